"""What a run tells and listens to: the log and its cutting back, lines and the progress bar, signals, agreement."""

import io
import json
import os
import signal
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from scalelong.train import pace, report
from scalelong.train.errors import RankError, UserError
from scalelong.train.hosts.processes import Processes
from scalelong.train.hosts.signals import STOP_SIGNALS, StopSignals
from scalelong.train.report import Report, open_report, truncate_log

pytest.importorskip("tensorboard")


def row(images_seen: int, loss: float = 0.5, speed: float = 100.0) -> dict:
    return {"images_seen": images_seen, "loss": loss, "images_per_second": speed}


def rows_in(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def write_log(run: Path, *images_seen: int, torn: str = "") -> None:
    (run / "log.jsonl").write_text("".join(json.dumps(row(n)) + "\n" for n in images_seen) + torn)


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    """Whatever the surroundings say of colours."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def clock(monkeypatch):
    """The report's clock; set ``now`` to move it."""
    clock = SimpleNamespace(now=1000.0)
    for module in (report, pace):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_each_row_is_in_the_log_at_once(tmp_path):
    with open_report(tmp_path, 0, 100) as run:
        for n in (10, 20):
            run.log(row(n) | {"skip/1/scale": 0.25})
            assert rows_in(tmp_path)[-1] == row(n) | {"skip/1/scale": 0.25}
    assert len(rows_in(tmp_path)) == 2


def test_tensorboard_gets_each_value_at_its_images_seen(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_report(tmp_path, 0, 100) as run:
        for n in (10, 20):
            run.log(row(n, loss=n / 100))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["images_per_second", "loss"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(10, pytest.approx(0.1)), (20, pytest.approx(0.2))]


def test_tensorboard_gets_grids_and_the_configuration_and_resuming_doubles_neither(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "config.json").write_text('{"seed": 3}')
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "grid.png")
    for resumed, drawn in ((0, (10, 20)), (10, (20,))):
        with open_report(tmp_path, resumed, 100) as run:
            for n in drawn:
                run.show(tmp_path / "grid.png", n)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Images("samples")] == [10, 20]
    shown = np.asarray(Image.open(io.BytesIO(events.Images("samples")[1].encoded_image_string)))
    np.testing.assert_array_equal(shown, pixels)
    (text,) = events.Tensors("config.json/text_summary")
    assert text.step == 0
    assert b'{"seed": 3}' in text.tensor_proto.string_val[0]


@pytest.mark.parametrize(("images_seen", "kept"), [(0, []), (20, [10, 20]), (25, [10, 20]), (40, [10, 20, 30, 40])])
def test_resuming_takes_out_what_lies_past_the_checkpoint(tmp_path, images_seen, kept):
    write_log(tmp_path, 10, 20, 30, 40)
    with open_report(tmp_path, images_seen, 100) as run:
        assert [r["images_seen"] for r in rows_in(tmp_path)] == kept
        run.log(row(50))
    assert [r["images_seen"] for r in rows_in(tmp_path)] == [*kept, 50]


@pytest.mark.parametrize("torn", ['{"images_seen": 20, "lo', "{", "\0\0\0\0"])
def test_resuming_takes_out_a_last_line_that_was_cut_off(tmp_path, torn):
    write_log(tmp_path, 10, torn=torn)
    with open_report(tmp_path, 10, 100) as run:
        run.log(row(20))
    assert rows_in(tmp_path) == [row(10), row(20)]


@pytest.mark.parametrize(
    "line",
    [b"[1]", b"7", b"null", b'"x"', b"{}", b'{"images_seen": "5"}', b'{"images_seen": NaN}', b"\xff", b"[" * 200_000],
)
def test_lines_that_are_no_rows_are_taken_out(tmp_path, line):
    write_log(tmp_path, 10, 20)
    first, second = (tmp_path / "log.jsonl").read_bytes().splitlines()
    (tmp_path / "log.jsonl").write_bytes(b"\n".join([line, first, line, second, line]))
    with open_report(tmp_path, 20, 100) as run:
        run.log(row(30))
    assert rows_in(tmp_path) == [row(10), row(20), row(30)]


def test_a_long_log_is_not_held_in_memory(tmp_path):
    long = "x" * 1000
    with (tmp_path / "log.jsonl").open("w") as file:
        for n in range(20_000):
            file.write(json.dumps({**row(n), "note": long}) + "\n")
    tracemalloc.start()
    try:
        truncate_log(tmp_path / "log.jsonl", 20_000)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert len(rows_in(tmp_path)) == 20_000


def test_a_checkpoint_finds_the_log_on_the_disk(tmp_path, monkeypatch):
    synced = []
    with open_report(tmp_path, 0, 100) as run:
        run.log(row(10))
        monkeypatch.setattr(os, "fsync", lambda file: synced.append(Path(f"/proc/self/fd/{file}").readlink()))
        run.sync()
    assert synced == [tmp_path / "log.jsonl"]


def test_resuming_leaves_no_other_file_beside_the_log(tmp_path):
    write_log(tmp_path, 10, 20)
    with open_report(tmp_path, 10, 100):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "tensorboard"]


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*no-run/log\.jsonl"):
        open_report(tmp_path / "no-run", 0, 100)


def test_the_other_processes_report_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Report() as run:
        run.log(row(10))
        run.say("hello")
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_without_a_terminal_progress_is_a_plain_line(tmp_path, capsys, clock):
    with open_report(tmp_path, 0, 1_000_000) as run:
        run.log(row(1234, loss=0.12345, speed=1000.0))
    shown = "1,234 / 1,000,000 images  loss 0.1235  1,000 images/s  0:16:39 left\n"
    assert capsys.readouterr() == (shown, "")


def test_lines_come_every_ten_seconds_and_at_the_end(tmp_path, capsys, clock):
    with open_report(tmp_path, 0, 50) as run:
        for n, clock.now in ((10, 1000.0), (20, 1009.0), (30, 1010.5), (40, 1011.0), (50, 1012.0)):
            run.log(row(n))
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["10", "30", "50"]
    assert len(rows_in(tmp_path)) == 5


@pytest.mark.parametrize(
    ("left", "speed", "shown"), [(59, 1, "0:00:59"), (3661, 1, "1:01:01"), (360_000, 1, "100:00:00")]
)
def test_the_time_left_is_shown_as_a_clock(tmp_path, capsys, clock, left, speed, shown):
    with open_report(tmp_path, 0, left + 1) as run:
        run.log(row(1, speed=speed))
    assert capsys.readouterr().out.endswith(f" {shown} left\n")


def test_a_speed_of_zero_is_no_division_by_zero(tmp_path, capsys, clock):
    with open_report(tmp_path, 0, 100) as run:
        run.log(row(1, speed=0.0))
    assert "0 images/s" in capsys.readouterr().out


def test_messages_are_plain_lines(tmp_path, capsys):
    with open_report(tmp_path, 0, 100) as run:
        run.say("resumed from [checkpoint] 10")
    assert capsys.readouterr().out == "resumed from [checkpoint] 10\n"


def test_on_a_terminal_a_bar_shows_progress_and_messages_stay_above_it(tmp_path, monkeypatch):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100, color_system=None)
    monkeypatch.setattr(report, "Console", lambda: terminal)
    with open_report(tmp_path, 50, 200) as run:
        run.say("resumed from [checkpoint] 50")
        run.log(row(100, loss=0.25, speed=1234.0))
    shown = screen.getvalue()
    assert "resumed from [checkpoint] 50\n" in shown
    assert "100/200 images  loss 0.2500  1,234 images/s" in shown.split("[checkpoint] 50")[1]


@pytest.fixture
def handlers():
    """Those that the tests had before, put back: after a signal some do nothing."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_remembered_and_interrupts_nothing(handlers, number):
    with StopSignals() as stop:
        assert stop.received is None
        send(number)
        assert stop.received == number.name


def test_under_nohup_a_terminal_may_close():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            send(signal.SIGHUP)
            assert stop.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_once_a_signal_has_come_the_next_ones_kill_no_more(handlers):
    with StopSignals():
        send(signal.SIGTERM)
    send(signal.SIGTERM)
    with StopSignals():
        pass
    assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_a_second_signal_soon_after_does_not_cut_the_saving_short(handlers):
    with StopSignals() as stop:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            send(number)
        assert stop.received == "SIGINT"


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_ctrl_c_after_patience_is_over_interrupts(handlers, first, monkeypatch):
    monkeypatch.setattr(StopSignals, "PATIENCE_SECONDS", -1.0)
    with StopSignals() as stop:
        send(first)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert stop.received == first.name


def test_a_launcher_that_repeats_its_signal_never_interrupts(handlers, monkeypatch):
    monkeypatch.setattr(StopSignals, "PATIENCE_SECONDS", -1.0)
    with StopSignals() as stop:
        for _ in range(3):
            send(signal.SIGTERM)
        assert stop.received == "SIGTERM"


@pytest.mark.parametrize("fails", [False, True])
def test_the_handlers_from_before_come_back(fails):
    numbers = STOP_SIGNALS
    before = [signal.getsignal(number) for number in numbers]
    try:
        with StopSignals():
            assert [signal.getsignal(number) for number in numbers] != before
            if fails:
                raise UserError("stopped")
    except UserError:
        pass
    assert [signal.getsignal(number) for number in numbers] == before


ALONE = Processes(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"), control_group=None)


def test_a_process_alone_agrees_with_itself():
    assert ALONE.agree(lambda: 42) == 42
    assert ALONE.agree(lambda: None) is None
    assert (ALONE.any(True), ALONE.any(False)) == (True, False)
    assert (ALONE.gather("x"), ALONE.from_main("x"), ALONE.is_main) == (["x"], "x", True)


@pytest.mark.parametrize("kind", [UserError, RankError])
def test_what_one_process_cannot_do_is_an_error_of_all(kind):
    def action():
        raise kind("cannot write")

    with pytest.raises(UserError, match=r"^cannot write$") as caught:
        ALONE.agree(action)
    # Every process raises it now, so that one of them is enough to say it.
    assert not isinstance(caught.value, RankError)


def test_errors_of_the_program_are_not_agreed_upon():
    with pytest.raises(ZeroDivisionError):
        ALONE.agree(lambda: 1 // 0)


class Tracker:
    """A sink of one's own, that fails from its second row on."""

    def __init__(self):
        self.rows, self.told, self.ended = [], [], 0

    def log(self, row):
        self.rows.append(row)
        if len(self.rows) == 2:
            raise ConnectionError("the server is gone")

    def sync(self):
        pass

    def say(self, message):
        self.told.append(message)

    def close(self):
        self.ended += 1


def test_a_sink_of_ones_own_stands_in_the_table(tmp_path, monkeypatch):
    tracker = Tracker()
    monkeypatch.setitem(report.SINKS, "tracker", lambda run, images_seen, total_images: tracker)
    with open_report(tmp_path, 0, 100) as run:
        run.say("hello")
        run.log(row(10))
    assert (tracker.rows, tracker.told, tracker.ended) == ([row(10)], ["hello"], 1)


def test_a_sink_that_fails_is_warned_of_once_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    tracker = Tracker()
    monkeypatch.setitem(report.SINKS, "tracker", lambda run, images_seen, total_images: tracker)
    with open_report(tmp_path, 0, 100) as run:
        for n in (10, 20, 30):
            run.log(row(n))
    assert len(tracker.rows) == 2
    assert tracker.ended == 0
    assert rows_in(tmp_path) == [row(10), row(20), row(30)]
    warned = "warning: no more rows go to Tracker: ConnectionError: the server is gone\n"
    assert capsys.readouterr().err == warned


def test_a_tensorboard_that_cannot_be_written_ends_no_run(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    with open_report(tmp_path, 0, 100) as run:
        monkeypatch.setattr("torch.utils.tensorboard.writer.FileWriter.add_summary", full)
        run.log(row(10))
        run.log(row(20))
    assert capsys.readouterr().err.count("no more rows go to TensorBoard") == 1
    assert rows_in(tmp_path) == [row(10), row(20)]


def test_a_log_that_cannot_be_written_any_more_ends_the_run(tmp_path):
    with open_report(tmp_path, 0, 100) as run:
        (tmp_path / "log.jsonl").unlink()
        with pytest.raises(UserError, match=r"cannot write .*log\.jsonl"):
            run.sync()


def test_a_sink_that_cannot_be_opened_is_named_and_the_others_are_closed(tmp_path, monkeypatch):
    tracker = Tracker()

    def refuse(*_):
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(report, "SINKS", {"tracker": lambda *_: tracker, "other": refuse})
    with pytest.raises(UserError, match=r"cannot open the other of .*Permission denied"):
        open_report(tmp_path, 0, 100)
    assert tracker.ended == 1
