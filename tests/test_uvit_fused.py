"""The fused U-ViT against the network written plainly, over the same parameters."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from parity import assert_networks_within_budget
from torch import Tensor, nn
from torch.func import functional_call

from scalelong.bench.published_uvit import as_published
from scalelong.bench.timing import peak_bytes
from scalelong.model.backbone_config import BlockMemory
from scalelong.model.recompute import kept_parts
from scalelong.model.skip_scale import SKIP_SCALE_NAMES, Unscaled, make_skip_scale
from scalelong.model.uvit import UViT, UViTConfig

CONFIG = UViTConfig(img_size=16, patch_size=2, width=64, depth=4, num_heads=4, num_classes=7)
each_mode = pytest.mark.parametrize("mode", SKIP_SCALE_NAMES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def make_model(mode: str, **more) -> UViT:
    model = UViT(CONFIG, skip_scale=make_skip_scale(mode, 0.7), **more)
    with torch.no_grad():  # larger than at the start, so that every parameter matters
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def make_batch(dtype: torch.dtype = torch.float32, B: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, noise = torch.randn(2, B, 3, 16, 16, dtype=dtype)
    return x, torch.linspace(1, 999, B), torch.arange(B) % 7, noise


def output_and_gradients(model: nn.Module, batch: tuple[Tensor, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """By autocast in bf16, as in training; truths in fp64."""
    x, t, y, noise = batch
    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    if dtype == torch.float64:
        leaves = {name: p.detach().double().requires_grad_() for name, p in leaves.items()}
        x, noise = x.double(), noise.double()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = functional_call(model, leaves, (x, t, y))
        loss = F.mse_loss(output.to(noise.dtype), noise)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}


@each_mode
@each_dtype
def test_outputs_and_gradients_of_every_parameter_are_within_budget(dtype, mode):
    ours = make_model(mode)
    networks = {"ours": ours, "plain": as_published(ours)}
    batches = [make_batch() for _ in range(4 if dtype == torch.bfloat16 else 1)]
    assert_networks_within_budget(
        lambda name, batch, dtype: output_and_gradients(networks[name], batch, dtype), batches, dtype, gates="se."
    )


@each_mode
def test_the_plain_network_has_the_same_state_dict(mode):
    ours = make_model(mode)
    plain = as_published(ours)
    assert list(plain.state_dict()) == list(ours.state_dict())
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(plain.parameters(), ours.parameters(), strict=True))


def test_the_plain_network_computes_attention_in_fp32_where_asked():
    """Outside autocast; inside, PyTorch's attention casts back to the dtype of autocast."""
    ours, (x, t, y, _) = make_model("ls").bfloat16(), make_batch(torch.bfloat16)
    outputs = [as_published(ours, casts_to_fp32=casts)(x, t, y) for casts in (False, True)]
    assert not torch.equal(*outputs)
    torch.testing.assert_close(*outputs, rtol=0.05, atol=0.05)


@each_mode
def test_twenty_steps_give_the_same_losses(mode):
    def losses(model: UViT) -> list[float]:
        generator = torch.Generator().manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        found = []
        for _ in range(20):
            x, noise = torch.randn(2, 4, 3, 16, 16, generator=generator)
            loss = F.mse_loss(model(x, torch.rand(4, generator=generator) * 999, torch.arange(4)), noise)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    ours = make_model(mode)
    plain = UViT(CONFIG, skip_scale=make_skip_scale(mode, 0.7))
    plain.load_state_dict(ours.state_dict())
    torch.testing.assert_close(losses(ours), losses(as_published(plain)), rtol=1e-4, atol=0)


@each_mode
def test_compiles_to_one_graph(mode):
    torch.compiler.reset()
    model, (x, t, y, _) = make_model(mode), make_batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, t, y), model(x, t, y))
    compiled(x, t, y).sum().backward()


@pytest.mark.parametrize("recompute", ["blocks", 0.2, 0.5, 0.75])
@each_dtype
def test_recomputing_changes_no_bit(dtype, recompute):
    model, batch = make_model("ls"), make_batch()
    expected = output_and_gradients(model, batch, dtype)
    model.recompute = recompute
    found = output_and_gradients(model, batch, dtype)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("recompute", ["blocks", 0.5, 0.9])
def test_recomputing_holds_with_a_linear_that_adds_its_bias_in_place(recompute, monkeypatch):
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = x.matmul(weight.t())
        if bias is not None:
            y += bias
        return y

    monkeypatch.setattr(F, "linear", linear)
    model, batch = make_model("ls"), make_batch()
    expected = output_and_gradients(model, batch, torch.float32)
    model.recompute = recompute
    found = output_and_gradients(model, batch, torch.float32)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_recomputing_lowers_the_peak():
    model, (x, t, y, _) = make_model("ls"), make_batch(B=32)

    def peak(recompute) -> int:
        model.recompute = recompute
        return peak_bytes(lambda: model(x, t, y).sum().backward(), (), "cpu")

    peak("none")  # makes the gradients, which then stay
    peaks = [peak(recompute) for recompute in ("none", 0.75, 0.25, "blocks")]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < 0.5 * peaks[0]


def test_needs_less_memory_than_the_plain_network():
    ours, (x, t, y, _) = make_model("ls"), make_batch(B=32)
    ours(x, t, y).sum().backward()  # makes the gradients, which then stay
    mine, plain, unscaled = (
        peak_bytes(lambda model=model: model(x, t, y).sum().backward(), (), "cpu")
        for model in (ours, as_published(ours), as_published(ours, skip_scale=Unscaled()))
    )
    assert mine < 0.85 * min(plain, unscaled)


@pytest.mark.parametrize(
    ("share", "kept"),
    [(0.05, set()), (0.2, {"attention"}), (0.3, {"attention", 1.0}), (0.5, {"attention", 1.0, 3.0}),
     (0.6, {"attention", 1.0, 3.0}), (0.9, {"attention", 1.0, 3.0, 4.0})],
)  # fmt: skip
def test_what_is_kept_costs_most_for_its_size(share, kept):
    assert CONFIG.block_memory == BlockMemory(total=12, products=(1.0, 3.0, 4.0))
    assert kept_parts(share, CONFIG.block_memory) == kept


def test_products_of_the_same_shape_share_their_room():
    assert kept_parts(0.6, replace(CONFIG, mlp_ratio=3.0).block_memory) == {"attention", 1.0}


@pytest.mark.parametrize("recompute", ["all", "", 0.0, 1.0, -0.5, float("nan")])
def test_other_ways_of_recomputing_are_refused(recompute):
    with pytest.raises(ValueError, match="recompute is 'none', 'blocks' or a share in"):
        UViT(CONFIG, recompute=recompute)
