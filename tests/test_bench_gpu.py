"""What `make gpu` runs, without a GPU: the whole walk at small sizes, and parts that hang, crash or are not there."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from scalelong.bench import gpu
from scalelong.bench.gpu import CALLS, Call, Part
from scalelong.bench.record import Row, append_rows, environment, read_rows

ROOT = Path(__file__).resolve().parents[1]

APEX = """
import torch
class GroupNorm(torch.nn.Module):
    SUPPORTED_CHANNELS, SUPPORTED_GROUPS = range(10_000), range(100)
    def __init__(self, groups, channels, **more):
        super().__init__()
    def forward(self, x):
        raise RuntimeError("no kernel image is available")
"""
NCU = """#!/bin/sh
while [ "$1" != "%s" ]; do shift; done
"$@" && echo "  _fwd_kernel (132, 1, 1)x(128, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Duration                         us       112.30
    Registers Per Thread             register/thread       80"
"""


def dry_run(tmp_path: Path, part: str, **variables: str) -> tuple[str, list, Path]:
    """What it prints, the rows it leaves, and $OUT."""
    out, results = tmp_path / "out", tmp_path / "results"
    results.mkdir()
    paths = [str(tmp_path / "packages"), str(ROOT / "src")]
    variables |= {"SCALELONG_DRY_RUN": "1", "SCALELONG_COMMIT": "0123abc", "SCALELONG_RESULTS": str(results)}
    variables |= {"OUT": str(out), "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["make", "gpu", f"PART={part}", f"PYTHON={sys.executable}"],
        cwd=ROOT,
        # Its benches must not take themselves for one of the processes that share these tests.
        env={**{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}, **variables},
        capture_output=True,
        text=True,
        timeout=400,
    )
    rows = []
    for path in results.glob("*.csv"):
        assert (out / path.name).read_bytes() == path.read_bytes()
        rows += read_rows(path)
    assert len(list(out.iterdir())) <= 8
    return done.stdout + done.stderr, rows, out


def outcomes(printed: str, part: str) -> dict[str, str]:
    """The lines that end a call."""
    names = [part.name for part in CALLS[part] if not part.in_background]
    lines = [line.partition(": ") for line in printed.splitlines()]
    return {name: how for name, _, how in lines if name in names}


@pytest.mark.slow
def test_a_dry_run_of_one_part_measures_what_it_is_named_after(tmp_path):
    printed, rows, _ = dry_run(tmp_path, "norms")
    assert "norms: well" in printed.splitlines()
    assert {row.op for row in rows} == {"skip_group_norm"}
    assert all(row.ms_median > 0 for row in rows)


@pytest.mark.exhaustive
def test_a_dry_run_walks_through_the_first_call(tmp_path):
    package = tmp_path / "packages" / "apex" / "contrib"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "group_norm.py").write_text(APEX)
    printed, rows, out = dry_run(tmp_path, "first")
    assert outcomes(printed, "first") == {
        **dict.fromkeys(("ceilings", "triton", "steps", "attention", "skip-linear", "tests"), "well"),
        "norms": "failed (1)",  # for the row below
    }
    assert {row.commit for row in rows} == {"0123abc"}
    failed = [row for row in rows if row.error]
    assert {(row.provider, row.error) for row in failed} == {("apex", "RuntimeError: no kernel image is available")}
    assert {row.layout for row in failed} == {"channels_last"}
    assert all(row.ms_median > 0 for row in rows if not row.error)
    norms = {(row.layout, row.direction, row.provider) for row in rows if row.op == "skip_group_norm"}
    assert set(product(("contiguous", "channels_last"), ("forward", "backward"), ["ours"])) <= norms
    networks = {"uvit_step", "unet_step", "dit_step"}
    assert {row.op for row in rows} == {"copy", "product", "skip_group_norm", "attention", "skip_linear", *networks}
    assert "ours-graph" in {row.provider for row in rows if row.op == "unet_step"}
    assert "launches compiled" in (out / "first.log").read_text()


@pytest.mark.exhaustive
def test_a_dry_run_walks_through_the_second_call(tmp_path):
    printed, rows, _ = dry_run(tmp_path, "second")
    assert outcomes(printed, "second") == dict.fromkeys(
        ("tests", "compiled-steps", "compiled-norms", "exhaustive"), "well"
    )
    assert {row.op for row in rows} == {"skip_group_norm", "uvit_step", "unet_step", "dit_step"}
    norms = {(row.layout, row.direction, row.provider) for row in rows if row.op == "skip_group_norm"}
    assert ("contiguous", "backward", "compile-loops-in-order") in norms
    assert {"ours-compile", "compile"} <= {row.provider for row in rows if row.op == "unet_step"}
    assert {row.commit for row in rows} == {"0123abc"}


@pytest.mark.exhaustive
def test_a_dry_run_walks_through_the_tuning(tmp_path):
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "ncu").write_text(NCU % sys.executable)
    (programs / "ncu").chmod(0o755)
    printed, _, _ = dry_run(tmp_path, "tuning", PATH=f"{programs}{os.pathsep}{os.environ['PATH']}")
    found = outcomes(printed, "tuning")
    assert found.pop("tune") in ("well", "at its limit")
    assert found == {"ncu": "well"}
    assert "_fwd_kernel, Duration us 112.30, Registers Per Thread register/thread 80" in printed


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu, "GRACE", 1.0)
    folder = tmp_path / "call"
    folder.mkdir()
    return lambda seconds: Call("test", seconds, folder, tmp_path / "out")


STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.alone
def test_a_part_that_hangs_ends_at_its_limit_with_what_it_has_started(call, tmp_path, capsys):
    start = time.monotonic()
    parts = [Part("stubborn", 3, python(STUBBORN)), Part("next", 30, python("print('reached')"))]
    assert not call(60).run(parts)
    assert time.monotonic() - start < 10
    printed = capsys.readouterr().out
    assert "stubborn: at its limit" in printed
    assert "next: well" in printed
    log = (tmp_path / "out" / "test.log").read_text()
    assert "reached" in log
    (pid,) = (int(line.split()[1]) for line in log.splitlines() if line.startswith("child "))
    assert not Path(f"/proc/{pid}").exists() or "zombie" in Path(f"/proc/{pid}/status").read_text()


def test_rows_are_copied_out_while_a_part_runs(call, tmp_path, monkeypatch):
    """Whoever ends the whole call from outside leaves no time for it afterwards."""
    monkeypatch.setattr(gpu, "COPY_SECONDS", 0.1)
    results = tmp_path / "results"
    results.mkdir()
    what = {**environment("cpu"), "op": "copy", "shape": "8", "dtype": "uint8", "layout": "-", "direction": "forward"}
    append_rows([Row(**what, provider="eager", ms_median=1.0)], results)
    (path,) = results.iterdir()
    code = f"""
import time
from pathlib import Path
with Path({str(path)!r}).open("a") as file:
    file.write(Path({str(path)!r}).read_text().splitlines()[1] + chr(10))
while not Path({str(tmp_path / "out" / path.name)!r}).exists():
    time.sleep(0.05)
"""
    assert call(30).run([Part("norms", 20, python(code))])


def test_what_one_part_leaves_the_next_one_has(call):
    running = call(100)
    part = Part("tests", 50, ("true",))
    assert 45 < running.seconds_of(part) < 50
    assert running.seconds_of(Part("ncu", 90, ("true",), at_most=10)) == 10
    running.start -= 48
    assert running.seconds_of(part) < 2
    assert running.seconds_of(Part("steps", 300, ("true",))) < 52  # never beyond the call


def test_a_program_that_is_not_there_is_skipped(call, capsys):
    assert call(60).run([Part("ncu", 30, ("no-such-program",))])
    assert "ncu: skipped, there is no no-such-program" in capsys.readouterr().out


def test_nothing_runs_beside_what_measures(call, tmp_path):
    mark = tmp_path / "mark"
    background = Part("warm", 5, python(f"import time; time.sleep(1); open({str(mark)!r}, 'w')"), in_background=True)
    assert call(60).run([background, Part("norms", 30, python(f"open({str(mark)!r})"), measures=True)])


# A process that loses its GPU at the second of three, and one that is killed there.
@pytest.mark.parametrize("crash", ["sys.exit(75)", "os.abort()"])
def test_benchmarks_go_on_behind_the_one_at_which_a_process_lost_its_gpu(call, tmp_path, capsys, crash):
    code = f"""
import os, pathlib, sys
path = pathlib.Path({str(tmp_path / "call" / "norms.begun")!r})
for name in "abc":
    if name in (path.read_text() if path.exists() else ""):
        continue
    with path.open("a") as file:
        print(name, file=file)
    print("ran", name, flush=True)
    if name == "b":
        {crash}
"""
    call(60).run([Part("norms", 30, python(code))])
    assert "norms: lost its GPU on the way" in capsys.readouterr().out
    log = (tmp_path / "out" / "test.log").read_text()
    assert [line for line in log.splitlines() if line.startswith("ran")] == ["ran a", "ran b", "ran c"]


def test_a_process_that_loses_its_gpu_before_any_benchmark_has_failed(call, capsys):
    assert not call(60).run([Part("norms", 30, python("import sys; sys.exit(75)"))])
    assert "norms: failed (75)" in capsys.readouterr().out


def test_arguments_go_to_the_tests_alone():
    changed = [gpu.with_arguments(part, ["-k", "attention"]) for part in CALLS["second"]]
    assert [part.name for part in changed if part.command[-2:] == ("-k", "attention")] == ["tests"]


def test_parts_end_one_after_the_other_within_the_call():
    for name, seconds in (("first", 385), ("second", 300), ("tuning", 200)):
        ends = [part.ends_by for part in CALLS[name] if not part.in_background]
        assert ends == sorted(ends)
        assert ends[-1] + 10 <= seconds
        # A marker given on the command line takes the place of the project's own.
        assert all("exhaustive" in word for part in CALLS[name] for word in part.command if word.startswith("gpu"))


def test_an_unknown_part_is_named_beside_those_that_there_are():
    command = ["make", "gpu", "PART=third", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "no part 'third'; there are first, second, tuning, data, ceilings" in done.stderr
    assert done.returncode != 0


def test_benchmarks_that_had_begun_are_left_out(tmp_path):
    (tmp_path / "conftest.py").write_text((ROOT / "bench" / "conftest.py").read_text())
    (tmp_path / "bench_two.py").write_text("def test_a():\n    assert False\n\ndef test_b():\n    pass\n")
    begun = tmp_path / "begun"
    begun.write_text("bench_two.py::test_a\n")
    command = [sys.executable, "-m", "pytest", "-q", "bench_two.py", "--begun", str(begun)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert "1 passed" in done.stdout
    assert begun.read_text().split() == ["bench_two.py::test_a", "bench_two.py::test_b"]


def test_the_last_resort_ends_what_waits_for_ever(tmp_path):
    code = f"""
import time
from pathlib import Path
from scalelong.bench import gpu
call = gpu.Call("test", 3, Path({str(tmp_path)!r}), Path({str(tmp_path / "out")!r}))
call.outcome = lambda part: time.sleep(600)
call.run([gpu.Part("stuck", 2, ("true",))])
"""
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(python(code), env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "test: its 3 s are over" in done.stdout


def test_rows_are_those_of_the_call(call, tmp_path):
    what = {**environment("cpu"), "op": "copy", "shape": "8", "dtype": "uint8", "layout": "-", "direction": "forward"}
    row = Row(**what, provider="eager")
    append_rows([row], tmp_path / "results")
    running = call(60)
    assert running.rows() == []
    append_rows([replace(row, provider="ours", ms_median=1.0)], tmp_path / "results")
    assert [found.provider for found in running.rows()] == ["ours"]
