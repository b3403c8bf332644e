"""The projection of a scaled skip by the BLAS library: two products, the second added to the first.

Shapes: M rows, D1 width of x, D2 width of s, O width of the output. Weights may be slices of one matrix.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    x_MD1: Tensor,
    s_MD2: Tensor,
    row_scale_M: Tensor | None,
    weight_x_OD1: Tensor,
    weight_s_OD2: Tensor,
    bias_O: Tensor | None,
    y_MO: Tensor,
) -> None:
    """y = x Wxᵀ + row_scale * (s Wsᵀ) + bias.

    In 16 bits the concatenation is written after all, for as long as the product takes: a product that is rounded
    before the other is added makes up to 2.2 times the error of one product.
    """
    if y_MO.dtype != torch.float32:
        if row_scale_M is not None:
            s_MD2 = (s_MD2 * row_scale_M[:, None]).to(s_MD2.dtype)
        weight_OD = torch.cat([weight_x_OD1, weight_s_OD2], dim=1)
        y_MO.copy_(F.linear(torch.cat([x_MD1, s_MD2], dim=1), weight_OD, bias_O))
        return
    if row_scale_M is None:
        if bias_O is None:
            torch.mm(x_MD1, weight_x_OD1.t(), out=y_MO)
        else:
            torch.addmm(bias_O, x_MD1, weight_x_OD1.t(), out=y_MO)
        y_MO.addmm_(s_MD2, weight_s_OD2.t())
        return
    torch.mm(s_MD2, weight_s_OD2.t(), out=y_MO)
    row_scale_M1 = row_scale_M.to(y_MO.dtype)[:, None]
    if bias_O is None:
        y_MO.mul_(row_scale_M1)
    else:
        torch.addcmul(bias_O, y_MO, row_scale_M1, out=y_MO)
    y_MO.addmm_(x_MD1, weight_x_OD1.t())


def backward_inputs(
    dy_MO: Tensor,
    weight_x_OD1: Tensor,
    weight_s_OD2: Tensor,
    s_MD2: Tensor,
    row_scale_M: Tensor | None,
    dx_MD1: Tensor | None,
    ds_MD2: Tensor | None,
    drow_M: Tensor | None,
) -> None:
    """dx = dy Wx, ds = row_scale * (dy Ws), drow = sum of s * (dy Ws) over the channels; None: not wanted."""
    if dx_MD1 is not None:
        torch.mm(dy_MO, weight_x_OD1, out=dx_MD1)
    if ds_MD2 is None:
        return
    torch.mm(dy_MO, weight_s_OD2, out=ds_MD2)
    if row_scale_M is not None:
        if drow_M is not None:
            torch.sum(s_MD2 * ds_MD2, dim=1, dtype=drow_M.dtype, out=drow_M)
        ds_MD2 *= row_scale_M.to(ds_MD2.dtype)[:, None]


def backward_weight(
    dy_MO: Tensor, x_MD1: Tensor, s_MD2: Tensor, row_scale_M: Tensor | None, dweight_OD: Tensor
) -> None:
    """dW = [dyᵀ x, (row_scale * dy)ᵀ s]."""
    dweight_x, dweight_s = dweight_OD.split((x_MD1.shape[1], s_MD2.shape[1]), dim=1)
    torch.mm(dy_MO.t(), x_MD1, out=dweight_x)
    if row_scale_M is not None:
        dy_MO = dy_MO * row_scale_M.to(dy_MO.dtype)[:, None]
    torch.mm(dy_MO.t(), s_MD2, out=dweight_s)
