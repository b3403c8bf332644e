"""The Triton kernel of the forward pass of ``add_layer_norm``; add_layer_norm_rows.py says how it goes through rows."""
# ruff: noqa: RUF005 - Triton adds tuples and does not unpack them
# pyright: reportGeneralTypeIssues=false
# (to a type checker, a call of one jitted function by another never returns)

import triton
import triton.language as tl

from scalelong.kernels.add_layer_norm_rows import (
    factor_and_constant,
    mask_of_piece,
    offsets_of_piece,
    piece_of_gate,
    place_of_program,
    size_of_piece,
    turned_piece,
    turns_of_sample,
)


@triton.jit(do_not_specialize=("T", "rows_per_program"))
def _add_layer_norm_fwd_kernel(
    x_ptr,  # (M, D)
    branch_ptr,  # (M, D) or None
    vectors,
    stream_ptr,  # (M, D); None without a branch
    y_ptr,  # (M, D)
    mean_ptr,  # (M,)
    rstd_ptr,  # (M,)
    T,
    rows_per_program,
    eps,
    D: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
    NUM_PIECES: tl.constexpr,
):
    b, first, last = place_of_program(T, rows_per_program)
    factors, constants, gates = (), (), ()
    for k in tl.static_range(NUM_PIECES):
        factor, constant = factor_and_constant(vectors, b, k, SPAN, PIECE)
        factors, constants = factors + (factor,), constants + (constant,)
        gates = gates + (piece_of_gate(vectors, b, k, SPAN, PIECE),)
    turns = turns_of_sample(vectors, b, SPAN, PIECE, NUM_PIECES)
    for t in range(first, last, ROWS):
        row = b * T + t
        inside = tl.arange(0, ROWS) < last - t
        stream = ()
        total = tl.zeros((ROWS, PIECE), tl.float32)
        for k in tl.static_range(NUM_PIECES):
            mask, offsets = mask_of_piece(inside, k, SPAN, PIECE), offsets_of_piece(k, D, SPAN, ROWS, PIECE)
            s = tl.load(x_ptr + row * D + offsets, mask=mask, other=0.0).to(tl.float32)
            if branch_ptr is not None:
                added = tl.load(branch_ptr + row * D + offsets, mask=mask, other=0.0).to(tl.float32)
                rounded = (s + (added if vectors.gate is None else gates[k] * added)).to(stream_ptr.dtype.element_ty)
                tl.store(stream_ptr + row * D + offsets, rounded, mask=mask)
                s = rounded.to(tl.float32)
            stream = stream + (s,)
            total += s
        near = tl.sum(total, 1) / D
        distances, squares = tl.zeros((ROWS, PIECE), tl.float32), tl.zeros((ROWS, PIECE), tl.float32)
        for k in tl.static_range(NUM_PIECES):
            distance = stream[k] - near[:, None]
            if size_of_piece(k, SPAN, PIECE) < PIECE:
                distance = tl.where(mask_of_piece(inside, k, SPAN, PIECE), distance, 0.0)
            distances += distance
            squares += distance * distance
        left = tl.sum(distances, 1) / D  # the error of a mean far from zero
        rstd = 1.0 / tl.sqrt_rn(tl.maximum(tl.sum(squares, 1) / D - left * left, 0.0) + eps)
        modulated = ()
        for k in tl.static_range(NUM_PIECES):
            xhat = ((stream[k] - near[:, None]) - left[:, None]) * rstd[:, None]
            modulated = modulated + (xhat * factors[k] + constants[k],)
        for k in tl.static_range(NUM_PIECES):
            y = turned_piece(modulated, k, turns, NUM_PIECES, False).to(y_ptr.dtype.element_ty)
            tl.store(
                y_ptr + row * D + offsets_of_piece(k, D, SPAN, ROWS, PIECE),
                y,
                mask=mask_of_piece(inside, k, SPAN, PIECE),
            )
        tl.store(mean_ptr + row + tl.arange(0, ROWS), near + left, mask=inside)
        tl.store(rstd_ptr + row + tl.arange(0, ROWS), rstd, mask=inside)
