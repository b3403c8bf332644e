"""The examples, run as commands."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from programs import start_own_process, start_python
from safetensors.torch import load_file

for package in ("diffusers", "sklearn", "tyro"):
    pytest.importorskip(package)

DIFFUSERS = Path(__file__).resolve().parents[1] / "examples" / "diffusers_finetune.py"


def run(*arguments: object, start: Callable[..., Any] = start_python) -> str:
    # On so small a network, threads only wait for one another.
    started = start(DIFFUSERS, *arguments, variables={"OMP_NUM_THREADS": 1})
    out, err = started.communicate(timeout=120)
    assert started.returncode == 0, err[-2000:]
    return out


def losses(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+)", printed)]


@pytest.mark.slow
def test_the_network_of_diffusers_learns_is_saved_and_continued(tmp_path):
    small = ("--batch-size", 32, "--channels", 16, "--skip-scale", "ls")
    first = run("--steps", 60, "--output", tmp_path / "first", *small, start=start_own_process)
    assert "6 skips scaled by LearnedScale" in first
    assert len(losses(first)) == 10
    assert losses(first)[-1] < 0.5 * losses(first)[0]
    with Image.open(tmp_path / "first" / "samples.png") as samples:
        assert samples.size == (4 * 32, 4 * 32)

    start = ("--model", tmp_path / "first", "--gates-from", tmp_path / "first")
    second = run("--steps", 2, "--output", tmp_path / "second", "--learning-rate", 1e-6, *start, *small)
    assert losses(second)[0] < 0.5 * losses(first)[0]
    before, after = (load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in ("first", "second"))
    assert list(before) == list(after)
    assert any("skip_gates" in name for name in before)
    assert all((after[name] - before[name]).abs().max() < 1e-3 for name in before)


@pytest.mark.slow
@pytest.mark.parametrize("skip_scale", ["none", "cs"])
def test_every_policy_trains(tmp_path, skip_scale):
    printed = run("--steps", 2, "--batch-size", 8, "--channels", 8, "--skip-scale", skip_scale, "--output", tmp_path)
    assert len(losses(printed)) == 2
    assert (tmp_path / "samples.png").is_file()


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_the_averages_of_all_parameters(tmp_path):
    small = ("--batch-size", 16, "--channels", 16, "--skip-scale", "ls")
    run("--steps", 20, "--output", tmp_path / "first", *small)
    standing = ("--steps", 1, "--learning-rate", 0, "--resume", tmp_path / "first")
    printed = run("--output", tmp_path / "second", *standing, *small)
    counts = re.search(r"(\d+) averages of (\d+) parameters", printed)
    assert counts is not None
    assert counts[1] == counts[2]
    files = [tmp_path / name / "state" / "unet" / "diffusion_pytorch_model.safetensors" for name in ("first", "second")]
    before, after = map(load_file, files)
    assert any("skip_gates" in name for name in before)
    # The optimizer comes back with its own learning rate: one step of it.
    assert all((after[name] - before[name]).abs().max() < 1e-2 for name in before)
    averages = [load_file(file.parents[1] / "unet_ema" / file.name) for file in files]
    assert averages[0].keys() == before.keys()
    # They went a step towards the weights, from where they stood.
    moved = {name: (averages[1][name] - averages[0][name]).abs() for name in before}
    assert all((moved[name] <= (after[name] - averages[0][name]).abs() + 1e-6).all() for name in before)
    assert not all(torch.equal(averages[1][name], after[name]) for name in before)


NOTEBOOK = DIFFUSERS.with_name("scalelong.ipynb")


def cells_of_notebook() -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_runs_from_top_to_bottom(capsys):
    """Without Jupyter: its cells are Python and nothing else, one after the other in one namespace."""
    names: dict[str, Any] = {}
    for cell in cells_of_notebook():
        exec(compile("".join(cell["source"]), NOTEBOOK.name, "exec"), names)
    printed = capsys.readouterr().out
    assert [picture.size for picture in names["pictures"]] == [(8, 8), (8, 8)]
    assert "skips scaled by ConstantScale" in printed
    assert not torch.equal(names["scaled"], names["before"])
    assert "it is what it was: True" in printed
    assert names["difference"] < 1e-5
    assert names["scale"].grad is not None


def test_the_notebook_is_committed_without_outputs():
    assert all((cell["outputs"], cell["execution_count"]) == ([], None) for cell in cells_of_notebook())
