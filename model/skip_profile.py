"""Factors of long skips from one forward pass: each skip makes up a chosen share of the concatenation it enters.

Admin (Liu et al., arXiv:2004.08249) measures the variances of residual branches of a network as it begins, and sets its
factors so that none outweighs the others. Here the branches are the two halves of the concatenation
``[h, kappa_i s]``, of N_a and N_b features and magnitudes M, the root mean square over samples and features:

    kappa_i² N_b M[s]² / (N_a M[h]² + kappa_i² N_b M[s]²) = share

Decoder blocks run from the innermost skip outwards, each with the factors of those before it in place already.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from scalelong.model.backbone import Backbone
from scalelong.model.skip_scale import LongSkip


@torch.no_grad()
def profile_skips(network: Backbone, run: Callable[[], object], *, share: float = 0.5) -> tuple[float, ...]:
    """kappa_1 to kappa_N of a network's long skips, by the features of one batch; the network stays as it is.

    Args:
        network: whose own policy is passed over while its features are measured.
        run: runs the network, once and over one batch.
        share: of the energy of each concatenation, in (0, 1).

    Raises:
        ValueError: a network without long skips, a share outside (0, 1), features that are zero or not finite, or a
            ``run`` that does not run the network.
    """
    if not network.skips:
        raise ValueError(f"this {type(network).__name__} has no long skips to measure")
    if not 0 < share < 1:
        raise ValueError(f"the share of a skip must lie in (0, 1), got {share}")
    factors: dict[int, float] = {}
    blocks = zip(network.skip_blocks(), network.skips, strict=True)

    def measure_at(i: int, ratio: float) -> Callable[..., tuple[Any, ...]]:
        def measure(_block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            skip: LongSkip = next(x for x in inputs if isinstance(x, LongSkip))
            factors[i] = math.sqrt(share / (1 - share) * ratio * mean_square(inputs[0]) / mean_square(skip.features))
            scaled = skip._replace(scale=factors[i], common=None)
            return tuple(scaled if x is skip else x for x in inputs)

        return measure

    hooks = [
        block.register_forward_pre_hook(measure_at(i, shape.stream_width / shape.width)) for (i, block), shape in blocks
    ]
    try:
        run()
    except ZeroDivisionError:
        raise ValueError("a long skip is zero everywhere: no factor gives it a share") from None
    finally:
        for hook in hooks:
            hook.remove()
    if len(factors) < len(network.skips):
        raise ValueError(f"{len(factors)} of {len(network.skips)} long skips were run")
    found = tuple(factors[i] for i in range(1, len(factors) + 1))
    if not all(map(math.isfinite, found)):
        raise ValueError(f"the features of long skips are not finite: factors {found}")
    return found


def mean_square(x: Tensor) -> float:
    """M[x]²."""
    return float(x.double().square().mean())
