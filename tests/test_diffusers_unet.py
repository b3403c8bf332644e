"""UNets of diffusers as ours: the same outputs, and what is no network of ours."""

import json
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
from diffusers import UNet2DModel

from scalelong.model.diffusers_unet import weights_of_diffusers
from scalelong.model.fitted_weights import fit
from scalelong.model.skip_scale import Unscaled

SMALL: dict[str, Any] = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
BLOCKS: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
BY_BLOCKS: dict[str, Any] = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}


@pytest.mark.parametrize(
    "options",
    [
        {**BLOCKS},
        {**BLOCKS, "downsample_padding": 0, "attention_head_dim": None, "norm_eps": 1e-6},
        {**BLOCKS, "flip_sin_to_cos": False, "num_class_embeds": 5},
        {**BY_BLOCKS, "resnet_time_scale_shift": "scale_shift", "attention_head_dim": 4, "attn_norm_num_groups": 4},
    ],
    ids=["defaults", "ddpm", "sines first", "adm"],
)
def test_ours_gives_the_outputs_of_theirs(options):
    theirs = UNet2DModel(**SMALL, **options).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    description = json.loads(theirs.to_json_string())
    weights = weights_of_diffusers(description, theirs.state_dict())
    config = weights.config
    assert config is not None
    ours = config.network()(config).eval()
    state, lines = fit(weights, config, Unscaled(), ours.state_dict(), has_null_label=False)
    assert lines == [f"taken: {len(state)} tensors, {theirs.num_parameters():,} parameters"]
    ours.load_state_dict(state)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0])
    y = torch.tensor([0, 4]) if config.num_classes else None
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t, y), theirs(x, t, y).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel of diffusers is no network here"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type 'fourier'"),
        ({"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}, "a SkipDownBlock2D"),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "other levels in its decoder"),
    ],
)
def test_another_network_is_refused(options, words):
    theirs = UNet2DModel(**SMALL, **BLOCKS)
    description = {**json.loads(theirs.to_json_string()), **options}
    with pytest.raises(ValueError, match=words):
        weights_of_diffusers(description, theirs.state_dict())


def test_other_frequencies_of_the_time_are_said():
    theirs = UNet2DModel(**SMALL, **BLOCKS, freq_shift=1)
    weights = weights_of_diffusers(json.loads(theirs.to_json_string()), theirs.state_dict())
    assert weights.remarks == ("the time was embedded by other frequencies (freq_shift 1)",)
