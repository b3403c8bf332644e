"""SCEdit's adapters on skips: they begin as nothing, are all that is trained, and go where the network goes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scalelong.model.architectures import load_backbone
from scalelong.model.dit import DiT, DiTConfig
from scalelong.model.skip_adapters import SkipAdapter, freeze_all_but_adapters
from scalelong.model.skip_scale import AdaptedSkips, ConstantScale, SkipShape, Unscaled, described
from scalelong.model.unet import UNet, UNetConfig
from scalelong.model.uvit import UViT, UViTConfig

SIZES: dict[str, Any] = {"img_size": 8, "in_channels": 1}
TRANSFORMER: dict[str, Any] = {**SIZES, "patch_size": 2, "width": 32, "num_heads": 2, "depth": 4}
UNET: dict[str, Any] = {**SIZES, "model_channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1, "num_groups": 8}
NETWORKS: dict[str, Any] = {
    "uvit": (UViT, UViTConfig(**TRANSFORMER)),
    "dit": (DiT, DiTConfig(**TRANSFORMER, skip="layer-norm")),
    "unet": (UNet, UNetConfig(**UNET)),
    "residual": (UNet, UNetConfig(**UNET, skip="residual")),
}
BATCH = torch.linspace(-1, 1, 3 * 64).reshape(3, 1, 8, 8), torch.tensor([1.0, 500.0, 900.0])
STEP = 32
each_network = pytest.mark.parametrize("name", NETWORKS)


def pair(name: str, kappa: float = 0.7) -> tuple[Any, Any]:
    """A network that is trained, and the same with adapters that have just been made."""
    kind, config = NETWORKS[name]
    torch.manual_seed(0)
    plain = kind(config, skip_scale=ConstantScale(kappa))
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    adapted = kind(config, skip_scale=AdaptedSkips(kappa, rank=4))
    missing, unexpected = adapted.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith(("se.", "skip_gates.")) for name in missing)
    return plain, adapted


@each_network
def test_a_network_begins_as_without_and_gradients_lie_in_the_adapters_alone(name):
    plain, adapted = pair(name)
    assert torch.equal(adapted(*BATCH), plain(*BATCH))
    freeze_all_but_adapters(adapted)
    adapted(*BATCH).square().mean().backward()
    with_gradient = {n for n, p in adapted.named_parameters() if p.grad is not None and p.grad.any()}
    # What stands before a zero has a gradient from the second step on.
    assert with_gradient == {n for n, _ in adapted.named_parameters() if ".up." in n and n.startswith(("se", "skip_g"))}
    assert len([m for m in adapted.modules() if isinstance(m, SkipAdapter)]) == len(adapted.skips)


@pytest.mark.parametrize(("shape", "kind"), [((2, 5, 12), "tokens"), ((2, 12, 3, 4), "channels")])
def test_an_adapter_is_the_formula_of_each_token_or_position(shape, kind):
    adapter, s = SkipAdapter(SkipShape(kind, 12, 12), rank=3), torch.randn(shape)
    assert torch.equal(adapter(s), s)
    nn.init.normal_(adapter.up.weight)
    tokens = s if kind == "tokens" else s.permute(0, 2, 3, 1)
    expected = tokens + adapter.up(nn.functional.gelu(adapter.down(tokens)))
    torch.testing.assert_close(adapter(s), expected if kind == "tokens" else expected.permute(0, 3, 1, 2))
    with torch.autocast("cpu", torch.bfloat16):
        assert adapter(s).dtype == torch.float32


def test_exports_carry_the_adapters(tmp_path):
    _, adapted = pair("uvit")
    for module in adapted.modules():
        if isinstance(module, SkipAdapter):
            nn.init.normal_(module.up.weight)
    adapted.save_pretrained(tmp_path)
    again = load_backbone(tmp_path)
    assert again.skip_scale == AdaptedSkips(0.7, rank=4)
    assert described(again.skip_scale) == "adapter (kappa 0.7, rank 4)"
    assert torch.equal(again(*BATCH), adapted.eval()(*BATCH))


def test_bad_input_is_refused():
    for values, message in (({"rank": 0}, "rank of an adapter must be at least 1"), ({"kappa": 0}, "kappa must lie")):
        with pytest.raises(ValueError, match=message):
            AdaptedSkips(**values)
    with pytest.raises(ValueError, match="has no adapters on its skips"):
        freeze_all_but_adapters(UViT(UViTConfig(**TRANSFORMER)))
    with pytest.raises(ValueError, match="'adapter', but this DiT has no long skips"):
        DiT(DiTConfig(**TRANSFORMER), skip_scale=AdaptedSkips())


@pytest.mark.parametrize("position", ["before-norm", "after-norm"])
def test_a_network_of_diffusers_has_them_by_the_patch(position, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    import scalelong

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
    blocks: dict[str, Any] = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    unet = diffusers.UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **sizes, **blocks).eval()
    scalelong.patch_diffusers(unet, skip_scale="cs", kappa=0.7, position=position)
    before = unet(*BATCH).sample
    scalelong.patch_diffusers(unet, skip_scale=AdaptedSkips(0.7, rank=4), position=position)
    assert torch.equal(unet(*BATCH).sample, before)
    freeze_all_but_adapters(unet)
    optimizer = torch.optim.SGD([p for p in unet.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        (unet(*BATCH).sample - 1).square().mean().backward()
        optimizer.step()
    assert {n.split(".")[0] for n, p in unet.named_parameters() if p.grad is not None} == {"skip_gates"}
    after = unet(*BATCH).sample
    assert not torch.equal(after, before)
    unet.up_blocks[0].resnets[0].register_forward_hook(lambda *_: None)  # which is called as it is from then on
    torch.testing.assert_close(unet(*BATCH).sample, after, rtol=1e-4, atol=1e-5)
    unet.save_pretrained(tmp_path)
    again = scalelong.PatchedUNet.from_pretrained(tmp_path)
    torch.testing.assert_close(again(*BATCH).sample, after, rtol=1e-4, atol=1e-5)


def run_config(run: Path, steps: int, **changes: Any) -> Any:
    from running import small_config

    config = small_config(run, total_images=steps * STEP, num_validation_images=0, **changes)
    return replace(config, sample=replace(config.sample, num_images=1, steps=1))


def tensors_of(run: Path, steps: int) -> dict[str, dict[str, Tensor]]:
    from safetensors.torch import load_file

    folder = run / "checkpoints" / str(steps * STEP)
    return {name: load_file(folder / f"{name}.safetensors") for name in ("model", "ema", "optimizer")}


def pretrained(folder: Path, **sizes: Any) -> UViT:
    torch.manual_seed(3)
    network = UViT(replace(run_config(folder, 1).model, **sizes), skip_scale=Unscaled())
    network.save_pretrained(folder)
    return network


@pytest.mark.slow
@pytest.mark.parametrize("stage", [*(pytest.param(n, marks=pytest.mark.exhaustive) for n in (0, 1, 3)), 2])
def test_a_run_moves_the_adapters_alone_and_goes_on_bit_for_bit(stage, tmp_path):
    pytest.importorskip("deepspeed")
    from scalelong.train.loop import train

    begun = pretrained(tmp_path / "export").state_dict()
    for run, stops in (("straight", [2]), ("resumed", [1, 2])):
        for steps in stops:
            options = {"skip_scale": AdaptedSkips(), "zero_stage": stage, "init_from": str(tmp_path / "export")}
            assert train(run_config(tmp_path / run, steps, **options)) == 0
    straight, resumed = (tensors_of(tmp_path / run, 2) for run in ("straight", "resumed"))
    for name, tensors in straight.items():
        assert resumed[name].keys() == tensors.keys()
        assert all(torch.equal(resumed[name][key], tensor) for key, tensor in tensors.items())
    for name in ("model", "ema"):
        assert all(torch.equal(straight[name][key], tensor) for key, tensor in begun.items())
        assert straight[name]["se.0.up.weight"].any()
    assert {name.split(".")[1] for name in straight["optimizer"]} == {"se"}


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_go_on_bit_for_bit_for_fifty_steps(stage, tmp_path):
    pytest.importorskip("deepspeed")
    from running import SMALL, train_on_ranks

    begun = pretrained(tmp_path / "export").state_dict()
    for run, stops in (("straight", [50]), ("resumed", [25, 50])):
        for steps in stops:
            flags = ["--skip-scale", "adapter", "--init-from", tmp_path / "export", "--zero-stage", stage]
            flags += ["--total-images", steps * STEP, "--run", tmp_path / run]
            train_on_ranks(2, "digits-uvit", *SMALL, *flags)
    straight, resumed = (tensors_of(tmp_path / run, 50) for run in ("straight", "resumed"))
    for name, tensors in straight.items():
        assert all(torch.equal(resumed[name][key], tensor) for key, tensor in tensors.items())
    for name in ("model", "ema"):
        assert all(torch.equal(straight[name][key], tensor) for key, tensor in begun.items())


def test_a_run_from_nothing_is_refused(tmp_path):
    pytest.importorskip("deepspeed")
    from scalelong.train.errors import UserError
    from scalelong.train.loop import train

    with pytest.raises(UserError, match="--skip-scale adapter fine-tunes a network that is trained"):
        train(run_config(tmp_path / "run", 1, skip_scale=AdaptedSkips()))
    assert not (tmp_path / "run").exists()
