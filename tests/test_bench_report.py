"""Documents and the committed rows that their tables are made of."""

from dataclasses import replace

import pytest

pytest.importorskip("tyro")

from scalelong.bench import report
from scalelong.bench.lab.experiments import EXPERIMENTS, commands_of
from scalelong.bench.lab.summary import tables_of
from scalelong.bench.lab.table import Row, write_table
from scalelong.train.errors import UserError

ROWS = [
    Row(
        cell=f"depth={depth} skip-scale=none start=preserving seed=0",
        digest="d",
        preset="digits-uvit",
        state="start",
        kappa_squares=depth / 2,
        norm_ratio=1.0 + depth,
        commit="abc1234",
        device="a machine",
        date="2026-11-26",
    )
    for depth in (4, 8)
]
TRANSFERRED = [
    replace(ROWS[0], cell="parametrization=mup width=64 learning-rate=2^-7 seed=0", state="finished", final_loss=0.25)
]


@pytest.mark.parametrize("path", report.DOCUMENTS, ids=lambda path: path.name)
def test_documents_say_what_the_committed_rows_say(path):
    text = path.read_text()
    assert report.rebuilt(text) == text, "python -m scalelong.bench.report rewrites it"


def test_a_marked_table_is_made_anew(tmp_path):
    (tmp_path / "initialisation").mkdir()
    write_table(tmp_path / "initialisation" / "cells.csv", ROWS)
    text = "before\n<!-- lab initialisation law mode, slope -->\nold\n<!-- end -->\nbehind\n"
    made = report.rebuilt(text, tmp_path)
    assert made.startswith("before\n<!-- lab initialisation law mode, slope -->\n\n| mode | slope |\n")
    assert "| none | 2 |" in made
    assert "experiments initialisation`: 2 untrained networks, commit abc1234, a machine, 2026-11-26" in made
    assert made.endswith("<!-- end -->\nbehind\n")
    assert "old" not in made
    assert report.rebuilt(made, tmp_path) == made
    write_table(tmp_path / "initialisation" / "cells.csv", [replace(row, norm_ratio=0.0) for row in ROWS])
    assert report.rebuilt(made, tmp_path) != made


def test_a_table_of_trainings_is_made_of_its_rows(tmp_path):
    """Each of them, from rows that stand in another order than the table's."""
    where = "2026-11-26,abc1234,a machine,2"
    files = {
        "objectives": "recipe,varied,value,beside,total_images,num_images,accuracy_with_guidance,accuracy,"
        "kernel_distance_with_guidance,kernel_distance,sampler,date,commit,device,torch\n"
        f"digits-uvit,objective.times,edm,,640,10,1,0.5,0.001,0.002,heun,{where}\n"
        f"digits-uvit,objective.prediction,v,objective.times=edm,640,10,0.9,0.4,0.001,0.0025,heun,{where}\n",
        "scores": "recipe,processes,images,checkpoint,features,kernel_distance,kernel_distance_error,precision,recall,"
        "date,commit,device,torch\n"
        + "".join(
            f"r,{n},{name},pixels,{distance},0.001,0.5,0.25,{where}\n"
            for n in (1, 2)
            for name, distance in (
                ("samples,640", 0.02),
                ("samples,1280", 0.01),
                ('"real, held out",', 0),
                ("noise,", 0.5),
            )
        ),
        "fine-tuning": "start,images_seen,label_accuracy,date,commit,device,torch\n"
        f"from weights,640,0.75,{where}\nfrom weights,1280,1,{where}\nfrom nothing,1280,0.125,{where}\n",
        "skip-tuning": "skip_scale,seed,images,samples,depth,steps,bottom,kernel_distance,sampler,"
        "date,commit,device,torch\n"
        + "".join(
            f"none,{seed},640,100,12,4,{bottom},{distance},heun,{where}\n"
            for seed, distances in ((0, (0.02, 0.01)), (1, (0.02, 0.018)))
            for bottom, distance in zip((1.0, 0.9), distances, strict=True)
        ),
    }
    said = {
        "objectives": "| `--objective.prediction v --objective.times edm` | 90.0 % | 40.0 % | 1.0 | 2.5 |\n"
        "| `--objective.times edm` | 100.0 % | 50.0 % | 1.0 | 2.0 |\n",
        "scores": "| r | real, held out | 0.0 ± 1.0 | 0.0 ± 1.0 | 0.50 | 0.25 |\n"
        "| r | samples, after 1,280 images | 10.0 ± 1.0 | 10.0 ± 1.0 | 0.50 | 0.25 |\n"
        "| r | samples, after 640 images | 20.0 ± 1.0 | 20.0 ± 1.0 | 0.50 | 0.25 |\n"
        "| r | noise | 500.0 ± 1.0 | 500.0 ± 1.0 | 0.50 | 0.25 |\n",
        "fine-tuning": "| 640 | 75.0 % | - |\n| 1,280 | 100.0 % | 12.5 % |\n",
        "skip-tuning": "| none | 4 | 2 | 20.00 ± 0.00 | -6.00 ± 5.66 |\n",
    }
    for name, rows in files.items():
        mark = f"<!-- trained {name} -->\n<!-- end -->"
        assert f"Not measured yet: `python -m scalelong.bench.{name.replace('-', '_')}`" in report.rebuilt(
            mark, trained=tmp_path
        )
        (tmp_path / f"{name}.csv").write_text(rows)
        made = report.rebuilt(mark, trained=tmp_path)
        assert said[name] in made + "\n"
        assert "commit abc1234, a machine, 2026-11-26." in made


def test_what_was_not_measured_names_its_command(tmp_path):
    made = report.rebuilt("<!-- lab clipping stability -->\n<!-- end -->", tmp_path)
    command, estimate = "python -m scalelong.bench.lab.experiments clipping", EXPERIMENTS["clipping"].estimate
    assert f"Not measured yet: `{command}` ({estimate})" in made


def test_marks_of_what_is_not_measured_yet_name_columns_that_there_will_be():
    """Every one, of rows that have everything."""
    names = "curve_images", "curve_loss", "curve_scored_images", "curve_kernel_distance"
    curves = {name: [1.0, 0.5] for name in names}
    trained = replace(ROWS[0], state="finished", start_loss=1.0, final_loss=0.5, largest_gradient=1.0, weight_norm=1.0)
    rows = [
        replace(trained, cell=f"depth=4 skip-scale={mode} learning-rate=2^-8 seed=0", gain_0_1=[1.0] * 5, **curves)
        for mode in ("none", "ls")
    ]
    rows = [replace(row, curve_flops=[n, 2.0 * n]) for n, row in enumerate(rows, start=1)]
    rows = [replace(row, gain_0_01=row.gain_0_1, gain_0_3=row.gain_0_1) for row in rows]
    tables = {table.key: table for table in tables_of([*ROWS, *rows])}
    marks = [mark for path in report.DOCUMENTS for mark in report.MARKED.finditer(path.read_text())]
    assert {mark[2] for mark in marks} >= {"methods-digits", "methods-photos", "methods-dit", "digits-muon"}
    for _, name, key, columns in (mark.groups()[:4] for mark in marks):
        assert name in EXPERIMENTS
        named = [column.strip() for column in (columns or "").split(",") if column]
        assert set(named) <= set(tables[key].header), (name, key)


@pytest.mark.parametrize("mark", ["no table", "initialisation no", "initialisation law no"])
def test_a_mark_that_names_nothing_is_an_error(tmp_path, mark):
    (tmp_path / "initialisation").mkdir()
    write_table(tmp_path / "initialisation" / "cells.csv", ROWS)
    with pytest.raises(UserError, match="no"):
        report.rebuilt(f"<!-- lab {mark} -->\n<!-- end -->", tmp_path)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_a_grid_that_can_be_planned(name, tmp_path):
    from scalelong.bench.lab.command import DEFAULTS, cells_of, parser, training_flags
    from scalelong.train.recipes import RECIPES

    if EXPERIMENTS[name].preset not in RECIPES:
        pytest.skip(f"no recipe {EXPERIMENTS[name].preset}")
    num_cells = 0
    for line in commands_of(name):
        arguments, rest = parser().parse_known_args(line)
        if not arguments.report_only:
            given = {option: getattr(arguments, option.replace("-", "_")) or text for option, text in DEFAULTS.items()}
            cells = cells_of(line[0], arguments, given, training_flags(rest))
            num_cells += len(cells)
            # Cells are alike but for their variants: the first, and the last of each variant.
            chosen = {dict(cell.place).get("variant"): cell for cell in cells}
            assert all(cell.config(tmp_path) for cell in (cells[0], *chosen.values()))
    assert 20 <= num_cells <= 250


def test_tables_of_mup_are_made_anew(tmp_path):
    (tmp_path / "coordinates.csv").write_text(
        "model,parametrization,skip scale,worst size,worst update,of the layer,date,commit,device\n"
        'uvit,"mup, bug: qkv",none,+0.16,+0.92,blocks.0.attn.qkv,2026-11-26,abc1234,a machine\n'
    )
    (tmp_path / "transfer-uvit").mkdir()
    write_table(tmp_path / "transfer-uvit" / "cells.csv", TRANSFERRED)
    marks = "<!-- mup coordinates -->\n<!-- end -->\n<!-- mup transfer-uvit transfer -->\nold\n<!-- end -->\n"
    made = report.rebuilt(marks, mup_results=tmp_path)
    assert "| uvit | mup, bug: qkv | none | +0.16 | +0.92 | blocks.0.attn.qkv |" in made
    assert "mup.experiments coordinates`: 2026-11-26, abc1234, a machine." in made
    assert "| mup | 64 | 2^-7 | 0.25 | - | 0.25 |" in made
    assert "old" not in made
    assert report.rebuilt(made, mup_results=tmp_path) == made


def test_tables_of_mup_that_are_not_there(tmp_path):
    unmeasured = report.rebuilt("<!-- mup transfer-dit transfer -->\n<!-- end -->", mup_results=tmp_path)
    assert "Not measured yet: `python -m scalelong.bench.mup.experiments transfer-dit`" in unmeasured
    (tmp_path / "transfer-uvit").mkdir()
    write_table(tmp_path / "transfer-uvit" / "cells.csv", TRANSFERRED)
    for name in ("no", "transfer-uvit no"):
        with pytest.raises(UserError, match="of muP; there are"):
            report.rebuilt(f"<!-- mup {name} -->\n<!-- end -->", mup_results=tmp_path)
