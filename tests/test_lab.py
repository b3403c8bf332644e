"""The laboratory: cells and their digests, a grid that goes on from its table, tables, plots and the page."""

import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("deepspeed")

from scalelong.bench.lab.cells import (
    AXES,
    Cell,
    digest_of,
    expand,
    free_axis,
    make_cells,
    named_axis,
    number,
    variant_axis,
)
from scalelong.bench.lab.command import cells_of, fixed_flags, parser
from scalelong.bench.lab.grid import Grid, plan_cells, run_grid, table_path
from scalelong.bench.lab.groups import baseline_of, groups_of
from scalelong.bench.lab.report_page import Facts, write_report
from scalelong.bench.lab.summary import tables_of
from scalelong.bench.lab.table import COST, Row, read_table, write_table
from scalelong.bench.lab.verdicts import verdicts_of
from scalelong.train.errors import UserError

SMALL = ("--model.width", "32", "--images-per-step", "32")


def axes_of(**values: str):
    return [named_axis(option.replace("_", "-"), "digits-uvit", text) for option, text in values.items()]


def small_cells(images: int, **values: str) -> list[Cell]:
    chosen = {"depths": "2", "skip_scale": "none,cs:0.7", "learning_rates": "2^-8,2^-7", "seeds": "1", **values}
    return make_cells("digits-uvit", axes_of(**chosen), (*fixed_flags(images, 64), *SMALL))


def test_lists_and_ranges_are_expanded():
    assert expand("12,24,48") == ["12", "24", "48"]
    assert expand("2^-9..2^-8:0.5") == ["2^-9", "2^-8.5", "2^-8"]
    assert expand("2^-11..2^-9,0.1") == ["2^-11", "2^-10", "2^-9", "0.1"]
    assert expand("3..5") == ["3", "4", "5"]
    assert number("2^-8") == 2**-8
    for wrong in ("2^-5..2^-9", "1,,2"):
        with pytest.raises(UserError):
            expand(wrong)
    with pytest.raises(UserError, match="expected a number, got 'fast'"):
        number("fast")


def test_axes_become_flags():
    (cell,) = make_cells("digits-uvit", axes_of(skip_scale="cs:0.7", clipping="z-score:2.5", seeds="3,3"), ("--a", "1"))
    assert cell.name == "skip-scale=cs:0.7 clipping=z-score:2.5 seed=3"
    assert cell.flags == (
        *("--a", "1", "--skip-scale", "cs", "--skip-scale.kappa", "0.7"),
        *("--optimizer.clip-z-score", "2.5", "--seed", "3"),
    )
    assert len(named_axis("seeds", "digits-uvit", "3").values) == 3
    sparse = {"dense": (), "0.75:64": ("--model.sparse-ratio", "0.75", "--sparse-images", "64")}
    assert named_axis("sparse", "digits-uvit", "dense,0.75:64").values == sparse
    assert named_axis("depths", "digits-unet", "2").values == {"2": ("--model.num-res-blocks", "2")}
    assert free_axis("model.width=32,64").values["64"] == ("--model.width", "64")
    for option, wrong in (
        ("skip-scale", "no"),
        ("skip-scale", "none:1"),
        ("clipping", "z:1"),
        ("starts", "zero"),
        ("sparse", "x"),
    ):
        with pytest.raises(UserError):
            named_axis(option, "digits-uvit", wrong)
    with pytest.raises(UserError, match="expected FLAG=VALUE"):
        free_axis("model.width")


def test_variants_are_flags_under_a_name():
    line = "digits-uvit --skip-scale none --learning-rates 2^-8 --depths 4 --seeds 1 --probe"
    texts = ["--variant", "plain=", "--variant", "muon=--optimizer.kind muon --optimizer.momentum 0.9"]
    arguments, _ = parser().parse_known_args([*line.split(), *texts])
    values = {"skip-scale": "none", "learning-rates": "2^-8", "depths": "4", "seeds": "1"}
    plain, muon = cells_of("digits-uvit", arguments, values, ())
    assert muon.name == "depth=4 skip-scale=none learning-rate=2^-8 variant=muon seed=0"
    configs = [cell.config(Path("run")) for cell in (plain, muon)]
    assert [(c.optimizer.kind, c.optimizer.momentum) for c in configs] == [("adamw", 0.95), ("muon", 0.9)]
    # One that is probed is another cell; others have the digest that they had.
    assert digest_of(muon, configs[1]) != digest_of(replace(muon, is_probed=False), configs[1])
    assert [group.mode for group in groups_of(rows_named(plain.name, muon.name))] == ["none, plain", "none, muon"]
    for wrong in ("muon", "=--a 1", "a b=--c 1", "a='"):
        with pytest.raises(UserError, match="--variant"):
            variant_axis([wrong])
    with pytest.raises(UserError, match="--variant a is given twice"):
        variant_axis(["a=", "a=--b 1"])
    arguments, _ = parser().parse_known_args(["digits-uvit", "--images", "0", "--probe"])
    with pytest.raises(UserError, match="--probe is of trained networks"):
        cells_of("digits-uvit", arguments, values, ())


def rows_named(*names: str) -> list[Row]:
    return [Row(cell=name, digest="d", preset="digits-uvit", state="finished") for name in names]


def test_a_run_whose_skips_were_profiled_goes_on(tmp_path):
    from scalelong.model.skip_scale import ProfiledScale
    from scalelong.train.run_folder import write_config

    (cell,) = small_cells(64, skip_scale="profiled", learning_rates="2^-8")
    config = cell.config(tmp_path / "cells" / cell.folder)
    write_config(replace(config, skip_scale=ProfiledScale((0.7,))))  # as the run has measured it
    assert [one.cell for one in plan_cells([cell], [], Grid(tmp_path, {}))] == [cell]


def test_digests_tell_what_is_computed_and_nothing_else(tmp_path):
    one, two = small_cells(64, learning_rates="2^-8", skip_scale="none,ls")
    config = one.config(tmp_path / "a")
    same = replace(config, run=tmp_path / "b", images_per_log=7, zero_stage=2)
    assert digest_of(one, config) == digest_of(one, same)
    others = [
        replace(config, total_images=96),
        replace(config, seed=5),
        replace(config, optimizer=replace(config.optimizer, learning_rate=0.1)),
        two.config(tmp_path / "a"),
    ]
    assert len({digest_of(one, other) for other in [config, *others]}) == 5


def test_what_a_model_cannot_have_is_said_and_the_rest_is_planned(tmp_path):
    axes = axes_of(depths="2,3", positions="before-norm,after-norm", seeds="1")
    cells = make_cells("digits-uvit", axes, fixed_flags(64, 0))
    grid, said = Grid(tmp_path, {}), []
    planned = plan_cells(cells, [], grid, said.append)
    assert [one.cell.name for one in planned] == ["depth=2 position=before-norm seed=0"]
    assert len(grid.problems) == len(said) == 3
    assert any("depth must be even" in line for line in said)
    assert any("no skip scale can stand after one" in line for line in said)


def test_one_seed_of_every_cell_runs_before_the_next_of_any(tmp_path):
    planned = plan_cells(small_cells(64, seeds="2", learning_rates="2^-8"), [], Grid(tmp_path, {}))
    assert [one.config.seed for one in planned] == [0, 0, 1, 1]


def test_a_row_or_a_run_of_another_configuration_is_said_and_left_alone(tmp_path):
    from scalelong.train.run_folder import write_config

    cells = small_cells(64)
    first, second = (cell.config(tmp_path / "cells" / cell.folder) for cell in cells[:2])
    rows = [Row(cell=cells[0].name, digest="another", preset="digits-uvit", state="finished")]
    write_config(replace(second, seed=9))
    grid, said = Grid(tmp_path, {}), []
    planned = plan_cells(cells, rows, grid, said.append)
    assert [one.cell for one in planned] == cells[2:]
    assert f"another configuration (another, here {digest_of(cells[0], first)})" in said[0]
    assert "disagrees: --seed 9 -> 0" in said[1]


def test_a_table_is_read_as_it_was_written_without_a_cut_line(tmp_path):
    row = Row(cell="depth=2 seed=0", digest="d", preset="p", state="finished", final_loss=0.25, gain_0_1=[1.5, 2.0])
    write_table(tmp_path / "cells.csv", [row, replace(row, cell="b", reason='said "no", twice')])
    text = (tmp_path / "cells.csv").read_text()
    (tmp_path / "cells.csv").write_text(text + "depth=4,x,y")
    again = read_table(tmp_path / "cells.csv")
    assert [r.cell for r in again] == ["depth=2 seed=0", "b"]
    assert (again[0].final_loss, again[0].gain_0_1, again[1].reason) == (0.25, [1.5, 2.0], 'said "no", twice')
    assert math.isnan(again[0].sigma_max)
    write_table(tmp_path / "again.csv", again)
    assert (tmp_path / "again.csv").read_text() == text
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="no table of the laboratory"):
        read_table(tmp_path / "other.csv")


def results(**outcome: dict[float, list[float]]) -> list[Row]:
    """Rows of modes by rate, a final loss a seed; infinite ones diverged. Curves fall linearly to the final loss."""
    rows = []
    for mode, losses_by_rate in outcome.items():
        for rate, losses in losses_by_rate.items():
            for seed, loss in enumerate(losses):
                diverged = math.isinf(loss)
                rows.append(
                    Row(
                        cell=f"depth=24 skip-scale={mode} learning-rate={rate} seed={seed}",
                        digest="d",
                        preset="digits-uvit",
                        state="diverged" if diverged else "finished",
                        start_loss=1.0,
                        final_loss=math.nan if diverged else loss,
                        final_is="" if diverged else "training",
                        spikes_gradient=0.02 if mode == "none" else 0.005,
                        curve_images=[0.0, 100.0, 200.0],
                        curve_loss=[1.0, (1 + min(loss, 1)) / 2, min(loss, 1.0)],
                        curve_gradient=[1.0, 2.0, 3.0],
                        curve_hidden=[1.0, 2.0, 3.0],
                        curve_weights=[1.0, 1.5, 2.0],
                        weight_norm=2.0,
                        gain_0_01=[1.0] * 5,
                        gain_0_1=[1.0] * 5,
                        gain_0_3=[1.0] * 5,
                    )
                )
    return rows


GOOD = results(
    none={0.001: [0.2] * 3, 0.002: [0.9, 0.8, math.inf], 0.004: [math.inf] * 3},
    ls={0.001: [0.2] * 3, 0.002: [0.2] * 3, 0.004: [0.21, 0.2, 0.2]},
)


def test_tables_hold_the_metrics_of_each_mode():
    tables = {table.key: table for table in tables_of(GOOD)}
    none, ls = (dict(zip(tables["stability"].header, line, strict=True)) for line in tables["stability"].lines)
    assert (none["mode"], none["runs"], none["diverged"], none["best rate"]) == ("none", 9, 4, "0.001")
    assert (none["stable octaves"], ls["stable octaves"]) == (0.0, 2.0)
    assert (none["first diverging rate"], ls["first diverging rate"]) == (0.004, math.inf)
    # Medians .2, .9, 1.0: excess 0, .7, .8 of a gain of .8 over two octaves.
    assert none["sensitivity S"] == pytest.approx((0.35 + 0.75) / (2 * 0.8))
    assert ls["sensitivity S"] == 0
    speed = {line[1]: line for line in tables["speed"].lines}
    assert speed["ls"][5] == 200
    assert tables["losses"].lines[0][-1] == "diverged"
    assert tables["losses"].lines[0][3] == "0.9 (1 of 3 diverged)"


def test_the_table_of_methods_has_means_and_spreads_at_the_best_rate():
    def measured(row: Row) -> Row:
        mode, seed = ("ls" if "skip-scale=ls" in row.cell else "none"), float(row.cell[-1])
        return replace(
            row,
            kernel_distance=0.01 + 0.001 * seed,
            probe_accuracy=[0.5, 0.8 + 0.01 * seed, 0.7],
            largest_gradient=2.0,
            images_per_second=100.0 if mode == "none" else 80.0,
        )

    (table,) = (t for t in tables_of([measured(row) for row in GOOD]) if t.key == "best")
    none, ls = (dict(zip(table.header, line, strict=True)) for line in table.lines)
    assert (none["mode"], none["rate"], none["seeds"], none["loss"]) == ("none", "≤ 0.001", "3", "0.2000 ± 0.0000")
    assert none["kernel distance"] == "0.0110 ± 0.0010"
    assert none["probe % (block)"] == "81.0 ± 1.0 (1)"
    assert (none["gradient spikes %"], none["largest gradient"]) == ("2.00 ± 0.00", "2.00 ± 0.00")
    assert (none["time a step"], ls["time a step"]) == ("1.00 ± 0.00", "1.25 ± 0.00")
    some_lost = results(
        none={0.001: [0.2, 0.3, math.inf]}, ls={0.001: [0.3], 0.002: [0.2]}, cs={0.001: [0.3], 0.002: [0.2], 0.004: [1]}
    )
    (table,) = (t for t in tables_of(some_lost) if t.key == "best")
    assert [line[2] for line in table.lines] == ["0.001", "≥ 0.002", "0.002"]
    line = dict(zip(table.header, table.lines[0], strict=True))
    assert (line["seeds"], line["median loss"], line["loss"]) == ("2 of 3", "0.3000", "0.2500 ± 0.0707")
    # What was not measured is told, and nothing made of it.
    assert [line[name] for name in ("kernel distance", "probe % (block)", "time a step")] == ["-", "-", "-"]


def test_verdicts_are_plain_whichever_way_they_fall():
    assert [verdict.holds for verdict in verdicts_of(GOOD)] == [True, True, True, False]
    same = results(none={0.001: [0.2] * 3, 0.002: [0.2] * 3}, cs={0.001: [0.2] * 3, 0.002: [0.3] * 3})
    verdicts = verdicts_of(same)
    assert verdicts[0].holds is False
    assert verdicts[1].holds is None  # nothing to be less sensitive than
    assert "no pair to compare" in verdicts_of(results(ls={0.001: [0.2]}))[0].found
    assert verdicts_of([]) == []
    lost = results(none={0.001: [math.inf] * 3}, ls={0.001: [0.2] * 3})
    assert "none diverges at every rate" in verdicts_of(lost)[0].found
    assert {table.key for table in tables_of(lost)} == {"stability", "losses", "magnitudes", "best", "gain"}


def test_the_band_of_losses_is_of_the_seeds_that_there_are():
    pytest.importorskip("matplotlib")
    from scalelong.bench.lab.plots import rate_and_loss

    figure = rate_and_loss(results(none={0.001: [0.2, 0.3], 0.002: [0.4]}, ls={0.001: [0.2], 0.002: [0.2]}))
    assert figure is not None
    band = np.asarray(figure.axes[0].collections[0].get_paths()[0].vertices)
    assert sorted(set(band[:, 1].tolist())) == [0.2, 0.3, 0.4]


@pytest.mark.parametrize(
    ("values", "labels"), [((44.0, 52.0), ["44", "46", "48", "50", "52"]), ((0.05, 0.4), ["0.1", "0.2", "0.3", "0.4"])]
)
def test_a_logarithmic_axis_of_less_than_a_power_of_ten_has_numbers(values, labels):
    assert labels_of_axis(values) == labels


def test_a_logarithmic_axis_of_more_has_powers_of_ten():
    assert all("10^" in label for label in labels_of_axis((0.01, 2.0)))


def labels_of_axis(values) -> list[str]:
    pytest.importorskip("matplotlib")
    from scalelong.bench.lab.plots import label_plainly, panels

    figure, (panel,) = panels(["weights"])
    panel.plot([0, 1], values)
    panel.set_yscale("log")
    label_plainly(panel)
    figure.savefig(io.BytesIO(), format="png")
    low, high = panel.get_ylim()
    ticks = [tick for tick in panel.yaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    assert ticks
    return [tick.label1.get_text() for tick in ticks]


def test_a_target_that_no_run_reaches_is_said():
    rows = results(none={0.001: [0.2] * 3}, ls={0.001: [0.4] * 3})
    (table,) = (table for table in tables_of(rows) if table.key == "speed")
    line = dict(zip(table.header, table.lines[1], strict=True))
    assert (line["times fewer"], line["at equal rate"]) == ("not reached", "not reached")
    # Halfway the baseline is at 0.6 after 100 images; this one, 0.7 by then, after 133.
    assert line["half-way"] == "0.75 (0.75 to 0.75)"


def test_images_to_the_baselines_kernel_distance_and_the_wall_clock_of_operators():
    def scored(row: Row) -> Row:
        halves = 2.0 if "skip-scale=ls" in row.cell else 1.0
        curve = [1.0, 1 - 0.5 * halves, 0.25 / halves]
        return replace(
            row, curve_scored_images=[0.0, 100.0, 200.0], curve_kernel_distance=curve, operators_speedup=halves
        )

    rows = results(none={0.001: [0.2] * 3}, ls={0.001: [0.2] * 3})
    tables = {table.key: table for table in tables_of([scored(row) for row in rows])}
    assert "score-speed" not in {table.key for table in tables_of(rows)}
    none, ls = (dict(zip(tables["score-speed"].header, line, strict=True)) for line in tables["score-speed"].lines)
    assert (none["target distance"], none["images to target"]) == (0.25, 200.0)
    assert ls["images to target"] == 75.0  # from 1 to 0 over the first 100
    assert str(ls["times fewer"]).startswith("2.67 ")
    assert [line[-1] for line in tables["speed"].lines] == [1.0, 2.0]


def test_operations_to_the_baselines_best_loss_where_modes_differ_in_what_an_image_costs():
    """The dense unscaled mode is the baseline, wherever its rows stand."""

    def counted(row: Row, sparse: str, cost: float) -> Row:
        cell = row.cell.replace(" learning", f" sparse={sparse} learning")
        return replace(row, cell=cell, curve_flops=[cost * images for images in row.curve_images])

    rows = results(none={0.001: [0.2] * 3, 0.002: [0.6] * 3}, cs={0.001: [0.6] * 3, 0.002: [0.2] * 3})
    sparse, dense = [counted(row, "0.75:100", 1e9) for row in rows], [counted(row, "dense", 4e9) for row in rows]
    tables = {table.key: table for table in tables_of([*sparse, *dense])}
    lines = [dict(zip(tables["flops"].header, line, strict=True)) for line in tables["flops"].lines]
    assert [line["mode"] for line in lines] == [
        *("none, sparse dense", "none, sparse 0.75:100", "cs, sparse 0.75:100", "cs, sparse dense")
    ]
    assert [line["GFLOP an image"] for line in lines] == [4, 1, 1, 4]
    assert [line["TFLOP to target"] for line in lines] == pytest.approx([0.8, 0.2, 0.2, 0.8])
    for column in ("times fewer", "half-way"):
        assert [str(line[column])[:4] for line in lines] == ["1.00", "4.00", "4.00", "1.00"]
    (verdict,) = (verdict for verdict in verdicts_of([*sparse, *dense]) if "operations" in verdict.claim)
    assert verdict.holds
    assert "cs, sparse 0.75:100, times fewer: 4.00" in verdict.found
    for alike in (dense, [replace(row, curve_flops=[]) for row in [*sparse, *dense]]):
        assert "flops" not in {table.key for table in tables_of(alike)}
        assert not [verdict for verdict in verdicts_of(alike) if "operations" in verdict.claim]


def test_groups_are_named_by_what_differs():
    cell = "depth=8 skip-scale=cs:0.7 position={} qk-norm=False learning-rate=2^-8 seed=0"
    rows = [replace(GOOD[0], cell=cell.format(position)) for position in ("before-norm", "after-norm")]
    names = [(group.context, group.mode) for group in groups_of(rows)]
    assert names == [("depth 8", "cs:0.7, position before-norm"), ("depth 8", "cs:0.7, position after-norm")]


def test_modes_are_compared_with_the_plain_network_wherever_its_rows_stand():
    others = "variant=magnitude-preserving ", "magnitude=mp ", "clipping=norm:1 ", "sparse=0.75:100 ", ""
    names = [f"depth=6 skip-scale=none {other}learning-rate=2^-8 seed=0" for other in others]
    groups = groups_of(rows_named(*names))
    assert groups[0].rows[0].cell == names[-1]
    assert [group.rows[0].cell for group in groups[1:]] == names[:-1]
    assert baseline_of(groups) is groups[0]
    assert baseline_of(groups[1:3]) is groups[2]  # a flag of its own may be anything
    assert baseline_of(groups[4:]) is None


def test_the_page_is_one_file_with_sortable_tables_and_plots(tmp_path):
    pytest.importorskip("matplotlib")
    facts = Facts("A <lab>", "scalelong lab digits-uvit", {"depth=3": "depth must be even"})
    page = write_report(tmp_path, GOOD, facts).read_text()
    assert "A &lt;lab&gt;" in page
    assert len(re.findall(r'<img [^>]*src="data:image/svg', page)) == 5
    assert len(re.findall(r'style="--inches: [1-9][\d.]*"', page)) == 5  # widths that the page can shrink and grow by
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert page.index("verdicts") < page.index("<table>")
    assert "depth must be even" in page
    assert {path.name for path in tmp_path.iterdir()} >= {"stability.csv", "losses.png", "report.md", "speed.csv"}
    write_report(tmp_path / ".", GOOD, facts)
    assert (tmp_path / "report.html").read_text() == page  # the same rows, the same page


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to the run folder"):
        run_grid(small_cells(64), tmp_path / "file" / "out", trains=True, workers=1, say=lambda line: None)


def test_the_command_line_makes_the_cells():
    line = "digits-uvit --depths 2,4 --seeds 2 --axis model.width=32,64 -- --model.mlp-ratio 2"
    arguments, rest = parser().parse_known_args(line.split())
    values = {"skip-scale": "none", "learning-rates": "0.001", "depths": "2,4", "seeds": "2"}
    cells = cells_of("digits-uvit", arguments, values, tuple(rest[1:]))
    assert len(cells) == 8
    assert cells[-1].name == "depth=4 skip-scale=none learning-rate=0.001 model.width=64 seed=1"
    config = cells[-1].config(Path("run"))
    model: Any = config.model
    assert (model.depth, model.width, model.mlp_ratio, config.seed) == (4, 64, 2.0, 1)
    assert (config.total_images, config.guard.roll_back_factor, config.guard.roll_backs) == (12_800, 3, 0)
    assert set(AXES) >= {"positions", "qk-norm", "clipping", "batches"}


def without_cost(rows: list[Row]) -> list[str]:
    return [repr(replace(row, **dict.fromkeys(COST, ""))) for row in rows]


@pytest.mark.slow
def test_a_grid_of_four_cells_and_again_from_its_table(tmp_path):
    cells = small_cells(20 * 32, learning_rates="2^-8,2^30")
    cells[0] = replace(cells[0], is_probed=True)
    said: list[str] = []
    grid = run_grid(cells, tmp_path / "a", trains=True, workers=2, say=said.append)
    assert said[0] == "4 cells: 0 in the table, 4 to run, 0 that cannot"
    assert [row.state for row in grid.rows.values()] == ["finished", "diverged", "finished", "diverged"]
    finished = [row for row in grid.rows.values() if not row.reason]
    assert all(len(row.curve_loss) == 20 and len(row.gain_0_1) == 5 for row in finished)
    assert all(0.1 < row.operators_speedup < 10 for row in finished)
    assert [len(row.probe_accuracy) for row in finished] == [3, 0]
    assert max(finished[0].probe_accuracy) > 0.3
    assert not list(tmp_path.glob("a/cells/*/checkpoints"))
    # The table alone, elsewhere: nothing is left to run.
    (tmp_path / "b").mkdir()
    table_path(tmp_path / "b").write_bytes(table_path(tmp_path / "a").read_bytes())
    said.clear()
    began = time.monotonic()
    again = run_grid(cells, tmp_path / "b", trains=True, workers=2, say=said.append)
    assert time.monotonic() - began < 2
    assert said == ["4 cells: 4 in the table, 0 to run, 0 that cannot"]
    assert without_cost(list(again.rows.values())) == without_cost(read_table(table_path(tmp_path / "a")))
    assert not (tmp_path / "b" / "cells").exists()


def start_lab(out: Path) -> subprocess.Popen:
    grid = "--depths 2 --skip-scale none,ls --learning-rates 2^-8,2^-7 --seeds 1 --images 1600 --workers 2"
    command = [sys.executable, "-m", "scalelong", "lab", "digits-uvit", *grid.split(), "--out", str(out), *SMALL]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)


@pytest.mark.exhaustive
def test_a_grid_killed_at_random_ends_with_the_same_table(tmp_path):
    assert start_lab(tmp_path / "whole").wait(300) == 0
    draw = random.Random(0)
    for _ in range(8):
        lab = start_lab(tmp_path / "killed")
        with pytest.raises(subprocess.TimeoutExpired):
            lab.wait(draw.uniform(4, 14))
        os.kill(lab.pid, signal.SIGKILL)
        lab.wait()
        if len(read_table(table_path(tmp_path / "killed"))) >= 3:
            break
    time.sleep(2)
    assert start_lab(tmp_path / "killed").wait(300) == 0
    whole, killed = (read_table(table_path(tmp_path / name)) for name in ("whole", "killed"))
    assert without_cost(killed) == without_cost(whole)


def test_the_law_at_initialisation_orders_the_policies():
    """Norms grow with depth under none, half as fast under 1/√2, a quarter as fast under ls, and not under cs."""
    from scalelong.bench.lab.metrics import fit_depth_law
    from scalelong.bench.lab.probes import depth_law_point, noisy, preserve_norms, read_batch
    from scalelong.model.architectures import make_backbone

    batch = read_batch(small_cells(64)[0].config(Path("run")))
    depths, seeds, slopes, points = (4, 12, 24), 2, {}, []
    for mode in ("none", "inv-sqrt2", "ls", "cs:0.7", "cs:0.5"):
        values = {"depths": ",".join(map(str, depths)), "learning_rates": "0.001", "seeds": str(seeds)}
        found = []
        for cell in small_cells(64, skip_scale=mode, **values):
            config = cell.config(Path("run"))
            torch.manual_seed(config.seed)
            model = make_backbone(config.model, skip_scale=config.skip_scale)
            preserve_norms(model)
            found.append(depth_law_point(model, noisy(config, batch, 0.5)))
        num_skips = [depth / 2 for depth in depths for _ in range(seeds)]
        slopes[mode] = fit_depth_law(num_skips, [point.ratio for point in found]).slope
        points += found
    assert 0.7 < slopes["none"] < 1.3
    assert slopes["none"] > 1.5 * slopes["inv-sqrt2"] > 2 * slopes["ls"]
    assert max(abs(slopes["cs:0.7"]), abs(slopes["cs:0.5"])) < 0.2 * slopes["none"]
    assert fit_depth_law([p.kappa_squares for p in points], [p.ratio for p in points]).r_squared > 0.8


def test_gains_of_a_linear_map_are_its_singular_values():
    from scalelong.bench.lab.probes import jacobian_norm, mean_mode_share, perturbation_gain

    weight = torch.diag(torch.tensor([3.0, 1.0, 0.5, 0.25]))

    def network(x):
        return (x.flatten(1) @ weight.T).view_as(x)

    x = torch.randn(64, 1, 2, 2)
    assert jacobian_norm(network, x[:4]) == pytest.approx(3.0, rel=1e-3)
    gains = [perturbation_gain(network, x, delta) for delta in (0.01, 0.3)]
    assert gains[0] == pytest.approx(gains[1], rel=1e-3)
    assert 1.0 < gains[0] < 2.0
    assert perturbation_gain(lambda x: 2 * x, x, 0.1) == pytest.approx(2.0, rel=1e-4)
    alike = torch.randn(3, 1, 8).expand(3, 5, 8)
    assert mean_mode_share(alike) == pytest.approx(1.0)
    assert mean_mode_share(torch.tensor([[[1.0], [-1.0]]])) == 0


def test_what_a_log_amounts_to(tmp_path):
    from scalelong.bench.lab.cell import measures_of
    from scalelong.train.outcome import Outcome

    (cell,) = small_cells(3200, skip_scale="none", learning_rates="2^-8")
    config = cell.config(tmp_path)
    rows = [
        {
            **{"images_seen": 32.0 * step, "step": step, "loss": 1 / step, "grad_norm": 1.0 + (step == 60)},
            **{
                "images_per_second": 64.0,
                "skip/1/hidden_norm": 2.0,
                "block/0/magnitude": 0.5,
                "block/1/magnitude": 1.5,
            },
            **{"block/0/weight_norm": 3.0 + (step == 100), "block/outside/weight_norm": 4.0},
            **{"block/0/gradient_norm": 1.0, "block/outside/gradient_norm": 0.0},
            **{"block/0/gradient_alignment": -0.5, "block/outside/gradient_alignment": 0.0},
        }
        for step in range(1, 101)
    ]
    found = measures_of(rows, config, Outcome(state="finished", images_seen=3200, step=100))
    assert found["final_loss"] == pytest.approx(sum(1 / s for s in range(76, 101)) / 25)
    assert (found["final_is"], found["seconds"], found["largest_gradient"]) == ("training", 50.0, 2.0)
    assert found["spikes_gradient"] == 1 / 80
    assert (found["spikes_loss"], found["oscillation"], found["hidden_norm"]) == (0, 0, 2.0)
    assert (found["magnitude"], found["weight_norm"]) == (1.5, 32**0.5)
    assert found["weight_growth"] == pytest.approx(32**0.5 / 5)
    assert found["gradient_alignment"] == pytest.approx(0.5 * 3 / 5)
    assert len(found["curve_images"]) == len(found["curve_weights"]) == 60
    for row in rows[9::10]:
        row["validation_loss"] = row["loss"] + 1
    validated = measures_of(rows, config, Outcome(state="finished", images_seen=3200, step=100))
    assert (validated["final_is"], validated["final_loss"]) == ("validation", 1.01)
    assert validated["curve_images"] == [320.0 * n for n in range(1, 11)]
    rising = [{**row, "loss": row["step"], "validation_loss": None} for row in rows[:8]]
    worse = measures_of(rising, config, Outcome(state="finished", images_seen=256, step=8))
    assert (worse["state"], worse["reason"]) == ("diverged", "the loss ended at 7.5, above its start")
    assert json.dumps(worse)
