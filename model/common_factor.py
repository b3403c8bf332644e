"""The factor of a whole concatenation, where a policy renormalises."""

from torch import Tensor

CommonFactor = Tensor | float | None
"""None for 1, a number, or a tensor of one element."""


def multiplied(x: Tensor, common: CommonFactor) -> Tensor:
    """``common * x`` in the dtype of x."""
    if isinstance(common, Tensor):
        common = common.reshape(())  # (1,) would take part in the choice of the dtype
    return x if common is None else common * x
