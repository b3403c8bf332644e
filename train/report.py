"""What a run tells as it goes: rows to log.jsonl, TensorBoard and the terminal, and lines for people.

``SINKS`` is the table of where rows go; a tracker of one's own is a further ``Sink`` in it. The log is the source of
truth: a run whose log cannot be written stops, any other sink that fails is warned of once and left out from then on.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from scalelong.train.errors import UserError, warn
from scalelong.train.pace import Pace, clock, short
from scalelong.train.run_folder import config_path, log_path, tensorboard_folder
from scalelong.train.wandb_sink import open_wandb
from scalelong.train.write_whole import staged, sync

SECONDS_BETWEEN_LINES = 10.0
Row = dict[str, float | int]
"""What there is to tell of a step: at least images_seen, loss and images_per_second, other figures by their names."""


class Sink(Protocol):
    """A place that rows go to. What it raises ends it, not the run, but for a UserError, which ends both."""

    def log(self, row: Row) -> None:
        """Takes a row."""

    def sync(self) -> None:
        """Waits until what it was given is where a power cut leaves it."""

    def say(self, message: str) -> None:
        """Takes a line for people; places that nobody watches leave it."""

    def close(self) -> None:
        """Is called once, at the end."""


@runtime_checkable
class TakesPictures(Protocol):
    """A sink that is given pictures too."""

    def show(self, picture: Path, images_seen: int) -> None:
        """Takes a grid of samples, a file, that was drawn then."""


class Report:
    """Tells every sink. Use it as a context manager; without sinks, as on the other processes, it tells nothing."""

    def __init__(self, sinks: Sequence[Sink] = ()):
        self._sinks = list(sinks)

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        self._tell(lambda sink: sink.close())

    def log(self, row: Row) -> None:
        """Gives a row to each sink.

        Raises:
            UserError: the log cannot be written.
        """
        self._tell(lambda sink: sink.log(row))

    def sync(self) -> None:
        """Waits until the rows are on the disk: a checkpoint whose rows a power cut took would leave a gap in the log.

        Raises:
            UserError: the log cannot be written.
        """
        self._tell(lambda sink: sink.sync())

    def say(self, message: str) -> None:
        """A line for people."""
        self._tell(lambda sink: sink.say(message))

    def show(self, picture: Path, images_seen: int) -> None:
        """Gives a grid of samples to each sink that takes pictures."""
        self._tell(lambda sink: sink.show(picture, images_seen) if isinstance(sink, TakesPictures) else None)

    def _tell(self, what: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                what(sink)
            except UserError:
                raise
            except Exception as error:
                self._sinks.remove(sink)
                warn(f"no more rows go to {type(sink).__name__}: {type(error).__name__}: {error}")


def open_report(run: Path, images_seen: int, total_images: int, *, wandb: str = "") -> Report:
    """The report of the main process.

    Args:
        run: run folder.
        images_seen: where the run starts or resumes; what the log says of later steps is taken out.
        total_images: where it ends.
        wandb: project of Weights & Biases that rows go to as well.

    Raises:
        UserError: a sink cannot be opened.
    """
    openers: list[tuple[str, Callable[[Path, int, int], Sink | None]]] = [*SINKS.items()]
    if wandb:  # between the log, which it reads, and the terminal, whose bar would be written over
        openers.insert(-1, ("Weights & Biases", lambda run, images_seen, _: open_wandb(wandb, run, images_seen)))
    sinks: list[Sink] = []
    for name, open_sink in openers:
        try:
            sink = open_sink(run, images_seen, total_images)
            if sink is not None:
                sinks.append(sink)
        except OSError as error:
            for sink in sinks:
                sink.close()
            raise UserError(f"cannot open the {name} of {run}: {error}") from error
    return Report(sinks)


class LogFile:
    """``log.jsonl``: an object for each row."""

    def __init__(self, run: Path, images_seen: int, _total_images: int):
        self._path = log_path(run)
        try:
            truncate_log(self._path, images_seen)
            self._file = self._path.open("a")
        except OSError as error:
            raise self._cannot_write(error) from error

    def log(self, row: Row) -> None:
        try:
            # JSON knows no NaN and no infinity (the gradient of a step that overflowed in fp16).
            self._file.write(json.dumps({k: v if math.isfinite(v) else None for k, v in row.items()}) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._cannot_write(error) from error

    def sync(self) -> None:
        try:
            sync(self._path)
        except OSError as error:
            raise self._cannot_write(error) from error

    def say(self, message: str) -> None:
        pass

    def close(self) -> None:
        self._file.close()

    def _cannot_write(self, error: OSError) -> UserError:
        return UserError(f"cannot write {self._path}: {error}")


class TensorBoard:
    """``tensorboard/``: each figure of a row over the images seen, the grids of samples, the configuration as text."""

    def __init__(self, run: Path, images_seen: int, _total_images: int):
        # Imported here: it costs a second, and only the main process reports.
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
        from torch.utils.tensorboard import SummaryWriter

        self._summary, self._value = Summary, Summary.Value
        folder = tensorboard_folder(run)
        is_new = not any(folder.glob("events.*"))
        self._writer = SummaryWriter(str(folder), purge_step=images_seen + 1)
        if is_new and config_path(run).is_file():
            self._writer.add_text("config.json", f"```json\n{config_path(run).read_text()}```", images_seen)

    def log(self, row: Row) -> None:
        # One event for all: ``add_scalar`` takes some 50 us for each, and a row has a hundred.
        values = [self._value(tag=name, simple_value=value) for name, value in row.items() if name != "images_seen"]
        self._writer._get_file_writer().add_summary(self._summary(value=values), int(row["images_seen"]))

    def show(self, picture: Path, images_seen: int) -> None:
        with Image.open(picture) as opened:
            self._writer.add_image("samples", np.asarray(opened.convert("RGB")), images_seen, dataformats="HWC")

    def sync(self) -> None:
        pass

    def say(self, message: str) -> None:
        pass

    def close(self) -> None:
        self._writer.close()


class Terminal:
    """Standard output: a progress bar on a terminal, elsewhere a line every ten seconds."""

    def __init__(self, _run: Path, images_seen: int, total_images: int):
        self._total, self._pace = total_images, Pace()
        self._line_time = -math.inf
        self._bar: Progress | None = None
        console = Console()
        if console.is_terminal:
            columns = "images  loss {task.fields[loss]}  {task.fields[speed]} images/s  {task.fields[left]} left"
            self._bar = Progress(BarColumn(), MofNCompleteColumn(), TextColumn(columns), console=console)
            unknown = dict.fromkeys(("loss", "speed", "left"), "-")
            self._task = self._bar.add_task("", total=total_images, completed=images_seen, **unknown)
            self._bar.start()

    def log(self, row: Row) -> None:
        images_seen, loss, speed = int(row["images_seen"]), f"{row['loss']:.4f}", float(row["images_per_second"])
        left = clock(self._pace.seconds_for(self._total - images_seen, images_seen=images_seen, speed=speed))
        if self._bar is not None:
            self._bar.update(self._task, completed=images_seen, loss=loss, speed=short(speed), left=left)
            return
        now = time.monotonic()
        if now - self._line_time < SECONDS_BETWEEN_LINES and images_seen < self._total:
            return
        self._line_time = now
        progress = f"{images_seen:,} / {self._total:,} images"
        print(f"{progress}  loss {loss}  {short(speed)} images/s  {left} left", flush=True)

    def sync(self) -> None:
        pass

    def say(self, message: str) -> None:
        """A line above the progress bar."""
        if self._bar is not None:
            self._bar.console.print(message, highlight=False, markup=False)
        else:
            print(message, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


SINKS: dict[str, Callable[[Path, int, int], Sink]] = {
    "log": LogFile,
    "TensorBoard folder": TensorBoard,
    "terminal": Terminal,
}
"""Each opened for a run folder, the images seen so far and those in all. The log comes first, the terminal last."""


def truncate_log(path: Path, images_seen: int) -> None:
    """Takes out the rows past the checkpoint that a run resumes from, and lines that are no rows: the last, cut off."""
    if not path.exists():
        return
    with staged(path) as staging, path.open("rb") as before, staging.open("wb") as kept:
        for line in before:
            if _images_seen_of(line) <= images_seen:
                kept.write(line.rstrip(b"\n") + b"\n")


def _images_seen_of(line: bytes) -> float:
    """Infinity for a line that is no row of the log."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return math.inf
    number = row.get("images_seen") if isinstance(row, dict) else None
    return number if isinstance(number, int | float) and not math.isnan(number) else math.inf
