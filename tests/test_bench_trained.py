"""bench/scores.py and bench/fine_tuning.py: which commands they run, and what becomes of their rows."""

import csv
from pathlib import Path

import pytest

pytest.importorskip("tyro")

from scalelong.bench import fine_tuning, modules, scores
from scalelong.train.command_line import parse_train_arguments

SWEPT = """\
images,checkpoint,guidance,features,num_images,kernel_distance,kernel_distance_error,precision,recall,accuracy
samples,320,1.0,pixels,200,0.003,0.0008,0.08,0.58,0.18
"real, held out",,,pixels,355,-0.001,0.0003,0.9,0.9,
"""


def test_rows_of_a_recipe_take_the_place_of_its_last_ones(tmp_path, monkeypatch, capsys):
    commands = []

    def run_module(arguments, processes=1):
        words = [str(word) for word in arguments]
        commands.append((words, processes))
        if words[:2] == ["scalelong", "evaluate"]:
            Path(words[words.index("--out") + 1]).write_text(SWEPT)
        return ""

    monkeypatch.setattr(scores, "run_module", run_module)
    out = tmp_path / "trained" / "scores.csv"
    flags = ["--runs", f"{tmp_path}", "--out", f"{out}", "--total-images", "640", "--num-images", "200"]
    for recipes in (["photos32-uvit", "digits-uvit"], ["digits-uvit"]):
        scores.main(["--recipes", *recipes, *flags])
    assert "-> " in capsys.readouterr().out
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["recipe"], row["processes"], row["images"], row["checkpoint"]) for row in rows] == [
        (recipe, processes, *images)
        for recipe in ("digits-uvit", "photos32-uvit")
        for processes in ("1", "2")
        for images in (("samples", "320"), ("real, held out", ""))
    ]
    (train, _), (one, alone), (_, together) = commands[:3]
    config = parse_train_arguments(train[1:])
    assert (config.total_images, config.images_per_checkpoint, config.keep_checkpoints) == (640, 320, 4)
    assert one[one.index("--sweep") + 1] == "checkpoint=320,640"
    assert (alone, together) == (1, 2)


def test_a_command_that_fails_is_said_with_its_words():
    with pytest.raises(RuntimeError, match=r"-m zipfile -l no-such-file: .+"):
        modules.run_module(["zipfile", "-l", "no-such-file"])


def test_the_curves_are_drawn(tmp_path):
    rows = [
        {"start": start, "images_seen": f"{images}", "label_accuracy": "0.5"}
        for start in fine_tuning.STARTS
        for images in (640, 1280)
    ]
    fine_tuning.draw(rows, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
