"""Samples of a product of values for ``make test``; the whole product is exhaustive."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest


def each_value_once(names: str, *axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrises by the product of the axes; what is not exhaustive has every value of each, the longest axis once.

    Args:
        names: of the arguments, separated by commas, one for each axis.
        axes: their values.
    """
    longest = max(range(len(axes)), key=lambda i: len(axes[i]))

    def is_in_sample(places: tuple[int, ...]) -> bool:
        return all(place == places[longest] % len(axis) for place, axis in zip(places, axes, strict=True))

    cases = [
        pytest.param(
            *(axis[place] for place, axis in zip(places, axes, strict=True)),
            marks=() if is_in_sample(places) else pytest.mark.exhaustive,
        )
        for places in product(*(range(len(axis)) for axis in axes))
    ]
    return pytest.mark.parametrize(names, cases, ids=lambda value: str(value))
