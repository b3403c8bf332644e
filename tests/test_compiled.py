"""torch.compile with dynamic shapes and over blocks one by one: how many graphs there are, and what they hold."""

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_networks import ADM, DDPM, DIT, KAPPA, _drawn, diffusers_unet, dit, unet, uvit
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from scalelong.kernels.add_layer_norm import add_layer_norm
from scalelong.kernels.attention import attention
from scalelong.kernels.backend import use_backend
from scalelong.kernels.gelu_linear import gelu_linear
from scalelong.kernels.group_norm import group_norm, skip_group_norm
from scalelong.kernels.skip_conv1x1 import skip_conv1x1
from scalelong.kernels.skip_linear import skip_linear
from scalelong.kernels.skip_norm_linear import skip_norm_linear
from scalelong.kernels.unit_rows import unit_rows
from scalelong.model.dit import DiT
from scalelong.model.norm_layers import AddLayerNorm
from scalelong.model.skip_layers import GroupNorm
from scalelong.model.skip_scale import make_skip_scale
from scalelong.model.unet import UNet, UNetConfig
from scalelong.model.uvit import UViT, UViTConfig


@pytest.fixture(autouse=True)
def fresh():
    """No graph of another test. With fullgraph=True, dynamo raises where it would give up recompiling."""
    torch.compiler.reset()


WEIGHT = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
IMAGES = [(2, 4, 6, 7), (3, 4, 8, 11), (4, 4, 13, 5)]
TOKENS = [(2, 6, 4), (3, 11, 4), (5, 13, 4)]


def skip_of(x: Tensor, channels: int, dim: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = channels
    return torch.randn(shape)


def in_channels_last(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, *more: op(x.contiguous(memory_format=torch.channels_last), *more)


# Of (x, factor, eps), with the plain operation that says how many graphs a change of eps costs.
OPERATORS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "group_norm": (lambda x, s, factor, eps: group_norm(x, 2, None, None, eps=eps), IMAGES),
    "skip_group_norm": (lambda x, s, factor, eps: skip_group_norm(x, s, factor, 3, None, None, eps=eps), IMAGES),
    "skip_conv1x1": (lambda x, s, factor, eps: skip_conv1x1(x, s, factor, WEIGHT, None), IMAGES),
    "gelu_linear": (lambda x, s, factor, eps: gelu_linear(x, WEIGHT[:, :4], None, act="gelu-tanh"), TOKENS),
    "attention": (lambda x, s, factor, eps: attention((x, s[..., :4], s[..., 1:]), 2, scale=0.3), TOKENS),
    "add_layer_norm": (lambda x, s, factor, eps: add_layer_norm(x, x, None, None, eps=eps)[1], TOKENS),
    "skip_norm_linear": (
        lambda x, s, factor, eps: skip_norm_linear(x, s, factor, None, None, WEIGHT, None, eps=eps),
        TOKENS,
    ),
    "skip_linear": (lambda x, s, factor, eps: skip_linear(x, s, factor, WEIGHT, None), TOKENS),
    "unit_rows": (lambda x, s, factor, eps: unit_rows(x, factor), TOKENS),
}
each_operator = pytest.mark.parametrize(
    ("op", "shapes", "dim"),
    [
        *(pytest.param(op, shapes, 1 if shapes is IMAGES else -1, id=name) for name, (op, shapes) in OPERATORS.items()),
        pytest.param(in_channels_last(OPERATORS["skip_conv1x1"][0]), IMAGES, 1, id="skip_conv1x1-channels_last"),
        pytest.param(in_channels_last(OPERATORS["skip_group_norm"][0]), IMAGES, 1, id="skip_group_norm-channels_last"),
    ],
)


def graphs(op: Callable[..., Any], calls: list[tuple], dynamic: bool | None) -> int:
    count = CompileCounter()
    compiled = torch.compile(op, fullgraph=True, dynamic=dynamic, backend=count)
    for arguments in calls:
        torch.testing.assert_close(compiled(*arguments), op(*arguments))
    return count.frame_count


@each_operator
def test_one_graph_serves_all_sizes(op, shapes, dim):
    inputs = [torch.randn(shape) for shape in shapes]
    calls = [(x, skip_of(x, 5, dim), 0.5, 1e-5) for x in inputs]
    assert graphs(op, calls, dynamic=True) == 1


@each_operator
@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
def test_one_graph_serves_all_factors_and_one_more_the_first(op, shapes, dim, dynamic):
    x = torch.randn(shapes[0])
    calls = [(x, skip_of(x, 5, dim), factor, 1e-5) for factor in torch.linspace(0.1, 0.9, 12).tolist()]
    assert graphs(op, calls, dynamic) <= (1 if dynamic else 2)


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
def test_an_eps_costs_no_more_graphs_than_pytorchs_norms(dynamic):
    images, tokens = torch.randn(IMAGES[0]), torch.randn(TOKENS[0])
    norms = {
        lambda x, eps: group_norm(x, 2, None, None, eps=eps, act=None): lambda x, eps: F.group_norm(x, 2, eps=eps),
        lambda x, eps: add_layer_norm(x, None, None, None, eps=eps)[1]: lambda x, eps: F.layer_norm(x, (4,), eps=eps),
    }
    for (ours, plain), x in zip(norms.items(), (images, tokens), strict=True):
        counts = []
        for op in (ours, plain):
            torch.compiler.reset()
            counts.append(graphs(op, [(x, eps) for eps in (1e-5, 1e-6, 1e-3)], dynamic))
        assert counts[0] <= counts[1]


@pytest.mark.parametrize("kind", [partial(GroupNorm, 2, 4), partial(AddLayerNorm, 7)])
def test_blocks_of_two_eps_that_are_compiled_one_by_one(kind):
    x, count = torch.randn(2, 4, 6, 7), CompileCounter()
    for eps in (1e-5, 1e-6, 1e-5, 1e-6):
        layer = kind(eps)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend=count)(x), layer(x))
    assert count.frame_count == 2


DEEP_UVIT = UViTConfig(img_size=8, patch_size=2, width=32, depth=24, num_heads=4)
DEEP_UNET = UNetConfig(
    img_size=8, model_channels=16, channel_mult=(1, 1), num_res_blocks=9, num_groups=8, attention_resolutions=()
)


@pytest.mark.parametrize(
    ("position", "whole"),
    [
        ("before-norm", True),
        ("after-norm", False),
        *(pytest.param(*x, marks=pytest.mark.exhaustive) for x in (("before-norm", False), ("after-norm", True))),
    ],
)
def test_decoder_blocks_of_a_unet_that_are_compiled_one_by_one(position, whole):
    """Twenty factors, and no more graphs than blocks of other shapes ask for."""
    model = UNet(replace(DEEP_UNET, skip_position=position), skip_scale=make_skip_scale("cs", 0.9))
    x, t, count = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 500.0]), CompileCounter()
    expected = model(x, t)
    for stage in model.output_blocks:
        (stage if whole else stage[0]).compile(fullgraph=True, backend=count)  # type: ignore[index]
    torch.testing.assert_close(model(x, t), expected, rtol=1e-4, atol=1e-5)
    assert count.frame_count <= 6


def test_decoder_blocks_of_a_uvit_that_are_compiled_one_by_one():
    model = UViT(DEEP_UVIT, skip_scale=make_skip_scale("cs", KAPPA))
    x, t, count = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 500.0]), CompileCounter()
    expected = model(x, t)
    for block in model.out_blocks:
        block.compile(fullgraph=True, backend=count)
    torch.testing.assert_close(model(x, t), expected, rtol=1e-4, atol=1e-5)
    assert count.frame_count == 2


@pytest.mark.parametrize("skip", ["layer-norm", "plain"])
def test_decoder_blocks_of_a_dit_that_are_compiled_one_by_one(skip):
    model = _drawn(DiT(replace(DIT, depth=12, skip=skip), skip_scale=make_skip_scale("cs", KAPPA)))
    batch = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 500.0]), torch.tensor([1, 5])
    count, expected = CompileCounter(), model(*batch)
    for _, block in model.skip_blocks():
        block.compile(fullgraph=True, backend=count)
    torch.testing.assert_close(model(*batch), expected, rtol=1e-4, atol=1e-5)
    # The first takes the stream itself for its skip.
    assert count.frame_count <= 3


def test_residual_blocks_of_diffusers_that_are_compiled_one_by_one():
    pytest.importorskip("diffusers")
    from test_diffusers_patch import make_inputs, make_network, patched_copy

    network = patched_copy(make_network("ddpm", layers_per_block=6), skip_scale="cs", kappa=KAPPA)
    inputs, count = make_inputs(network), CompileCounter()
    expected = network(**inputs).sample
    decoder = [resnet for block in network.up_blocks for resnet in block.resnets]
    assert len(decoder) == 14
    for resnet in decoder:
        resnet.compile(fullgraph=True, backend=count)
    torch.testing.assert_close(network(**inputs).sample, expected, rtol=1e-4, atol=1e-4)
    assert count.frame_count <= 8


def operators(network: nn.Module, call: Callable[[nn.Module], Tensor]) -> Counter[str]:
    seen: Counter[str] = Counter()

    def look(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        seen.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    call(torch.compile(network, fullgraph=True, backend=look))  # type: ignore[arg-type]
    return seen


@pytest.mark.parametrize("backend", ["native", None])
def test_a_compiled_uvit_is_fused(backend):
    """But for norms on a CPU, unless asked for, which torch.compile fuses with what stands around them."""
    found = uvit("cs")
    with nullcontext() if backend is None else use_backend(backend):
        seen, config = operators(found.ours, found.call), found.ours.config
    assert seen["scalelong.skip_linear"] == config.num_skips
    assert seen["scalelong.add_layer_norm"] == (0 if backend is None else 2 * (config.depth + 1) + 1)


@pytest.mark.parametrize("backend", ["native", None])
def test_a_compiled_dit_is_fused(backend):
    """But for norms on a CPU, unless asked for, which torch.compile fuses with what stands around them."""
    found = dit("cs")
    with nullcontext() if backend is None else use_backend(backend):
        seen, config = operators(found.ours, found.call), found.ours.config
    assert seen["scalelong.skip_linear"] == config.num_skips
    assert seen["scalelong.add_layer_norm"] == (0 if backend is None else 2 * config.depth + 1)


@pytest.mark.parametrize(
    ("make", "of_time", "of_embeddings"),
    [
        pytest.param(lambda: unet(DDPM, "cs"), 1, 2, id="ddpm", marks=pytest.mark.exhaustive),
        pytest.param(lambda: unet(ADM, "ls"), 1, 2, id="adm"),
        pytest.param(diffusers_unet, 2, 14, id="diffusers"),
    ],
)
def test_a_compiled_unet_writes_no_concatenation_and_activates_in_the_norm(make, of_time, of_embeddings):
    """What is left are the sines and cosines of time, and the activations of its embedding."""
    if make is diffusers_unet:
        pytest.importorskip("diffusers")
    found = make()
    seen = operators(found.ours, found.call)
    assert sum(n for name, n in seen.items() if " cat " in name) == of_time
    assert sum(n for name, n in seen.items() if "silu" in name) == of_embeddings
    assert seen["scalelong.skip_group_norm"] == len([m for m in found.ours.modules() if isinstance(m, nn.GroupNorm)])


@pytest.mark.parametrize(
    ("make_pair", "tracing_mode"),
    [
        pytest.param(uvit, "real", id="uvit-real"),
        pytest.param(partial(unet, ADM), "symbolic", id="unet-symbolic"),
        pytest.param(dit, "real", id="dit-real"),
        pytest.param(dit, "symbolic", id="dit-symbolic", marks=pytest.mark.exhaustive),
        pytest.param(uvit, "symbolic", id="uvit-symbolic", marks=pytest.mark.exhaustive),
        pytest.param(partial(unet, ADM), "real", id="unet-real", marks=pytest.mark.exhaustive),
    ],
)
def test_make_fx_records_operators_and_their_gradients(make_pair, tracing_mode):
    """Not what they launch: products written into given memory could not be differentiated again."""
    model = make_pair("ls").ours
    batch = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([1, 5])
    names = [name for name, _ in model.named_parameters()]
    parameters = [p.detach().clone().requires_grad_() for p in model.parameters()]

    def gradients(*parameters: Tensor) -> tuple[Tensor, ...]:
        output = functional_call(model, dict(zip(names, parameters, strict=True)), batch)
        return torch.autograd.grad(output.square().mean(), parameters)

    graph = make_fx(gradients, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(*parameters)
    for recorded, expected in zip(graph(*parameters), gradients(*parameters), strict=True):
        torch.testing.assert_close(recorded, expected)
    assert any("scalelong" in str(node.target) for node in graph.graph.nodes)
