"""A DiT through the same trainer: with and without long skips, every policy, form of skips and stage of ZeRO."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("deepspeed")

from running import log_rows, losses, train_on_ranks

from scalelong.model.architectures import load_backbone
from scalelong.model.dit import DiT
from scalelong.model.dit_config import MODULATIONS
from scalelong.model.skip_scale import SKIP_SCALE_NAMES, make_skip_scale
from scalelong.train.command_line import parse_train_arguments
from scalelong.train.commands.export import main as export
from scalelong.train.config import TrainConfig
from scalelong.train.config_json import config_from_dict, config_to_dict
from scalelong.train.errors import UserError
from scalelong.train.loop import train
from scalelong.train.recipes import RECIPES

STEP = 16
FLAGS = [
    *("--model.width", "32", "--model.depth", "4", "--images-per-step", str(STEP), "--optimizer.warmup-images", "32"),
    *("--sample.num-images", "10", "--sample.steps", "2", "--images-per-log", "0"),
]
FORMS, STAGES, BASE_WIDTHS = ("layer-norm", "plain"), (0, 1, 2, 3), (0, 16)
SAMPLE = {
    ("layer-norm", "ls", 3, "scale-rot", 16),
    ("plain", "cs", 2, "rot", 16),
    ("layer-norm", "inv-sqrt2", 1, "scale", 16),
    ("plain", "ls-separate", 0, "adaln", 16),
    ("plain", "geometric", 2, "scale-rot", 0),
    ("plain", "none", 1, "adaln", 0),
}
"""The last number is the base width of muP, or 0: the standard parametrisation."""


def mup(base_width: int) -> dict[str, Any]:
    return {"parametrization": "mup", "base_width": base_width} if base_width else {}


def dit_config(
    run: Path,
    skip: str = "none",
    policy: str = "none",
    modulation: str = "adaln",
    base_width: int = 0,
    **changes: Any,
) -> TrainConfig:
    """What FLAGS make of the preset."""
    base = RECIPES["digits-dit"]
    small = replace(
        base,
        run=run,
        images_per_step=STEP,
        images_per_log=0,
        skip_scale=make_skip_scale(policy),
        model=replace(base.model, width=32, depth=4, skip=skip, modulation=modulation, **mup(base_width)),
        optimizer=replace(base.optimizer, warmup_images=32),
        sample=replace(base.sample, num_images=10, steps=2),
    )
    return replace(small, **changes)


def assert_same_run(left: Path, right: Path, images: int) -> None:
    assert losses(left) == losses(right)
    for name in ("model", "ema", "optimizer"):
        mine, other = (load_file(run / "checkpoints" / str(images) / f"{name}.safetensors") for run in (left, right))
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[key], other[key]) for key in mine)


def test_the_sample_has_each_policy_form_stage_and_modulation():
    found = tuple(set(values) for values in zip(*SAMPLE, strict=True))
    assert found == (set(FORMS), set(SKIP_SCALE_NAMES), set(STAGES), set(MODULATIONS), set(BASE_WIDTHS))
    assert {stage for _, _, stage, _, base_width in SAMPLE if base_width} == set(STAGES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("skip", "policy", "stage", "modulation", "base_width"), [("none", "none", 2, "adaln", 0), *sorted(SAMPLE)]
)
def test_resuming_is_exact(tmp_path, skip, policy, stage, modulation, base_width):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    network = (skip, policy, modulation, base_width)
    assert train(dit_config(straight, *network, zero_stage=stage, total_images=5 * STEP)) == 0
    for total in (2 * STEP, 5 * STEP):
        assert train(dit_config(resumed, *network, zero_stage=stage, total_images=total)) == 0
    assert_same_run(straight, resumed, 5 * STEP)
    num_skips = 0 if skip == "none" else 2
    assert sum(key.endswith("/scale") for key in log_rows(straight)[-1]) == num_skips


MUP = ("--parametrization", "mup", "--base-width", "16")
PLAIN_SKIPS = ("--model.skip", "plain", "--zero-stage", "2")
OPTIONS = [
    *(
        ("--model.skip", skip, "--skip-scale", policy, "--zero-stage", str(stage))
        for skip, policy, stage in product(FORMS, SKIP_SCALE_NAMES, STAGES)
    ),
    *(
        (*MUP, "--model.skip", FORMS[n % 2], "--skip-scale", policy, "--zero-stage", str(STAGES[n % 4]))
        for n, policy in enumerate(SKIP_SCALE_NAMES)
    ),
    (*PLAIN_SKIPS, "--skip-scale", "geometric", "--skip-scale.renorm", "False", "--kappa", "0.7"),
    *((*PLAIN_SKIPS, "--model.modulation", modulation, "--skip-scale", "geometric") for modulation in MODULATIONS),
    *(("--zero-stage", "2", "--model.modulation", modulation) for modulation in MODULATIONS),
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_fifty_steps_on_two_ranks_and_resuming_them_are_exact(tmp_path, options):
    arguments = ["digits-dit", *FLAGS, *options]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train_on_ranks(2, *arguments, "--run", straight, "--total-images", 50 * STEP)
    for steps in (20, 50):
        train_on_ranks(2, *arguments, "--run", resumed, "--total-images", steps * STEP)
    assert_same_run(straight, resumed, 50 * STEP)
    first, last = (sum(part) / 10 for part in (losses(straight)[:10], losses(straight)[-10:]))
    assert last < 0.9 * first


@pytest.mark.slow
def test_a_run_is_exported_with_its_skips(tmp_path):
    run = tmp_path / "run"
    assert train(dit_config(run, "layer-norm", "ls", "scale-rot", 16, total_images=2 * STEP)) == 0
    export([str(run), "--out", str(tmp_path / "exported")])
    model = load_backbone(tmp_path / "exported")
    assert isinstance(model, DiT)
    assert (model.config.skip, model.skip_scale) == ("layer-norm", make_skip_scale("ls"))
    assert model.config.modulation == "scale-rot"
    assert model.parameter_groups() == DiT(model.config, skip_scale=model.skip_scale).parameter_groups()
    assert {group.learning_rate_factor for group in model.parameter_groups()} == {1.0, 0.5, 2.0}
    assert [hook.factor for hook in model.final_layer.linear._forward_hooks.values()] == [0.5]  # type: ignore[attr-defined]
    assert torch.equal(model.pos_embed, DiT(model.config).pos_embed)
    assert model(torch.randn(1, 1, 8, 8), torch.ones(1), torch.tensor([3])).isfinite().all()


@pytest.mark.parametrize("name", ["digits-dit", "imagenet256-dit-xl2", "imagenet512-dit-xl2"])
def test_a_configuration_survives_json(name):
    assert config_from_dict(config_to_dict(RECIPES[name])) == RECIPES[name]


def test_a_recipe_is_given_skips_and_their_policy_by_flags():
    config = parse_train_arguments(["digits-dit", "--skip-scale", "cs", "--kappa", "0.7", "--model.skip", "layer-norm"])
    assert (config.model.skip, config.skip_scale) == ("layer-norm", make_skip_scale("cs", 0.7))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--skip-scale", "cs"], r"skip scale 'cs', but this DiT has no long skips \(model.skip\): 'none' fits"),
        (["--model.out-channels", "2"], "a learned variance is not trained"),
        (["--model.width", "98"], "width 98 is no multiple of num_heads 4"),
        (["--model.modulation", "turn"], "invalid choice 'turn' for argument '--model.modulation'"),
    ],
    ids=["policy", "variance", "width", "modulation"],
)
def test_what_cannot_be_is_refused_in_one_line(flags, message):
    with pytest.raises(UserError, match=message):
        parse_train_arguments(["digits-dit", *flags])


@pytest.mark.parametrize("recipe", ["digits-uvit", "digits-unet"])
def test_a_network_without_modulation_refuses_one_by_name(recipe):
    with pytest.raises(UserError, match=r"--model.modulation"):
        parse_train_arguments([recipe, "--model.modulation", "scale-rot"])
