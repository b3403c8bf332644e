"""The Triton kernels of the backward pass of ``add_layer_norm``; add_layer_norm_rows.py says how they go through rows.

A program of the first one writes the sums over its rows once; the small ones put them together in a fixed order.
"""
# ruff: noqa: RUF005 - Triton adds tuples and does not unpack them
# pyright: reportGeneralTypeIssues=false
# (to a type checker, a call of one jitted function by another never returns)

import triton
import triton.language as tl

from scalelong.kernels.add_layer_norm_rows import (
    factor_and_constant,
    first_of_piece,
    mask_of_piece,
    offsets_of_piece,
    piece_of_gate,
    place_of_program,
    size_of_piece,
    turned_piece,
    turns_of_sample,
)


@triton.jit(do_not_specialize=("T", "rows_per_program"))
def _add_layer_norm_bwd_kernel(
    dstream_ptr,  # (M, D) or None
    dy_ptr,  # (M, D)
    stream_ptr,  # (M, D)
    branch_ptr,  # (M, D), or None where the gate needs no gradient
    vectors,
    mean_ptr,  # (M,)
    rstd_ptr,  # (M,)
    dx_ptr,  # (M, D) or None
    dbranch_ptr,  # (M, D) or None
    sums_ptr,  # (programs, NUM_SUMS, D), of dz, dz * xhat, with branch of branch * dx, and for the angles; or None
    T,
    rows_per_program,
    D: tl.constexpr,
    SPAN: tl.constexpr,
    SUMS_ANGLES: tl.constexpr,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
    NUM_PIECES: tl.constexpr,
):
    b, first, last = place_of_program(T, rows_per_program)
    factors, constants, dz_sums, dz_xhat_sums, dgate_sums, dangle_sums = (), (), (), (), (), ()
    for k in tl.static_range(NUM_PIECES):
        factor, constant = factor_and_constant(vectors, b, k, SPAN, PIECE)
        factors = factors + (factor,)
        dz_sums = dz_sums + (tl.zeros((ROWS, PIECE), tl.float32),)
        dz_xhat_sums = dz_xhat_sums + (tl.zeros((ROWS, PIECE), tl.float32),)
        dgate_sums = dgate_sums + (tl.zeros((ROWS, PIECE), tl.float32),)
        if SUMS_ANGLES:
            constants = constants + (constant,)
            dangle_sums = dangle_sums + (tl.zeros((ROWS, PIECE), tl.float32),)
    turns = turns_of_sample(vectors, b, SPAN, PIECE, NUM_PIECES)
    for t in range(first, last, ROWS):
        row = b * T + t
        inside = tl.arange(0, ROWS) < last - t
        mean = tl.load(mean_ptr + row + tl.arange(0, ROWS), mask=inside, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row + tl.arange(0, ROWS), mask=inside, other=0.0)[:, None]
        streams, dys = (), ()
        for k in tl.static_range(NUM_PIECES):
            mask, offsets = mask_of_piece(inside, k, SPAN, PIECE), offsets_of_piece(k, D, SPAN, ROWS, PIECE)
            stream = tl.load(stream_ptr + row * D + offsets, mask=mask, other=0.0)
            dy = tl.load(dy_ptr + row * D + offsets, mask=mask, other=0.0)
            streams, dys = streams + (stream,), dys + (dy,)  # 16 bits wide until they are needed again
        dnorm_sum, dnorm_xhat_sum = tl.zeros((ROWS, PIECE), tl.float32), tl.zeros((ROWS, PIECE), tl.float32)
        new_dz_sums, new_dz_xhat_sums, new_dangle_sums = (), (), ()
        for k in tl.static_range(NUM_PIECES):
            xhat, dz = (streams[k].to(tl.float32) - mean) * rstd, turned_piece(dys, k, turns, NUM_PIECES, True)
            dz_xhat = dz * xhat
            dnorm_sum += dz * factors[k]
            dnorm_xhat_sum += dz_xhat * factors[k]
            new_dz_sums = new_dz_sums + (dz_sums[k] + dz,)
            new_dz_xhat_sums = new_dz_xhat_sums + (dz_xhat_sums[k] + dz_xhat,)
            if SUMS_ANGLES:  # dz of the other half times z of this one
                other = turned_piece(dys, (k + NUM_PIECES // 2) % NUM_PIECES, turns, NUM_PIECES, True)
                new_dangle_sums = new_dangle_sums + (dangle_sums[k] + other * (xhat * factors[k] + constants[k]),)
        dz_sums, dz_xhat_sums, dangle_sums = new_dz_sums, new_dz_xhat_sums, new_dangle_sums
        if dx_ptr is not None or dbranch_ptr is not None or branch_ptr is not None:
            dnorm_mean, dnorm_xhat_mean = (tl.sum(dnorm_sum, 1) / D)[:, None], (tl.sum(dnorm_xhat_sum, 1) / D)[:, None]
            new_dgate_sums = ()
            for k in tl.static_range(NUM_PIECES):
                mask, offsets = mask_of_piece(inside, k, SPAN, PIECE), offsets_of_piece(k, D, SPAN, ROWS, PIECE)
                xhat = (streams[k].to(tl.float32) - mean) * rstd
                dnorm = turned_piece(dys, k, turns, NUM_PIECES, True) * factors[k]
                gradient = (dnorm - dnorm_mean - xhat * dnorm_xhat_mean) * rstd
                if dstream_ptr is not None:
                    gradient += tl.load(dstream_ptr + row * D + offsets, mask=mask, other=0.0).to(tl.float32)
                if dx_ptr is not None:
                    tl.store(dx_ptr + row * D + offsets, gradient.to(dx_ptr.dtype.element_ty), mask=mask)
                if dbranch_ptr is not None:
                    dbranch = gradient * piece_of_gate(vectors, b, k, SPAN, PIECE)
                    tl.store(dbranch_ptr + row * D + offsets, dbranch.to(dbranch_ptr.dtype.element_ty), mask=mask)
                if branch_ptr is not None:
                    branch = tl.load(branch_ptr + row * D + offsets, mask=mask, other=0.0).to(tl.float32)
                    new_dgate_sums = new_dgate_sums + (dgate_sums[k] + branch * gradient,)
            if branch_ptr is not None:
                dgate_sums = new_dgate_sums
    if sums_ptr is not None:
        NUM_SUMS: tl.constexpr = (2 if branch_ptr is None else 3) + SUMS_ANGLES
        sums_ptr += tl.program_id(0).to(tl.int64) * NUM_SUMS * D
        for k in tl.static_range(NUM_PIECES):
            d, exists = (
                first_of_piece(k, SPAN, PIECE) + tl.arange(0, PIECE),
                tl.arange(0, PIECE) < size_of_piece(k, SPAN, PIECE),
            )
            tl.store(sums_ptr + d, tl.sum(dz_sums[k], 0), mask=exists)
            tl.store(sums_ptr + D + d, tl.sum(dz_xhat_sums[k], 0), mask=exists)
            if branch_ptr is not None:
                tl.store(sums_ptr + 2 * D + d, tl.sum(dgate_sums[k], 0), mask=exists)
            if SUMS_ANGLES:
                tl.store(sums_ptr + (NUM_SUMS - 1) * D + d, tl.sum(dangle_sums[k], 0), mask=exists)


@triton.jit(do_not_specialize=("num_programs", "num_chunks"))
def _add_layer_norm_bwd_params_kernel(
    sums_ptr,  # (programs, NUM_SUMS, D)
    vectors,
    dweight_ptr,  # (D,) or None
    dbias_ptr,  # (D,) or None
    num_programs,
    num_chunks,
    D: tl.constexpr,
    NUM_SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    d = (tl.program_id(0) * COLS + tl.arange(0, COLS))[None, :]
    dweight, dbias = tl.zeros((ROWS, COLS), tl.float32), tl.zeros((ROWS, COLS), tl.float32)
    for first in range(0, num_programs, ROWS):
        program = first + tl.arange(0, ROWS)[:, None].to(tl.int64)
        mask = (program < num_programs) & (d < D)
        pointers = sums_ptr + program * NUM_SUMS * D + d
        dy, dy_xhat = tl.load(pointers, mask=mask, other=0.0), tl.load(pointers + D, mask=mask, other=0.0)
        if vectors.gain is not None:
            gain_pointers = vectors.gain + program // num_chunks * vectors.gain_stride + d
            gain = 1.0 + tl.load(gain_pointers, mask=mask, other=0.0).to(tl.float32)
            dy, dy_xhat = dy * gain, dy_xhat * gain
        dweight += dy_xhat
        dbias += dy
    d = tl.program_id(0) * COLS + tl.arange(0, COLS)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + d, tl.sum(dweight, 0), mask=d < D)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + d, tl.sum(dbias, 0), mask=d < D)


@triton.jit(do_not_specialize=("num_chunks",))
def _add_layer_norm_bwd_samples_kernel(
    sums_ptr,  # (B, num_chunks, NUM_SUMS, D)
    vectors,
    dgain_ptr,  # (B, D) or None
    dshift_ptr,  # (B, D) or None
    dgate_ptr,  # (B, D) or None
    dangle_ptr,  # (B, D / 2) or None
    num_chunks,
    D: tl.constexpr,
    NUM_SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    b, d = tl.program_id(1).to(tl.int64), tl.program_id(0) * COLS + tl.arange(0, COLS)
    sums_ptr += b * num_chunks * NUM_SUMS * D
    dy, dy_xhat, dgate = tl.zeros((COLS,), tl.float32), tl.zeros((COLS,), tl.float32), tl.zeros((COLS,), tl.float32)
    for first in range(0, num_chunks, ROWS):
        chunk = first + tl.arange(0, ROWS)[:, None].to(tl.int64)
        mask = (chunk < num_chunks) & (d < D)[None, :]
        pointers = sums_ptr + chunk * NUM_SUMS * D + d[None, :]
        dy += tl.sum(tl.load(pointers, mask=mask, other=0.0), 0)
        dy_xhat += tl.sum(tl.load(pointers + D, mask=mask, other=0.0), 0)
        if dgate_ptr is not None:
            dgate += tl.sum(tl.load(pointers + 2 * D, mask=mask, other=0.0), 0)
    exists = d < D
    if dangle_ptr is not None:  # the first half of its sums less the second
        dangle, HALF = tl.zeros((COLS,), tl.float32), D // 2
        for first in range(0, num_chunks, ROWS):
            chunk = first + tl.arange(0, ROWS)[:, None].to(tl.int64)
            mask = (chunk < num_chunks) & (d < HALF)[None, :]
            pointers = sums_ptr + chunk * NUM_SUMS * D + (NUM_SUMS - 1) * D + d[None, :]
            dangle += tl.sum(tl.load(pointers, mask=mask, other=0.0), 0)
            dangle -= tl.sum(tl.load(pointers + HALF, mask=mask, other=0.0), 0)
        tl.store(dangle_ptr + b * HALF + d, dangle, mask=d < HALF)
    if dgain_ptr is not None:
        dgain = dy_xhat
        if vectors.weight is not None:
            dgain *= tl.load(vectors.weight + d, mask=exists, other=0.0).to(tl.float32)
        if vectors.bias is not None:
            dgain += tl.load(vectors.bias + d, mask=exists, other=0.0).to(tl.float32) * dy
        tl.store(dgain_ptr + b * D + d, dgain, mask=exists)
    if dshift_ptr is not None:
        tl.store(dshift_ptr + b * D + d, dy, mask=exists)
    if dgate_ptr is not None:
        tl.store(dgate_ptr + b * D + d, dgate, mask=exists)
