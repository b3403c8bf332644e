import os
from collections.abc import Callable, Iterable

import pytest

from scalelong.bench.record import RESULTS, Row, append_rows, print_table

ROWS = pytest.StashKey[list[Row]]()
NOTES = pytest.StashKey[list[str]]()
IS_RECORDING = os.environ.get("SCALELONG_RECORD") == "1"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit:DeprecationWarning")  # Inductor still uses it
    config.stash[ROWS], config.stash[NOTES] = [], []


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
    """Takes a line to print under the table."""
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
    print(*notes, recorded, sep="\n")
