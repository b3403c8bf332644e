"""In which dtype a matrix product is computed."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor


def cast_by_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """As torch's linear and convolutions cast their arguments under autocast; fp64 is left alone."""
    assert tensors[0] is not None
    device = tensors[0].device.type
    if not is_autocast(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def is_autocast(device: str) -> bool:
    """Whether autocast is on for this type of device; some have none."""
    return _has_autocast(device) and torch.is_autocast_enabled(device)


@torch.compiler.assume_constant_result
def _has_autocast(device: str) -> bool:
    # Dynamo of torch 2.11 cannot trace the question, whose answer never changes.
    return torch.amp.is_autocast_available(device)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """In which torch's linear would compute with ``x``: without autocast, its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if x.dtype != torch.float64 and is_autocast(device) else x.dtype


def product_dtype(x: Tensor, dtype: torch.dtype | None = None) -> torch.dtype:
    """fp32 on a CPU whose BLAS library multiplies 16-bit numbers one by one, up to a hundred times slower.

    Elsewhere ``dtype``, which is that of ``x`` if it is not given.
    """
    dtype = x.dtype if dtype is None else dtype
    if x.device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    has_products = (
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if dtype == torch.bfloat16
        else torch.ops.mkldnn._is_mkldnn_fp16_supported()
    )
    return dtype if has_products else torch.float32


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Operators inside compute in the dtypes that they are given, on the device of ``x``."""
    device = x.device.type
    if not is_autocast(device):
        return _AS_IT_IS
    # Dynamo of torch 2.11 traces the one; the other costs the host less.
    return torch.autocast(device, enabled=False) if torch.compiler.is_compiling() else _autocast_off(device)


_AS_IT_IS = nullcontext()


@contextmanager
def _autocast_off(device: str) -> Iterator[None]:
    torch.set_autocast_enabled(device, False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, True)
