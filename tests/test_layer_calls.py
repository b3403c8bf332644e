"""What adapts, prunes, hooks, offloads, shards or quantises layers finds each layer called as in the plain network."""

import ast
import copy
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_networks import ADM, DDPM, PAIRS, Pair, unet, uvit
from samples import each_value_once
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from scalelong.model import linear_layers
from scalelong.model.layer_calls import is_called_by_class
from scalelong.model.linear_layers import (
    GeluLinear,
    SkipLinear,
    TokenConv1d,
    project_gelu,
    project_skip,
    project_tokens,
)
from scalelong.model.plain_layers import PLAIN_LAYERS, use_plain_layers
from scalelong.model.skip_layers import GroupNorm, fused_activation, norm_and_activation

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
each_pair = pytest.mark.parametrize("pair", PAIRS)


def each_of_both(name: str, values: Iterable[str]) -> pytest.MarkDecorator:
    """Every value with every pair; ``make test`` takes a third of them, in which each occurs."""
    values = list(values)
    combinations = [
        pytest.param(value, pair, marks=() if (i - j) % len(values) == 0 else pytest.mark.exhaustive)
        for (i, value), (j, pair) in product(enumerate(values), enumerate(PAIRS))
    ]
    return pytest.mark.parametrize((name, "pair"), combinations)


def make(pair: str) -> Pair:
    if pair == "diffusers":
        pytest.importorskip("diffusers")
    return PAIRS[pair]()


def names_of(network: nn.Module, kind: Any = LAYERS) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, kind)]


def result(network: nn.Module, call: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """The output and the gradients of what is trained."""
    output = call(network)
    leaves = {name: p for name, p in network.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(output.square().mean(), list(leaves.values()))
    return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_same(pair: Pair, rename: Callable[[str], str] = lambda name: name) -> dict[str, Tensor]:
    """Of the two networks the same comes; returns what came of ours."""
    found, expected = (result(network, pair.call) for network in (pair.ours, pair.plain))
    assert set(found) == {rename(name) for name in expected}
    # Some gradients are zero but for rounding: a bias before a norm over one channel.
    largest = max(float(x.abs().max()) for name, x in expected.items() if name != "output")
    for name, truth in expected.items():
        floor = 1e-5 if name == "output" else 1e-5 * largest
        allowed = 1e-3 * float(truth.abs().max()) + floor
        assert float((found[rename(name)] - truth).abs().max()) <= allowed, name
    return found


def adapted(network: Any, config: Any) -> None:
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, network)


ADAPTERS = {
    "lora": lambda peft, names: peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False),
    "dora": lambda peft, names: peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False, use_dora=True),
    "loha": lambda peft, names: peft.LoHaConfig(r=2, target_modules=names, init_weights=False),
}


@each_of_both("adapter", ADAPTERS)
def test_adapters_of_every_layer_are_trained_and_count(adapter, pair):
    """LoRA, DoRA and LoHa on every linear layer and convolution at once, then each without the others."""
    peft = pytest.importorskip("peft")
    found = make(pair)
    names = names_of(found.ours)
    assert names == names_of(found.plain)
    assert len(names) > 20
    for network in (found.ours, found.plain):
        adapted(network, ADAPTERS[adapter](peft, names))
    adapters = [
        module for module in found.ours.modules() if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)
    ]
    assert len(adapters) == len(names)
    with torch.no_grad():  # small enough that no unit dies of it
        for name, p in found.ours.named_parameters():
            if "lora_" in name or "hada_" in name:
                p.mul_(0.5)
    found.plain.load_state_dict(found.ours.state_dict())
    assert_same(found)
    trained = {name: p for name, p in found.ours.named_parameters() if p.requires_grad}
    assert any("lora_" in name or "hada_" in name for name in trained)
    found.call(found.ours).square().mean().backward()
    for name, p in trained.items():
        assert p.grad is not None, name
        assert p.grad.any(), name
    with torch.no_grad():
        for layer in adapters:
            layer.enable_adapters(False)
        without = found.call(found.ours)
        for layer in adapters:
            layer.enable_adapters(True)
            assert not torch.equal(found.call(found.ours), without), layer
            layer.enable_adapters(False)


@pytest.mark.parametrize("pair", ["uvit", "unet-adm"])
def test_merged_adapters_are_in_the_weights_and_the_layers_are_fused_again(pair):
    peft = pytest.importorskip("peft")
    found = make(pair)
    model = peft.get_peft_model(found.ours, ADAPTERS["lora"](peft, names_of(found.ours)))
    expected = found.call(found.ours)
    merged = model.merge_and_unload()
    torch.testing.assert_close(found.call(merged), expected, rtol=1e-3, atol=1e-4)
    fused = [module for module in merged.modules() if isinstance(module, tuple(PLAIN_LAYERS))]
    assert len(fused) > 5
    assert all(is_called_by_class(module, type(module)) for module in fused)


def watched(network: nn.Module, call: Callable[[nn.Module], Tensor], kinds: tuple[str, ...]) -> Counter[str]:
    """How often each module without children is called, and with tensors of which shapes; backward too."""
    seen: Counter[str] = Counter()

    def forward(name: str, module: nn.Module, arguments: Any, output: Any) -> None:
        seen[f"{name}: {len(arguments)} {tuple(arguments[0].shape)} to {tuple(output.shape)}"] += 1

    def before(name: str, module: nn.Module, arguments: Any) -> None:
        seen[f"{name} before: {len(arguments)} {tuple(arguments[0].shape)}"] += 1

    def backward(name: str, module: nn.Module, d_inputs: Any, d_outputs: Any) -> None:
        seen[f"{name} backward: {len(d_inputs)} {tuple(d_outputs[0].shape)}"] += 1

    for name, module in network.named_modules():
        if list(module.children()):
            continue
        if "forward" in kinds:
            module.register_forward_hook(functools.partial(forward, name))
        if "before" in kinds:
            module.register_forward_pre_hook(functools.partial(before, name))
        if "backward" in kinds:
            module.register_full_backward_hook(functools.partial(backward, name))
    call(network).square().mean().backward()
    return seen


@each_value_once(
    "pair, kinds, recomputed",
    tuple(PAIRS),
    (("forward", "before", "backward"), ("forward",), ("before",), ("backward",)),
    (False, True),
)
def test_hooks_see_every_layer_exactly_as_often_as_in_the_plain_network(recomputed, kinds, pair):
    found = make(pair)
    if recomputed:
        for network in (found.ours, found.plain):
            if pair == "diffusers":
                network.enable_gradient_checkpointing()
            else:
                network.recompute = "blocks"
    seen, expected = (watched(copy.deepcopy(network), found.call, kinds) for network in (found.ours, found.plain))
    assert seen == expected
    leaves = {name for name, module in found.ours.named_modules() if not list(module.children())}
    # No gradient passes through the sinusoids of time.
    assert leaves - {key.split(":")[0].split(" ")[0] for key in seen} <= {"time_proj"}


@each_of_both("kind", ["forward", "before", "backward"])
def test_a_hook_of_one_layer_sees_and_changes_what_it_would_in_the_plain_network(kind, pair):
    """One at a time, so that its neighbours run fused."""
    found = make(pair)

    def change(network: nn.Module, name: str) -> Any:
        module: Any = network.get_submodule(name)
        if kind == "forward":
            return module.register_forward_hook(lambda module, arguments, y: y * 1.5)
        if kind == "before":
            return module.register_forward_pre_hook(lambda module, arguments: (_larger(arguments[0]),))
        return module.register_full_backward_hook(
            lambda module, d_inputs, d_outputs: tuple(None if d is None else d * 1.5 for d in d_inputs)
        )

    unchanged = result(found.ours, found.call)
    leaves = [name for name, module in found.ours.named_modules() if not list(module.children())]
    roles = {re.sub(r"[.]\d+[.]", ".", name): name for name in leaves}
    for name in roles.values():
        handles = [change(network, name) for network in (found.ours, found.plain)]
        changed = assert_same(found)
        for handle in handles:
            handle.remove()
        if not isinstance(found.ours.get_submodule(name), nn.Identity | nn.Dropout) and kind != "backward":
            assert any(not torch.equal(changed[key], unchanged[key]) for key in unchanged), name


@each_pair
def test_hooks_of_all_modules_see_every_layer(pair):
    found = make(pair)

    def calls(network: nn.Module) -> Counter[str]:
        seen: Counter[str] = Counter()
        names = {module: name for name, module in network.named_modules() if not list(module.children())}
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, *_: seen.update([names[module]] if module in names else [])
        )
        try:
            found.call(network)
        finally:
            handle.remove()
        return seen

    assert calls(found.ours) == calls(found.plain)


def _larger(x: Tensor) -> Tensor:
    return 1.5 * x if x.is_floating_point() else x - 1


def pruned(network: nn.Module) -> None:
    for name in names_of(network):
        prune.l1_unstructured(network.get_submodule(name), "weight", amount=0.5)


def weight_normed(network: nn.Module) -> None:
    for name in names_of(network):
        parametrizations.weight_norm(network.get_submodule(name))


def weight_normed_by_hooks(network: nn.Module) -> None:
    for name in names_of(network):
        with pytest.warns(FutureWarning, match="weight_norm"):
            nn.utils.weight_norm(network.get_submodule(name))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized(network: nn.Module) -> None:
    for name in names_of(network):
        parametrize.register_parametrization(network.get_submodule(name), "weight", Doubled())


def with_forward_of_the_plain_class(network: nn.Module) -> None:
    """As a wrapper of an instance's forward has it."""
    for name in names_of(network):
        module: Any = network.get_submodule(name)
        kind = next(base for base in type(module).__mro__ if base in LAYERS)
        module.forward = functools.partial(lambda kind, module, x: 2 * kind.forward(module, x), kind, module)


@each_pair
@pytest.mark.parametrize(
    "change", [pruned, weight_normed, weight_normed_by_hooks, parametrized, with_forward_of_the_plain_class]
)
def test_changed_layers_act_as_in_the_plain_network(change, pair):
    found = make(pair)
    unchanged = found.call(found.ours)
    with torch.no_grad():
        for network in (found.ours, found.plain):
            torch.manual_seed(1)
            change(network)
    assert_same(found)
    if change not in (weight_normed, weight_normed_by_hooks):  # which leave the weights as they are
        assert (found.call(found.ours) - unchanged).abs().max() > 1e-3


@pytest.mark.parametrize("pair", ["uvit", "unet-ddpm", "unet-adm", "unet-after-norm", "diffusers"])
def test_plain_layers_in_place_of_ours_give_the_plain_network(pair):
    found = make(pair)
    expected = result(found.ours, found.call)
    use_plain_layers(found.ours)
    assert not any(type(module) in PLAIN_LAYERS for module in found.ours.modules())
    assert list(found.ours.state_dict()) == list(found.plain.state_dict())
    for name, x in result(found.ours, found.call).items():
        torch.testing.assert_close(x, expected[name], rtol=1e-3, atol=1e-4 * float(expected[name].abs().max()) + 1e-6)
    assert_same(found)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("pair", ["uvit", "unet-ddpm", "unet-adm", "diffusers"])
def test_layers_quantised_when_called(pair):
    """The plain layers in place of ours: quantize_dynamic takes those whose class is nn.Linear itself."""
    if "x86" not in torch.backends.quantized.supported_engines and torch.backends.quantized.engine == "none":
        pytest.skip("torch has no quantised products here")
    found = make(pair)
    quantised = [
        torch.ao.quantization.quantize_dynamic(use_plain_layers(copy.deepcopy(network)), {nn.Linear})
        for network in (found.ours, found.plain)
    ]
    kind = torch.ao.nn.quantized.dynamic.Linear  # type: ignore[attr-defined]
    assert names_of(quantised[0], kind) == names_of(quantised[1], kind) == names_of(found.plain, nn.Linear)
    with torch.no_grad():
        outputs = [found.call(network) for network in quantised]
        assert not torch.equal(outputs[0], found.call(found.ours))
    torch.testing.assert_close(*outputs, rtol=0.02, atol=0.02)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("pair", ["uvit", "unet-adm"])
def test_a_network_with_fused_layers_is_quantised_in_its_plain_layers(pair):
    found = make(pair)
    quantised = torch.ao.quantization.quantize_dynamic(found.ours, {nn.Linear})
    with torch.no_grad():
        torch.testing.assert_close(found.call(quantised), found.call(found.ours), rtol=0.1, atol=0.1)


@each_pair
def test_accelerate_offloads_each_layer(pair):
    accelerate = pytest.importorskip("accelerate")
    found = make(pair)
    with torch.no_grad():
        expected = found.call(found.ours)
        offloaded = accelerate.cpu_offload(found.ours, execution_device=torch.device("cpu"))
        assert {p.device.type for p in offloaded.parameters()} == {"meta"}
        dtype = torch.float32
        assert dtype == expected.dtype
        torch.testing.assert_close(found.call(offloaded), expected, rtol=1e-4, atol=1e-5)


@each_pair
def test_fsdp_shards_each_layer(process_group, pair):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    found = make(pair)
    expected = result(found.ours, found.call)
    mesh = init_device_mesh("cpu", (1,))
    names = names_of(found.ours)
    for name in names:
        fully_shard(found.ours.get_submodule(name), mesh=mesh)
    fully_shard(found.ours, mesh=mesh)
    assert all(isinstance(found.ours.get_submodule(name).weight, DTensor) for name in names)
    output = found.call(found.ours)
    torch.testing.assert_close(output, expected.pop("output"), rtol=1e-3, atol=1e-5)
    output.square().mean().backward()
    for name, p in found.ours.named_parameters():
        assert isinstance(p.grad, DTensor), name
        truth = expected[name]
        torch.testing.assert_close(p.grad.full_tensor(), truth, rtol=1e-3, atol=1e-4 * float(truth.abs().max()) + 1e-6)


@each_pair
def test_functional_call_takes_other_weights(pair):
    found = make(pair)
    weights = {name: 1.1 * p.detach() for name, p in found.ours.named_parameters()}

    class Called(nn.Module):
        def __init__(self, network: nn.Module):
            super().__init__()
            self.network = network

        def forward(self) -> Tensor:
            return found.call(self.network)

    outputs = []
    for network in (found.ours, found.plain):
        theirs = {f"network.{name}": weights[name] for name, _ in network.named_parameters()}
        outputs.append(torch.func.functional_call(Called(network), theirs, ()))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    assert (outputs[0] - found.call(found.ours)).abs().max() > 1e-3


class Scaled(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.layer(x)


@pytest.mark.parametrize(
    ("make_layer", "call"),
    [
        (lambda: SkipLinear(5, 3), lambda layer: project_skip(layer, torch.ones(2, 4, 3), torch.ones(2, 4, 2), 0.5)),
        (lambda: GeluLinear(5, 3), lambda layer: project_gelu(layer, torch.ones(2, 4, 5))),
        (lambda: TokenConv1d(5, 6, 1), lambda layer: project_tokens(layer, torch.ones(2, 4, 5))),
        (lambda: TokenConv1d(5, 12, 1), lambda layer: project_tokens(layer, torch.ones(2, 4, 5), 2)),
        (lambda: TokenConv1d(5, 12, 1, bias=False), lambda layer: project_tokens(layer, torch.ones(2, 4, 5), 2)),
    ],
)
def test_whatever_stands_in_place_of_a_layer_is_called_as_it_is(make_layer, call):
    layer = make_layer()
    torch.testing.assert_close(call(Scaled(layer)), 2 * call(layer))
    plain = copy.deepcopy(layer)
    plain.__class__ = PLAIN_LAYERS[type(layer)]
    torch.testing.assert_close(call(plain), call(layer))
    x = torch.randn(2, 5, 5)
    torch.testing.assert_close(layer(x), plain(x))


def test_without_hooks_u_vits_layers_are_fused(monkeypatch):
    seen, joined, gelu = [], linear_layers.concatenated_tokens, torch.nn.functional.gelu
    monkeypatch.setattr(linear_layers, "concatenated_tokens", lambda *parts: (seen.append("joined"), joined(*parts))[1])
    monkeypatch.setattr(linear_layers.F, "gelu", lambda x, **how: (seen.append("gelu"), gelu(x, **how))[1])
    found = uvit("cs")
    found.call(found.ours)
    assert not seen
    found.ours.out_blocks[0].skip_linear.register_forward_hook(lambda *_: None)
    found.ours.in_blocks[1].mlp.fc2.register_forward_hook(lambda *_: None)
    found.call(found.ours)
    assert sorted(seen) == ["gelu", "joined"]


def test_hooks_that_bring_weights_leave_layers_fused():
    """DeepSpeed's under ZeRO 3, which look at no argument."""

    def bring(module: nn.Module, arguments: Any) -> None: ...

    layer = GeluLinear(4, 4)
    layer.register_forward_pre_hook(bring)
    assert not is_called_by_class(layer, GeluLinear)
    bring.__module__ = "deepspeed.runtime.zero.parameter_offload"
    assert is_called_by_class(layer, GeluLinear)


@pytest.mark.parametrize(
    "activation", [nn.ReLU, nn.GELU, functools.partial(nn.GELU, approximate="tanh"), nn.Tanh], ids=str
)
@pytest.mark.parametrize("config", [DDPM, ADM], ids=["ddpm", "adm"])
def test_other_activations_in_a_unet_act_where_they_were_put(config, activation):
    found = unet(config, "cs")
    before = found.call(found.ours)
    for network in (found.ours, found.plain):
        for name, module in list(network.named_modules()):
            if isinstance(module, nn.SiLU):
                network.set_submodule(name, activation())
    assert_same(found)
    assert (found.call(found.ours) - before).abs().max() > 1e-3


def test_activations_that_the_norm_knows_are_its_own():
    norm, h = GroupNorm(2, 4).requires_grad_(False), torch.randn(2, 4, 3, 3)
    known = {nn.SiLU(): "silu", nn.GELU(): "gelu", nn.GELU(approximate="tanh"): "gelu-tanh", nn.Tanh(): None}
    for activation, name in known.items():
        assert fused_activation(activation) == name
        torch.testing.assert_close(norm_and_activation(norm, activation, h), activation(norm(h)))


@pytest.mark.parametrize("wrap", [torch.compile, Scaled], ids=["compiled", "wrapped"])
def test_blocks_that_are_wrapped_one_by_one(wrap):
    torch.compiler.reset()
    compile_one = functools.partial(torch.compile, backend="eager")
    found = unet(ADM, "cs")
    expected = found.call(found.ours)
    if wrap is torch.compile:
        for stage in (*found.ours.input_blocks, found.ours.middle_block, *found.ours.output_blocks):
            for k, layer in enumerate(stage):
                stage[k] = compile_one(layer)
        torch.testing.assert_close(found.call(found.ours), expected, rtol=1e-4, atol=1e-4)
    else:
        for network in (found.ours, found.plain):
            network.middle_block[1] = Scaled(network.middle_block[1])
        assert_same(found)


@pytest.mark.parametrize("name", ["uvit", "unet"])
def test_no_backbone_reads_the_weight_of_a_layer(name):
    """A weight that is read past its module is what adapters, hooks and sharding miss."""
    source = (Path(__file__).parents[1] / "model" / f"{name}.py").read_text()
    tree = ast.walk(ast.parse(source))
    readers = {node.name: ast.unparse(node) for node in tree if isinstance(node, ast.FunctionDef)}
    assert not [name for name, text in readers.items() if ".weight" in text and name != "init_weights"]
