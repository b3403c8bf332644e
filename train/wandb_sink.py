"""Weights & Biases as a place for rows and grids of samples: ``--log.wandb PROJECT`` (extra ``wandb``).

``WANDB_MODE=offline`` and the other variables of W&B count as everywhere. The run folder keeps which run of W&B it is,
so that resuming goes on with it. Rows and grids that W&B lacks, as after a start that was killed, are sent again from
the folder; those that it has are not.
"""

import json
import math
import secrets
import shutil
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from scalelong.train.errors import warn
from scalelong.train.run_folder import config_path, grid_path, log_path, wandb_path
from scalelong.train.write_whole import write_whole

OFFLINE = "offline-run-"
"""How W&B's names of the folders of offline starts begin."""
SECONDS_TO_FINISH = 60.0
"""How long the end of a run waits for what is still to be sent; ``wandb sync`` sends the rest."""


@dataclass(frozen=True)
class Tracked:
    """What a run folder remembers of W&B, as JSON."""

    id: str
    project: str
    sent_to: int = -1
    """The images_seen up to which W&B has rows and grids, or the files of starts that ended as they should have."""
    unfinished: str = ""
    """The name of the offline folder of a start that is under way, or was killed: its file may lack its end."""


def open_wandb(project: str, run: Path, images_seen: int) -> "WeightsAndBiases | None":
    """The sink; None, with a warning, where W&B cannot be reached or refuses, for which no training stops."""
    try:
        return WeightsAndBiases(project, run, images_seen)
    except Exception as error:
        warn(f"no rows go to Weights & Biases: {type(error).__name__}: {' '.join(str(error).split())}")
        return None


class WeightsAndBiases:
    """Each figure of a row over the images seen, the grids of samples, and the configuration.

    Args:
        project: of W&B.
        run: run folder, whose log ends where the run resumes.
        images_seen: where that is.
    """

    def __init__(self, project: str, run: Path, images_seen: int):
        import wandb

        self._run, self._image = run, wandb.Image
        self._tracked = tracked = tracked_run(run, project)
        if tracked.unfinished.startswith(OFFLINE):
            shutil.rmtree(run / "wandb" / tracked.unfinished, ignore_errors=True)
        config = json.loads(config_path(run).read_text()) if config_path(run).is_file() else {}
        self._there = wandb.init(
            project=project,
            id=tracked.id,
            name=run.name,
            dir=str(run),
            config=config,
            resume="allow",
            settings=wandb.Settings(silent=True, console="off", finish_timeout=SECONDS_TO_FINISH),
        )
        is_offline = self._there.offline
        # On resuming, the server says which step would be the next.
        self._sent_to = self._there.step - 1 if self._there.resumed and not is_offline else tracked.sent_to
        self._tracked = replace(tracked, unfinished=Path(self._there.dir).parent.name if is_offline else "")
        self._write()
        self._send_what_lacks(images_seen)
        where = f"wandb sync {run / 'wandb' / self._tracked.unfinished}" if is_offline else self._there.url
        print(f"Weights & Biases, project {project}: {where}", flush=True)

    def log(self, row: Mapping[str, Any]) -> None:
        seen = int(row["images_seen"])
        if seen > self._sent_to:
            self._there.log({k: v for k, v in row.items() if v is not None and math.isfinite(v)}, step=seen)

    def show(self, picture: Path, images_seen: int) -> None:
        if images_seen > self._sent_to:
            self._there.log({"samples": self._image(str(picture))}, step=images_seen)

    def sync(self) -> None:
        pass

    def say(self, message: str) -> None:
        pass

    def close(self) -> None:
        last = int(self._there.step)
        self._there.finish()
        self._tracked = replace(self._tracked, sent_to=max(self._sent_to, last), unfinished="")
        self._write()

    def _send_what_lacks(self, images_seen: int) -> None:
        """Rows and grids of the folder up to there that W&B has not."""
        if self._sent_to >= images_seen or not log_path(self._run).is_file():
            return
        drawn = sorted(int(path.stem) for path in grid_path(self._run, 0).parent.glob("*.png") if path.stem.isdigit())
        pictures = deque(number for number in drawn if number <= images_seen)
        with log_path(self._run).open() as log:
            for row in map(json.loads, log):
                while pictures and pictures[0] < row["images_seen"]:  # steps go up there
                    self._show_drawn(pictures.popleft())
                self.log(row)
        for number in pictures:
            self._show_drawn(number)

    def _show_drawn(self, images_seen: int) -> None:
        self.show(grid_path(self._run, images_seen), images_seen)

    def _write(self) -> None:
        write_whole(wandb_path(self._run), (json.dumps(asdict(self._tracked)) + "\n").encode())


def tracked_run(run: Path, project: str) -> Tracked:
    """What the folder remembers, of a new run of W&B if it remembers nothing, or another project."""
    try:
        known = Tracked(**json.loads(wandb_path(run).read_text()))
    except (OSError, ValueError, TypeError):
        known = None
    return known if known is not None and known.project == project else Tracked(secrets.token_hex(4), project)
