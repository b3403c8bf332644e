"""The fused UNet against the network written plainly, over the same parameters."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from parity import assert_networks_within_budget
from samples import each_value_once
from torch import Tensor, nn
from torch.func import functional_call

from scalelong.bench.published_unet import as_published
from scalelong.bench.timing import peak_bytes
from scalelong.model.skip_scale import SKIP_SCALE_NAMES, Unscaled, make_skip_scale
from scalelong.model.unet import UNet, UNetConfig

# The second level's decoder has concatenations of 48 + 16 and 32 + 16 channels in 8 groups: some straddle.
DDPM = UNetConfig(img_size=16, model_channels=16, channel_mult=(1, 2, 3), num_res_blocks=1, num_groups=8)
ADM = replace(
    DDPM,
    attention_resolutions=(1, 4),
    num_head_channels=8,
    use_scale_shift_norm=True,
    resblock_updown=True,
    use_new_attention_order=False,
    num_classes=7,
)
CONFIGS = {"ddpm": replace(DDPM, same_padding=True, norm_eps=1e-6), "adm": ADM}
MODES = [(name, "before-norm") for name in SKIP_SCALE_NAMES] + [("cs", "after-norm"), ("ls", "after-norm")]
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=tuple(CONFIGS))
each_mode = pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(mode))
each_layout = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def make_model(config: UNetConfig, mode: Any = ("none", "before-norm"), **more) -> UNet:
    name, position = mode
    model = UNet(replace(config, skip_position=position), skip_scale=make_skip_scale(name, 0.7), **more)
    with torch.no_grad():  # so that no branch begins at zero
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def make_batch(config: UNetConfig, B: int = 3) -> tuple:
    x, noise = torch.randn(2, B, config.in_channels, config.img_size, config.img_size)
    return x, torch.linspace(1, 999, B), torch.arange(B) % 7 if config.num_classes else None, noise


def output_and_gradients(model: nn.Module, batch: tuple, dtype: torch.dtype) -> dict[str, Tensor]:
    """By autocast in bf16, as in training; truths in fp64."""
    x, t, y, noise = batch
    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    if dtype == torch.float64:
        leaves = {name: p.detach().double().requires_grad_() for name, p in leaves.items()}
        x, noise = x.double(), noise.double()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = functional_call(model, leaves, (x, t, y))
        loss = F.mse_loss(output.to(noise.dtype), noise)
    grads = torch.autograd.grad(loss, [x, *leaves.values()])
    return {"output": output.detach(), **dict(zip(["x", *leaves], grads, strict=True))}


def assert_parity(ours: UNet, plain: UNet, batches: list[tuple], dtype: torch.dtype) -> None:
    """A bias before a norm over one channel has a gradient of zero."""
    networks = {"ours": ours, "plain": plain}
    assert_networks_within_budget(
        lambda name, batch, dtype: output_and_gradients(networks[name], batch, dtype),
        batches,
        dtype,
        gates="skip_gates.",
        share_of_largest=1e-2,
    )


@each_value_once(
    "mode, config, layout_and_dtype",
    MODES,
    tuple(CONFIGS.values()),
    ((False, torch.float32), (False, torch.bfloat16), (True, torch.bfloat16), (True, torch.float32)),
)
def test_outputs_and_gradients_of_every_parameter_are_within_budget(mode, config, layout_and_dtype):
    channels_last, dtype = layout_and_dtype
    ours = make_model(config, mode, channels_last=channels_last)
    batches = [make_batch(config) for _ in range(4 if dtype == torch.bfloat16 else 1)]
    assert_parity(ours, as_published(ours, channels_last=channels_last), batches, dtype)


@pytest.mark.slow
def test_the_triton_kernels_are_within_budget():
    program = Path(__file__).parent / "interpreted_unet.py"
    environment = {**os.environ, "PYTHONPATH": str(program.parents[1] / "src")}
    subprocess.run([sys.executable, program], env=environment, check=True)


@each_mode
def test_the_plain_network_shares_the_parameters(mode):
    ours = make_model(ADM, mode)
    plain = as_published(ours)
    assert list(plain.state_dict()) == list(ours.state_dict())
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(plain.parameters(), ours.parameters(), strict=True))


@each_config
def test_both_layouts_give_the_same(config):
    model, (x, t, y, _) = make_model(config, ("ls", "before-norm")).double(), make_batch(config)
    outputs = []
    for channels_last in (False, True):
        model.channels_last = channels_last
        outputs.append(model(x.double(), t, y))
    torch.testing.assert_close(*outputs)


def test_activations_have_the_layout_that_was_asked_for():
    model, (x, t, y, _) = make_model(ADM), make_batch(ADM)
    layouts = []

    def record(_: nn.Module, arguments: tuple, output: Tensor) -> None:
        layouts.append({x.is_contiguous(memory_format=torch.channels_last) for x in (arguments[0], output)})

    for _, block in model.skip_blocks():
        block.register_forward_hook(record)
    for channels_last in (False, True):
        layouts.clear()
        model.channels_last = channels_last
        model(x, t, y)
        assert layouts == [{channels_last}] * model.config.num_skips


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "config"),
    [
        pytest.param(("cs", "before-norm"), ADM, id="cs-before-norm-adm", marks=pytest.mark.exhaustive),
        pytest.param(("ls", "after-norm"), ADM, id="ls-after-norm-adm"),
        pytest.param(("cs", "before-norm"), DDPM, id="cs-before-norm-ddpm"),
        pytest.param(("ls", "after-norm"), DDPM, id="ls-after-norm-ddpm", marks=pytest.mark.exhaustive),
    ],
)
def test_compiles_to_one_graph(mode, config):
    torch.compiler.reset()
    model, (x, t, y, _) = make_model(config, mode), make_batch(config)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, t, y), model(x, t, y))
    compiled(x, t, y).sum().backward()


@each_config
@each_dtype
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_changes_no_bit(dropout, dtype, config):
    config = replace(config, dropout=dropout)
    model, batch = make_model(config, ("ls", "before-norm")).train(), make_batch(config)
    results = []
    for recompute in ("none", "blocks"):
        model.recompute = recompute
        torch.manual_seed(1)
        results.append(output_and_gradients(model, batch, dtype))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_dropout_is_of_training_alone():
    model, (x, t, y, _) = make_model(replace(ADM, dropout=0.3)), make_batch(ADM)
    assert not torch.equal(model.train()(x, t, y), model(x, t, y))
    assert torch.equal(model.eval()(x, t, y), model(x, t, y))


@pytest.mark.slow
@each_layout
def test_a_step_takes_less_memory_than_the_plain_network(channels_last):
    config = replace(DDPM, img_size=32, model_channels=64, num_groups=32)
    ours, (x, t, y, noise) = (
        make_model(config, ("cs", "before-norm"), channels_last=channels_last),
        make_batch(config, 4),
    )
    plain = as_published(ours, skip_scale=Unscaled(), channels_last=channels_last)

    def step(model: nn.Module) -> None:
        F.mse_loss(model(x, t, y), noise).backward()
        model.zero_grad()

    def peak(recompute: Literal["none", "blocks"]) -> int:
        ours.recompute = recompute
        return peak_bytes(step, (ours,), "cpu")

    kept = peak_bytes(step, (plain,), "cpu")
    assert peak("none") < 0.75 * kept
    assert peak("blocks") < 0.6 * kept
