"""Other parametrisations of linear layers: what they bound, what they begin as, and how they are trained and saved."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scalelong.model.architectures import load_backbone
from scalelong.model.dit import DiT, DiTConfig
from scalelong.model.linear_layers import GeluLinear, SkipLinear, project_gelu, project_skip
from scalelong.model.linear_wrappers import SINGULAR_VECTOR, DecoupledLinear, SigmaLinear, sigma_layers, wrap_linear
from scalelong.model.plain_layers import use_plain_layers
from scalelong.model.skip_scale import ConstantScale
from scalelong.model.uvit import UViT, UViTConfig

CONFIG = UViTConfig(img_size=8, in_channels=1, patch_size=2, width=32, depth=2, num_heads=2)
BATCH = torch.linspace(-1, 1, 2 * 64).reshape(2, 1, 8, 8), torch.tensor([1.0, 500.0])
STEP = 32


def wrapped(kind: Any, layer: type[nn.Linear] = nn.Linear, inputs: int = 96, outputs: int = 64) -> Any:
    torch.manual_seed(1)
    return wrap_linear(layer(inputs, outputs), kind)


def spectral_norm(weight: Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.detach().double(), 2))


@pytest.mark.parametrize("shape", [(64, 96), (256, 64), (1, 8)])
def test_the_spectral_norm_is_gamma_after_fifty_power_steps(shape):
    layer = wrapped("sigma-reparam", inputs=shape[1], outputs=shape[0])
    with torch.no_grad():
        layer.weight.copy_(torch.randn(shape))  # another weight, whose vector the layer does not know
        layer.gamma.fill_(3.0)
    for _ in range(50):
        layer.power_step(layer.weight)
    assert spectral_norm(layer.product_weight()) == pytest.approx(3.0, rel=0.01)


@pytest.mark.parametrize("kind", [nn.Linear, SkipLinear, GeluLinear])
def test_sigma_reparam_begins_as_the_plain_layer_whatever_it_fuses(kind):
    plain, layer = wrapped("plain", kind), wrapped("sigma-reparam", kind)
    assert torch.equal(layer.product_weight(), plain.weight)
    x, s = torch.randn(2, 3, 64), torch.randn(2, 3, 32)
    if kind is SkipLinear:
        assert torch.equal(project_skip(layer, x, s, 0.5), project_skip(plain, x, s, 0.5))
    elif kind is GeluLinear:
        x = torch.randn(2, 3, 96)
        assert torch.equal(project_gelu(layer, x), project_gelu(plain, x))
    plain_again = use_plain_layers(nn.Sequential(layer))[0]
    assert type(plain_again) is SigmaLinear


def test_the_gradient_is_that_of_the_exact_singular_value():
    layer = wrapped("sigma-reparam").double()
    for _ in range(2000):
        layer.power_step(layer.weight)
    x = torch.randn(5, 96, dtype=torch.float64)
    layer(x).square().sum().backward()
    weight = layer.weight.detach().requires_grad_()
    hat = layer.gamma.detach() * weight / torch.linalg.matrix_norm(weight, 2)
    (x @ hat.T + layer.bias.detach()).square().sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_of_a_decoupled_layer_have_the_size_of_its_gain(dtype):
    layer = wrapped("decoupled")
    with torch.no_grad():
        layer.bias.zero_()
        layer.alpha.copy_(torch.linspace(0.5, 2, 64))
    x = torch.randn(4096, 96)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        y, larger = layer(x), layer(100 * x)
    rms = y.detach().double().square().mean().sqrt()
    assert rms == pytest.approx(layer.alpha.detach().square().mean().sqrt().item(), rel=0.05)
    torch.testing.assert_close(larger, y, rtol=0, atol=1e-4 if dtype == torch.float32 else 5e-2)
    assert project_skip(wrap_linear(SkipLinear(96, 64), "decoupled"), x[None, :, :64], x[None, :, 64:], 0.5).shape == (
        *(1, 4096, 64),
    )


@pytest.mark.parametrize("network", ["uvit", "dit"])
@pytest.mark.parametrize(("kind", "layer_class"), [("sigma-reparam", SigmaLinear), ("decoupled", DecoupledLinear)])
def test_networks_are_made_trained_and_saved_with_them(kind, layer_class, network, tmp_path):
    config: Any = replace(CONFIG, linear=kind)
    if network == "dit":
        config = DiTConfig(
            img_size=8, in_channels=1, patch_size=2, width=32, depth=2, num_heads=2, skip="layer-norm", linear=kind
        )
    torch.manual_seed(0)
    model: Any = {"uvit": UViT, "dit": DiT}[network](config, skip_scale=ConstantScale(0.5))
    torch.manual_seed(0)
    plain = type(model)(replace(config, linear="plain"), skip_scale=ConstantScale(0.5))
    layers = [name for name, layer in model.named_modules() if isinstance(layer, layer_class)]
    blocks = 3 if network == "uvit" else 2
    assert len(layers) == 4 * blocks + 1
    assert not [name for name in layers if "block" not in name]
    if kind == "sigma-reparam":
        assert torch.equal(model(*BATCH), plain(*BATCH))
    decays = {group.weight_decay_factor: group.names for group in model.parameter_groups()}
    assert len(decays[0.0]) == len(layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    (model(*BATCH) - 1).square().mean().backward()
    optimizer.step()
    for _, layer in sigma_layers(model):
        layer.power_step(layer.weight)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_backbone(tmp_path)(*BATCH), model.eval()(*BATCH))
    # Averages are of parameters alone: the vectors are found for the weights that are there.
    averages = {name: p.detach() for name, p in model.named_parameters()}
    again: Any = type(model)(config, skip_scale=ConstantScale(0.5))
    again.load_state_dict(averages | {n: b for n, b in model.named_buffers() if not n.endswith(SINGULAR_VECTOR)})
    torch.testing.assert_close(again(*BATCH), model(*BATCH), rtol=2e-2, atol=2e-2)


def test_wrapping_twice_and_other_bad_input_is_refused():
    layer = wrapped("sigma-reparam")
    with pytest.raises(ValueError, match="is wrapped already: a linear layer has one parametrisation"):
        wrap_linear(layer, "decoupled")
    with pytest.raises(ValueError, match="plain, sigma-reparam or decoupled, not 'spectral'"):
        wrap_linear(nn.Linear(2, 2), "spectral")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got a Conv2d"):
        wrap_linear(nn.Conv2d(2, 2, 1), "decoupled")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="linear must be one of plain, sigma-reparam, decoupled, got 'sdd'"):
        replace(CONFIG, linear="sdd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="exclude each other: its layers have a parametrisation already"):
        replace(CONFIG, linear="decoupled", magnitude_preserving=True)


@pytest.mark.parametrize("kind", ["decoupled", pytest.param("sigma-reparam", marks=pytest.mark.exhaustive)])
def test_what_a_step_changes_does_not_go_with_the_width_under_mup(kind):
    pytest.importorskip("deepspeed")
    from scalelong.bench.mup.coordinates import Check, curves_of, networks, worst_growth

    config = replace(CONFIG, in_channels=3, num_classes=4, width=64, depth=2, num_heads=4, linear=kind)
    config = replace(config, parametrization="mup", base_width=64)
    check = Check(widths=(64, 256), seeds=2, steps=2)
    assert worst_growth(curves_of(networks(config, ConstantScale(0.5)), check)) < 0.4


def trained(run: Path, steps: int, kind: Any, **changes: Any) -> dict[str, dict[str, Tensor]]:
    pytest.importorskip("deepspeed")
    from running import small_config
    from safetensors.torch import load_file

    from scalelong.train.loop import train

    config = small_config(run, total_images=steps * STEP, num_validation_images=0, **changes)
    sample = replace(config.sample, num_images=1, steps=1)
    assert train(replace(config, model=replace(config.model, linear=kind), sample=sample)) == 0
    folder = run / "checkpoints" / str(steps * STEP)
    return {name: load_file(folder / f"{name}.safetensors") for name in ("model", "ema", "optimizer")}


@pytest.mark.exhaustive  # test_skip_profile.py has one of them in make test
@pytest.mark.slow
@pytest.mark.parametrize(("stage", "kind"), [(3, "sigma-reparam"), (2, "sigma-reparam"), (3, "decoupled")])
def test_a_run_goes_on_bit_for_bit(stage, kind, tmp_path):
    straight = trained(tmp_path / "straight", 2, kind, zero_stage=stage)
    trained(tmp_path / "resumed", 1, kind, zero_stage=stage)
    resumed = trained(tmp_path / "resumed", 2, kind, zero_stage=stage)
    for name, tensors in straight.items():
        assert resumed[name].keys() == tensors.keys()
        assert all(torch.equal(resumed[name][key], tensor) for key, tensor in tensors.items())
    vectors = [key for key in straight["model"] if key.endswith(SINGULAR_VECTOR)]
    assert bool(vectors) == (kind == "sigma-reparam")
    for key in vectors:
        # One power step behind weights that move by as much as they are.
        weight, u = straight["model"][key.replace(SINGULAR_VECTOR, "weight")], straight["model"][key]
        assert torch.linalg.vector_norm(weight.T @ u) == pytest.approx(spectral_norm(weight), rel=0.05)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sigma-reparam", "decoupled"])
def test_two_ranks_go_on_bit_for_bit_for_fifty_steps(kind, tmp_path):
    from running import SMALL, train_on_ranks
    from safetensors.torch import load_file

    for run, stops in (("straight", [50]), ("resumed", [25, 50])):
        for steps in stops:
            flags = ["--zero-stage", 2, "--total-images", steps * STEP, "--model.linear", kind]
            train_on_ranks(2, "digits-uvit", *SMALL, *flags, "--run", tmp_path / run)
    for name in ("model", "ema", "optimizer"):
        found, expected = (
            load_file(tmp_path / run / "checkpoints" / str(50 * STEP) / f"{name}.safetensors")
            for run in ("resumed", "straight")
        )
        assert all(torch.equal(found[key], expected[key]) for key in expected)
