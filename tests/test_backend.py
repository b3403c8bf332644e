"""Which implementation runs: forced by thread, and named where it is missing."""

import _thread
import threading
from collections.abc import Callable
from queue import Queue

import pytest
import torch
from torch import Tensor

from scalelong.kernels import backend, native_library
from scalelong.kernels.backend import backend_of, forced_backend, use_backend
from scalelong.kernels.group_norm import group_norm

X = torch.zeros(1)
needs_native = pytest.mark.skipif(native_library.ERROR is not None, reason=str(native_library.ERROR))


def in_threads(*calls: Callable[[], object]) -> list[object]:
    """What each gives, or the exception that it raised."""
    found: list[object] = [None] * len(calls)

    def run(i: int) -> None:
        try:
            found[i] = calls[i]()
        except BaseException as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


@needs_native
def test_threads_that_overlap_see_their_own_and_leave_nothing_behind():
    steps = threading.Barrier(2, timeout=30)

    def first() -> list[str | None]:
        seen = []
        with use_backend("reference"):
            steps.wait()  # the second enters
            steps.wait()
            seen.append(forced_backend())
        seen.append(forced_backend())
        steps.wait()  # the second leaves
        steps.wait()
        return [*seen, forced_backend()]

    def second() -> list[str | None]:
        steps.wait()
        with use_backend("native"):
            steps.wait()
            seen = [forced_backend()]
            steps.wait()
            seen.append(forced_backend())
        steps.wait()
        return [*seen, forced_backend()]

    assert in_threads(first, second) == [["reference", None, None], ["native", "native", None]]
    assert forced_backend() is None
    assert backend_of(X) == "native"


def test_many_threads_at_once_leave_nothing_behind():
    def work() -> bool:
        seen = set()
        for _ in range(200):
            with use_backend("reference"):
                seen.add(forced_backend())
        return seen == {"reference"} and forced_backend() is None

    assert in_threads(*[work] * 8) == [True] * 8
    assert forced_backend() is None


@needs_native
def test_another_thread_chooses_as_before():
    with use_backend("reference"):
        assert in_threads(lambda: backend_of(X)) == ["native"]
        assert backend_of(X) == "reference"


def test_a_thread_that_is_not_pythons_follows_the_last_that_entered():
    """As those in which autograd runs backward on a GPU."""
    found: Queue = Queue()

    def look() -> str | None:
        _thread.start_new_thread(lambda: found.put(forced_backend()), ())
        return found.get(timeout=30)

    with use_backend("reference"):
        assert look() == "reference"
    assert look() is None


def test_an_error_inside_leaves_nothing_behind():
    with pytest.raises(ValueError, match="do not divide"), use_backend("reference"):
        group_norm(torch.zeros(1, 3, 2), 2, None, None)
    assert forced_backend() is None


@needs_native
def test_backward_runs_what_forward_ran_in_whatever_thread():
    def gradient(x: Tensor) -> Tensor:
        with use_backend("reference"):
            y = group_norm(x, 2, None, None).square().sum()
        return torch.autograd.grad(y, x)[0]

    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    expected = gradient(x)
    with use_backend("reference"):
        y = group_norm(x, 2, None, None).square().sum()
    (found,) = in_threads(lambda: torch.autograd.grad(y, x)[0])
    assert isinstance(found, Tensor)
    assert torch.equal(found, expected)


@needs_native
def test_what_was_compiled_follows():
    torch.compiler.reset()
    x = torch.randn(2, 4, 5, 5)
    compiled = torch.compile(lambda x: group_norm(x, 2, None, None), fullgraph=True, backend="aot_eager")
    native = compiled(x)
    with use_backend("reference"):
        assert torch.equal(compiled(x), group_norm(x, 2, None, None))
    assert torch.equal(compiled(x), native)


def missing(monkeypatch) -> None:
    monkeypatch.setattr(native_library, "ERROR", "the native library is not built (nowhere.so is missing)")
    monkeypatch.setattr(backend, "_has_warned", False)


def test_in_a_clone_the_command_builds_it_there(monkeypatch):
    missing(monkeypatch)
    with pytest.warns(UserWarning, match=r"pip install -e \. "):
        backend_of(X)


@pytest.mark.parametrize(
    ("origin", "given"),
    [
        (None, "scalelong"),
        ("{broken", "scalelong"),
        ('{"url": "file:///tmp/scalelong", "dir_info": {}}', "file:///tmp/scalelong"),
        ('{"url": "https://example.org/s.git", "vcs_info": {"vcs": "git"}}', r"git\+https://example.org/s.git"),
    ],
)
def test_installed_without_a_clone_the_command_needs_none(monkeypatch, tmp_path, origin, given):
    class Installed:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return origin

    missing(monkeypatch)
    library = tmp_path / "site-packages" / "scalelong" / "kernels" / "native" / "libscalelong_native.so"
    monkeypatch.setattr(native_library, "PATH", library)
    monkeypatch.setattr(native_library.metadata, "distribution", lambda _: Installed())
    with pytest.warns(UserWarning, match=f"pip install --force-reinstall .* {given}$") as caught:
        backend_of(X)
    assert "setup.py" not in str(caught[0].message)
    assert "pip install -e" not in str(caught[0].message)
    with pytest.raises(RuntimeError, match="pip install --force-reinstall"), use_backend("native"):
        pass
