"""Which implementation of the operators runs: "triton", "native" (the C++ library for CPUs) or "reference".

CUDA tensors take Triton, CPU tensors the native library; with TRITON_INTERPRET=1, CPU tensors take Triton as well.
What neither can take (fp64, other devices, transforms of torch.func) is computed by the plain PyTorch reference.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from scalelong.kernels import native_library

BACKENDS = ("triton", "native", "reference")
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BUILD_COMMAND = "pip install -e . (or, without installing, python setup.py build_ext --inplace)"

_interprets = os.environ.get("TRITON_INTERPRET") == "1"
_forced: str | None = None
_has_warned = False


def get_backend(tensor: Tensor) -> str:
    """What an operator runs when its first argument is ``tensor``.

    Raises:
        RuntimeError: ``use_backend`` forces a backend that cannot take this tensor; says why.
    """
    if _forced is not None:
        reason = _why_not(_forced, tensor)
        if reason is not None:
            raise RuntimeError(f"the backend {_forced!r} cannot run: {reason}")
        return _forced
    if tensor.dtype not in FUSED_DTYPES or in_transform():
        return "reference"
    if tensor.device.type == "cuda":
        return "triton" if _why_no_triton() is None else "reference"
    if tensor.device.type != "cpu":
        return "reference"
    if _interprets:
        return "triton"
    if native_library.ERROR is None:
        return "native"
    _warn_once()
    return "reference"


def in_transform() -> bool:
    """Inside torch.func.grad, vmap, jvp and their like, which see through the reference alone."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def forced_backend() -> str | None:
    """What ``use_backend`` forces."""
    return _forced


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces ``name`` for the operators called inside; they raise for tensors that it cannot take.

    Raises:
        ValueError: no such backend.
        RuntimeError: it cannot run on this machine; says why.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is none of {', '.join(BACKENDS)}")
    reason = _why_not(name)
    if reason is not None:
        raise RuntimeError(f"the backend {name!r} cannot run: {reason}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


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
            return f"{native_library.ERROR}; build it with: {BUILD_COMMAND}"
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
            f"Build it with: {BUILD_COMMAND}",
            stacklevel=5,
        )
