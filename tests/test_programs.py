"""Forks of the server are what tests take them for: programs that end as processes of their own do."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from programs import Forked, environment, start_own_process
from running import rank_variables

PROGRAMS = {
    "end": "print('said')",
    "exit": "import sys; print('said'); sys.exit(7)",
    "exit with words": "import sys; sys.exit('words')",
    "error": "raise ValueError('wrong')",
    "os._exit": "import os; print('said', flush=True); os._exit(3)",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "terminated": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "interrupted": "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
    "closed pipe": "import os; r, w = os.pipe(); os.close(r); os.write(w, b'x')",
    "at exit": "import atexit; atexit.register(print, 'at exit')",
    "thread": "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()",
    "error in a thread": "import threading; threading.Thread(target=lambda: 1 / 0).start()",
    "arguments": "import sys; print(sys.argv, sys.stdin.read())",
    "surroundings": "import os; print(os.getcwd(), sorted(os.environ.items()), os.umask(0))",
    "signals": "import signal; print([signal.getsignal(number) for number in signal.valid_signals()])",
    "descriptors": "import os; print(sorted(os.listdir('/proc/self/fd')))",
    "child": "import subprocess, sys; print(subprocess.run([sys.executable, '-c', 'exit(5)']).returncode)",
}


def ending(program: Forked | subprocess.Popen[str]) -> tuple[int | None, str, str]:
    """The exit code, the output, and the last line of the errors: a traceback shows what has called the program."""
    out, err = program.communicate(timeout=60)
    return program.returncode, out, err.strip().splitlines()[-1] if err.strip() else ""


@pytest.fixture
def heeds_interrupts():
    """As at a terminal: what a script starts in the background ignores them, and so do the programs that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_interrupts")
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_fork_ends_as_a_process_of_its_own(name):
    line = ["-c", PROGRAMS[name], "1", "--two"]
    own = start_own_process(*line)
    assert ending(Forked(line, environment())) == ending(own)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_fork_has_the_threads_that_its_environment_gives(threads):
    line = ["-c", "import torch; print(torch.get_num_threads(), torch.ones(9**6).sum().item())"]
    assert ending(Forked(line, environment({"OMP_NUM_THREADS": threads}))) == (0, f"{threads} {9.0**6}\n", "")


def test_a_fork_can_be_waited_for_and_killed(tmp_path):
    program = Forked(["-c", "import time; print('said', flush=True); time.sleep(60)"], environment(), tmp_path / "out")
    with pytest.raises(subprocess.TimeoutExpired):
        program.wait(0.1)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert program.poll() is None
    program.kill()
    assert program.wait(10) == program.poll() == -signal.SIGKILL
    assert (tmp_path / "out").read_text() == "said\n"
    assert not Path(f"/proc/{program.pid}").exists()


def test_forks_are_not_born_of_the_tests_and_run_beside_each_other():
    line = ["-c", "import os, time; time.sleep(0.5); print(os.getpid(), os.getppid(), os.environ['RANK'])"]
    programs = [Forked(line, environment(variables)) for variables in rank_variables(2)]
    printed = [program.communicate(timeout=60)[0].split() for program in programs]
    assert [rank for _, _, rank in printed] == ["0", "1"]
    assert [int(pid) for pid, _, _ in printed] == [program.pid for program in programs]
    assert len({parent for _, parent, _ in printed} - {str(os.getpid())}) == 1


def test_a_fork_that_nobody_waits_for_harms_no_other():
    Forked(["-c", "import time; time.sleep(0.3)"], environment()).kill()
    time.sleep(0.5)
    assert ending(Forked(["-c", "print('said')"], environment())) == (0, "said\n", "")
