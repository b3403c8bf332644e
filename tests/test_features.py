"""Hidden features by block: those of ``forward``, each computed once, and nothing behind the last that is asked for."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from plain_networks import ADM, DDPM, DIT, UVIT, _drawn
from torch import Tensor

from scalelong.model.dit import DiT
from scalelong.model.skip_scale import make_skip_scale
from scalelong.model.unet import UNet
from scalelong.model.uvit import UViT

TEXT = replace(UVIT, num_classes=0, context_tokens=5, context_dim=12)
NETWORKS = {
    "uvit": (UViT, UVIT),
    "uvit-text": (UViT, TEXT),
    "dit": (DiT, DIT),
    "ddpm": (UNet, DDPM),
    "adm": (UNet, ADM),
}
CASES: list[Any] = [(name, recompute) for name in NETWORKS for recompute in ("none", "blocks")]
CASES.append(("uvit", 0.5))
each_network = pytest.mark.parametrize("name", NETWORKS)
each_case = pytest.mark.parametrize(("name", "recompute"), CASES, ids=str)


def make(name: str, recompute: Any = "none") -> tuple[Any, tuple[Tensor, ...]]:
    network, config = NETWORKS[name]
    model: Any = _drawn(network(config, skip_scale=make_skip_scale("ls"), recompute=recompute))  # type: ignore[call-arg, arg-type]
    batch: tuple[Tensor, ...] = (torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0]))
    if config.num_classes:
        batch += (torch.tensor([1, 5]),)
    return model, batch + ((torch.randn(2, 5, 12),) if config.context_tokens else ())


def outputs_of_blocks(model: Any, batch: tuple[Tensor, ...]) -> list[Tensor]:
    found: list[Tensor] = []
    handles = [block.register_forward_hook(lambda *a: found.append(a[2])) for _, block in model.named_blocks()]
    model(*batch)
    for handle in handles:
        handle.remove()
    return found


def count_calls(model: Any) -> Counter[str]:
    calls: Counter[str] = Counter()
    for name, block in model.named_blocks():
        block.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


@each_network
def test_the_blocks_are_those_of_the_network_in_the_order_in_which_they_run(name):
    model, batch = make(name)
    calls = count_calls(model)
    model(*batch)
    assert list(calls) == [name for name, _ in model.named_blocks()]
    assert all(model.get_submodule(name) is block for name, block in model.named_blocks())
    taking = [block for _, block in model.skip_blocks()]
    assert len(taking) == len(model.skips) == model.config.num_skips


@each_case
def test_features_are_those_of_forward(name, recompute):
    model, batch = make(name, recompute)
    expected = outputs_of_blocks(model, batch)
    names = [name for name, _ in model.named_blocks()]
    found = model.features(*batch, blocks=names)
    assert list(found) == names
    assert all(torch.equal(a, b) for a, b in zip(found.values(), expected, strict=True))
    by_number = model.features(*batch, blocks=[-1, 0, 2, names[2]])
    assert list(by_number) == [-1, 0, 2, names[2]]
    assert [torch.equal(by_number[n], expected[n]) for n in (-1, 0, 2)] == [True] * 3
    assert by_number[2] is by_number[names[2]]
    assert torch.equal(model(*batch), model(*batch))


@each_case
def test_features_have_the_gradients_of_forward(name, recompute):
    model, batch = make(name, recompute)
    plain, _ = make(name)
    plain.load_state_dict(model.state_dict())
    wanted = [1, len(model.named_blocks()) - 2]
    expected = outputs_of_blocks(plain, batch)
    losses = (
        torch.stack([x.square().sum() for x in model.features(*batch, blocks=wanted).values()]).sum(),
        torch.stack([expected[n].square().sum() for n in wanted]).sum(),
    )
    for network, loss in zip((model, plain), losses, strict=True):
        loss.backward()
        assert sum(p.grad is not None for p in network.parameters()) > 10
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(p.grad, q.grad)


@each_case
def test_each_block_runs_once_and_none_behind_the_last_that_is_asked_for(name, recompute):
    model, batch = make(name, recompute)
    calls, names = count_calls(model), [name for name, _ in model.named_blocks()]
    middle = len(names) // 2
    model.features(*batch, blocks=[0, middle, names[0]])
    assert calls == Counter(names[: middle + 1])
    calls.clear()
    assert model.features(*batch, blocks=()) == {}
    assert not calls


@each_network
def test_a_block_that_does_not_exist_is_named(name):
    model, batch = make(name)
    number = len(model.named_blocks())
    with pytest.raises(ValueError, match=rf"{type(model).__name__} has no block 'head'; there are (in|blocks)"):
        model.features(*batch, blocks=["head"])
    for wrong in (number, -number - 1):
        with pytest.raises(ValueError, match=rf"has {number} blocks, 0 to {number - 1}, no block {wrong}"):
            model.features(*batch, blocks=[0, wrong])
    with pytest.raises(ValueError, match="expected images of shape"):
        model.features(batch[0][:, :2], *batch[1:], blocks=[0])
