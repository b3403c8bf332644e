"""Whole networks under torch.func's transforms and create_graph, against the same networks written plainly."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_networks import ADM, DDPM, PAIRS, Pair, diffusers_unet, unet, uvit
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from scalelong.model.backbone import Backbone

NETWORKS: dict[str, Callable[[], Pair]] = {
    **PAIRS,
    "uvit-cs": lambda: uvit("cs"),
    "uvit-ls-separate": lambda: uvit("ls-separate"),
    "unet-ls-after-norm": lambda: unet(ADM, "ls", "after-norm"),
    "unet-ls-separate": lambda: unet(DDPM, "ls-separate"),
    "diffusers-none": lambda: diffusers_unet("none"),
}
each_network = pytest.mark.parametrize("name", NETWORKS)


def make(name: str) -> Pair:
    if name.startswith("diffusers"):
        pytest.importorskip("diffusers")
    return NETWORKS[name]()


class Called(nn.Module):
    """A network as a function of nothing, or of the image in place of that of the batch."""

    def __init__(self, network: nn.Module, call: Callable[..., Tensor]):
        super().__init__()
        self.network, self.call = network, call

    def forward(self, x: Tensor | None = None) -> Tensor:
        if x is None:
            return self.call(self.network)
        # The first argument, or the one named "sample" of diffusers, is the image.
        handle = self.network.register_forward_pre_hook(
            lambda module, args, named: ((), {**named, "sample": x}) if "sample" in named else ((x, *args[1:]), named),
            with_kwargs=True,
        )
        try:
            return self.call(self.network)
        finally:
            handle.remove()


def parameters_of(network: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: p.detach().to(dtype) for name, p in network.named_parameters()}


def image(dtype: torch.dtype) -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3)).to(dtype)


def assert_close(found: Sequence[Tensor], plain: Sequence[Tensor], truths: Sequence[Tensor]) -> None:
    """Against the truth at most three times as wrong as the plain network, but for gradients that only round off."""
    assert len(found) == len(plain) == len(truths)
    largest = max(float(truth.abs().max()) for truth in truths)
    for x, expected, truth in zip(found, plain, truths, strict=True):
        assert x.shape == truth.shape
        floor = 64 * torch.finfo(torch.float32).eps * (float(truth.abs().max()) + 1e-1 * largest)
        error, allowed = ((y.double() - truth).abs().max().item() for y in (x, expected))
        assert error <= 3 * allowed + floor, f"error {error:.3g}, plain {allowed:.3g}, size {truth.abs().max():.3g}"


def in_each(pair: Pair, results: Callable[[nn.Module, torch.dtype], Sequence[Tensor]]) -> None:
    """``results`` of ours and of the plain network in fp32, and of the plain one in fp64 for a truth."""
    truth = copy.deepcopy(pair.plain).double()
    with plain_attention(pair.ours):
        found = results(Called(pair.ours, pair.call), torch.float32)
    with sdpa_kernel(SDPBackend.MATH), dense_group_norm():
        plain = results(Called(pair.plain, pair.call), torch.float32)
        truths = results(Called(truth, pair.call), torch.float64)
    assert_close(found, plain, truths)


@contextmanager
def dense_group_norm() -> Iterator[None]:
    """PyTorch's transforms of a GroupNorm fail over what is not contiguous; ours take it."""
    with pytest.MonkeyPatch.context() as patch:
        original = F.group_norm
        patch.setattr(F, "group_norm", lambda x, *arguments: original(x.contiguous(), *arguments))
        yield


def plain_attention(network: nn.Module) -> Any:
    """PyTorch's kernels end in a derivative that is not there; our networks find a way round by themselves."""
    return nullcontext() if isinstance(network, Backbone) else sdpa_kernel(SDPBackend.MATH)


@each_network
def test_gradients_and_products_with_jacobians(name):
    def results(network: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        parameters, x = parameters_of(network, dtype), image(dtype)

        def output(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(network, parameters, (x,))

        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return output(parameters, x).square().mean()

        d_parameters, dx = grad(loss, (0, 1))(parameters, x)
        y, back = vjp(output, parameters, x)  # type: ignore[misc]
        sent_back, sent_back_x = back(torch.ones_like(y))
        along = {name: torch.ones_like(p) for name, p in parameters.items()}
        value, derivative = jvp(output, (parameters, x), (along, torch.ones_like(x)))  # type: ignore[misc]
        return [*d_parameters.values(), dx, y, *sent_back.values(), sent_back_x, value, derivative]

    in_each(make(name), results)


@each_network
def test_gradients_of_each_sample(name):
    """With respect to the parameters, as for differential privacy, and the image."""

    def results(network: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        parameters = parameters_of(network, dtype)

        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(network, parameters, (torch.stack([x, x]),)).square().mean()

        d_parameters, dx = vmap(grad(loss, (0, 1)), in_dims=(None, 0))(parameters, image(dtype))
        assert all(d.shape[0] == 2 for d in d_parameters.values())
        return [*d_parameters.values(), dx]

    in_each(make(name), results)


@pytest.mark.parametrize("name", ["uvit", "unet-adm", "diffusers"])
def test_an_ensemble_by_vmap_over_the_weights(name):
    def results(network: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        stacked = {key: torch.stack([p, 1.05 * p]) for key, p in parameters_of(network, dtype).items()}
        return [
            vmap(lambda weights, x: functional_call(network, weights, (x,)), in_dims=(0, None))(stacked, image(dtype))
        ]

    in_each(make(name), results)


@pytest.mark.parametrize("name", ["uvit", "unet-ddpm", "diffusers"])
def test_gradients_of_gradients_by_transforms(name):
    def results(network: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        parameters = parameters_of(network, dtype)

        def penalty(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return grad(lambda x: functional_call(network, parameters, (x,)).square().mean())(x).square().sum()

        return list(grad(penalty)(parameters, image(dtype)).values())

    in_each(make(name), results)


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@each_network
def test_a_gradient_penalty(name, recomputed):
    """create_graph=True through the whole network, for the parameters and for the image."""
    pair = make(name)
    if recomputed:
        for network in (pair.ours, pair.plain):
            network.enable_gradient_checkpointing() if name.startswith("diffusers") else setattr(
                network, "recompute", "blocks"
            )

    def results(network: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        x, leaves = image(dtype).requires_grad_(), list(network.parameters())
        loss = network(x).square().mean()
        first = torch.autograd.grad(loss, [x, *leaves], create_graph=True)
        penalty = torch.stack([(d * d).sum() for d in first]).sum()
        second = torch.autograd.grad(penalty, [x, *leaves], allow_unused=True)
        return [*first, *(torch.zeros_like(p) if d is None else d for d, p in zip(second, [x, *leaves], strict=True))]

    in_each(pair, lambda network, dtype: [d.detach() for d in results(network, dtype)])


def test_a_jacobian():
    def results(network: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        def corner(x: Tensor) -> Any:
            return network(x)[0, 0, 0, :2]

        return [jacrev(corner)(image(dtype))]

    in_each(make("uvit"), results)
