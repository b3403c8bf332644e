"""What the operators say of their arguments."""

from collections.abc import Iterable

import torch
from torch import Tensor


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
    if tuple(scale.shape) not in shapes:
        raise ValueError(
            f"{op}: scale has shape {tuple(scale.shape)}, but s {tuple(s.shape)} takes a scalar, "
            f"{', '.join(map(str, shapes[1:]))}"
        )
    if scale.device != h.device or not scale.is_floating_point():
        raise ValueError(f"{op}: scale is {described(scale)}, but h is {described(h)}")
    return scale.reshape(()) if scale.shape == (1,) else scale
