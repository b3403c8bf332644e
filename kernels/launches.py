"""Launches of Triton kernels, of which all but the first go round Triton's own path, 10 to 19 us of the host.

A compiled kernel takes its arguments as they are: whoever keeps a ``Prepared`` vouches that from launch to launch only
addresses of tensors differ. It belongs in a plan whose key holds the ``signature`` of each tensor.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from scalelong.kernels.triton_device import current_device

T = TypeVar("T")


class Launch(NamedTuple):
    """One launch of a kernel, with all that Triton needs for it."""

    kernel: Any
    """What ``triton.jit`` returned. Its compile-time constants come last in its signature."""
    num_programs: int | tuple[int, ...]
    arguments: tuple[Any, ...]
    """Tensors, numbers, None, and tuples of these, in the order of the signature."""
    constants: Mapping[str, Any]
    """The compile-time constants, by name."""
    num_warps: int
    options: Mapping[str, int] = {}
    """Of the compiler: maxnreg, num_stages."""

    @property
    def grid(self) -> tuple[int, ...]:
        return self.num_programs if isinstance(self.num_programs, tuple) else (self.num_programs,)

    def through_triton(self) -> Any:
        """Launches it, compiled first where need be. Returns the CompiledKernel; None when interpreted."""
        return self.kernel[self.grid](*self.arguments, **self.constants, num_warps=self.num_warps, **self.options)


def signature(x: Tensor | None) -> tuple[Any, ...] | None:
    """What a plan's key holds of a tensor; an address that is a multiple of 16 has a kernel of its own."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % 16, x.device)


def prepare(launch: Launch) -> "Prepared":
    """Launches once through Triton, and keeps what the next launches need, which is no tensor."""
    return Prepared(launch, launch.through_triton())


class Prepared:
    """A launch to repeat, on the device that was current when it was prepared and on any stream that is."""

    def __init__(self, launch: Launch, compiled: Any) -> None:
        # A compiled kernel is given its constants too, and leaves them out.
        constants = (launch.constants[name] for name in launch.kernel.arg_names[len(launch.arguments) :])
        self._leaves: list[Any] = []
        self._tensors: list[int] = []  # places among the leaves
        self._tuples: list[tuple[int, int, Any]] = []  # first leaf, number of members, how to make it; inner ones first
        self._flatten(launch.arguments)
        self._leaves += constants
        self._num_arguments = len(launch.arguments)
        self._launch = launch._replace(arguments=())
        self._grid = (*launch.grid, 1, 1)[:3]
        self._keep(compiled)

    def _flatten(self, arguments: tuple[Any, ...]) -> None:
        for x in arguments:
            if isinstance(x, tuple):
                self._tuples.insert(0, (len(self._leaves), len(x), getattr(x, "_make", tuple)))
                self._flatten(x)
                continue
            if isinstance(x, Tensor):
                self._tensors.append(len(self._leaves))
                x = None
            self._leaves.append(x)

    @property
    def takes_addresses(self) -> bool:
        """False where a launch goes through Triton, which needs tensors: interpreted, or recorded instead of run."""
        return self._compiled is not None

    def __call__(self, *pointers: Tensor | int) -> None:
        """Launches it with these tensors, in the order in which they occur, or, faster, with their addresses."""
        arguments = self._leaves.copy()
        for i, pointer in zip(self._tensors, pointers, strict=True):
            arguments[i] = pointer
        for first, length, make in self._tuples:
            arguments[first : first + length] = [make(arguments[first : first + length])]
        if (compiled := self._compiled) is None:
            own = tuple(arguments[: self._num_arguments])
            return self._keep(self._launch._replace(arguments=own).through_triton())
        active: Any = driver.active
        if active.get_current_device() != self._device:
            with torch.cuda.device(self._device):
                return self(*pointers)
        stream = active.get_current_stream(self._device)
        runtime, metadata = knobs.runtime, None
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # a chain of hooks may be empty
            metadata = compiled.launch_metadata(self._grid, stream, *arguments)
        else:
            enter = leave = None
        self._run(*self._grid, stream, compiled.function, compiled.packed_metadata, metadata, enter, leave, *arguments)

    def _keep(self, compiled: Any) -> None:
        self._compiled: Any = compiled if isinstance(compiled, CompiledKernel) else None
        if self._compiled is not None:
            active: Any = driver.active
            self._run, self._device = self._compiled.run, active.get_current_device()
            self._tuples = [(first, length, tuple) for first, length, _ in self._tuples]  # it knows no names


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


class Plans(Kept[Prepared]):
    """The launches of an operator, each prepared at its first call and kept by what it depends on."""

    def launch(self, key: Hashable, make: Callable[[], Launch], tensors: Iterable[Tensor | None]) -> None:
        """Launches what ``make`` returns, or what it returned before for this key and tensors of these signatures.

        ``tensors`` are those among its arguments, in their order.
        """
        given = [x for x in tensors if x is not None]
        key = (key, *map(signature, tensors))
        prepared = self.get(key)
        if prepared is not None:
            return prepared(*given)
        with current_device(given[0]):
            prepared = prepare(make())
        if prepared.takes_addresses:
            self.keep(key, prepared)
