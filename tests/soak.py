"""Kills training runs at seeded random moments, a given number of times, and compares each with an undisturbed run.

    python tests/soak.py FOLDER --kills 200 --seed 0

Every run is killed in each of its starts until one comes to its end; then its checkpoint and its losses must be those
of the undisturbed run, bit for bit. What has been counted is kept in FOLDER/counts.json: the same command goes on.
"""

import argparse
import json
import random
import shutil
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from killing import (
    Kill,
    draw_kill,
    expect_same_run,
    kill_again_and_again,
    killable_config,
    make_images,
    train_to_the_end,
)
from programs import start_python

from scalelong.train.config import TrainConfig

STEPS = 24
FILE_OPERATIONS = 120
"""Of one start: those of the start itself and of about four checkpoints."""
SHARE_OF_TIME = 0.4
"""Kills come within this share of what an undisturbed run takes, so that a run is killed more than once."""
SHAPES = ((1, 0), (1, 2), (2, 1), (1, 1), (1, 3), (2, 3), (1, 0), (2, 2))
"""(processes, ZeRO stage)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    soak(arguments.folder.resolve(), arguments.kills, arguments.seed)


def soak(folder: Path, kills: int, seed: int) -> Counter[str]:
    """Counts kills until there are ``kills`` of them; returns the counts, which it also prints."""
    counts = read_counts(folder, seed)
    # The server's imports are no part of the first run's time.
    start_python("-c", "").wait()
    if not (folder / "images").is_dir():
        make_images(folder / "images")
    while counts["kills"] < kills:
        number = counts["runs"]
        world_size, stage = SHAPES[number % len(SHAPES)]
        began = time.monotonic()
        counts += killed_run(folder, random.Random(f"{seed} {number}"), world_size, stage)
        write_counts(folder, seed, counts)
        print(
            f"{counts['kills']} of {kills} kills, {counts['runs']} runs identical; the last: {world_size} processes, "
            f"ZeRO {stage}, {time.monotonic() - began:.0f} s",
            flush=True,
        )
    print("\n".join(f"{count:>6} {what}" for what, count in sorted(counts.items())))
    return counts


def killed_run(folder: Path, rng: random.Random, world_size: int, stage: int) -> Counter[str]:
    """One run, killed until it comes to its end, and compared."""
    reference = folder / f"undisturbed-{world_size}-{stage}"
    config = killable_config(reference / "run", folder / "images", steps=STEPS, zero_stage=stage)
    seconds = SHARE_OF_TIME * train_undisturbed(config, world_size)
    killed = folder / "killed"
    shutil.rmtree(killed, ignore_errors=True)
    own = replace(config, run=killed / "run")

    def draw() -> tuple[Kill, int]:
        return draw_kill(rng, world_size=world_size, seconds=seconds, operations=FILE_OPERATIONS)

    kinds = kill_again_and_again(own, draw, world_size)
    expect_same_run(own.run, config.run)
    total = kinds.total()
    shape = f"kills of {world_size} processes under ZeRO {stage}"
    return Counter({"kills": total, "runs": 1, shape: total, **{f"kills {kind}": n for kind, n in kinds.items()}})


def train_undisturbed(config: TrainConfig, world_size: int) -> float:
    """Seconds that the run to compare with took; it is made once for each shape."""
    done = config.run.with_name("seconds.txt")
    if not done.exists():
        shutil.rmtree(config.run, ignore_errors=True)
        began = time.monotonic()
        train_to_the_end(config, world_size)
        done.write_text(str(time.monotonic() - began))
    return float(done.read_text())


def read_counts(folder: Path, seed: int) -> Counter[str]:
    path = folder / "counts.json"
    if not path.exists():
        return Counter()
    found = json.loads(path.read_text())
    if found["seed"] != seed:
        sys.exit(f"error: {folder} was made with --seed {found['seed']}; take another folder")
    return Counter(found["counts"])


def write_counts(folder: Path, seed: int, counts: Counter) -> None:
    path = folder / "counts.json"
    staging = path.with_suffix(".writing")
    staging.write_text(json.dumps({"seed": seed, "counts": counts}, indent=2) + "\n")
    staging.rename(path)


if __name__ == "__main__":
    main()
