"""In which dtype a matrix product is computed."""

import torch
from torch import Tensor


def cast_by_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """As torch's linear and convolutions cast their arguments under autocast; fp64 is left alone."""
    assert tensors[0] is not None
    device = tensors[0].device.type
    if not _has_autocast(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def product_dtype(x: Tensor) -> torch.dtype:
    """fp32 on a CPU whose BLAS library multiplies 16-bit numbers one by one, up to a hundred times slower."""
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return x.dtype
    has_products = (
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if x.dtype == torch.bfloat16
        else torch.ops.mkldnn._is_mkldnn_fp16_supported()
    )
    return x.dtype if has_products else torch.float32


@torch.compiler.assume_constant_result
def _has_autocast(device: str) -> bool:
    # Dynamo of torch 2.11 cannot trace the question, whose answer never changes.
    return torch.amp.is_autocast_available(device)
