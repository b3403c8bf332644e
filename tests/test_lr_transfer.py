"""Transfer of the learning rate: the cells of its grid, and what is made of their rows."""

import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed")

from scalelong.bench.lab.cells import Cell, digest_of
from scalelong.bench.lab.grid import table_path
from scalelong.bench.lab.table import Row, write_table
from scalelong.bench.mup.lr_transfer import cells_of, main, parser
from scalelong.bench.mup.transfer import losses_of, tables_of, verdicts_of
from scalelong.model.architectures import make_backbone
from scalelong.train.errors import UserError

NAMES = ("standard", "fan-in", "mup")


def cells(*line: str) -> list[Cell]:
    values = ["--widths", "32,64", "--learning-rates", "2^-8,2^-7", "--seeds", "1", "--images", "640"]
    return cells_of(parser().parse_args([*values, *line]), ())


def test_cells_are_widths_of_one_head_in_each_parametrisation():
    found = cells("--parametrizations", ",".join(NAMES))
    assert len(found) == 3 * 2 * 2
    configs: dict[str, Any] = {cell.name: cell.config(Path("run")) for cell in found}
    wide = [configs[f"parametrization={name} width=64 learning-rate=2^-7 seed=0"] for name in NAMES]
    assert [config.model.base_width for config in wide] == [0, 64, 32]
    assert all((c.model.num_heads, c.optimizer.learning_rate, c.total_images) == (4, 2**-7, 640) for c in wide)
    assert all(c.images_per_step == 32 for c in configs.values())
    narrow = [cell for cell in found if "width=32 learning-rate=2^-7" in cell.name]
    standard, fan_in, mup = (digest_of(cell, cell.config(Path("run"))) for cell in narrow)
    assert fan_in == mup != standard


def test_one_rate_for_all_widths_is_what_fan_in_means():
    (cell,) = (cell for cell in cells("--parametrizations", "fan-in") if "width=64 learning-rate=2^-7" in cell.name)
    (group,) = make_backbone(cell.config(Path("run")).model).parameter_groups()
    assert group[1:] == (1.0, 1.0, 1.0)


def rows(losses: dict[tuple[str, int, str], list[float]]) -> list[Row]:
    """A row a seed; infinite losses diverged."""
    return [
        Row(
            cell=f"parametrization={name} width={width} learning-rate={rate} seed={seed}",
            digest="d",
            preset="digits-uvit",
            state="diverged" if math.isinf(loss) else "finished",
            final_loss=math.nan if math.isinf(loss) else loss,
        )
        for (name, width, rate), seeds in losses.items()
        for seed, loss in enumerate(seeds)
    ]


FOUND = rows(
    {
        ("standard", 64, "2^-8"): [0.3, 0.3],
        ("standard", 64, "2^-7"): [0.2, 0.2],
        ("standard", 256, "2^-8"): [0.16, 0.16],
        ("standard", 256, "2^-7"): [0.4, math.inf],
        ("mup", 64, "2^-8"): [0.2, 0.22],
        ("mup", 64, "2^-7"): [0.25, 0.25],
        ("mup", 256, "2^-8"): [0.15, 0.17],
        ("mup", 256, "2^-7"): [0.15, 0.15],
    }
)


def test_best_rates_and_regrets():
    table, losses = tables_of(FOUND)
    lines = {tuple(line[:2]): line[2:] for line in table.lines}
    assert lines["mup", "64"] == ["2^-8", pytest.approx(0.21), 0.0, pytest.approx(0.25)]
    assert lines["mup", "256"] == ["2^-7", pytest.approx(0.15), 6.7, pytest.approx(0.15)]
    assert lines["standard", "256"][:2] == ["2^-8", pytest.approx(0.16)]
    assert lines["standard", "256"][2] == math.inf
    assert losses.lines[1][2:] == [0.16, "diverged"]
    assert math.isnan(losses_of([row for row in FOUND if "2^-7" in row.cell])["mup"].regret(256))


def test_verdicts_are_plain_whichever_way_they_fall():
    assert [verdict.holds for verdict in verdicts_of(FOUND)] == [True, True, True]
    mup = losses_of(FOUND)["mup"].rows
    swapped = [Row(**{**vars(row), "cell": row.cell.replace("mup", "standard")}) for row in mup]
    assert [verdict.holds for verdict in verdicts_of(swapped)] == [False]
    assert [verdict.holds for verdict in verdicts_of([row for row in mup if "width=64" in row.cell])] == [None, None]
    costly = {("mup", 64, "2^-8"): [0.2], ("mup", 64, "2^-7"): [0.3]}
    costly |= {("mup", 256, "2^-8"): [0.2], ("mup", 256, "2^-7"): [0.1]}
    assert [verdict.holds for verdict in verdicts_of(rows(costly))] == [True, False]
    assert verdicts_of([]) == []


def test_a_report_of_the_table_alone(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    write_table(table_path(tmp_path), FOUND)
    main(["--report-only", "--out", str(tmp_path)])
    assert "| mup | 256 | 2^-7 | 0.15 | 6.7 | 0.15 |" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} >= {"report.md", "transfer.csv", "losses.csv", "transfer.png"}
    assert "- reached: under muP wider is better" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--widths", "64,100"], "100 is no multiple of --head-width 16"),
        (["--widths", "64"], "expected at least two widths"),
        (["--parametrizations", "magic"], "--parametrizations magic: there are standard, fan-in, mup"),
        (["--learning-rates", "2^-5..2^-9"], "is empty"),
        (["--images", "16"], "a step takes 32"),
        (["--report-only"], "has no rows"),
    ],
    ids=range(6),
)
def test_a_grid_that_cannot_be_is_one_line(tmp_path, line, message):
    with pytest.raises(UserError, match=message) as caught:
        main([*line, "--out", str(tmp_path)])
    assert "\n" not in str(caught.value)


@pytest.mark.exhaustive
def test_a_small_grid_runs_and_goes_on(tmp_path, capsys):
    line = ["--widths", "32,64", "--learning-rates", "2^-7", "--seeds", "1", "--images", "320", "--out", str(tmp_path)]
    for done in (0, 4):
        main(line)
        assert f"4 cells: {done} in the table, {4 - done} to run, 0 that cannot" in capsys.readouterr().out
