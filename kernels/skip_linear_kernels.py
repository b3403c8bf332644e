"""The Triton kernels of ``skip_linear`` (skip_linear.py says what it computes; skip_linear_triton.py launches them).

Each product is one kernel over both inputs: neither their concatenation nor the scaled skip is ever written. A scale
of a row s is applied to the fp32 accumulator, or in registers on the way to a product that sums over the rows. x and s
may be wider than the product: they are read as they are and rounded in registers, their gradients are written from the
fp32 accumulator.

Shapes: M tokens of all images, D1 width of x, D2 width of the skip s, OUT width of y. Only the last axis has to be
dense.
"""
# pyright: reportGeneralTypeIssues=false
# (to a type checker, a call of one jitted function by another never returns)

import triton
import triton.language as tl
from triton import knobs

# The interpreter's dot takes bf16 for integers.
_WIDENS_OPERANDS = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def _place(num_row_tiles, num_col_tiles, GROUP_ROWS: tl.constexpr):
    """Row and column, in tiles, of this program: down GROUP_ROWS tiles, then on to the next column."""
    group, local = tl.program_id(0) // (GROUP_ROWS * num_col_tiles), tl.program_id(0) % (GROUP_ROWS * num_col_tiles)
    num_rows = tl.minimum(num_row_tiles - group * GROUP_ROWS, GROUP_ROWS)
    return group * GROUP_ROWS + local % num_rows, local // num_rows


@triton.jit
def _indices(tile, BLOCK: tl.constexpr):
    return tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _add_product(
    acc, a_ptr, b_ptr, k_scale_ptr, row, col, num_rows, num_cols, K,
    a_row_stride, a_k_stride, b_k_stride, b_col_stride, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + a @ b for those rows of a (num_rows, K) and columns of b (K, num_cols), in the type of b.

    ``k_scale`` (K,) multiplies a.
    """
    k = tl.arange(0, BLOCK_K)
    a_pointers = a_ptr + row[:, None] * a_row_stride + k[None, :] * a_k_stride
    b_pointers = b_ptr + k[:, None] * b_k_stride + col[None, :] * b_col_stride
    for first in range(0, K, BLOCK_K):
        inside = k < K - first
        a = tl.load(a_pointers, mask=(row < num_rows)[:, None] & inside[None, :], other=0.0)
        b = tl.load(b_pointers, mask=(col < num_cols)[None, :] & inside[:, None], other=0.0)
        if k_scale_ptr is not None:
            k_scale = tl.load(k_scale_ptr + first + k, mask=inside, other=0.0).to(tl.float32)
            a = (a.to(tl.float32) * k_scale[None, :]).to(a.dtype)
        a = a.to(b.dtype)
        if _WIDENS_OPERANDS:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        a_pointers += BLOCK_K * a_k_stride
        b_pointers += BLOCK_K * b_k_stride
    return acc


@triton.jit
def _store(y_ptr, tile, row, col, num_rows, num_cols, row_stride, col_stride):
    pointers = y_ptr + row[:, None] * row_stride + col[None, :] * col_stride
    mask = (row < num_rows)[:, None] & (col < num_cols)[None, :]
    tl.store(pointers, tile.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _row_scale(row_scale_ptr, row, M):
    return tl.load(row_scale_ptr + row, mask=row < M, other=0.0).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=("M",))
def _skip_linear_fwd_kernel(
    x_ptr,  # (M, D1)
    s_ptr,  # (M, D2)
    row_scale_ptr,  # (M,) or None
    weight_x_ptr,  # (OUT, D1)
    weight_s_ptr,  # (OUT, D2)
    bias_ptr,  # (OUT,) or None
    y_ptr,  # (M, OUT)
    M,
    OUT,
    D1,
    D2,
    x_stride,
    s_stride,
    weight_x_stride,
    weight_s_stride,
    y_stride,
    float_scale,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):
    row_tile, col_tile = _place(tl.cdiv(M, BLOCK_ROWS), tl.cdiv(OUT, BLOCK_COLS), GROUP_ROWS)
    m, o = _indices(row_tile, BLOCK_ROWS), _indices(col_tile, BLOCK_COLS)
    y = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    y = _add_product(y, s_ptr, weight_s_ptr, None, m, o, M, OUT, D2, s_stride, 1, 1, weight_s_stride, BLOCK_K)
    y *= float_scale if row_scale_ptr is None else _row_scale(row_scale_ptr, m, M)
    y = _add_product(y, x_ptr, weight_x_ptr, None, m, o, M, OUT, D1, x_stride, 1, 1, weight_x_stride, BLOCK_K)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + o, mask=o < OUT, other=0.0).to(tl.float32)[None, :]
    _store(y_ptr, y, m, o, M, OUT, y_stride, 1)


@triton.jit(do_not_specialize=("M",))
def _skip_linear_bwd_inputs_kernel(
    dy_ptr,  # (M, OUT)
    weight_x_ptr,  # (OUT, D1)
    weight_s_ptr,  # (OUT, D2)
    s_ptr,  # (M, D2)
    row_scale_ptr,  # (M,) or None
    dx_ptr,  # (M, D1) or None
    ds_ptr,  # (M, D2) or None
    partial_drow_ptr,  # (tiles along D2, M) or None
    M,
    OUT,
    D1,
    D2,
    dy_stride,
    weight_x_stride,
    weight_s_stride,
    s_stride,
    dx_stride,
    ds_stride,
    float_scale,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):
    """A tile of dx, or one of ds and its part of the row scale's gradient."""
    num_x_tiles = 0 if dx_ptr is None else tl.cdiv(D1, BLOCK_COLS)
    num_s_tiles = 0 if ds_ptr is None and partial_drow_ptr is None else tl.cdiv(D2, BLOCK_COLS)
    row_tile, col_tile = _place(tl.cdiv(M, BLOCK_ROWS), num_x_tiles + num_s_tiles, GROUP_ROWS)
    # Two branches with a product each would be merged by the compiler, with the shared memory of both.
    is_skip = col_tile >= num_x_tiles
    col_tile -= tl.where(is_skip, num_x_tiles, 0)
    D = tl.where(is_skip, D2, D1)
    weight_ptr = tl.where(is_skip, weight_s_ptr, weight_x_ptr)
    weight_stride = tl.where(is_skip, weight_s_stride, weight_x_stride)
    m, d = _indices(row_tile, BLOCK_ROWS), _indices(col_tile, BLOCK_COLS)
    dinput = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    dinput = _add_product(dinput, dy_ptr, weight_ptr, None, m, d, M, D, OUT, dy_stride, 1, weight_stride, 1, BLOCK_K)
    if is_skip:
        if ds_ptr is not None:
            scale = float_scale if row_scale_ptr is None else _row_scale(row_scale_ptr, m, M)
            _store(ds_ptr, scale * dinput, m, d, M, D2, ds_stride, 1)
        if partial_drow_ptr is not None:
            mask = (m < M)[:, None] & (d < D2)[None, :]
            s = tl.load(s_ptr + m[:, None] * s_stride + d[None, :], mask=mask, other=0.0).to(tl.float32)
            tl.store(partial_drow_ptr + col_tile.to(tl.int64) * M + m, tl.sum(s * dinput, 1), mask=m < M)
    else:
        if dx_ptr is not None:
            _store(dx_ptr, dinput, m, d, M, D1, dx_stride, 1)


@triton.jit(do_not_specialize=("M", "rows_per_split"))
def _skip_linear_bwd_weight_kernel(
    dy_ptr,  # (M, OUT)
    x_ptr,  # (M, D1)
    s_ptr,  # (M, D2)
    row_scale_ptr,  # (M,) or None
    dweight_ptr,  # (splits, OUT, D1 + D2)
    M,
    rows_per_split,
    OUT,
    D1,
    D2,
    dy_stride,
    x_stride,
    s_stride,
    dweight_split_stride,
    dweight_stride,
    float_scale,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):
    """A tile of the transpose, (D1, OUT) or (D2, OUT): wgmma takes only its first operand, x or s, from registers."""
    num_x_tiles = tl.cdiv(D1, BLOCK_ROWS)
    row_tile, col_tile = _place(num_x_tiles + tl.cdiv(D2, BLOCK_ROWS), tl.cdiv(OUT, BLOCK_COLS), GROUP_ROWS)
    o = _indices(col_tile, BLOCK_COLS)
    split = tl.program_id(1).to(tl.int64)
    first = split * rows_per_split
    num_tokens = tl.minimum(M - first, rows_per_split).to(tl.int32)
    dy_ptr += first * dy_stride
    x_ptr += first * x_stride
    s_ptr += first * s_stride
    if row_scale_ptr is not None:
        row_scale_ptr += first
    dweight_ptr += split * dweight_split_stride
    zero = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    if row_tile < num_x_tiles:
        d = _indices(row_tile, BLOCK_ROWS)
        dweight = _add_product(zero, x_ptr, dy_ptr, None, d, o, D1, OUT, num_tokens, 1, x_stride, dy_stride, 1, BLOCK_K)
        _store(dweight_ptr, dweight, d, o, D1, OUT, 1, dweight_stride)
    else:
        d = _indices(row_tile - num_x_tiles, BLOCK_ROWS)
        dweight = _add_product(
            zero, s_ptr, dy_ptr, row_scale_ptr, d, o, D2, OUT, num_tokens, 1, s_stride, dy_stride, 1, BLOCK_K
        )
        if row_scale_ptr is None:
            dweight *= float_scale
        _store(dweight_ptr + D1, dweight, d, o, D2, OUT, 1, dweight_stride)
