"""``--compile``: the same steps and names, exact resuming, and what is refused.

Here graphs are run as they were traced; the exhaustive test compiles them.
"""

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")

from running import log_rows, losses, small_config
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from scalelong.train import compiling
from scalelong.train.config import TrainConfig
from scalelong.train.errors import UserError
from scalelong.train.loop import train
from scalelong.train.objective_config import NUM_AUGMENT_LABELS, ObjectiveConfig
from scalelong.train.recipes import RECIPES

pytestmark = pytest.mark.slow

STEP = 32


def config_of(recipe: str, run: Path, **changes) -> TrainConfig:
    """A network of few blocks, without validation."""
    shape = {"model_channels": 32, "num_res_blocks": 1} if recipe == "digits-unet" else {"width": 32, "depth": 2}
    base = RECIPES[recipe]
    changes = {"model": replace(base.model, **shape), "skip_scale": base.skip_scale, **changes}
    return small_config(run, total_images=4 * STEP, num_validation_images=0, **changes)


def resumed(config: TrainConfig) -> None:
    train(replace(config, total_images=2 * STEP))
    train(config)


@pytest.mark.parametrize(
    ("recipe", "what", "stage", "recompute"),
    [
        ("digits-dit", "model", 1, "none"),
        ("digits-uvit", "blocks", 2, "blocks"),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in (
                ("digits-uvit", "model", 1, "none"),
                ("digits-uvit", "model", 0, 0.5),
                ("digits-dit", "blocks", 2, "blocks"),
                ("digits-unet", "blocks", 1, "none"),
                ("digits-unet", "model", 2, "none"),
                ("digits-mpuvit", "blocks", 1, "none"),
            )
        ),
    ],
)
def test_a_compiled_run_takes_the_same_steps(tmp_path, monkeypatch, recipe, what, stage, recompute):
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    how = {"zero_stage": stage, "recompute": recompute, "precision": "bf16" if stage == 2 else "fp32"}
    if recipe == "digits-mpuvit":
        how |= {"objective": RECIPES[recipe].objective, "optimizer": RECIPES[recipe].optimizer}
    plain = config_of(recipe, tmp_path / "plain", **how)
    train(plain)
    counters.clear()
    compiled = replace(plain, run=tmp_path / "compiled", compile=what)
    resumed(compiled)
    # Of both starts; the blocks of a DiT without skips are of one kind.
    assert counters["stats"]["unique_graphs"] >= (2 if what == "model" or recipe == "digits-dit" else 4)
    assert not counters["graph_break"]
    rounding = 1e-3 if plain.precision == "bf16" else 1e-6
    assert losses(compiled.run) == pytest.approx(losses(plain.run), rel=rounding)
    weights = [load_file(run / "checkpoints/128/model.safetensors") for run in (plain.run, compiled.run)]
    assert weights[0].keys() == weights[1].keys()
    # What is watched of blocks and skips is there too.
    for before, now in zip(log_rows(plain.run), log_rows(compiled.run), strict=True):
        watched = [name for name in before if name.startswith(("block/", "skip/"))]
        assert before.keys() == now.keys()
        expected = pytest.approx([before[name] for name in watched], rel=100 * rounding, abs=100 * rounding)
        assert [now[name] for name in watched] == expected


@pytest.mark.parametrize("what", ["model", pytest.param("blocks", marks=pytest.mark.exhaustive)])
def test_a_contrast_of_features_goes_with_graphs(tmp_path, monkeypatch, what):
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    shape = {"model": replace(RECIPES["digits-uvit"].model, width=32, depth=2, augment_dim=NUM_AUGMENT_LABELS)}
    plain = config_of("digits-uvit", tmp_path / "plain", objective=ObjectiveConfig(contrast=0.1), **shape)
    train(plain)
    compiled = replace(plain, run=tmp_path / "compiled", compile=what)
    train(compiled)
    for name in ("loss", "contrast_loss"):
        before, now = ([row[name] for row in log_rows(run)] for run in (plain.run, compiled.run))
        assert now == pytest.approx(before, rel=1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("what", ["model", "blocks"])
def test_what_inductor_makes_resumes_exactly(tmp_path, what):
    once = config_of("digits-uvit", tmp_path / "once", compile=what)
    train(once)
    twice = replace(once, run=tmp_path / "twice")
    resumed(twice)
    assert losses(twice.run) == losses(once.run)
    plain = replace(once, run=tmp_path / "plain", compile="none")
    train(plain)
    assert losses(once.run) == pytest.approx(losses(plain.run), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"compile": "model", "zero_stage": 3}, "--compile model cannot trace .* ZeRO 3 .* take --zero-stage 2"),
        ({"compile": "blocks", "recompute": 0.5}, "--compile blocks hides from --recompute 0.5 .* --compile model"),
        ({"compile": "blocks"}, "needs a C.. compiler on a CPU, and there is no no-such-compiler"),
    ],
)
def test_what_cannot_be_compiled_is_refused_before_anything_is_written(tmp_path, monkeypatch, changes, words):
    if len(changes) == 1:
        monkeypatch.setenv("CXX", "no-such-compiler")
    config = config_of("digits-uvit", tmp_path / "run", **changes)
    with pytest.raises(UserError, match=words) as raised:
        train(config)
    assert "\n" not in str(raised.value)
    assert not config.run.exists()
