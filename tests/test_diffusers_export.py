"""UNets as UNet2DModels of diffusers: the same outputs, back again the same network, and what diffusers cannot say."""

import json
from typing import Any, cast

import pytest
import torch

pytest.importorskip("diffusers")
from diffusers import UNet2DModel

from scalelong import PatchedUNet, UNet, UNetConfig, UViT, UViTConfig
from scalelong.model.diffusers_export import save_as_unet2d
from scalelong.model.diffusers_unet import weights_of_diffusers
from scalelong.model.skip_scale import SkipScale, make_skip_scale

SMALL: dict[str, Any] = {
    "img_size": 8,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "num_groups": 4,
    "attention_resolutions": (2,),
}


def unet(policy: SkipScale | None = None, **changes: Any) -> UNet:
    torch.manual_seed(0)
    model = UNet(UNetConfig(**{**SMALL, **changes}), skip_scale=policy)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def check_outputs_are_equal(ours: UNet, theirs: Any) -> None:
    x, t = torch.randn(2, ours.config.in_channels, 8, 8), torch.tensor([3.0, 700.0])
    y = torch.tensor([0, 4]) if ours.config.num_classes else None
    with torch.no_grad():
        torch.testing.assert_close(theirs(x, t, y).sample, ours(x, t, y), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"same_padding": True, "norm_eps": 1e-6, "in_channels": 1},
        {"num_classes": 5, "num_heads": 4, "use_new_attention_order": False, "out_channels": 6},
        {"resblock_updown": True, "use_scale_shift_norm": True, "num_head_channels": 4, "attention_resolutions": (1,)},
    ],
    ids=["ddpm", "old order", "adm"],
)
def test_theirs_gives_the_outputs_of_ours_and_reads_back_as_it(tmp_path, changes):
    ours = unet(**changes)
    save_as_unet2d(ours, tmp_path)
    theirs, info = cast(Any, UNet2DModel.from_pretrained(tmp_path, output_loading_info=True))
    assert not any(info.values()), info
    check_outputs_are_equal(ours, theirs.eval())
    read = weights_of_diffusers(json.loads((tmp_path / "config.json").read_text()), theirs.state_dict())
    assert read.config is not None
    again = read.config.network()(read.config).eval()
    again.load_state_dict(read.state)
    x, t = torch.randn(1, ours.config.in_channels, 8, 8), torch.tensor([5.0])
    y = torch.tensor([1]) if ours.config.num_classes else None
    with torch.no_grad():
        torch.testing.assert_close(again(x, t, y), ours(x, t, y), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "position"), [("cs", "after-norm"), ("ls", "before-norm")])
def test_scaled_skips_are_those_of_a_patched_network(tmp_path, kind, position):
    ours = unet(make_skip_scale(kind), skip_position=position)
    save_as_unet2d(ours, tmp_path)
    theirs = PatchedUNet.from_pretrained(tmp_path)
    check_outputs_are_equal(ours, theirs.eval())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: UViT(UViTConfig(img_size=8, patch_size=2, width=16, depth=2, num_heads=2)),
            "a UViT is no UNet2DModel",
        ),
        (lambda: unet(num_heads=2, attention_resolutions=(1, 2)), "heads of one width .* num_heads 2 .*4, 8"),
    ],
    ids=["U-ViT", "heads"],
)
def test_what_diffusers_cannot_say_is_refused_by_name(tmp_path, make, words):
    with pytest.raises(ValueError, match=words):
        save_as_unet2d(make(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
