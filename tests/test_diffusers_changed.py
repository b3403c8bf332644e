"""What a user changes, hooks or replaces in a network of diffusers counts in the patched one as in the plain one."""

import copy
import functools
from collections import Counter
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("diffusers")
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets import unet_2d_blocks
from test_diffusers_patch import (
    NETWORKS,
    decoder_block,
    each_network,
    make_inputs,
    make_network,
    patched_copy,
    scaled_by_hooks,
)

from scalelong.kernels.conv3x3 import conv3x3
from scalelong.kernels.group_norm import skip_group_norm
from scalelong.kernels.skip_conv1x1 import skip_conv1x1
from scalelong.model import diffusers_blocks, skip_layers
from scalelong.model.diffusers_patch import patch_diffusers, unpatch_diffusers
from scalelong.model.skip_layers import Conv3x3, GroupNorm
from scalelong.model.skip_scale import SkipScale
from scalelong.model.unet_config import SKIP_POSITIONS

KAPPA = 0.1
patched_when = pytest.mark.parametrize("when", ["before", "after"])


def pair(change: Callable[[Any], None], when: str = "after", name: str = "ddpm", **options: Any) -> tuple[Any, Any]:
    """A patched network and the plain one, both changed, the latter scaled by hooks."""
    options = {"skip_scale": "cs", "kappa": KAPPA, "position": "before-norm", **options}
    plain = make_network(name)
    patched = copy.deepcopy(plain)
    if when == "after":
        patch_diffusers(patched, **options)
    # Not before it is copied for the hooks: what a change closes over would still be the original's.
    expected = scaled_by_hooks(plain, lambda i, skip: KAPPA ** (i - 1), options["position"])
    change(patched)
    change(expected)
    if when == "before":
        patch_diffusers(patched, **options)
    return patched, expected


def assert_same(patched: Any, expected: Any, atol: float = 1e-4) -> None:
    inputs = make_inputs(patched)
    torch.testing.assert_close(patched(**inputs).sample, expected(**inputs).sample, rtol=1e-4, atol=atol)


def circular(network: nn.Module) -> None:
    for conv in network.modules():
        if isinstance(conv, nn.Conv2d):
            conv.padding_mode = "circular"


def tiled_in_x(network: nn.Module) -> None:
    """As the tiling of the web interfaces: padded round in one direction, with zeros in the other."""

    def conv_forward(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        width, height = int(self.padding[1]), int(self.padding[0])
        x = F.pad(F.pad(x, (width, width, 0, 0), mode="circular"), (0, 0, height, height))
        return F.conv2d(x, weight, bias, self.stride)

    for conv in network.modules():
        if isinstance(conv, nn.Conv2d):
            conv._conv_forward = MethodType(conv_forward, conv)


def doubled_weights(network: nn.Module) -> None:
    def conv_forward(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.Conv2d._conv_forward(self, x, 2 * weight, bias)

    for conv in network.modules():
        if isinstance(conv, nn.Conv2d):
            conv._conv_forward = MethodType(conv_forward, conv)


@patched_when
@pytest.mark.parametrize("change", [circular, tiled_in_x, doubled_weights])
def test_tiling_and_other_convolutions_of_an_instance(change, when):
    patched, expected = pair(change, when)
    assert_same(patched, expected)
    untouched = patched_copy(make_network(), skip_scale="cs", kappa=KAPPA)
    untouched.load_state_dict(patched.state_dict())
    inputs = make_inputs(patched)
    assert (patched(**inputs).sample - untouched(**inputs).sample).abs().max() > 1e-2


@pytest.mark.parametrize("change", [circular, tiled_in_x])
def test_a_convolution_of_our_own_network_is_tiled(change):
    ours, plain = Conv3x3(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
    plain.load_state_dict(ours.state_dict())
    for conv in (ours, plain):
        change(conv)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(ours(x), plain(x))


def concatenating(block: Any) -> None:
    """A decoder block's forward as many projects replace it."""

    def forward(hidden_states, res_hidden_states_tuple, temb=None, upsample_size=None):
        h = hidden_states
        for resnet, skip in zip(block.resnets, res_hidden_states_tuple[::-1], strict=True):
            h = resnet(torch.cat([h, skip], dim=1), temb)
        for upsampler in block.upsamplers or ():
            h = upsampler(h, upsample_size)
        return h

    block.forward = forward


@pytest.mark.parametrize("position", SKIP_POSITIONS)
def test_a_replaced_forward_of_a_decoder_block(position):
    def change(network: Any) -> None:
        assert type(network.up_blocks[1]).__name__ == "UpBlock2D"
        concatenating(network.up_blocks[1])

    assert_same(*pair(change, position=position))


@pytest.mark.parametrize("skip_scale", ["ls", "ls-separate"])
def test_a_replaced_forward_of_a_decoder_block_under_learned_gates(skip_scale):
    network = patched_copy(make_network(), skip_scale=skip_scale)
    inputs = make_inputs(network)
    expected = network(**inputs).sample
    concatenating(network.up_blocks[1])
    torch.testing.assert_close(network(**inputs).sample, expected, rtol=1e-4, atol=1e-5)


def with_plain_forward(resnet: Any) -> None:
    """Somebody's own, which knows nothing of ours."""
    resnet.forward = lambda input_tensor, temb: MethodType(ResnetBlock2D.forward, resnet)(input_tensor, temb)


def with_wrapped_forward(resnet: Any) -> None:
    """Around whatever it was."""
    inner = resnet.forward
    resnet.forward = lambda input_tensor, temb: 2 * inner(input_tensor, temb)


def each_resnet(change: Callable[[Any], None]) -> Callable[[Any], None]:
    def change_all(network: Any) -> None:
        for block in network.up_blocks:
            for resnet in block.resnets:
                change(resnet)

    return change_all


@pytest.mark.parametrize("change", [with_plain_forward, with_wrapped_forward])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "recomputed"])
def test_replaced_forwards_of_residual_blocks(change, checkpointed):
    patched, expected = pair(each_resnet(change))
    if checkpointed:
        patched.enable_gradient_checkpointing()
    inputs = make_inputs(patched)
    found = results_in_place(patched, inputs)
    for name, truth in results_in_place(expected, inputs).items():
        torch.testing.assert_close(found[name], truth, rtol=1e-3, atol=1e-4 * truth.abs().max().item() + 1e-6)


def results_in_place(network: Any, inputs: dict) -> dict[str, Tensor]:
    """Without a copy, whose closures would call the original's modules."""
    output = network(**inputs).sample
    grads = torch.autograd.grad(output, list(network.parameters()), torch.ones_like(output))
    return {"output": output.detach(), **dict(zip(dict(network.named_parameters()), grads, strict=True))}


def test_replaced_forwards_of_residual_blocks_after_the_norm():
    assert_same(*pair(each_resnet(with_wrapped_forward), position="after-norm"))
    patched = patched_copy(make_network(), skip_scale="cs", kappa=KAPPA, position="after-norm")
    each_resnet(with_plain_forward)(patched)
    with pytest.raises(ValueError, match="does not call the patched forward, so that nothing scales its skip"):
        patched(**make_inputs(patched))


@pytest.mark.parametrize("position", SKIP_POSITIONS)
def test_residual_blocks_that_are_wrapped(position):
    class Around(nn.Module):
        def __init__(self, inner: Any):
            super().__init__()
            self.inner, self.in_channels, self.out_channels = inner, inner.in_channels, inner.out_channels
            self.norm1, self.conv_shortcut = inner.norm1, inner.conv_shortcut

        def forward(self, x: Tensor, temb: Tensor) -> Tensor:
            return 2 * self.inner(x, temb)

    def change(network: Any) -> None:
        for block in network.up_blocks:
            for k, resnet in enumerate(block.resnets):
                block.resnets[k] = Around(resnet)

    assert_same(*pair(change, position=position))


def other_norm_forward(layer: Any) -> None:
    inner = functools.partial(nn.GroupNorm.forward, layer)
    layer.forward = lambda x: 2 * inner(x)


def other_conv_forward(layer: Any) -> None:
    inner = functools.partial(nn.Conv2d.forward, layer)
    layer.forward = lambda x: 2 * inner(x)


@pytest.mark.parametrize("position", SKIP_POSITIONS)
@pytest.mark.parametrize("name", ["ddpm", "adm"])
@pytest.mark.parametrize(
    ("layer", "change"),
    [("norm1", other_norm_forward), ("norm2", other_norm_forward), ("conv_shortcut", other_conv_forward)],
)
def test_replaced_forwards_of_layers(name, layer, change, position):
    assert_same(*pair(each_resnet(lambda resnet: change(getattr(resnet, layer))), name=name, position=position))


def test_a_layer_of_a_derived_class():
    class Derived(nn.GroupNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    def change(resnet: Any) -> None:
        base = type(resnet.norm1)
        resnet.norm1.__class__ = type("Derived", (base,), {"forward": lambda self, x: 2 * base.forward(self, x)})

    assert_same(*pair(each_resnet(change)))


def counted(network: Any) -> Counter[str]:
    """How often each module without children is called, and the shapes of what it gets and gives."""
    seen: Counter[str] = Counter()

    def count(name: str, module: nn.Module, arguments: Any, output: Any) -> None:
        shapes = [tuple(x.shape) for x in (*arguments, output) if isinstance(x, Tensor)]
        seen[f"{name} {len(arguments)} {shapes}"] += 1

    for name, module in network.named_modules():
        is_block = isinstance(module, ResnetBlock2D)
        if (is_block or not list(module.children())) and not name.startswith("skip_gates"):
            module.register_forward_hook(functools.partial(count, name))
    network(**make_inputs(network))
    return seen


@each_network
@pytest.mark.parametrize("skip_scale", ["none", "ls"])
def test_hooks_see_every_layer_as_in_the_plain_network(name, skip_scale):
    plain = make_network(name)
    patched = patched_copy(plain, skip_scale=skip_scale)
    assert counted(patched) == counted(plain)


def test_hooks_of_all_modules_see_every_layer(monkeypatch):
    def calls(network: Any) -> Counter[str]:
        seen: Counter[str] = Counter()
        names = {module: name for name, module in network.named_modules()}
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, *_: seen.update([names[module]] if module in names else [])
        )
        try:
            network(**make_inputs(network))
        finally:
            handle.remove()
        return seen

    plain = make_network()
    assert calls(patched_copy(plain, skip_scale="cs")) == calls(plain)


@pytest.mark.parametrize("position", SKIP_POSITIONS)
@pytest.mark.parametrize("path", ["norm1", "norm2", "nonlinearity", "conv_shortcut", ""])
@pytest.mark.parametrize("kind", ["input", "output"])
def test_hooks_that_change_what_passes_act_as_in_the_plain_network(path, kind, position):
    def change(resnet: Any) -> None:
        layer = resnet.get_submodule(path)
        if kind == "output":
            layer.register_forward_hook(lambda module, arguments, y: y * y.abs())
        else:
            layer.register_forward_pre_hook(lambda module, arguments: (arguments[0] + 0.5, *arguments[1:]))

    plain = make_network()
    patched = patched_copy(plain, skip_scale="cs", kappa=KAPPA, position=position)
    # The hooks that scale come first on an input, where ours scale behind what a user's hook gave.
    expected = scaled_by_hooks(plain, lambda i, skip: KAPPA ** (i - 1), position)
    if path == "" and kind == "input":
        expected = copy.deepcopy(plain)
        each_resnet(change)(expected)
        expected = scaled_by_hooks(expected, lambda i, skip: KAPPA ** (i - 1), position)
    else:
        each_resnet(change)(expected)
    if (path, kind, position) in {("norm1", "output", "after-norm"), ("conv_shortcut", "input", "after-norm")}:
        pytest.skip("which of two hooks comes first is not what is compared here")
    each_resnet(change)(patched)
    assert_same(patched, expected, atol=1e-3)


def test_without_hooks_no_concatenation_is_written(monkeypatch):
    network, seen = patched_copy(make_network(), skip_scale="cs"), []

    def concatenated(h: Tensor, s: Tensor | None, scale: Any) -> Tensor:
        seen.append(s)
        return diffusers_concatenated(h, s, scale)

    diffusers_concatenated = diffusers_blocks.concatenated
    for module in (diffusers_blocks, skip_layers):
        monkeypatch.setattr(module, "concatenated", concatenated)
    network(**make_inputs(network))
    assert seen
    assert all(s is None for s in seen)
    network.up_blocks[0].resnets[0].norm1.register_forward_hook(lambda *_: None)
    network(**make_inputs(network))
    assert sum(s is not None for s in seen) == 1


@pytest.mark.parametrize("skip_scale", ["ls", "ls-separate"])
def test_new_gates_take_effect(skip_scale):
    network = patched_copy(make_network(), skip_scale=skip_scale)
    inputs = make_inputs(network)
    before = network(**inputs).sample
    gates = copy.deepcopy(network.skip_gates)
    with torch.no_grad():
        for p in gates.parameters():
            p.add_(1.0)
    network.skip_gates = gates
    after = network(**inputs).sample
    assert (after - before).abs().max() > 1e-3
    assert network.up_blocks[0].skips.gates is gates
    after.sum().backward()
    assert all(p.grad is not None for p in gates.parameters())
    copied = copy.deepcopy(network)
    assert torch.equal(copied(**inputs).sample, after)
    assert copied.up_blocks[1].skips.gates is copied.skip_gates is not gates


def test_a_block_that_is_copied_alone_has_gates_of_its_own():
    network = patched_copy(make_network(), skip_scale="ls")
    block = copy.deepcopy(network.up_blocks[0])
    assert block.skips.gates is not network.skip_gates
    assert block.skips.network.holder is not network
    h, skips = torch.randn(2, 64, 4, 4), tuple(torch.randn(2, C, 4, 4) for C in (32, 64, 64))
    temb = torch.randn(2, 128)
    assert torch.equal(block(h, skips, temb), network.up_blocks[0](h, skips, temb))


@pytest.mark.parametrize("wrap", [nn.ModuleList, lambda two: nn.ModuleDict(dict(zip("ab", two, strict=True)))])
def test_two_networks_in_one_module_count_their_skips_by_themselves(wrap, tmp_path):
    networks = [make_network("ddpm"), make_network("adm")]
    alone = [patched_copy(network, skip_scale="cs", kappa=KAPPA) for network in networks]
    both = wrap(networks)
    report = patch_diffusers(both, skip_scale="cs", kappa=KAPPA)
    assert [skip.i for skip in report.skips] == [6, 5, 4, 3, 2, 1, 4, 3, 2, 1]
    for network, expected in zip(networks, alone, strict=True):
        inputs = make_inputs(network)
        assert torch.equal(network(**inputs).sample, expected(**inputs).sample)
    patch_diffusers(both, skip_scale="ls-separate")
    assert [len(network.skip_gates) for network in networks] == [6, 4]
    file = tmp_path / "both.safetensors"
    save_all(both, file)
    gates = [copy.deepcopy(network.skip_gates.state_dict()) for network in networks]
    patch_diffusers(both, skip_scale="cs")
    patch_diffusers(both, skip_scale="ls-separate", gates_from=file)
    for network, expected in zip(networks, gates, strict=True):
        assert all(torch.equal(x, expected[name]) for name, x in network.skip_gates.state_dict().items())
    unpatch_diffusers(both)
    assert not any("skip_gates" in name for name in both.state_dict())


def save_all(module: nn.Module, path: Any) -> None:
    from safetensors.torch import save_file

    save_file(module.state_dict(), path)


@pytest.mark.parametrize("position", SKIP_POSITIONS)
def test_layers_in_8_bits_that_are_cast_when_called(position):
    network: Any = make_network("sd15").bfloat16()
    inputs = {name: x.bfloat16() if x.is_floating_point() else x for name, x in make_inputs(network).items()}
    network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert torch.float8_e4m3fn in {p.dtype for p in network.parameters()}
    plain = network(**inputs).sample
    patch_diffusers(network, skip_scale="none")
    torch.testing.assert_close(network(**inputs).sample, plain, rtol=0.05, atol=0.05)
    patch_diffusers(network, skip_scale="ls", position=position)
    assert {p.dtype for p in network.skip_gates.parameters()} == {torch.bfloat16}
    output = network(**inputs).sample
    assert output.isfinite().all()
    assert not torch.equal(output, plain)


def test_norms_without_a_bias():
    def without_bias(resnet: Any) -> None:
        for name in ("norm1", "norm2"):
            getattr(resnet, name).register_parameter("bias", None)

    patched, expected = pair(each_resnet(without_bias))
    assert_same(patched, expected)
    assert_same(*pair(each_resnet(without_bias), when="before"))
    layer, plain = GroupNorm(2, 4), nn.GroupNorm(2, 4)
    for norm in (layer, plain):
        norm.register_parameter("bias", None)
        norm.weight = nn.Parameter(torch.tensor([1.0, 2.0, -1.0, 0.5]))
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(layer(x), plain(x))


@pytest.mark.parametrize("C", [1, 3])
def test_a_scale_of_one_element(C):
    """nn.Parameter(torch.ones(1)) is the commonest learnable scalar."""
    h, s = torch.randn(2, 3, 4, 4), torch.randn(2, C, 4, 4)
    weight = torch.randn(5, 3 + C, 1, 1)
    for op in (
        lambda scale: skip_group_norm(h, s, scale, 1, None, None),
        lambda scale: skip_conv1x1(h, s, scale, weight, None),
        lambda scale: skip_conv1x1(h.contiguous(memory_format=torch.channels_last), s, scale, weight, None),
    ):
        scales = [nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor([0.7]))]
        outputs = [op(scale) for scale in scales]
        assert torch.equal(*outputs)
        grads = [torch.autograd.grad(y.square().sum(), scale)[0] for y, scale in zip(outputs, scales, strict=True)]
        assert grads[1].shape == (1,)
        assert torch.equal(grads[0], grads[1][0])


@pytest.mark.parametrize("position", SKIP_POSITIONS)
def test_a_policy_whose_factor_is_a_parameter_of_one_element(position):
    class Learned(SkipScale):
        def make_gates(self, skips):
            gate = nn.Module()
            gate.register_parameter("factor", nn.Parameter(torch.full((1,), KAPPA)))
            return gate

        def scale(self, i, num_skips, skip, gates):
            return gates.factor  # type: ignore[union-attr]

    plain = make_network()
    patched = patched_copy(plain, skip_scale=Learned(), position=position)
    assert_same(patched, scaled_by_hooks(plain, lambda i, skip: KAPPA, position))
    patched(**make_inputs(patched)).sample.sum().backward()
    assert patched.skip_gates.factor.grad.shape == (1,)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_an_image_without_a_batch(bias, requires_grad):
    ours, plain = Conv3x3(3, 4, 3, padding=1, bias=bias), nn.Conv2d(3, 4, 3, padding=1, bias=bias)
    plain.load_state_dict(ours.state_dict())
    ours.requires_grad_(requires_grad)
    x = torch.randn(3, 5, 6, requires_grad=True)
    torch.testing.assert_close(ours(x), plain(x))
    torch.testing.assert_close(*(torch.autograd.grad(conv(x).sum(), x)[0] for conv in (ours, plain)))
    with pytest.raises(ValueError, match=r"does not fit x \(2, 5, 6\)"):
        conv3x3(x[:2], ours.weight, ours.bias)


def test_a_patched_block_takes_what_the_plain_one_takes():
    block = decoder_block(out_channels=64)
    resnet: Any = block.resnets[0]
    x, temb = torch.randn(2, resnet.in_channels, 8, 8), torch.randn(2, 16)
    expected = resnet(x, temb)
    patch_diffusers(block, skip_scale="none")
    torch.testing.assert_close(resnet(x, temb), expected, rtol=1e-4, atol=1e-5)
    assert isinstance(block, unet_2d_blocks.UpBlock2D)
    assert set(NETWORKS) >= {"ddpm", "adm"}
