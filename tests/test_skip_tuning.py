"""Skip-Tuning: long skips of a trained network scaled while it samples."""

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scalelong.model.architectures import make_backbone
from scalelong.model.dit import DiTConfig
from scalelong.model.skip_scale import make_skip_scale
from scalelong.model.skip_tuning import SkipTuning, tuned_skips
from scalelong.model.unet import UNetConfig
from scalelong.model.uvit import UViTConfig

UVIT = UViTConfig(img_size=8, patch_size=2, in_channels=3, width=32, depth=6, num_heads=2)
NETWORKS = {
    "uvit": UVIT,
    "unet": UNetConfig(img_size=8, in_channels=3, model_channels=32, channel_mult=(1, 2), num_res_blocks=1),
    "dit": DiTConfig(img_size=8, patch_size=2, in_channels=3, width=32, depth=4, num_heads=2, skip="plain"),
}


def made(name: str = "uvit", policy: str = "none", **values):
    torch.manual_seed(0)
    network = make_backbone(NETWORKS[name], skip_scale=make_skip_scale(policy, **values)).eval()
    for parameter in network.parameters():  # layers that begin as zero would hide the skips
        torch.nn.init.normal_(parameter, std=0.1)
    return network


def output(network, tuning=None):
    torch.manual_seed(1)
    x_BCHW = torch.randn(2, 3, 8, 8)
    with torch.no_grad(), tuned_skips(network, tuning):
        return network(x_BCHW, torch.tensor([3.0, 700.0]))


def test_factors_lie_on_a_line_from_the_innermost_to_the_outermost():
    tuning = SkipTuning(0.6, 1.0)
    assert [tuning.factor(i, 5) for i in (5, 3, 1)] == pytest.approx([0.6, 0.8, 1.0])
    assert SkipTuning(0.6, 1.0).factor(1, 1) == 0.6
    assert SkipTuning(1.0).factor(4, 9) == 1.0


@pytest.mark.parametrize(
    ("name", "policy"), [("uvit", "none"), ("uvit", "ls"), ("unet", "cs"), ("unet", "geometric"), ("dit", "none")]
)
def test_ones_change_no_bit_and_what_is_left_again_is_as_before(name, policy):
    network = made(name, policy)
    plain = output(network)
    assert torch.equal(output(network, (1.0, 1.0)), plain)
    assert not torch.allclose(output(network, (0.5, 1.0)), plain)
    with pytest.raises(KeyError), tuned_skips(network, SkipTuning(0.5)):
        raise KeyError
    assert torch.equal(output(network), plain)


def test_it_multiplies_what_the_policy_says():
    halved = output(made("uvit", "inv-sqrt2"))
    torch.testing.assert_close(output(made("uvit", "none"), (2**-0.5, 2**-0.5)), halved)
    # kappa^(i-1) of three skips, 1 at the outermost, times 0.8 at the innermost and 1.2 at the outermost.
    seen = []
    network = made("uvit", "cs", kappa=0.5)
    stop = network.watch_skips(lambda skip, _: seen.append((skip.i, skip.scale)))
    output(network, (0.8, 1.2))
    stop()
    assert [i for i, _ in seen] == [3, 2, 1]
    assert [scale for _, scale in seen] == pytest.approx([0.8 * 0.25, 0.5, 1.2])
    gates = []
    network = made("uvit", "ls")
    for tuning in (None, (0.5, 0.5)):
        stop = network.watch_skips(lambda skip, _: gates.append(skip.scale))
        output(network, tuning)
        stop()
    torch.testing.assert_close(gates[3], 0.5 * gates[0])  # of the innermost, whose features do not depend on others


def test_networks_of_diffusers_that_were_patched():
    diffusers = pytest.importorskip("diffusers")
    from scalelong import patch_diffusers

    torch.manual_seed(0)
    down, up = ("DownBlock2D", "DownBlock2D"), ("UpBlock2D", "UpBlock2D")
    unet = diffusers.UNet2DModel(
        8, 3, 3, block_out_channels=(32, 32), down_block_types=down, up_block_types=up, layers_per_block=1
    ).eval()
    with (
        pytest.raises(ValueError, match="UNet2DModel has no long skips to tune"),
        tuned_skips(unet, (1, 1)),
    ):
        pass
    patch_diffusers(unet, skip_scale="none")
    x_BCHW = torch.randn(2, 3, 8, 8)

    @torch.no_grad()
    def sample(network, tuning=None):
        with tuned_skips(network, tuning):
            return network(x_BCHW, 5).sample

    plain, tuned = sample(unet), sample(unet, (2**-0.5, 2**-0.5))
    assert torch.equal(sample(unet, (1.0, 1.0)), plain)
    assert torch.equal(sample(copy.deepcopy(unet), (2**-0.5, 2**-0.5)), tuned)
    assert torch.equal(sample(unet), plain)
    patch_diffusers(unet, skip_scale="inv-sqrt2")
    torch.testing.assert_close(tuned, sample(unet))


def test_the_example_of_the_documents(monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    import scalelong

    page = (Path(__file__).resolve().parents[1] / "docs" / "diffusers.md").read_text()
    (example,) = re.findall(r"^## Skip-Tuning\n.*?^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    torch.manual_seed(0)
    down, up = ("DownBlock2D", "DownBlock2D"), ("UpBlock2D", "UpBlock2D")
    unet = diffusers.UNet2DModel(
        8, 3, 3, block_out_channels=(32, 32), down_block_types=down, up_block_types=up, layers_per_block=1
    )
    pipeline = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def drawn():
        torch.manual_seed(1)
        return np.stack(pipeline(num_inference_steps=5).images)

    program: dict[str, Any] = {"scalelong": scalelong, "pipeline": pipeline}
    torch.manual_seed(1)
    exec(compile(example, "docs/diffusers.md", "exec"), program)
    found = np.stack(program["images"])
    assert not np.array_equal(found, drawn())
    with tuned_skips(unet, (0.9, 1.0)):
        assert np.array_equal(found, drawn())


@pytest.mark.parametrize("factors", [(0.0, 1.0), (1.0, -1.0), (float("nan"), 1.0), ("a", 1.0)])
def test_factors_that_are_none_are_refused(factors):
    with pytest.raises(ValueError, match="skip_tuning must be two positive factors"):
        UVIT.check_skip_tuning(factors)


def test_a_network_without_long_skips_is_refused():
    plain = DiTConfig(img_size=8, patch_size=2, in_channels=3, width=32, depth=4, num_heads=2)
    with pytest.raises(ValueError, match="has no long skips"):
        plain.check_skip_tuning((0.5, 1.0))
    with pytest.raises(ValueError, match="has no long skips to tune"), tuned_skips(make_backbone(plain), (0.5, 1.0)):
        pass
