"""``scalelong launch`` on this machine: what it refuses, signals passed on, a dead process, the exit codes."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

pytest.importorskip("deepspeed")

from programs import start_own_process
from running import SMALL, free_port, losses, run_command, run_on_ranks, small_config

from scalelong.train.checkpoint import list_checkpoints
from scalelong.train.errors import EXIT_SAVED_AFTER_SIGNAL, UserError
from scalelong.train.hosts import preflight
from scalelong.train.hosts.hostfile import (
    check_environment_files,
    read_hostfile,
    select_hosts,
    without_byte_order_mark,
)
from scalelong.train.hosts.launch import Job, LaunchConfig, command_line, find_hosts, split_arguments
from scalelong.train.hosts.preflight import check_hosts, stale_locks
from scalelong.train.loop import train

STEP = 32
SECONDS_TO_END = 60


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("node1 slots=8\nnode2 slot=8\n", ["line 2", "node2 slot=8"]),
        ("node1\n", ["line 1", "NAME slots=NUMBER"]),
        ("node1 slots=8 8\n", ["line 1"]),
        ("node1 slots=2\n\n# spare\nnode1 slots=2\n", ["line 4", "node1", "twice"]),
        ("node1 slots=0\n", ["line 1", "at least one slot"]),
        ("# none\n", ["names no host"]),
    ],
)
def test_a_hostfile_with_a_mistake_names_its_line(tmp_path, text, words):
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_hostfile(path)
    assert all(word in str(caught.value) for word in [str(path), *words])


def test_a_hostfile_keeps_the_order_of_its_hosts(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# first\nnode2 slots=4 # four\n\n  node1   slots=8\n")
    assert list(read_hostfile(path).items()) == [("node2", 4), ("node1", 8)]


def test_a_hostfile_that_is_not_there():
    with pytest.raises(UserError, match="no/hosts: No such file"):
        read_hostfile(Path("no/hosts"))


@pytest.mark.parametrize("line", ["", "# comment", "DS_ACCELERATOR"])
def test_a_line_that_would_crash_deepspeed_is_named(tmp_path, line):
    (tmp_path / ".deepspeed_env").write_text(f"A=1\n{line}\n")
    with pytest.raises(UserError, match=r"\.deepspeed_env, line 2"):
        check_environment_files(tmp_path, tmp_path / "home", {})


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({}, "home/.deepspeed_env"),
        ({"DS_ENV_FILE": "variables"}, "variables"),
        ({"DS_ENV_FILE": "variables"}, "home/variables"),
        ({"DS_ENV_FILE": "ROOT/other/variables"}, "other/variables"),
    ],
)
def test_the_files_of_variables_that_deepspeed_reads_are_all_checked(tmp_path, environ, name):
    environ = {key: value.replace("ROOT", str(tmp_path)) for key, value in environ.items()}
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("A=1\n")
    check_environment_files(tmp_path, tmp_path / "home", environ)
    for mistake in ("# comment", "\ufeffA=1"):
        path.write_text(f"{mistake}\n")
        with pytest.raises(UserError, match=f"{re.escape(str(path))}, line 1"):
            check_environment_files(tmp_path, tmp_path / "home", environ)
    path.write_bytes(b"A=\xff\n")
    with pytest.raises(UserError, match="cannot read the variables"):
        check_environment_files(tmp_path, tmp_path / "home", environ)


def test_a_file_of_variables_that_is_not_there_is_missed_if_it_was_named(tmp_path):
    check_environment_files(tmp_path, tmp_path, {})
    with pytest.raises(UserError, match="DS_ENV_FILE=variables: there is no such file"):
        check_environment_files(tmp_path, tmp_path, {"DS_ENV_FILE": "variables"})


def test_a_byte_order_mark_is_no_part_of_a_name_here_and_in_deepspeed(tmp_path):
    from deepspeed.launcher.runner import fetch_hostfile

    path = tmp_path / "hosts"
    path.write_text("node1 slots=2\nnode2 slots=1\n", encoding="utf-8-sig")
    assert list(read_hostfile(path)) == ["node1", "node2"]
    with without_byte_order_mark(path) as plain:
        assert fetch_hostfile(plain) == {"node1": 2, "node2": 1}
    assert not Path(str(plain)).exists()
    path.write_text("node1 slots=2\n")
    with without_byte_order_mark(path) as plain:
        assert plain == path
    with without_byte_order_mark(None) as plain:
        assert plain is None


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        ("", "", {"b": 2, "a": 4, "c": 1}),
        ("a", "", {"a": 4}),
        ("a:0,3@b", "", {"b": 2, "a": 2}),
        ("a:0@a:1,0", "", {"a": 2}),
        ("", "a", {"b": 2, "c": 1}),
        ("", "a:0,1,2@c:0", {"b": 2, "a": 1}),
    ],
)
def test_hosts_that_are_included_or_not_excluded_are_those_that_deepspeed_takes(include, exclude, left):
    from deepspeed.launcher.runner import parse_inclusion_exclusion

    slots = {"b": 2, "a": 4, "c": 1}
    selected = select_hosts(slots, include, exclude)
    assert list(selected.items()) == list(left.items())
    theirs = parse_inclusion_exclusion(slots, include, exclude)
    assert {host: len(numbers) for host, numbers in theirs.items()} == selected


@pytest.mark.parametrize(
    ("include", "exclude", "words"),
    [
        ("d", "", "--include d: d is none of the hosts a, b"),
        ("", "a:2", "--exclude a:2: a has slots 0 to 1"),
        ("a:", "", "expected NAME or NAME:SLOT,SLOT"),
        ("a:0-1", "", "expected NAME or NAME:SLOT,SLOT"),
        ("", "a@", "expected NAME"),
        ("", "a@b", "--exclude a@b leaves no host"),
    ],
)
def test_a_choice_of_hosts_that_cannot_be_is_named(include, exclude, words):
    with pytest.raises(UserError, match=words):
        select_hosts({"a": 2, "b": 2}, include, exclude)


def test_the_choice_reaches_the_launcher_and_the_check_of_hosts(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("node1 slots=2\nnode2 slots=1\nnode3 slots=1\n")
    config = LaunchConfig(hostfile=path, exclude="node1@node2")
    assert find_hosts(config) == ["node3"]
    line = command_line(config, ["node3"], "abc", ["digits-uvit"])
    assert line[line.index("--exclude") + 1] == "node1@node2"
    assert line[line.index("--master_addr") + 1] == "node3"
    assert find_hosts(LaunchConfig(include="localhost:0,3")) == []
    with pytest.raises(UserError, match="node1 is none of the hosts localhost"):
        find_hosts(LaunchConfig(include="node1"))
    with pytest.raises(ValueError, match="only one can be given"):
        LaunchConfig(include="a", exclude="b")


def test_a_host_is_never_an_option(tmp_path, monkeypatch):
    path = tmp_path / "hosts"
    path.write_text("-oProxyCommand=touch\tslots=1\n")
    with pytest.raises(UserError, match="line 1: expected 'NAME slots=NUMBER'"):
        read_hostfile(path)
    lines = []
    answer = subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(preflight.subprocess, "run", lambda line, **_: lines.append(line) or answer)
    preflight.over_ssh("node1", 2222, "module")
    assert lines[0][lines[0].index("node1") - 1] == "--"


def test_that_there_is_no_gpu_is_shown_once(capfd):
    said = "[2026-11-26 12:00:00,000] [WARNING] [real_accelerator.py:213:f] Setting accelerator to CPU. If you have"
    assert Job(["sh", "-c", 'for i in 1 2 3; do echo "$0" >&2; done', said], lambda number: 0).run() == 0
    assert capfd.readouterr().err == said + "\n"


def test_options_end_at_the_recipe():
    assert split_arguments(["--master-port", "1", "digits-uvit", "--run", "x"]) == (
        ["--master-port", "1"],
        ["digits-uvit", "--run", "x"],
    )


def test_slots_that_are_not_there_and_a_node_rank_out_of_range(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("node1 slots=2\nnode2 slots=1\n")
    with pytest.raises(UserError, match="node2 has 1 slots"):
        find_hosts(LaunchConfig(hostfile=path, num_accelerators=2))
    with pytest.raises(UserError, match="hosts 0 to 1 of"):
        find_hosts(LaunchConfig(hostfile=path, node_rank=2, master_addr="10.0.0.1"))


def test_several_hosts_go_through_pdsh_and_one_by_one_without_ssh(tmp_path):
    path = tmp_path / "hosts"
    over_ssh = command_line(LaunchConfig(hostfile=path), ["node1", "node2"], "abc", ["digits-uvit"])
    assert {"--force_multi", "--no_ssh_check"} <= set(over_ssh)
    assert over_ssh[over_ssh.index("--master_addr") + 1] == "node1"
    by_hand = LaunchConfig(hostfile=path, node_rank=1, master_addr="10.0.0.1")
    line = command_line(by_hand, ["node1", "node2"], "abc", ["digits-uvit"])
    assert {"--no_ssh", "--node_rank"} <= set(line)
    assert "--force_multi" not in line


@pytest.mark.parametrize(("what", "other"), [("torch", "1.0"), ("python", "3.9.1"), ("scalelong", "0.0.0")])
def test_another_version_on_a_host_is_named(monkeypatch, what, other):
    here = preflight.describe_host()
    answer = {**here, "versions": {**here["versions"], what: other}}
    monkeypatch.setattr(preflight, "ask", lambda host, port: answer if host == "node2" else here)
    monkeypatch.setattr(preflight.shutil, "which", lambda name: name)
    with pytest.raises(UserError, match=f"node2 has {what} {other}, this machine has"):
        check_hosts(["node1", "node2"], None, print)


def test_a_host_with_gpus_and_no_compiler_is_named(monkeypatch):
    answer = {**preflight.describe_host(), "lacks_compiler": True}
    monkeypatch.setattr(preflight, "ask", lambda host, port: answer)
    monkeypatch.setattr(preflight.shutil, "which", lambda name: name)
    with pytest.raises(UserError, match="node1 has GPUs and no C compiler"):
        check_hosts(["node1"], None, print)


def test_a_compiler_is_looked_for_where_triton_does(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(preflight.shutil, "which", lambda name: name if name == "my-cc" else None)
    assert not preflight.has_compiler()
    monkeypatch.setenv("CC", "my-cc")
    assert preflight.has_compiler()


def test_a_host_that_no_ssh_reaches_is_named(monkeypatch):
    monkeypatch.setattr(preflight.shutil, "which", lambda name: name)
    failed = subprocess.CompletedProcess([], 255, "", "ssh: Could not resolve hostname node9\n")
    monkeypatch.setattr(preflight.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(UserError, match="node9 cannot be reached over ssh: ssh: Could not resolve"):
        check_hosts(["node9"], None, print)


def test_pdsh_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(preflight.shutil, "which", lambda name: None if name == "pdsh" else name)
    with pytest.raises(UserError, match="pdsh is not installed"):
        check_hosts(["node1"], None, print)


def test_only_old_locks_are_stale(tmp_path):
    lock = tmp_path / ".cache/torch_extensions/py311_cpu/fused_adam/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    now = time.time()
    assert list(stale_locks(tmp_path, now)) == []
    assert list(stale_locks(tmp_path, now + 3600)) == [lock]


@pytest.mark.parametrize(
    ("printed", "code", "expected_code", "told"),
    [
        ("[x] [E] [launch.py:1:main] ['python'] exits with return code = -9", 247, 247, "this machine was killed"),
        (
            "node2: [x] [E] [launch.py:1:main] [] exits with return code = -11",
            245,
            245,
            "node2 was killed by SIGSE",
        ),
        ("pdsh@node1: node2: ssh exited with exit code 255", 255, 255, "the connection to node2 was lost"),
        ("[x] [E] [launch.py:1:main] ['python'] exits with return code = 75", 75, 75, ""),
        ("error: cannot decode a.png", 2, 2, ""),
        ("", 3, 3, "ended with exit code 3"),
        ("", 0, 0, ""),
    ],
)
def test_what_ended_the_job_is_told_in_one_line(capfd, printed, code, expected_code, told):
    job = Job(["sh", "-c", 'echo "$0" >&2; exit "$1"', printed, str(code)], lambda number: 0)
    assert job.run() == expected_code
    shown = capfd.readouterr().err.strip()
    assert told in shown
    assert len(shown.splitlines()) <= 1
    assert "launch.py" not in shown


def test_processes_that_a_killed_launcher_leaves_behind_are_ended(capfd):
    sent = []

    def signal_two(number: int) -> int:
        sent.append(number)
        return 2 if len(sent) < 3 else 0

    assert Job(["true"], signal_two).run() == 1
    assert sent == [signal.SIGTERM, 0, 0, signal.SIGKILL]
    assert "the deepspeed launcher was killed" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--hostfile", "no/such/file", "digits-uvit"], ["no/such/file"]),
        (["--num-acelerators", "2", "digits-uvit"], ["--num-acelerators", "--num-accelerators"]),
        (["--node-rank", "0", "digits-uvit"], ["hostfile", "master_addr"]),
        (["digits-uvit", "--total-images", "many"], ["--total-images", "many"]),
        ([], ["which recipe?"]),
    ],
)
def test_bad_input_gets_one_line(options, words):
    done = run_command("launch", *options, module="scalelong")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in words)


def training(run: Path, steps: int) -> list[object]:
    often = ["--images-per-checkpoint", 2 * STEP]
    return ["digits-uvit", *SMALL, "--run", run, *often, "--total-images", steps * STEP]


def start_two(*arguments: object) -> subprocess.Popen[str]:
    options = ["--num-accelerators", 2, "--master-port", free_port()]
    return start_own_process("-m", "scalelong", "launch", *options, *arguments, variables={"DS_ACCELERATOR": "cpu"})


def training_processes(run: Path) -> list[psutil.Process]:
    def trains(line: list[str]) -> bool:
        return str(run) in line and any(argument.startswith("--local_rank=") for argument in line)

    return [p for p in psutil.process_iter(["cmdline"]) if trains(p.info["cmdline"] or [])]


def wait_for_a_checkpoint(run: Path, launch: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not list_checkpoints(run):
        assert launch.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "harm",
    [
        # The test of two hosts sends SIGTERM too; test_front.py sends every signal, to a launcher of stand-ins.
        pytest.param("SIGTERM", marks=pytest.mark.exhaustive),
        pytest.param("SIGINT", marks=pytest.mark.exhaustive),
        "rank 1 dies",
    ],
)
def test_harm_ends_all_processes_and_the_same_command_goes_on(tmp_path, harm):
    run = tmp_path / "run"
    launch = start_two(*training(run, 100_000))
    wait_for_a_checkpoint(run, launch)
    if harm.startswith("SIG"):
        launch.send_signal(signal.Signals[harm])
    else:
        (victim,) = [p for p in training_processes(run) if "--local_rank=1" in p.cmdline()]
        os.kill(victim.pid, signal.SIGKILL)
    try:
        out, err = launch.communicate(timeout=SECONDS_TO_END)
    finally:
        launch.kill()
    assert training_processes(run) == []
    saved = int(list_checkpoints(run)[0].name)
    if harm.startswith("SIG"):
        assert launch.returncode == EXIT_SAVED_AFTER_SIGNAL, out + err
        assert re.search(rf"saved at {saved:,} images", out)
    else:
        assert launch.returncode not in (0, EXIT_SAVED_AFTER_SIGNAL)
        assert "error: a process on this machine was killed by SIGKILL" in err
        assert "Traceback" not in err
    # The same command goes on, and what two have computed together is the same with and without the harm.
    if harm == "rank 1 dies":
        out, _ = run_on_ranks(2, "-m", "scalelong.train", *training(run, saved // STEP + 2))
    else:
        again = start_two(*training(run, saved // STEP + 2))
        out, err = again.communicate(timeout=120)
        assert again.returncode == 0, out + err
    assert f"resuming at {saved:,} images" in out
    alone = tmp_path / "alone"
    assert train(small_config(alone, total_images=5 * STEP)) == 0
    assert losses(run)[:5] == pytest.approx(losses(alone)[: len(losses(run)[:5])], abs=1e-4)
