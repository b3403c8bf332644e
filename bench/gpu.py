"""What a machine with a GPU and no network runs: `make gpu PART=first` (380 s), then `PART=second` (300 s).

`PART=tuning` (200 s) tunes the tiles of GroupNorm anew, for another GPU say, and looks at its kernels with ncu.

    python -m scalelong.bench.gpu first|second|tuning|PART [PYTEST ARGUMENT ...]

PART is one of those below. Each ends by its time, whatever hangs in it, and leaves to the next what it did not take.
Every few seconds the rows, and the log of what all parts print, are copied to $OUT (runs/gpu), so that they are there
however the call ends; a table ends it.
Arguments are those of the tests: `make gpu PART=second ARGS="-k attention"` tests what has changed.
SCALELONG_DRY_RUN=1 walks through all of it on a CPU, at sizes of its own. Needs torch, triton, pytest, and of pytest's
plugins benchmark, timeout and xdist.
"""

import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from scalelong.bench.record import RESULTS, Row, commit, environment, read_rows
from scalelong.bench.summary import ncu_lines, summary_lines, table_lines

ROOT = Path(__file__).resolve().parents[1]
IS_DRY_RUN = os.environ.get("SCALELONG_DRY_RUN") == "1"
WELL = "well"
GPU_IS_LOST, NOTHING_LEFT = 75, 5  # exit statuses of bench/conftest.py and of pytest
GRACE = 4.0  # seconds from asking a part to end to ending it
NUM_TEST_WORKERS = 1 if IS_DRY_RUN else 10
COPY_SECONDS = 5.0
MAX_OUT_BYTES = 15 * 2**20


@dataclass(frozen=True)
class Part:
    """``{seconds}``, ``{begun}`` and ``{warm}`` in the command: the time it has, and paths of this call."""

    name: str
    ends_by: float
    """Seconds after the call has begun."""
    command: tuple[str, ...]
    at_most: float = math.inf
    """Seconds of its own."""
    in_background: bool = False
    """Runs beside the parts that follow, up to the first that measures."""
    measures: bool = False
    """Nothing may run beside it."""
    environment: dict[str, str] = field(default_factory=dict)


def module(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"scalelong.bench.{name}", *arguments)


def tests(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "120", *arguments)


def benchmarks(*arguments: str) -> tuple[str, ...]:
    """Stop by themselves, and go on behind the one at which a process lost its GPU."""
    options = ("-o", "python_files=bench_*.py", "-p", "no:cacheprovider", "--benchmark-only", "-q", "-r", "fE")
    return (sys.executable, "-m", "pytest", *options, "--stop-after", "{seconds}", "--begun", "{begun}", *arguments)


UVIT = "bench/bench_uvit_step.py::test_uvit_step[imagenet64-uvit-m4-ls-bfloat16{}]"
ADM = "bench/bench_unet_step.py::test_unet_step[imagenet64-adm-cs{}]"
DIT = "bench/bench_dit_step.py::test_dit_step[imagenet256-dit-{}-none-none-bfloat16{}]"
SIZES_OF_DIT = ("l2",) if IS_DRY_RUN else ("xl2", "l2")  # a dry run is small anyway
DIT_STEPS = tuple(DIT.format(size, "") for size in SIZES_OF_DIT)
STEPS = (UVIT.format(""), DIT_STEPS[0], ADM.format(""), *DIT_STEPS[1:])
COMPILED_STEPS = (UVIT.format("-compiled"), DIT.format("xl2", "-compiled"), ADM.format("-compiled"))
PARALLEL = ("-n", str(NUM_TEST_WORKERS), "--dist", "worksteal", "-m", "gpu and not exhaustive", "tests/test_gpu.py")
NCU = ("ncu", "--profile-from-start", "off", "--clock-control", "none", "--set", "full", "--launch-count", "8")
TUNE = ("--max-seconds", "{seconds}", *(["--dry-run"] if IS_DRY_RUN else []))
NORMS = "bench/bench_group_norm.py"
# Of a dry run, one shape.
SOME = "384+192 and " if IS_DRY_RUN else ""
WARM = {"SCALELONG_WARM": "{warm}"}

CALLS: dict[str, tuple[Part, ...]] = {
    # All that needs no torch.compile: whole steps first, as the GPU may not be there for long.
    "first": (
        Part("ceilings", 20, module("ceilings"), measures=True),
        Part("triton", 45, module("warm_cache", "triton")),
        Part("steps", 150, benchmarks(*STEPS), measures=True),
        Part("norms", 240, benchmarks(NORMS, "-k", f"{SOME}plain"), measures=True),
        Part("attention", 265, benchmarks("bench/bench_attention.py"), measures=True, environment=WARM),
        Part("skip-linear", 285, benchmarks("bench/bench_skip_linear.py"), measures=True, environment=WARM),
        Part("tests", 375, tests(*PARALLEL)),
    ),
    # Inductor takes two minutes for a U-ViT, and more than three for ADM, beside the tests on 16 cores.
    "second": (
        Part("inductor", 185, module("warm_cache", "inductor", "{warm}"), in_background=True),
        Part("tests", 185, tests(*PARALLEL)),
        Part("compiled-steps", 255, benchmarks(*COMPILED_STEPS), measures=True, environment=WARM),
        Part("compiled-norms", 275, benchmarks(NORMS, "-k", f"{SOME}compiled"), measures=True, environment=WARM),
        Part("exhaustive", 290, tests("-m", "gpu and exhaustive", "tests/test_gpu.py"), measures=True),
    ),
    "tuning": (
        Part("tune", 150, module("tune_group_norm", *TUNE), at_most=8 if IS_DRY_RUN else 150, measures=True),
        Part("ncu", 190, (*NCU, *module("profiled_norms")), at_most=40, measures=True),
    ),
    # Nothing for the first quarter of an hour: DALI must be installed.
    "data": (
        Part("data-tests", 200, tests("-m", "gpu and not exhaustive", "tests/test_gpu_data.py")),
        Part("data-steps", 400, benchmarks("bench/bench_data.py"), measures=True),
    ),
}


class Call:
    """Runs parts one after the other; ``seconds`` after it was made it is over.

    Args:
        folder: of the log and of what the parts share.
        out: gets copies of rows and log.
    """

    def __init__(self, name: str, seconds: float, folder: Path, out: Path):
        self.name, self.seconds, self.folder, self.out = name, seconds, folder, out
        self.start = time.monotonic()
        self.log = folder / f"{name}.log"
        self.num_rows_before = {path: len(read_rows(path)) for path in RESULTS.glob("*.csv")}
        self.background: list[tuple[subprocess.Popen, float]] = []
        self.outcomes: dict[str, str] = {}
        (folder / "warm").mkdir()
        out.mkdir(parents=True, exist_ok=True)
        self.log.touch()

    def run(self, parts: Sequence[Part]) -> bool:
        """Whether all were well."""
        # The last resort, should this process itself be kept waiting.
        watchdog = threading.Timer(self.seconds - self.elapsed(), self.give_up)
        watchdog.daemon = True
        watchdog.start()
        for part in parts:
            if part.in_background:
                self.background.append((self.begin(part), part.ends_by))
                continue
            if part.measures:
                self.end_background()
            began = self.elapsed()
            self.outcomes[part.name] = self.outcome(part)
            took = f"{began:.0f} to {self.elapsed():.0f} s"
            print(f"{part.name}, {took}: {self.outcomes[part.name]}, {len(self.rows())} rows", flush=True)
            self.copy_out()
        self.end_background()
        self.finish()
        watchdog.cancel()
        return all(outcome == WELL or outcome.startswith("skipped") for outcome in self.outcomes.values())

    def outcome(self, part: Part) -> str:
        if shutil.which(part.command[0]) is None:
            return f"skipped, there is no {part.command[0]}"
        num_begun = -1
        while True:
            process = self.begin(part)
            status = self.wait(process, self.seconds_of(part))
            end(process)
            if status is None:
                return "at its limit"
            if status == 0 or (status == NOTHING_LEFT and num_begun > 0):
                return WELL if num_begun < 0 else f"lost its GPU on the way, {num_begun} times begun again"
            lost = status == GPU_IS_LOST or status < 0
            before, num_begun = num_begun, self.num_begun(part)
            if not lost or num_begun <= max(before, 0):
                return f"failed ({status})"

    def wait(self, process: subprocess.Popen, seconds: float) -> int | None:
        """Copies out meanwhile: whoever ends this program may do so at once."""
        deadline = time.monotonic() + seconds
        while (status := wait(process, min(COPY_SECONDS, deadline - time.monotonic()))) is None:
            if time.monotonic() >= deadline:
                break
            self.copy_out()
        return status

    def begin(self, part: Part) -> subprocess.Popen:
        # What stops by itself does so a little before it is ended.
        words = {"seconds": f"{max(1.0, 0.85 * self.seconds_of(part)):.0f}"}
        words |= {"warm": str(self.folder / "warm"), "begun": str(self.begun(part))}
        environment = {name: value.format(**words) for name, value in part.environment.items()}
        with self.log.open("a") as log:
            print(f"== {part.name}, from {self.elapsed():.0f} s", file=log, flush=True)
            return subprocess.Popen(
                [word.format(**words) if "{" in word else word for word in part.command],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def end_background(self) -> None:
        for process, ends_by in self.background:
            wait(process, ends_by - self.elapsed())
            end(process)
        self.background.clear()

    def begun(self, part: Part) -> Path:
        return self.folder / f"{part.name}.begun"

    def num_begun(self, part: Part) -> int:
        path = self.begun(part)
        return len(path.read_text().splitlines()) if path.exists() else 0

    def seconds_of(self, part: Part) -> float:
        return max(0.0, min(part.at_most, min(part.ends_by, self.seconds) - GRACE - self.elapsed()))

    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def rows(self) -> list[Row]:
        """Those of this call."""
        return [row for path in sorted(RESULTS.glob("*.csv")) for row in self.new_rows(path)]

    def new_rows(self, path: Path) -> list[Row]:
        return read_rows(path)[self.num_rows_before.get(path, 0) :]

    def copy_out(self) -> None:
        for path in (self.log, *(path for path in RESULTS.glob("*.csv") if self.new_rows(path))):
            (self.out / path.name).write_bytes(path.read_bytes()[-MAX_OUT_BYTES:])

    def finish(self) -> None:
        rows = self.rows()
        lines = [*ncu_lines(self.log.read_text(errors="replace")), *table_lines(rows), *summary_lines(rows)]
        lines += [f"{name}: {outcome}" for name, outcome in self.outcomes.items()]
        with self.log.open("a") as log:
            print(*lines, sep="\n", file=log)
        print(*lines, sep="\n", flush=True)
        self.copy_out()

    def give_up(self) -> None:
        print(f"{self.name}: its {self.seconds:.0f} s are over", flush=True)
        for process, _ in self.background:
            kill(process, signal.SIGKILL)
        os._exit(1)


def wait(process: subprocess.Popen, seconds: float) -> int | None:
    """The exit status; None where it is not there yet."""
    try:
        return process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return None


def end(process: subprocess.Popen) -> None:
    """It and what it has started: asked first, so that pytest says what it found. What no signal ends is left alone."""
    if process.poll() is None:
        kill(process, signal.SIGINT)
        wait(process, GRACE / 2)
    kill(process, signal.SIGKILL)
    wait(process, GRACE / 4)


def kill(process: subprocess.Popen, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def with_arguments(part: Part, arguments: Sequence[str]) -> Part:
    return replace(part, command=(*part.command, *arguments)) if "tests" in part.name else part


def main() -> None:
    name, *arguments = sys.argv[1:] or ["first"]
    alone = {part.name: (replace(part, in_background=False),) for parts in CALLS.values() for part in parts}
    if name not in {**CALLS, **alone}:
        sys.exit(f"make gpu: no part {name!r}; there are {', '.join(dict.fromkeys([*CALLS, *alone]))}")
    if not (torch.cuda.is_available() or IS_DRY_RUN):
        sys.exit(f"make gpu: {sys.executable} sees no GPU; SCALELONG_DRY_RUN=1 walks through it without one")
    parts = CALLS.get(name) or alone[name]
    os.environ |= {"SCALELONG_COMMIT": commit(), "SCALELONG_RECORD": "1"}
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    print(*environment("cuda" if torch.cuda.is_available() else "cpu").values(), sep=", ", flush=True)
    with tempfile.TemporaryDirectory(prefix="scalelong-gpu-", ignore_cleanup_errors=True) as folder:
        out = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu")
        call = Call(name, max(part.ends_by for part in parts) + 5, Path(folder), out)
        is_well = call.run([with_arguments(part, arguments) for part in parts])
    sys.exit(not is_well)


if __name__ == "__main__":
    main()
