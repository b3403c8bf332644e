"""Plans: what a kind of call launches, worked out once.

A plan's launches name the tensors of a call by ``Slot``; numbers, tilings and compiled kernels are in them. It serves
all calls whose tensors have the same ``signature``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from scalelong.kernels.launches import Launch, Prepared, prepare
from scalelong.kernels.triton_device import current_device


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
        # The places of its tensors, and bytes from where they start: all with offsets are in fp32.
        self._offsets = [
            [(slot.tensor, 4 * slot.offset) for slot in _slots_of(launch.arguments)] for launch in self.launches
        ]
        self._prepared: list[Prepared] | None = None

    def run(self, tensors: Sequence[Tensor | None]) -> None:
        if self._prepared is None:
            with current_device(next(x for x in tensors if x is not None)):
                prepared = [prepare(_bound(launch, tensors)) for launch in self.launches]
            if all(x.takes_addresses for x in prepared):  # neither interpreted nor only recorded
                self._prepared = prepared
            return
        for prepared, offsets in zip(self._prepared, self._offsets, strict=True):
            prepared(*[tensors[i].data_ptr() + offset for i, offset in offsets])  # type: ignore[union-attr]


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
