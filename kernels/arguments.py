"""What the operators share: how they read, check, concatenate and lay out their arguments."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Scale = Tensor | float | None
"""What multiplies a long skip; each operator says which shapes it takes. None is 1."""


def described(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"


def none_as_empty(grads: Iterable[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """An empty tensor for None: a schema has no optional results."""
    return tuple(like.new_empty(0) if grad is None else grad for grad in grads)


def as_argument(scale: float, like: Tensor) -> Tensor | float:
    """The scale of an operator under torch.compile: a scalar tensor where the graph holds it for a variable.

    A float argument is a constant of the graph, so that decoder blocks that are compiled one by one, each with a factor
    of its own, would be a graph each. A factor that is known stays a float, which a kernel takes for nothing.
    """
    if torch.fx.experimental.symbolic_shapes.has_static_value(scale):  # type: ignore[attr-defined]
        return float(scale)
    return torch.full((), scale, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def is_one_of(shape: Sequence[int], shapes: Iterable[Sequence[int]]) -> bool:
    """Python would compare the first sizes of shapes of other lengths, each of them a guard under torch.compile."""
    return any(len(shape) == len(other) and tuple(shape) == tuple(other) for other in shapes)


def check_skip(op: str, h: Tensor, s: Tensor) -> None:
    """h (N, Ch, *) and its skip s (N, Cs, *)."""
    if s.dim() != h.dim() or s.shape[0] != h.shape[0] or s.shape[2:] != h.shape[2:]:
        raise ValueError(f"{op}: h {tuple(h.shape)} and s {tuple(s.shape)} may differ in their channels only")
    if s.dtype != h.dtype or s.device != h.device:
        raise ValueError(f"{op}: h is {described(h)} but s is {described(s)}")


def check_scale(op: str, scale: Tensor, h: Tensor, s: Tensor) -> Tensor:
    """One factor, one a channel of s, or those of each sample; one of shape (1,) becomes a scalar."""
    N, Cs = s.shape[:2]
    shapes = ((), (1,), (Cs,), (N, Cs), (N, 1))
    if not is_one_of(scale.shape, shapes):
        raise ValueError(
            f"{op}: scale has shape {tuple(scale.shape)}, but s {tuple(s.shape)} takes a scalar, "
            f"{', '.join(map(str, shapes[1:]))}"
        )
    if scale.device != h.device or not scale.is_floating_point():
        raise ValueError(f"{op}: scale is {described(scale)}, but h is {described(h)}")
    return scale.reshape(()) if scale.shape == (1,) else scale


def concatenated(h: Tensor, s: Tensor | None, scale: Scale) -> Tensor:
    """``cat([h, scale * s], 1)``, written out."""
    return h if s is None else torch.cat([h, scaled(s, scale)], dim=1)


def scaled(s: Tensor, scale: Scale) -> Tensor:
    """``scale * s`` of (N, C, *), in its dtype; the factor of each channel is (N, C) or (C,), and None stands for 1."""
    if isinstance(scale, Tensor) and scale.dim() > 0:
        scale = scale[(..., *[None] * (s.dim() - 2))]
    return s if scale is None else (s * scale).to(s.dtype)


def concatenated_tokens(x_BTD1: Tensor, s_BTD2: Tensor, scale: Scale) -> Tensor:
    """``cat([x, scale * s], -1)``, written out."""
    if isinstance(scale, Tensor) and 1 < scale.dim() < s_BTD2.dim():
        scale = scale.unsqueeze(-1)
    return torch.cat([x_BTD1, s_BTD2 if scale is None else (s_BTD2 * scale).to(s_BTD2.dtype)], dim=-1)


def is_channels_last(x: Tensor) -> bool:
    """Dense with the channels innermost; a tensor that is contiguous as well counts as contiguous."""
    return x.dim() > 2 and not x.is_contiguous() and _has_channels_innermost(x)


def as_layout(x: Tensor, channels_last: bool) -> Tensor:
    """x itself where it has that layout already."""
    if not channels_last:
        return x.contiguous()
    return x if _has_channels_innermost(x) else x.movedim(1, -1).contiguous().movedim(-1, 1)


def _has_channels_innermost(x: Tensor) -> bool:
    if x.dim() == 4:  # for which torch knows it
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).is_contiguous()
