"""What a run tells as it goes: log.jsonl and TensorBoard; a progress bar on a terminal, plain lines elsewhere."""

import json
import math
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from scalelong.train.errors import UserError
from scalelong.train.run_folder import log_path, tensorboard_folder
from scalelong.train.write_whole import write_whole

SECONDS_BETWEEN_LINES = 10.0


class QuietReport:
    """Tells nothing: the report of the other processes."""

    def __enter__(self) -> "QuietReport":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def log(self, row: dict[str, float | int]) -> None:
        pass

    def say(self, message: str) -> None:
        pass


class Report(QuietReport):
    """The report of the main process. Use it as a context manager.

    Args:
        run: run folder.
        images_seen: where the run starts or resumes; what the log says of later steps is taken out.
        total_images: where it ends.

    Raises:
        UserError: the log cannot be written.
    """

    def __init__(self, run: Path, images_seen: int, total_images: int):
        # Imported here: it costs a second, and only the main process reports.
        from torch.utils.tensorboard import SummaryWriter

        self._log_path = log_path(run)
        self._first, self._total = images_seen, total_images
        self._line_time = 0.0
        self._bar: Progress | None = None
        try:
            _truncate_log(self._log_path, images_seen)
            self._log = self._log_path.open("a")
            self._tensorboard = SummaryWriter(str(tensorboard_folder(run)), purge_step=images_seen + 1)
        except OSError as error:
            raise UserError(f"cannot write {self._log_path}: {error}") from error

    def __enter__(self) -> "Report":
        console = Console()
        if console.is_terminal:
            self._bar = Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("images  loss {task.fields[loss]}  {task.fields[speed]} images/s "),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=console,
            )
            self._task = self._bar.add_task("", total=self._total, completed=self._first, loss="-", speed="-")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._log.close()
        self._tensorboard.close()

    def log(self, row: dict[str, float | int]) -> None:
        """Writes a row, which has at least images_seen, loss and images_per_second, to the log, and shows it."""
        images_seen = int(row["images_seen"])
        try:
            # JSON knows no NaN and no infinity (the gradient of a step that overflowed in fp16).
            self._log.write(json.dumps({k: v if math.isfinite(v) else None for k, v in row.items()}) + "\n")
            self._log.flush()
            for name, value in row.items():
                if name != "images_seen":
                    self._tensorboard.add_scalar(name, value, images_seen)
        except OSError as error:
            raise UserError(f"cannot write {self._log_path}: {error}") from error
        self._show(images_seen, float(row["loss"]), float(row["images_per_second"]))

    def say(self, message: str) -> None:
        """A line above the progress bar."""
        if self._bar is not None:
            self._bar.console.print(message, highlight=False, markup=False)
        else:
            print(message, flush=True)

    def _show(self, images_seen: int, loss: float, speed: float) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=images_seen, loss=f"{loss:.4f}", speed=f"{speed:,.0f}")
            return
        now = time.monotonic()
        if now - self._line_time < SECONDS_BETWEEN_LINES and images_seen < self._total:
            return
        self._line_time = now
        left = (self._total - images_seen) / speed if speed > 0 else 0.0
        print(
            f"{images_seen:,} / {self._total:,} images  loss {loss:.4f}  {speed:,.0f} images/s  {_clock(left)} left",
            flush=True,
        )


class Meter:
    """How fast a run is, and how much of its time it waits for data; entered for each step, so that logs, grids and
    checkpoints do not count."""

    def __init__(self):
        self._began = self._seconds = 0.0
        self._steps = 0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds += time.perf_counter() - self._began
        self._steps += 1

    def take(self, images_per_step: int, seconds_waited: float) -> dict[str, float]:
        """Images per second, and the share of the time waited for data, since the last call."""
        seconds, steps = self._seconds, self._steps
        self._seconds, self._steps = 0.0, 0
        return {"images_per_second": steps * images_per_step / seconds, "data_wait": seconds_waited / seconds}


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _truncate_log(path: Path, images_seen: int) -> None:
    """Takes out the rows past the checkpoint that a run resumes from, and a last row that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["images_seen"] <= images_seen:
            kept.append(line + "\n")
    write_whole(path, "".join(kept).encode())
