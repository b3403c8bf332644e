"""Plans: what a kind of call launches, worked out once.

A plan's launches name the tensors of a call by ``Slot``; numbers, tilings and compiled kernels are in them. It serves
all calls whose tensors have the same ``signature``.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from scalelong.kernels.launches import Launch, Prepared, prepare

MAX_PLANS = 4096  # of an operator: shapes may change with every batch


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor of a call, by its place among them, from an element on."""

    tensor: int
    offset: int = 0

    def of(self, tensors: Sequence[Tensor | None]) -> Tensor | None:
        x = tensors[self.tensor]
        return x if x is None or self.offset == 0 else x[self.offset :]


class Plan:
    """The launches of a call, in their order, and what has to be allocated for them."""

    def __init__(self, launches: Sequence[Launch], outputs: Sequence[tuple[int, ...] | None] = (), workspace: int = 0):
        self.launches = tuple(launches)
        self.outputs = tuple(outputs)
        self.workspace = workspace
        self._slots = [tuple(_slots_of(launch.arguments)) for launch in self.launches]
        self._prepared: list[Prepared] | None = None

    def run(self, tensors: Sequence[Tensor | None]) -> None:
        if self._prepared is None:
            self._prepared = [prepare(_bound(launch, tensors)) for launch in self.launches]
            return
        addresses = None
        for prepared, slots in zip(self._prepared, self._slots, strict=True):
            if prepared.takes_addresses:
                if addresses is None:
                    addresses = [0 if x is None else x.data_ptr() for x in tensors]
                prepared(*[addresses[slot.tensor] + 4 * slot.offset for slot in slots])
            else:
                prepared(*[slot.of(tensors) for slot in slots])  # type: ignore[arg-type]


class Plans:
    """Those of an operator, by what they are for."""

    def __init__(self) -> None:
        self._plans: dict[Hashable, Plan] = {}

    def get(self, key: Hashable) -> Plan | None:
        return self._plans.get(key)

    def keep(self, key: Hashable, plan: Plan) -> Plan:
        if len(self._plans) >= MAX_PLANS:
            self._plans.clear()
        self._plans[key] = plan
        return plan


def _slots_of(arguments: tuple[Any, ...]) -> Iterator[Slot]:
    for x in arguments:
        if isinstance(x, Slot):
            yield x
        elif isinstance(x, tuple):
            yield from _slots_of(x)


def _bound(launch: Launch, tensors: Sequence[Tensor | None]) -> Launch:
    return launch._replace(arguments=_with_tensors(launch.arguments, tensors))


def _with_tensors(arguments: Any, tensors: Sequence[Tensor | None]) -> Any:
    values = [
        x.of(tensors) if isinstance(x, Slot) else _with_tensors(x, tensors) if isinstance(x, tuple) else x
        for x in arguments
    ]
    return type(arguments)(*values) if hasattr(arguments, "_fields") else tuple(values)
