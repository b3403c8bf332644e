"""What a checkpoint's files may do to whoever reads them: nothing, unless they are whole and are what they say."""

import hashlib
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("deepspeed")

from scalelong.train.checkpoint import (
    MANIFEST,
    find_problem,
    list_checkpoints,
    newest_checkpoint,
    read_state,
    read_tensors,
)
from scalelong.train.errors import UserError
from scalelong.train.run_folder import checkpoints_folder

FILES = ("ema.safetensors", "model.safetensors", "optimizer.safetensors", "state.json")
STATE = {"images_seen": 64, "step": 2, "optimizer_steps": 2, "data_fingerprint": "f", "grad_scaler": None}


def write_manifest(folder: Path) -> None:
    hashes = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES if (folder / name).exists()
    }
    (folder / MANIFEST).write_text(json.dumps({"sha256": hashes}))


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A checkpoint of one number, made by hand."""
    folder = checkpoints_folder(tmp_path) / "64"
    folder.mkdir(parents=True)
    for name in FILES[:3]:
        save_file({"weight": torch.ones(1)}, folder / name)
    (folder / "state.json").write_text(json.dumps(STATE))
    write_manifest(folder)
    assert find_problem(folder) is None
    return folder


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keeps", [0.0, 0.5], ids=["empty", "half"])
def test_a_file_cut_short_is_named(checkpoint, name, keeps):
    data = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(data[: int(len(data) * keeps)])
    assert find_problem(checkpoint) == f"{name} is not what was written"


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_gone_is_named(checkpoint, name):
    (checkpoint / name).unlink()
    assert find_problem(checkpoint) == f"{name} is missing"


def test_two_files_swapped_are_noticed(checkpoint):
    save_file({"weight": torch.zeros(1)}, checkpoint / "ema.safetensors")
    write_manifest(checkpoint)
    model, ema = (checkpoint / "model.safetensors", checkpoint / "ema.safetensors")
    first = model.read_bytes()
    model.write_bytes(ema.read_bytes())
    ema.write_bytes(first)
    assert find_problem(checkpoint) is not None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "{}",
        '{"sha256": 3}',
        '{"sha256": {"model.safetensors": 7}}',
        "\x00\x01",
        '{"sha256": []}',
    ],
)
def test_a_damaged_manifest_is_no_whole_checkpoint(checkpoint, text):
    (checkpoint / MANIFEST).write_text(text)
    assert find_problem(checkpoint) is not None


@pytest.mark.parametrize("left_out", [*FILES, None], ids=str)
def test_a_manifest_that_leaves_files_out_is_no_whole_checkpoint(checkpoint, left_out):
    """Nor is one that lists none: nothing vouches for what it does not name."""
    values = json.loads((checkpoint / MANIFEST).read_text())
    values["sha256"] = {k: v for k, v in values["sha256"].items() if left_out not in (k, None)}
    (checkpoint / MANIFEST).write_text(json.dumps(values))
    assert find_problem(checkpoint) == f"{MANIFEST} does not name {left_out or FILES[0]}"


def test_a_manifest_that_is_gone_is_reported_and_the_one_before_is_taken(checkpoint):
    newer = checkpoint.with_name("96")
    checkpoint.rename(newer)
    older = checkpoint
    older.mkdir()
    for name in FILES:
        (older / name).write_bytes((newer / name).read_bytes())
    write_manifest(older)
    (newer / MANIFEST).unlink()
    told: list[str] = []
    assert newest_checkpoint(checkpoint.parent.parent, told.append) == older
    assert told == [f"passing over the checkpoint {newer}: {MANIFEST} is missing"]


def test_left_overs_and_strangers_are_no_checkpoints(checkpoint):
    for name in (".96.writing", "best", "12a"):
        (checkpoint.parent / name).mkdir()
    (checkpoint.parent / "128").write_text("a file")
    assert list_checkpoints(checkpoint.parent.parent) == [checkpoint]


class Malicious:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("name", ["model", "ema", "optimizer"])
@pytest.mark.parametrize("write", [lambda value, path: path.write_bytes(pickle.dumps(value)), torch.save])
def test_a_planted_pickle_is_refused_and_not_run_though_the_manifest_vouches_for_it(checkpoint, tmp_path, name, write):
    trace = tmp_path / "trace"
    write(Malicious(trace), checkpoint / f"{name}.safetensors")
    write_manifest(checkpoint)
    assert find_problem(checkpoint) is None
    with pytest.raises(UserError, match=f"cannot read .*{name}.safetensors") as caught:
        read_tensors(checkpoint, name)
    assert "\n" not in str(caught.value)
    assert not trace.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"images_seen": 64}', json.dumps({**STATE, "extra": 1})])
def test_a_state_that_does_not_fit_is_an_error_of_one_line(checkpoint, text):
    (checkpoint / "state.json").write_text(text)
    with pytest.raises(UserError, match=r"cannot read .*state\.json") as caught:
        read_state(checkpoint)
    assert "\n" not in str(caught.value)
