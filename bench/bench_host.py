"""What a call of each operator costs the host, beside a bare ``autograd.Function``: launches are free (host.py)."""

from collections.abc import Iterator

import pytest

from scalelong.bench.host import DIRECTIONS, make_cases, rows_of, stubbed_launches, time_case
from scalelong.kernels import backend

CASES = make_cases()


@pytest.fixture(scope="module", autouse=True)
def free_launches() -> Iterator[None]:
    if backend._interprets:
        pytest.skip("the interpreter launches nothing")
    with stubbed_launches():
        yield


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_host(benchmark, report, name, direction):
    benchmark.group = f"{name} {direction}"
    report(rows_of(CASES[name], direction, time_case(CASES[name], direction, benchmark)))
