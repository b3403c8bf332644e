"""Muon for hidden matrices, AdamW for every other parameter: one optimizer, under every stage of ZeRO.

Jordan et al., https://kellerjordan.github.io/posts/muon/; with the steps of the size of AdamW's, so that one learning
rate serves both, Liu et al., arXiv:2502.16982. With the gradient G of a matrix (O, I) and momentum mu:

    M <- mu M + (1 - mu) G,    W <- (1 - eta lambda) W - eta 0.2 sqrt(max(O, I)) NS((1 - mu) G + mu M)

NS is five Newton-Schulz iterations, which bring all singular values near 1: torch.optim.Muon computes them, in bf16.
ZeRO cuts matrices anywhere, and an iteration needs them whole: ranks take turns, each makes the step of every n-th
matrix. The momentum stays cut, in the place where AdamW keeps its mean of gradients.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scalelong.model.backbone import ParameterGroup
from scalelong.model.hidden_matrices import HiddenMatrix
from scalelong.train.zero import shards

MOMENTUM = "exp_avg"
"""The state of a hidden matrix, under the name of the mean of gradients of AdamW."""


HIDDEN = "is_hidden"
"""Of a group: its parameters are hidden matrices."""


class Fragment(NamedTuple):
    """This rank's part of a parameter in what the optimizer updates."""

    parameter: Any
    begin: int
    numel: int
    """0 where another rank has all of it."""


class Muon(torch.optim.AdamW):
    """AdamW whose groups of hidden matrices take orthogonalised steps instead.

    All ranks must call ``step`` together, with the same groups.

    Args:
        groups: as ``torch.optim.AdamW`` takes them; those of hidden matrices hold a true ``HIDDEN``.
        matrices: of every hidden matrix, how it divides.
        momentum: the decay of the mean of their gradients.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        matrices: Mapping[nn.Parameter, HiddenMatrix],
        *,
        momentum: float,
        betas: tuple[float, float],
    ):
        super().__init__(groups, lr=0.0, betas=betas, fused=True)
        # Else fp16's scaler would leave it to the kernel of AdamW to take the loss scale out.
        self._step_supports_amp_scaling = False
        self.matrices = dict(matrices)
        self.momentum = momentum
        self.stage = 0
        self._fragments: dict[Tensor, list[Fragment]] = {}

    def follow(self, engine: Any) -> None:
        """Learns from an engine of DeepSpeed what lies where in the flat tensors that it updates."""
        self.stage, zero = engine.zero_optimization_stage(), engine.optimizer
        if self.stage in (1, 2):
            flats, groups = zero.single_partition_of_fp32_groups, zero.bit16_groups
        elif self.stage == 3:
            flats, groups = zero.fp32_partitioned_groups_flat, zero.fp16_groups
        else:
            return
        make = _shards_in_order if self.stage == 3 else _mapped_fragments
        self._fragments = {flat: make(parameters) for flat, parameters in zip(flats, groups, strict=True)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of every group that has parameters just now."""
        assert closure is None
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group.get(HIDDEN)]
            if self.param_groups:
                super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get(HIDDEN):
                self._step_of_matrices(group)

    def _step_of_matrices(self, group: dict[str, Any]) -> None:
        moved = [(flat, self._with_momentum(flat)) for flat in group["params"] if flat.grad is not None]
        lr, decay = group["lr"], group["weight_decay"]
        for flat, _ in moved:
            flat.mul_(1 - lr * decay)
        turns = [
            (flat, update, fragment)
            for flat, update in moved
            for fragment in self._fragments.get(flat, [Fragment(flat, 0, flat.numel())])
        ]
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        for first in range(0, len(turns), ranks):
            turn = turns[first : first + ranks]
            parts = [update.flatten()[f.begin :][: f.numel] if self.stage else update for _, update, f in turn]
            steps = self._orthogonalised([fragment.parameter for _, _, fragment in turn], parts)
            for (flat, _, fragment), whole in zip(turn, steps, strict=True):
                step = shards.cut(fragment.parameter, whole, self.stage)
                target = flat[fragment.begin :][: fragment.numel] if self.stage else flat
                target.add_(step, alpha=-lr)

    def _with_momentum(self, flat: Tensor) -> Tensor:
        """Takes the gradient into the momentum; what Nesterov's form of it comes to."""
        state = self.state[flat]
        if not state:
            state.update({"step": torch.tensor(0.0, device=flat.device), MOMENTUM: torch.zeros_like(flat)})
        state["step"] += 1
        assert flat.grad is not None
        state[MOMENTUM].lerp_(flat.grad, 1 - self.momentum)
        return flat.grad.lerp(state[MOMENTUM], self.momentum)

    def _orthogonalised(self, parameters: Sequence[Any], parts: Sequence[Tensor]) -> Iterable[Tensor]:
        """The whole steps of as many matrices as there are ranks, or fewer: rank n makes that of the n-th."""
        rank, distributed, mine = (dist.get_rank(), True, None) if dist.is_initialized() else (0, False, None)
        shapes = []
        for place, (parameter, part) in enumerate(zip(parameters, parts, strict=True)):
            whole = shards.gather(parameter, part, self.stage)
            shapes.append(whole.shape)
            if place == rank:
                mine = self.matrices[parameter].apply(whole, orthogonalised)
        for place, (shape, part) in enumerate(zip(shapes, parts, strict=True)):
            step = mine if place == rank and mine is not None else part.new_empty(shape)
            if distributed:
                dist.broadcast(step := step.contiguous(), src=place)
            yield step


def orthogonalised(matrix: Tensor) -> Tensor:
    """0.2 sqrt(max(O, I)) times a matrix (O, I) with its singular values brought near 1: its entries have RMS 0.2."""
    step = nn.Parameter(torch.zeros_like(matrix))
    step.grad = matrix
    options: dict[str, Any] = {"weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
    torch.optim.Muon([step], lr=1.0, adjust_lr_fn="match_rms_adamw", **options).step()
    return -step.detach()


def split_group(
    group: ParameterGroup, matrices: Mapping[str, HiddenMatrix]
) -> tuple[ParameterGroup | None, ParameterGroup | None]:
    """A group of a network as AdamW has it, less the hidden matrices; and these, with rates as they take for Muon.

    AdamW's step changes what a hidden matrix puts out by as much as it has inputs, Muon's by the root of that. muP
    therefore divides the rate by sqrt(m) and not by m, m being what epsilon is divided by; elsewhere m is 1.
    """
    others = tuple(name for name in group.names if name not in matrices)
    hidden = tuple(name for name in group.names if name in matrices)
    root = group.epsilon_factor**-0.5
    return (
        group._replace(names=others) if others else None,
        group._replace(
            names=hidden,
            learning_rate_factor=group.learning_rate_factor * root,
            weight_decay_factor=group.weight_decay_factor / root,
        )
        if hidden
        else None,
    )


def _mapped_fragments(parameters: Iterable[Any]) -> list[Fragment]:
    """Under ZeRO 1 and 2 the rank's partition of a group begins and ends anywhere."""
    fragments = []
    for parameter in parameters:
        if parameter._hp_mapping is None:
            fragments.append(Fragment(parameter, 0, 0))
        else:
            address = parameter._hp_mapping.hp_fragment_address
            fragments.append(Fragment(parameter, address.start, address.numel))
    return fragments


def _shards_in_order(parameters: Iterable[Any]) -> list[Fragment]:
    """Under ZeRO 3 it is a shard of each parameter, one behind the other."""
    fragments, begin = [], 0
    for parameter in parameters:
        fragments.append(Fragment(parameter, begin, parameter.ds_tensor.numel()))
        begin += fragments[-1].numel
    return fragments
