"""How a run stands or has ended: ``outcome.json`` in its folder, for programs that start many runs and for people.

The main process writes it whole, "running" at the start and the end whenever Python sees one. A process that is killed
at once leaves "running" behind, and no lock: ``read_outcome`` then says "died".
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

from scalelong.train.errors import EXIT_SAVED_AFTER_SIGNAL, EXIT_USER_ERROR, DivergedError, UserError, warn
from scalelong.train.hosts.processes import to_user_error
from scalelong.train.run_folder import outcome_path
from scalelong.train.run_lock import is_locked
from scalelong.train.write_whole import write_whole

State = Literal["running", "finished", "stopped", "diverged", "failed", "died"]
EXIT_INTERRUPTED = 130
"""Of a second Ctrl-C, as shells give it."""


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Where a run diverged."""

    step: int
    images_seen: int
    what: str
    """"the loss is nan", say."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What outcome.json says."""

    state: State
    """"stopped" is saved by a signal, or interrupted; "failed" is any other end before the last image."""
    images_seen: int
    """As far as the run came, or where this start began while it runs. A checkpoint may be older."""
    step: int
    exit_code: int | None = None
    """Of the main process; None while it runs, or if nobody saw its end."""
    signal: str | None = None
    """Which stopped it; None also where another process of the run received it."""
    diverged: Divergence | None = None
    reason: str | None = None
    """Why it did not finish, in a line."""


def read_outcome(run: Path) -> Outcome | None:
    """What the outcome of a run is; None for a folder without one, of a version before it or without a run.

    Raises:
        UserError: outcome.json cannot be read, or is damaged.
    """
    path = outcome_path(run)
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        diverged = values.pop("diverged", None)
        outcome = Outcome(**values, diverged=Divergence(**diverged) if diverged else None)
        if outcome.state not in get_args(State):
            raise ValueError(f"unknown state {outcome.state!r}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if outcome.state == "running" and is_locked(run) is False:
        return replace(outcome, state="died", reason="its process ended at once, killed or with its machine")
    return outcome


def outcome_of_error(error: BaseException, so_far: Outcome) -> Outcome:
    """What an error makes of a run that came so far."""
    if isinstance(error, DivergedError):
        where = Divergence(step=error.step, images_seen=error.images_seen, what=error.what)
        return replace(so_far, state="diverged", exit_code=EXIT_USER_ERROR, diverged=where, reason=str(error))
    if isinstance(error, UserError):
        return replace(so_far, state="failed", exit_code=EXIT_USER_ERROR, reason=str(error))
    if isinstance(error, KeyboardInterrupt):
        reason = "interrupted before it was saved"
        return replace(so_far, state="stopped", exit_code=EXIT_INTERRUPTED, signal="SIGINT", reason=reason)
    if isinstance(error, RuntimeError) and (told := to_user_error(error)) is not None:
        return outcome_of_error(told, so_far)
    first_line = (str(error).strip().splitlines() or [""])[0]
    reason = f"{type(error).__name__}: {first_line}".removesuffix(": ")
    return replace(so_far, state="failed", exit_code=1, reason=reason)


class OutcomeFile:
    """Keeps outcome.json: "running" at once, and what ended the run when the context is left.

    Args:
        run: run folder.
        images_seen: where this start begins.
        step: the last one before it.
        writes: whether this process does; the others of a run only count along.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, run: Path, images_seen: int, step: int, *, writes: bool):
        self.run, self._writes = run, writes
        self._outcome = Outcome(state="running", images_seen=images_seen, step=step)
        self._write()

    def __enter__(self) -> "OutcomeFile":
        return self

    @property
    def images_seen(self) -> int:
        return self._outcome.images_seen

    def reached(self, images_seen: int, step: int) -> None:
        """Notes how far the run is, in memory alone."""
        self._outcome = replace(self._outcome, images_seen=images_seen, step=step)

    def finish(self) -> None:
        """The last image has been trained on, and all is saved."""
        self._outcome = replace(self._outcome, state="finished", exit_code=0)

    def stop(self, signal: str | None) -> None:
        """The run was saved after a signal; None if another process of the run received it."""
        reason = f"saved after {signal or 'a signal to another process'}"
        code = EXIT_SAVED_AFTER_SIGNAL
        self._outcome = replace(self._outcome, state="stopped", exit_code=code, signal=signal, reason=reason)

    def fail(self, error: BaseException) -> None:
        """Writes at once that this ends the run; for whoever ends the process without leaving the context."""
        self._outcome = outcome_of_error(error, self._outcome)
        try:
            self._write()
        except UserError as problem:
            warn(str(problem))  # what ended the run, a full disk say, is the error to tell

    def __exit__(self, _kind: Any, error: BaseException | None, _traceback: TracebackType | None) -> None:
        if error is None:
            self._write()
        else:
            self.fail(error)

    def _write(self) -> None:
        if not self._writes:
            return
        path = outcome_path(self.run)
        try:
            write_whole(path, (json.dumps(asdict(self._outcome), indent=2) + "\n").encode())
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
