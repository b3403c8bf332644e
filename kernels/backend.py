"""Which implementation of the operators runs: "triton", "native" (the C++ library for CPUs) or "reference".

CUDA tensors take Triton, CPU tensors the native library; with TRITON_INTERPRET=1, CPU tensors take Triton as well.
What neither can take (fp64, other devices, transforms of torch.func) is computed by the plain PyTorch reference.
``get_backend`` tells it of a call, a direction of which may also be left to PyTorch's own kernels ("torch").
"""

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from scalelong.kernels import native_library

BACKENDS = ("triton", "native", "reference")
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_interprets = os.environ.get("TRITON_INTERPRET") == "1"
_has_warned = False


class _Forced(NamedTuple):
    """A ``use_backend`` that is entered."""

    thread: int
    backend: str


_lock = threading.Lock()
_forced: list[_Forced] = []
_forced_last: str | None = None
"""The backend of the last entry, of whatever thread: torch.compile can guard a plain global, and no more than that."""


class Backends(NamedTuple):
    """What computes a call of an operator, by direction."""

    forward: str
    backward: str


_PROXY = torch._C._TorchDispatchModeKey.PROXY
_TELLING: dict[Callable[..., Any], Callable[..., Backends]] = {}


@overload
def get_backend(operator: Tensor) -> str: ...
@overload
def get_backend(operator: Callable[..., Any], *arguments: Any, **options: Any) -> Backends: ...
def get_backend(operator: Callable[..., Any] | Tensor, *arguments: Any, **options: Any) -> Backends | str:
    """What the call ``operator(*arguments, **options)`` runs here and now, forward and backward.

    Args:
        operator: one of this package's, such as ``skip_linear``; its arguments follow as it takes them. A tensor alone
            asks whose kernels operators take for it: "triton", "native" or "reference".

    Returns:
        Of each direction "triton" or "native", the kernels of this package for GPUs and CPUs; "torch", PyTorch's own
        kernels, which an operator calls where none of ours is faster (products of matrices, convolutions, attention);
        "reference", the plain formula, differentiated by autograd; or the name of a package of attention, such as
        "fa3". "triton+torch" where the products of one direction differ. Backward under create_graph=True always
        takes the reference.

    Raises:
        TypeError: ``operator`` is none of this package's.
        RuntimeError: ``use_backend`` forces a backend that cannot take these tensors; says why.
    """
    if isinstance(operator, Tensor):
        return backend_of(operator)
    if operator not in _TELLING:
        known = ", ".join(sorted(each.__name__ for each in _TELLING))
        raise TypeError(f"get_backend: {operator!r} is no operator that tells what it runs; those imported are {known}")
    return _TELLING[operator](*arguments, **options)


def tells(operator: Callable[..., Any]) -> Callable[[Callable[..., Backends]], Callable[..., Backends]]:
    """Decorates what answers ``get_backend`` for ``operator``, by the choices that the operator itself makes."""

    def keep(telling: Callable[..., Backends]) -> Callable[..., Backends]:
        _TELLING[operator] = telling
        return telling

    return keep


def backend_of(tensor: Tensor) -> str:
    """Whose kernels an operator takes when its first argument is ``tensor``: "triton", "native" or "reference".

    Raises:
        RuntimeError: ``use_backend`` forces a backend that cannot take this tensor; says why.
    """
    forced = forced_backend()
    if forced is not None:
        reason = _why_not(forced, tensor)
        if reason is not None:
            raise RuntimeError(f"the backend {forced!r} cannot run: {reason}")
        return forced
    if tensor.dtype not in FUSED_DTYPES or in_transform() or is_wrapper(tensor):
        return "reference"
    if tensor.is_cuda:
        return "triton" if _why_no_triton() is None else "reference"
    if not tensor.is_cpu:
        return "reference"
    if _interprets:
        return "triton"
    if native_library.ERROR is None:
        return "native"
    _warn_once()
    return "reference"


def is_traced() -> bool:
    """Under torch.compile, torch.export or make_fx, which record operators as registered, not what those launch."""
    return torch.compiler.is_compiling() or torch._C._get_dispatch_mode(_PROXY) is not None


def is_compiled() -> bool:
    """Under torch.compile, whose graph runs on the device that it was made on; an exported one may go to another."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def is_wrapper(tensor: Tensor) -> bool:
    """Made of other tensors, as DTensor and quantised ones are: PyTorch's operators take them apart, ours cannot."""
    return type(tensor) is not Tensor and hasattr(type(tensor), "__tensor_flatten__")


def in_transform() -> bool:
    """Inside torch.func.grad, vmap, jvp and their like, which see through the reference alone."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def forced_backend() -> str | None:
    """What ``use_backend`` forces in this thread."""
    if torch.compiler.is_compiling() or not _forced:
        return _forced_last
    thread = threading.get_ident()
    for entry in reversed(_forced):
        if entry.thread == thread:
            return entry.backend
    # The threads in which autograd runs backward on a GPU are not Python's: whoever called backward speaks for them.
    return _forced_last if isinstance(threading.current_thread(), threading._DummyThread) else None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces ``name`` for the operators that this thread calls inside; they raise for tensors that it cannot take.

    Other threads choose as before, those of autograd follow the last that entered. Under torch.compile, which cannot
    tell threads apart, so does every thread that compiles or calls what was compiled.

    Raises:
        ValueError: no such backend.
        RuntimeError: it cannot run on this machine; says why.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is none of {', '.join(BACKENDS)}")
    reason = _why_not(name)
    if reason is not None:
        raise RuntimeError(f"the backend {name!r} cannot run: {reason}")
    entry = _Forced(threading.get_ident(), name)
    _change_forced(_forced.append, entry)
    try:
        yield
    finally:
        _change_forced(_forced.remove, entry)


def _change_forced(change: Callable[[_Forced], None], entry: _Forced) -> None:
    global _forced_last
    with _lock:
        change(entry)
        _forced_last = _forced[-1].backend if _forced else None


def _why_not(name: str, tensor: Tensor | None = None) -> str | None:
    """None where ``name`` can run, on ``tensor`` if one is given."""
    if name == "reference":
        return None
    if tensor is not None and tensor.dtype not in FUSED_DTYPES:
        return f"it takes float32, bfloat16 and float16, not {str(tensor.dtype).removeprefix('torch.')}"
    if tensor is not None and in_transform():
        return "torch.func's transforms see through the reference alone"
    if name == "native":
        if native_library.ERROR is not None:
            return f"{native_library.ERROR}; {native_library.how_to_build()}"
        if tensor is not None and tensor.device.type != "cpu":
            return f"it takes CPU tensors, not {tensor.device.type}"
        return None
    if _interprets:
        if tensor is not None and tensor.device.type != "cpu":
            return f"with TRITON_INTERPRET=1 it takes CPU tensors, not {tensor.device.type}"
        return None
    if tensor is not None and tensor.device.type != "cuda":
        return f"it takes CUDA tensors, not {tensor.device.type} (TRITON_INTERPRET=1 runs it on CPU tensors, slowly)"
    return _why_no_triton()


def _why_no_triton() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no GPU (TRITON_INTERPRET=1 runs it on CPU tensors, slowly)"
    return None


def _warn_once() -> None:
    global _has_warned
    if not _has_warned and not torch.compiler.is_compiling():
        _has_warned = True
        warnings.warn(
            f"scalelong: {native_library.ERROR}; the slower plain PyTorch operators run instead. "
            f"To have it, {native_library.how_to_build()}",
            stacklevel=5,
        )
