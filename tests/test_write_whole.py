"""Files that are written whole: whatever happens on the way, the new bytes or the old stand there."""

import os
from pathlib import Path

import pytest
from programs import start_python

from scalelong.train.write_whole import is_staging, remove_left_over, staged, write_whole

KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from scalelong.train.write_whole import staged
with staged(Path(sys.argv[1])) as staging:
    staging.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_new_bytes_take_the_place_of_the_old_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "config.json"
    for data in (b"old", b"new", b""):
        write_whole(path, data)
        assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


def test_after_an_error_the_old_bytes_stand_there_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "config.json"
    write_whole(path, b"old")

    def interrupted() -> None:
        with staged(path) as staging:
            staging.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_removes_its_file_changes_nothing(tmp_path):
    with staged(tmp_path / "shard") as staging:
        staging.write_bytes(b"")
        staging.unlink()
    assert list(tmp_path.iterdir()) == []


def test_bytes_are_on_the_disk_before_they_are_seen(tmp_path, monkeypatch):
    path, done = tmp_path / "log.jsonl", []
    sync = os.fsync

    def recorded(descriptor: int) -> None:
        name = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        done.append(("the file", path.exists()) if name.endswith(".writing") else ("the folder", path.exists()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    write_whole(path, b"row")
    assert done == [("the file", False), ("the folder", True)]


def test_processes_that_write_the_same_file_do_not_write_into_each_others(tmp_path):
    path = tmp_path / "config.json"
    with staged(path) as mine:
        mine.write_bytes(b"mine")
        program = "import sys; from pathlib import Path; from scalelong.train.write_whole import write_whole; "
        theirs = start_python("-c", program + "write_whole(Path(sys.argv[1]), b'theirs')", path)
        assert theirs.wait(60) == 0
        assert (mine.read_bytes(), path.read_bytes()) == (b"mine", b"theirs")
    assert path.read_bytes() == b"mine"


def test_what_a_killed_process_has_left_is_known_and_removed(tmp_path):
    path = tmp_path / "config.json"
    write_whole(path, b"old")
    assert start_python("-c", KILLED_WHILE_WRITING, path).wait(60) != 0
    left = [other for other in tmp_path.iterdir() if other != path]
    assert [(other.read_bytes(), is_staging(other, path.name), is_staging(other, "log.jsonl")) for other in left] == [
        (b"half", True, False)
    ]
    assert path.read_bytes() == b"old"
    remove_left_over(tmp_path)
    assert list(tmp_path.iterdir()) == [path]
