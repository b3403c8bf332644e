"""The projection of a scaled skip by the BLAS library: two products, the second added to the first.

x and s may be wider than the product, as may the gradients that are filled: they are copied for as long as it takes.

Shapes: M rows, D1 width of x, D2 width of s, O width of the output. Weights may be slices of one matrix.
"""

import torch
from torch import Tensor


def forward(
    x_MD1: Tensor,
    s_MD2: Tensor,
    row_scale_M: Tensor | None,
    weight_x_OD1: Tensor,
    weight_s_OD2: Tensor,
    bias_O: Tensor | None,
    y_MO: Tensor,
    float_scale: float = 1.0,
) -> None:
    """y = x Wxᵀ + scale * (s Wsᵀ) + bias; the scale is that of the row or, where there is none, ``float_scale``.

    In 16 bits the concatenation is written after all, for as long as the product takes: a product that is rounded
    before the other is added makes up to 2.2 times the error of one product.
    """
    dtype = weight_x_OD1.dtype
    bias_O = None if bias_O is None else bias_O.to(dtype)
    weight_s_OD2 = _scaled(weight_s_OD2, float_scale)
    if dtype != torch.float32:
        weight_OD = torch.cat([weight_x_OD1, weight_s_OD2], dim=1)
        x_MD = _concatenated(x_MD1, s_MD2, row_scale_M, dtype)
        if bias_O is None:
            torch.mm(x_MD, weight_OD.t(), out=y_MO)
        else:
            torch.addmm(bias_O, x_MD, weight_OD.t(), out=y_MO)
        return
    # Where the CPU has no 16-bit products, they are fp32 and only the result is rounded.
    out_MO = y_MO if y_MO.dtype == dtype else y_MO.new_empty(y_MO.shape, dtype=dtype)
    x_MD1, s_MD2 = x_MD1.to(dtype), s_MD2.to(dtype)
    if row_scale_M is None:
        if bias_O is None:
            torch.mm(x_MD1, weight_x_OD1.t(), out=out_MO)
        else:
            torch.addmm(bias_O, x_MD1, weight_x_OD1.t(), out=out_MO)
        torch.addmm(out_MO, s_MD2, weight_s_OD2.t(), out=out_MO)  # which, unlike addmm_, FlopCounterMode counts
    else:
        torch.mm(s_MD2, weight_s_OD2.t(), out=out_MO)
        row_scale_M1 = row_scale_M.to(dtype)[:, None]
        if bias_O is None:
            out_MO.mul_(row_scale_M1)
        else:
            torch.addcmul(bias_O, out_MO, row_scale_M1, out=out_MO)
        torch.addmm(out_MO, x_MD1, weight_x_OD1.t(), out=out_MO)
    if out_MO is not y_MO:
        y_MO.copy_(out_MO)


def backward_inputs(
    dy_MO: Tensor,
    weight_x_OD1: Tensor,
    weight_s_OD2: Tensor,
    s_MD2: Tensor,
    row_scale_M: Tensor | None,
    dx_MD1: Tensor | None,
    ds_MD2: Tensor | None,
    drow_M: Tensor | None,
    float_scale: float = 1.0,
) -> None:
    """dx = dy Wx, ds = scale * (dy Ws), drow = sum of s * (dy Ws) over the channels; None: not wanted."""
    dy_MO = dy_MO.to(weight_x_OD1.dtype)
    if dx_MD1 is not None:
        _multiply(dy_MO, weight_x_OD1, dx_MD1)
    if ds_MD2 is None and drow_M is None:
        return
    ds_MD2 = torch.empty_like(s_MD2) if ds_MD2 is None else ds_MD2
    _multiply(dy_MO, _scaled(weight_s_OD2, float_scale), ds_MD2)
    if row_scale_M is not None:
        if drow_M is not None:
            torch.sum(s_MD2 * ds_MD2, dim=1, dtype=drow_M.dtype, out=drow_M)
        ds_MD2 *= row_scale_M.to(ds_MD2.dtype)[:, None]


def backward_weight(
    dy_MO: Tensor,
    x_MD1: Tensor,
    s_MD2: Tensor,
    row_scale_M: Tensor | None,
    dweight_OD: Tensor,
    float_scale: float = 1.0,
) -> None:
    """dW = [dyᵀ x, (scale * dy)ᵀ s], in the dtype of dy."""
    dtype = dy_MO.dtype
    dweight_x, dweight_s = dweight_OD.split((x_MD1.shape[1], s_MD2.shape[1]), dim=1)
    _multiply(dy_MO.t(), x_MD1.to(dtype), dweight_x)
    if row_scale_M is not None:
        dy_MO = dy_MO * row_scale_M.to(dtype)[:, None]
    _multiply(dy_MO.t(), s_MD2.to(dtype), dweight_s)
    if row_scale_M is None and float_scale != 1.0:
        dweight_s *= float_scale


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, straight into a wider dtype where the library can."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda and out.dtype == torch.float32:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        out.copy_(a @ b)


def _concatenated(x_MD1: Tensor, s_MD2: Tensor, row_scale_M: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[x, row_scale * s], cast while it is written."""
    D1 = x_MD1.shape[1]
    x_MD = x_MD1.new_empty((x_MD1.shape[0], D1 + s_MD2.shape[1]), dtype=dtype)
    x_MD[:, :D1].copy_(x_MD1)
    x_MD[:, D1:].copy_(s_MD2 if row_scale_M is None else (s_MD2 * row_scale_M[:, None]).to(s_MD2.dtype))
    return x_MD


def _scaled(weight_OD: Tensor, float_scale: float) -> Tensor:
    return weight_OD if float_scale == 1.0 else weight_OD * float_scale
