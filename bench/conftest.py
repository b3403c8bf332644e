import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch

from scalelong.bench.record import RESULTS, Row, append_rows, print_table
from scalelong.bench.summary import summary_lines

ROWS = pytest.StashKey[list[Row]]()
NOTES = pytest.StashKey[list[str]]()
START = pytest.StashKey[float]()
# The exit status of a process whose GPU is lost to it: the same command with the same --begun goes on behind the cause.
GPU_IS_LOST = 75
IS_RECORDING = os.environ.get("SCALELONG_RECORD") == "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--stop-after", type=float, metavar="SECONDS", help="skip the benchmarks that are not begun by then"
    )
    parser.addoption("--begun", type=Path, metavar="FILE", help="leave out those in FILE, and note there what begins")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit:DeprecationWarning")  # Inductor still uses it
    config.option.benchmark_quiet = True  # the table of pytest-benchmark shows one provider a test
    config.stash[ROWS], config.stash[NOTES], config.stash[START] = [], [], time.monotonic()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    path = config.getoption("begun")
    begun = set(path.read_text().splitlines()) if path is not None and path.exists() else set()
    items[:] = [item for item in items if item.nodeid not in begun]


def pytest_runtest_setup(item: pytest.Item) -> None:
    seconds, path = item.config.getoption("stop_after"), item.config.getoption("begun")
    if seconds is not None and time.monotonic() - item.config.stash[START] > seconds:
        pytest.skip(f"not begun after {seconds:g} s")
    if path is not None:
        with path.open("a") as file:
            print(item.nodeid, file=file)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError as error:  # every later call would raise it too
        pytest.exit(f"{item.nodeid}: {error}", returncode=GPU_IS_LOST)


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Iterator[Callable[[Iterable[Row]], None]]:
    """Takes the rows of a test, for the table and, with SCALELONG_RECORD=1, for the CSV. Failed ones fail the test."""

    def report(rows: Iterable[Row]) -> None:
        rows = list(rows)
        request.config.stash[ROWS].extend(rows)
        if IS_RECORDING:
            append_rows(rows)
        failed.extend(f"{row.direction} {row.provider}: {row.error}" for row in rows if row.error)

    failed: list[str] = []
    yield report
    if failed:
        pytest.fail("\n".join(failed), pytrace=False)


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
