"""Launches of Triton kernels, planned once for each kind of call and then repeated past Triton's own path.

That path takes 10 to 19 us of the host for each launch; a compiled kernel takes its arguments as they are. Whoever
keeps a ``Plan`` vouches that from call to call only the addresses of tensors differ: it belongs under a key that holds
the ``signature`` of each tensor.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from scalelong.kernels.triton_device import current_device

T = TypeVar("T")
Call = Sequence[Tensor | None]
"""The tensors of a call, in an order that its plan knows."""


class Launch(NamedTuple):
    """One launch of a kernel, with all that Triton needs for it."""

    kernel: Any
    """What ``triton.jit`` returned. Its compile-time constants come last in its signature."""
    num_programs: int | tuple[int, ...]
    arguments: tuple[Any, ...]
    """Slots, numbers, None, and tuples of these, in the order of the signature."""
    constants: Mapping[str, Any]
    """The compile-time constants, by name."""
    num_warps: int
    options: Mapping[str, int] = {}
    """Of the compiler: maxnreg, num_stages."""

    @property
    def grid(self) -> tuple[int, ...]:
        return self.num_programs if isinstance(self.num_programs, tuple) else (self.num_programs,)

    def through_triton(self, tensors: Call) -> Any:
        """Launches it, compiled first where need be. Returns the CompiledKernel; None when interpreted."""
        arguments = _with_tensors(self.arguments, tensors)
        return self.kernel[self.grid](*arguments, **self.constants, num_warps=self.num_warps, **self.options)


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor of a call, by its place among them, from an element in memory on; it may be None."""

    tensor: int
    offset: int = 0

    def of(self, tensors: Call) -> Tensor | None:
        x = tensors[self.tensor]
        if x is None or self.offset == 0:
            return x
        return x.as_strided((max(0, x.numel() - self.offset),), (1,), x.storage_offset() + self.offset)


class Plan:
    """The launches of a call, in their order, and what has to be allocated for them."""

    def __init__(self, launches: Sequence[Launch], outputs: Sequence[tuple[int, ...] | None] = (), workspace: int = 0):
        self.launches = tuple(launches)
        self.outputs = tuple(outputs)
        self.workspace = workspace
        self._compiled: _Compiled | None = None

    @property
    def is_compiled(self) -> bool:
        """False where launches go through Triton: before the first, interpreted, or recorded instead of run."""
        return self._compiled is not None

    def run(self, tensors: Call) -> None:
        if self._compiled is not None:
            return self._compiled.run(tensors)
        with current_device(next(x for x in tensors if x is not None)):
            kernels = [launch.through_triton(tensors) for launch in self.launches]
            if all(isinstance(kernel, CompiledKernel) for kernel in kernels):
                self._compiled = _Compiled(self.launches, kernels, tensors)


class _Compiled:
    """Launches to repeat, on the device that is current when this is made and on any stream that is when it is run.

    All that they hand over is listed once: addresses first, then constants and, as they are made, tuples of these.
    Each launch picks from that list.
    """

    def __init__(self, launches: Sequence[Launch], kernels: Sequence[Any], tensors: Call) -> None:
        found = dict.fromkeys(x for launch in launches for x in _slots_of(launch.arguments))
        slots = [slot for slot in found if tensors[slot.tensor] is not None]
        whole = list(dict.fromkeys(Slot(slot.tensor) for slot in slots))
        parts = [slot for slot in slots if slot.offset]
        self._slots = [*whole, *parts]
        self._given = _picks([slot.tensor for slot in whole])
        # Of each part the place of its tensor, and how many bytes behind it starts.
        self._parts = [
            (whole.index(Slot(slot.tensor)), slot.offset * tensors[slot.tensor].element_size())  # type: ignore[union-attr]
            for slot in parts
        ]
        self._rest: list[Any] = []
        self._tuples: list[
            tuple[int, Callable[[list[Any]], tuple[Any, ...]]]
        ] = []  # the place of each; inner ones first
        self._launches = []
        for launch, kernel in zip(launches, kernels, strict=True):
            # A compiled kernel is given its constants too, and leaves them out.
            names = launch.kernel.arg_names[len(launch.arguments) :]
            places = [*map(self._place, launch.arguments), *(self._keep(launch.constants[name]) for name in names)]
            grid = (*launch.grid, 1, 1)[:3]
            self._launches.append((kernel, kernel.run, grid, kernel.function, kernel.packed_metadata, _picks(places)))
        active: Any = driver.active
        self._device = active.get_current_device()

    def _place(self, x: Any) -> int:
        """Where ``x`` is in the list."""
        if isinstance(x, Slot):
            return self._slots.index(x) if x in self._slots else self._keep(None)
        if isinstance(x, tuple):
            picks = _picks([self._place(part) for part in x])
            self._tuples.append((self._keep(None), picks))
            return self._tuples[-1][0]
        return self._keep(x)

    def _keep(self, x: Any) -> int:
        self._rest.append(x)
        return len(self._slots) + len(self._rest) - 1

    def run(self, tensors: Call) -> None:
        active: Any = driver.active
        if active.get_current_device() != self._device:
            with torch.cuda.device(self._device):
                return self.run(tensors)
        stream = active.get_current_stream(self._device)
        values: list[Any] = [x.data_ptr() for x in self._given(tensors)]
        values += [values[place] + num_bytes for place, num_bytes in self._parts]
        values += self._rest
        for place, picks in self._tuples:
            values[place] = picks(values)
        runtime, metadata = knobs.runtime, None
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if not (getattr(enter, "calls", enter) or getattr(leave, "calls", leave)):  # a chain of hooks may be empty
            enter = leave = None
        for kernel, run, grid, function, packed, picks in self._launches:
            arguments = picks(values)
            if enter is not None or leave is not None:
                metadata = kernel.launch_metadata(grid, stream, *arguments)
            run(*grid, stream, function, packed, metadata, enter, leave, *arguments)


def _picks(places: list[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: tuple(values[place] for place in places)


def _slots_of(arguments: tuple[Any, ...]) -> Iterator[Slot]:
    for x in arguments:
        if isinstance(x, Slot):
            yield x
        elif isinstance(x, tuple):
            yield from _slots_of(x)


def _with_tensors(arguments: Any, tensors: Call) -> Any:
    values = [
        x.of(tensors) if isinstance(x, Slot) else _with_tensors(x, tensors) if isinstance(x, tuple) else x
        for x in arguments
    ]
    return type(arguments)(*values) if hasattr(arguments, "_fields") else tuple(values)


def signature(x: Tensor | None) -> tuple[Any, ...] | None:
    """What a plan's key holds of a tensor; an address that is a multiple of 16 has a kernel of its own."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % 16, x.device)


def places(tensors: Call) -> tuple[Any, ...]:
    """What may differ where ``signature`` did not, of tensors that were saved for backward.

    Hooks on saved tensors may have moved them, and so may whoever shards parameters.
    """
    return tuple([None if x is None else (x.stride(), x.data_ptr() % 16) for x in tensors])


class Kept(Generic[T]):
    """What an operator worked out for a kind of call, by what that depends on."""

    MAX_KEPT = 4096  # beyond which all are forgotten: shapes that vary without end must not fill the memory

    def __init__(self) -> None:
        self._kept: dict[Hashable, T] = {}

    def get(self, key: Hashable) -> T | None:
        return self._kept.get(key)

    def keep(self, key: Hashable, value: T) -> T:
        if len(self._kept) >= self.MAX_KEPT:
            self._kept.clear()
        self._kept[key] = value
        return value

    def of_call(self, tensors: Call, others: tuple[Hashable, ...], make: Callable[[], T]) -> T:
        """What ``make`` returned for tensors of these signatures and these other values; the first tensor is there.

        Nothing is kept of tensors that only stand for real ones, nor inside modes that follow what is computed: in both
        a tensor that ``make`` makes belongs to the one call.
        """
        if torch._C._len_torch_dispatch_stack() or isinstance(tensors[0], FakeTensor):
            return make()
        key = (*map(signature, tensors), *others)
        return self.get(key) or self.keep(key, make())
