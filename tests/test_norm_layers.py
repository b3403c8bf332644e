"""The LayerNorm with the residual sum before it, as a layer: what is called, how often, and what may replace it."""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from scalelong.model.norm_layers import AddLayerNorm, add_norm
from scalelong.model.uvit import UViT, UViTConfig

CONFIG = UViTConfig(img_size=8, patch_size=2, width=32, depth=4, num_heads=4)


class Doubled(nn.Module):
    """Stands in the place of a layer, as an adapter does."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.layer(x)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 8, 8), torch.linspace(1, 999, 2)


def output_and_gradients(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    output = model(*inputs)
    return [output.detach(), *torch.autograd.grad(output.square().mean(), list(model.parameters()))]


@pytest.mark.parametrize("affine", [True, False])
def test_alone_it_is_a_layer_norm_with_the_same_parameters(affine):
    ours, plain = AddLayerNorm(16, 1e-6, affine), nn.LayerNorm(16, 1e-6, affine)
    assert list(ours.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(ours(x), plain(x))
    ours.__class__ = nn.LayerNorm  # type: ignore[assignment]
    assert torch.equal(ours(x), plain(x))


def test_with_a_branch_and_the_adaptive_form():
    norm = AddLayerNorm(16, elementwise_affine=False)
    x, branch, (gain, shift, gate) = torch.randn(2, 5, 16), torch.randn(2, 5, 16), torch.randn(3, 2, 16)
    stream, y = norm(x, branch, with_stream=True, gain=gain, shift=shift, gate=gate)
    torch.testing.assert_close(stream, x + gate[:, None] * branch)
    torch.testing.assert_close(y, nn.functional.layer_norm(stream, (16,)) * (1 + gain[:, None]) + shift[:, None])


def replaced_forward(norm: AddLayerNorm) -> nn.Module:
    norm.forward = lambda x: 2 * nn.functional.layer_norm(x, (16,))  # type: ignore[method-assign]
    return norm


@pytest.mark.parametrize("replace", [Doubled, replaced_forward, lambda norm: nn.Identity()])
def test_anything_else_is_called_as_it_is(replace):
    norm = replace(AddLayerNorm(16))
    x, branch = torch.randn(2, 2, 5, 16).unbind()
    for added in (None, branch):
        stream, y = add_norm(norm, x, added)
        assert torch.equal(stream, x if added is None else x + added)
        assert torch.equal(y, norm(stream))


def test_plain_layers_in_its_place_give_the_same_network():
    model, inputs = UViT(CONFIG), batch()
    expected = output_and_gradients(model, inputs)
    for module in list(model.modules()):
        if isinstance(module, AddLayerNorm):
            module.__class__ = nn.LayerNorm  # type: ignore[assignment]
    for ours, plain in zip(output_and_gradients(model, inputs), expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


def test_hooks_see_each_norm_called_once():
    model, calls = UViT(CONFIG), Counter()
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    for name, module in norms.items():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    model(*batch())
    assert calls == dict.fromkeys(norms, 1)
    assert len(norms) == 2 * (CONFIG.depth + 1) + 1


def test_under_autocast_no_norm_writes_fp32_for_a_product_in_16_bits():
    model, found = UViT(CONFIG), []
    for name, layer in model.named_modules():
        if name.endswith((".qkv", ".fc1")):
            layer.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(*batch())
    assert found == [torch.bfloat16] * 2 * (CONFIG.depth + 1)
