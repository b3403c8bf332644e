"""Launches the Triton kernels of ``skip_group_norm`` (group_norm.py says what it computes).

What a call launches is planned once for each kind of call: forms and tiles (group_norm_tilings.py), compiled kernels,
and the places in one fp32 workspace of all that passes between the kernels.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scalelong.kernels.group_norm_arguments import Options, Tensors, Wanted
from scalelong.kernels.group_norm_flat import _flat_bwd_kernel, _flat_fwd_kernel
from scalelong.kernels.group_norm_parameters import ParameterGradients, _parameters_bwd_kernel
from scalelong.kernels.group_norm_split import (
    Combined,
    _split_bwd_apply_kernel,
    _split_bwd_combine_kernel,
    _split_bwd_sums_kernel,
    _split_fwd_apply_kernel,
    _split_fwd_combine_kernel,
    _split_fwd_sums_kernel,
)
from scalelong.kernels.group_norm_tilings import (
    VECTOR_BYTES,
    FlatTiling,
    SplitTiling,
    WholeTiling,
    choose_tiling,
    next_power_of_two,
)
from scalelong.kernels.group_norm_walks import Parameters
from scalelong.kernels.group_norm_whole import _whole_bwd_kernel, _whole_fwd_kernel
from scalelong.kernels.launches import Kept, Launch, Plan, Slot, places, signature
from scalelong.kernels.triton_device import multiprocessors

_plans: Kept[Plan] = Kept()


class _Slots:
    """Where plans find the tensors of a call: first ``Tensors``, then these."""

    H, S, SCALE, WEIGHT, BIAS, GAIN, SHIFT = (Slot(i) for i in range(7))
    # Of a forward pass.
    Y, MEAN, RSTD = Slot(7), Slot(8), Slot(9)
    FORWARD_WORKSPACE = 10
    # Of a backward pass, where MEAN and RSTD have the same places.
    DY = Slot(7)
    DH, DS, DSCALE, DWEIGHT, DBIAS, DGAIN, DSHIFT = (Slot(i) for i in range(10, 17))
    BACKWARD_WORKSPACE = 17


def forward(
    tensors: Tensors,
    options: Options,
    channels_last: bool,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    kind: Hashable = None,
) -> None:
    """Fills y (N, C, *), in the layout of h, and the mean and rstd of each group, (N, G).

    ``kind`` stands for options and the signature of each tensor, where somebody has looked at these already. The
    outputs need none: they are new, and torch's allocator aligns them by more than 16 bytes.
    """
    tensors = _with_dense_parameters(tensors)
    key = kind or (*map(signature, tensors), options, channels_last)
    plan = _plans.get(key)
    if plan is None:
        plan = _plans.keep(key, _plan_forward(_Call.of(tensors, options, channels_last, y)))
    plan.run((*tensors, y, mean, rstd, _workspace(plan, mean)))


def backward(
    dy: Tensor,
    tensors: Tensors,
    mean: Tensor,
    rstd: Tensor,
    options: Options,
    channels_last: bool,
    wanted: Sequence[bool],
    kind: Hashable = None,
) -> tuple[Tensor | None, ...]:
    """The gradients that are wanted, each in the dtype of its tensor, but that of the scale (N, Cs), which is in fp32.

    ``kind`` stands for the same as in forward; where the tensors lie may have changed since, by hooks on what is saved.
    """
    tensors = _with_dense_parameters(tensors)
    h, s, *_ = tensors
    wants_h, wants_s, wants_scale, *_ = wanted = tuple(wanted)
    dh = torch.empty_like(h) if wants_h else None
    # That of the scale is computed on the way to that of s.
    ds = torch.empty_like(s) if s is not None and (wants_s or wants_scale) else None
    if kind is None:
        key = (*map(signature, tensors), signature(dy), options, channels_last, wanted)
    else:
        key = (kind, places(tensors), dy.dtype, dy.data_ptr() % 16, wanted)
    plan = _plans.get(key)
    if plan is None:
        plan = _plans.keep(key, _plan_backward(_Call.of(tensors, options, channels_last, dy, dh, ds), Wanted(*wanted)))
    of_parameters = zip(plan.outputs, (mean, *tensors[3:]), strict=True)
    grads = [None if size is None else x.new_empty_strided(size, (*size[1:], 1)) for size, x in of_parameters]  # type: ignore[union-attr]
    plan.run((*tensors, dy, mean, rstd, dh, ds, *grads, _workspace(plan, mean)))
    return dh, ds if wants_s else None, *grads


def _workspace(plan: Plan, like: Tensor) -> Tensor | None:
    # torch.empty takes twice the time to read its arguments.
    return like.new_empty_strided((plan.workspace,), (1,)) if plan.workspace else None


def _with_dense_parameters(tensors: Tensors) -> Tensors:
    """The kernels read weight and bias as they lie."""
    _, _, _, weight, bias, _, _ = tensors
    if weight is None or bias is None or (weight.is_contiguous() and bias.is_contiguous()):
        return tensors
    return tensors._replace(weight=weight.contiguous(), bias=bias.contiguous())


class _Call(NamedTuple):
    """What a plan depends on."""

    N: int
    P: int
    Ch: int
    Cs: int
    G: int
    itemsize: int
    vec: int
    channels_last: bool
    act: str | None
    eps: float
    parameters: Parameters
    num_multiprocessors: int

    @staticmethod
    def of(tensors: Tensors, options: Options, channels_last: bool, *others: Tensor | None) -> "_Call":
        h, s = tensors.h, tensors.s
        N, Ch, *spatial = h.shape
        Cs, P, itemsize = 0 if s is None else s.shape[1], math.prod(spatial), h.element_size()
        addresses = (x.data_ptr() for x in (h, s, *others) if x is not None)
        runs = (Ch, Cs) if channels_last else (P,)
        vec = math.gcd(VECTOR_BYTES, *(run * itemsize for run in runs), *addresses) // itemsize
        return _Call(
            N=N,
            P=P,
            Ch=Ch,
            Cs=Cs,
            G=options.groups,
            itemsize=itemsize,
            vec=vec,
            channels_last=channels_last,
            act=options.act,
            eps=options.eps,
            parameters=_parameters(tensors, options.float_scale, N, Cs),
            num_multiprocessors=multiprocessors(h.get_device()),
        )

    @property
    def C(self) -> int:  # noqa: N802
        return self.Ch + self.Cs

    @property
    def D(self) -> int:  # noqa: N802
        return self.C // self.G

    @property
    def slot_of_s(self) -> Slot | None:
        return _Slots.S if self.Cs else None

    def tiling(self, direction: str) -> FlatTiling | WholeTiling | SplitTiling:
        sizes = (self.N, self.Ch, self.Cs, self.G, self.P)
        return choose_tiling(direction, self.channels_last, self.itemsize, self.vec, *sizes, self.num_multiprocessors)


def _parameters(tensors: Tensors, float_scale: float, N: int, Cs: int) -> Parameters:
    _, _, scale, weight, _, gain, shift = tensors
    strides = {}
    for name, x, width in (("scale", scale, Cs), ("gain", gain, 0), ("shift", shift, 0)):
        if x is not None:
            x = x.expand(N, width) if name == "scale" else x
            strides |= {f"{name}_stride_{axis}": stride for axis, stride in zip("nc", x.stride(), strict=True)}
    return Parameters(
        scale=None if scale is None else _Slots.SCALE,
        weight=None if weight is None else _Slots.WEIGHT,
        bias=None if weight is None else _Slots.BIAS,
        gain=None if gain is None else _Slots.GAIN,
        shift=None if shift is None else _Slots.SHIFT,
        float_scale=float_scale,
        **strides,
    )


def _plan_forward(call: _Call) -> Plan:
    tiling = call.tiling("forward")
    N, P, Ch, Cs, C, G, D = call.N, call.P, call.Ch, call.Cs, call.C, call.G, call.D
    h, s, y, mean, rstd = _Slots.H, call.slot_of_s, _Slots.Y, _Slots.MEAN, _Slots.RSTD
    if isinstance(tiling, FlatTiling):
        arguments = (h, s, call.parameters, mean, rstd, y, call.eps, P // call.vec, Ch, Cs, D, G)
        return Plan([_flat_launch(_flat_fwd_kernel, call, tiling, arguments)])
    if isinstance(tiling, WholeTiling):
        arguments = (h, s, call.parameters, mean, rstd, y, call.eps, P, Ch, Cs, D, tiling.block)
        return Plan([_whole_launch(_whole_fwd_kernel, call, tiling, arguments)])
    partial = Slot(_Slots.FORWARD_WORKSPACE)
    coefficients = Slot(_Slots.FORWARD_WORKSPACE, _rounded(N * tiling.num_chunks * 2 * C))
    chunks = (tiling.walk, tiling.num_chunks)
    combined = (partial, call.parameters, mean, rstd, coefficients, call.eps, P, Ch, Cs, D, *chunks)
    return Plan(
        [
            _tile_launch(_split_fwd_sums_kernel, tiling, (h, s, partial, P, Ch, Cs, *chunks)),
            _combine_launch(_split_fwd_combine_kernel, call, tiling, combined),
            _tile_launch(_split_fwd_apply_kernel, tiling, (h, s, coefficients, y, P, Ch, Cs, *chunks), ACT=call.act),
        ],
        workspace=coefficients.offset + N * 4 * C,
    )


def _plan_backward(call: _Call, wanted: Wanted) -> Plan:
    """The sums of each channel serve the gradient of h and s as well as those of weight, bias, gain and shift."""
    tiling = call.tiling("backward")
    if isinstance(tiling, FlatTiling):
        launches, sums, scale_sums, num_parts, workspace = _flat_backward(call, tiling, wanted)
    elif isinstance(tiling, WholeTiling):
        launches, sums, scale_sums, num_parts, workspace = _whole_backward(call, tiling, wanted)
    else:
        launches, sums, scale_sums, num_parts, workspace = _split_backward(call, tiling, wanted)
    gradients = ParameterGradients(
        scale=_Slots.DSCALE if wanted.scale else None,
        weight=_Slots.DWEIGHT if wanted.weight else None,
        bias=_Slots.DBIAS if wanted.bias else None,
        gain=_Slots.DGAIN if wanted.gain else None,
        shift=_Slots.DSHIFT if wanted.shift else None,
    )
    if any(x is not None for x in gradients):
        launches.append(_parameters_launch(call, gradients, sums, scale_sums, num_parts))
    N, C = call.N, call.C
    sizes = ((N, call.Cs), (C,), (C,), (N, C), (N, C))
    outputs = [None if slot is None else size for slot, size in zip(gradients, sizes, strict=True)]
    return Plan(launches, outputs, workspace)


class _Sums(NamedTuple):
    """Launches of a backward pass, and where they leave sums: of dz and of dz * xhat; of dx * s."""

    launches: list[Launch]
    sums: Slot | None
    scale_sums: Slot | None
    num_parts: tuple[int, int]  # of a channel, of either kind
    workspace: int


def _flat_backward(call: _Call, tiling: FlatTiling, wanted: Wanted) -> _Sums:
    N, Ch, Cs, C = call.N, call.Ch, call.Cs, call.C
    num_segments = call.P // call.vec // tiling.pieces.segment
    wants_sums, wants_scale = any(wanted[3:]), bool(wanted.scale)
    partial = Slot(_Slots.BACKWARD_WORKSPACE) if wants_sums or wants_scale else None
    scale_sums = Slot(_Slots.BACKWARD_WORKSPACE, 2 * N * C * num_segments)
    dh, ds = _Slots.DH if wanted.h else None, _Slots.DS if wanted.s or wanted.scale else None
    arguments = (
        *(_Slots.DY, _Slots.H, call.slot_of_s, call.parameters, _Slots.MEAN, _Slots.RSTD, dh, ds, partial),
        *(N, call.P // call.vec, Ch, Cs, call.D, call.G),
    )
    wants = {"WANTS_SUMS": wants_sums, "WANTS_DSCALE": wants_scale}
    launch = _flat_launch(_flat_bwd_kernel, call, tiling, arguments, **wants)
    return _Sums(
        launches=[launch],
        sums=partial if wants_sums else None,
        scale_sums=scale_sums if wants_scale else None,
        num_parts=(num_segments, num_segments),
        workspace=3 * N * C * num_segments if partial else 0,
    )


def _whole_backward(call: _Call, tiling: WholeTiling, wanted: Wanted) -> _Sums:
    N, Ch, Cs, C = call.N, call.Ch, call.Cs, call.C
    sums = Slot(_Slots.BACKWARD_WORKSPACE) if any(wanted[3:]) else None
    scale_sums = Slot(_Slots.BACKWARD_WORKSPACE, _rounded(2 * N * C)) if wanted.scale else None
    dh, ds = _Slots.DH if wanted.h else None, _Slots.DS if wanted.s or wanted.scale else None
    arguments = (
        *(_Slots.DY, _Slots.H, call.slot_of_s, call.parameters, _Slots.MEAN, _Slots.RSTD, dh, ds, sums, scale_sums),
        *(N, call.P, Ch, Cs, call.D, tiling.block),
    )
    return _Sums(
        launches=[_whole_launch(_whole_bwd_kernel, call, tiling, arguments)],
        sums=sums,
        scale_sums=scale_sums,
        num_parts=(1, 1),
        workspace=_rounded(2 * N * C) + N * C if sums or scale_sums else 0,
    )


def _split_backward(call: _Call, tiling: SplitTiling, wanted: Wanted) -> _Sums:
    N, P, Ch, Cs, C, D = call.N, call.P, call.Ch, call.Cs, call.C, call.D
    chunks = (tiling.walk, tiling.num_chunks)
    sizes = (N * tiling.num_chunks * 2 * C, 2 * N * C, N * 7 * C, N * C * tiling.num_chunks if wanted.scale else 0)
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + _rounded(size))
    partial, sums, coefficients, scale_sums = (Slot(_Slots.BACKWARD_WORKSPACE, offset) for offset in offsets[:-1])
    h, s, dy, statistics = _Slots.H, call.slot_of_s, _Slots.DY, (_Slots.MEAN, _Slots.RSTD)
    summed = (dy, h, s, call.parameters, *statistics, partial, P, Ch, Cs, D, *chunks)
    combined = (partial, call.parameters, *statistics, sums, coefficients, N, P, Ch, Cs, D, *chunks)
    launches = [
        _tile_launch(_split_bwd_sums_kernel, tiling, summed, ACT=call.act),
        _combine_launch(_split_bwd_combine_kernel, call, tiling, combined),
    ]
    dh, ds = _Slots.DH if wanted.h else None, _Slots.DS if wanted.s or wanted.scale else None
    if dh is not None or ds is not None:
        of_scale = scale_sums if wanted.scale else None
        applied = (dy, h, s, coefficients, dh, ds, of_scale, P, Ch, Cs, *chunks)
        launches.append(_tile_launch(_split_bwd_apply_kernel, tiling, applied, ACT=call.act))
    return _Sums(
        launches=launches,
        sums=sums if any(wanted[3:]) else None,
        scale_sums=scale_sums if wanted.scale else None,
        num_parts=(1, tiling.num_chunks),
        workspace=offsets[-1],
    )


def _rounded(size: int) -> int:
    """Up to a multiple of 16 bytes, so that the next part of the workspace is aligned."""
    return -(-size // 4) * 4


def _flat_launch(kernel: Any, call: _Call, tiling: FlatTiling, arguments: tuple[Any, ...], **constants: Any) -> Launch:
    options = {} if tiling.max_registers is None else {"maxnreg": tiling.max_registers}
    constants = {"PIECES": tiling.pieces, "ACT": call.act, **constants}
    return Launch(kernel, call.N * call.G, arguments, constants, tiling.num_warps, options)


def _whole_launch(kernel: Any, call: _Call, tiling: WholeTiling, arguments: tuple[Any, ...]) -> Launch:
    options = {} if tiling.max_registers is None else {"maxnreg": tiling.max_registers}
    constants = {"TILE": tiling.tile, "TILES": tiling.num_tiles, "GROUPS": tiling.groups, "ACT": call.act}
    return Launch(kernel, tiling.num_programs, arguments, constants, tiling.num_warps, options)


def _tile_launch(kernel: Any, tiling: SplitTiling, arguments: tuple[Any, ...], **constants: Any) -> Launch:
    return Launch(kernel, tiling.num_programs, arguments, {"TILE": tiling.tile, **constants}, tiling.num_warps)


def _combine_launch(kernel: Any, call: _Call, tiling: SplitTiling, arguments: tuple[Any, ...]) -> Launch:
    channels = min(128, next_power_of_two(call.D))
    chunks = min(128 // channels, next_power_of_two(tiling.num_chunks))
    block = Combined(min(128 // (channels * chunks), next_power_of_two(call.G)), chunks, channels)
    num_programs = call.N * math.ceil(call.G / block.groups)
    return Launch(kernel, num_programs, arguments, {"FOLDED": call.itemsize == 2, "BLOCK": block}, num_warps=1)


def _parameters_launch(
    call: _Call,
    gradients: ParameterGradients,
    sums: Slot | None,
    scale_sums: Slot | None,
    num_parts: tuple[int, int],
) -> Launch:
    block_parts = min(32, next_power_of_two(max(num_parts)))
    block_c = 4 if block_parts > 4 else 16
    block_n = min(max(1, 2048 // (block_parts * block_c)), next_power_of_two(call.N))
    arguments = (sums, scale_sums, call.parameters, gradients, call.N, call.Ch, call.Cs, *num_parts)
    constants = {"BLOCK_N": block_n, "BLOCK_C": block_c, "BLOCK_PARTS": block_parts, "VEC": math.gcd(4, *num_parts)}
    return Launch(_parameters_bwd_kernel, math.ceil(call.C / block_c), arguments, constants, num_warps=4)
