import os
import time
from collections.abc import Callable, Iterable

import pytest

from scalelong.bench.record import RESULTS, Row, append_rows, print_table
from scalelong.bench.summary import summary_lines

ROWS = pytest.StashKey[list[Row]]()
NOTES = pytest.StashKey[list[str]]()
START = pytest.StashKey[float]()
IS_RECORDING = os.environ.get("SCALELONG_RECORD") == "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--stop-after", type=float, metavar="SECONDS", help="skip the benchmarks that are not begun by then"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit:DeprecationWarning")  # Inductor still uses it
    config.option.benchmark_quiet = True  # the table of pytest-benchmark shows one provider a test
    config.stash[ROWS], config.stash[NOTES], config.stash[START] = [], [], time.monotonic()


def pytest_runtest_setup(item: pytest.Item) -> None:
    seconds = item.config.getoption("stop_after")
    if seconds is not None and time.monotonic() - item.config.stash[START] > seconds:
        pytest.skip(f"not begun after {seconds:g} s")


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[Iterable[Row]], None]:
    """Takes the rows of a test, for the table and, with SCALELONG_RECORD=1, for the CSV."""

    def report(rows: Iterable[Row]) -> None:
        rows = list(rows)
        request.config.stash[ROWS].extend(rows)
        if IS_RECORDING:
            append_rows(rows)

    return report


@pytest.fixture(scope="module")
def note(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Takes a line to print, once, under the table."""
    return request.config.stash[NOTES].append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows, notes = config.stash[ROWS], config.stash[NOTES]
    if not rows:
        return
    terminalreporter.write_sep("=", "providers, interleaved in each test")
    terminalreporter.flush()
    print_table(rows)
    recorded = (
        f"Rows appended under {RESULTS}." if IS_RECORDING else "Rows not recorded; SCALELONG_RECORD=1 records them."
    )
    print(*dict.fromkeys(notes), *summary_lines(rows), recorded, sep="\n")
