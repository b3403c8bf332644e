"""Muon: which weights are hidden matrices, what a step does to their singular values, and the same under ZeRO."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

pytest.importorskip("deepspeed")

from running import SMALL, run_on_ranks, small_config, train_on_ranks

from scalelong.model.architectures import make_backbone
from scalelong.model.backbone import ParameterGroup
from scalelong.model.hidden_matrices import HiddenMatrix, hidden_matrices
from scalelong.model.linear_layers import queries_first
from scalelong.model.skip_scale import ConstantScale
from scalelong.model.uvit import UViT
from scalelong.train.branch import check_differences
from scalelong.train.command_line import parse_train_arguments
from scalelong.train.config import OptimizerConfig, TrainConfig
from scalelong.train.errors import UserError
from scalelong.train.loop import train
from scalelong.train.recipes import RECIPES
from scalelong.train.zero import engine as zero
from scalelong.train.zero.engine_config import check_engine_config
from scalelong.train.zero.muon import orthogonalised

STEP, RATE = 32, 1e-2
MUON: dict[str, Any] = {"kind": "muon", "learning_rate": RATE, "weight_decay": 0.0, "warmup_images": 0}
FLAGS = [
    *SMALL,
    "--num-validation-images=0",
    "--sample.num-images=1",
    "--sample.steps=1",
    *(f"--optimizer.{name.replace('_', '-')}={value}" for name, value in MUON.items()),
]
AT_ONE = (0.6, 1.25)
"""Where five iterations leave singular values that are not far below the largest."""


def muon_config(run: Path, steps: int, **changes: Any) -> TrainConfig:
    config = small_config(run, total_images=steps * STEP, num_validation_images=0, **changes)
    sample = replace(config.sample, num_images=1, steps=1)
    return replace(config, optimizer=replace(config.optimizer, **MUON), sample=sample)


def weights(run: Path, steps: int, name: str = "model") -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / str(steps * STEP) / f"{name}.safetensors")


def matrices_of(recipe: str, **changes: Any) -> tuple[Any, dict[str, HiddenMatrix]]:
    with torch.device("meta"):
        model = make_backbone(replace(RECIPES[recipe].model, **changes), skip_scale=RECIPES[recipe].skip_scale)
    return model, dict(hidden_matrices(model))


def test_hidden_matrices_of_a_transformer_are_the_weights_of_its_blocks():
    model, found = matrices_of("digits-uvit")
    expected = {name for name, p in model.named_parameters() if "block" in name and p.ndim == 2}
    assert found.keys() == expected
    assert found["mid_block.attn.qkv.weight"] == HiddenMatrix(num_maps=3)
    assert found["out_blocks.0.skip_linear.weight"] == HiddenMatrix(skip_width=model.config.width)


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [("digits-dit", {}), ("digits-unet", {}), ("digits-mpdit", {}), ("imagenet64-edm2-s", {"num_res_blocks": 1})],
)
def test_embeddings_modulation_and_the_outer_layers_are_none(recipe, changes):
    model, found = matrices_of(recipe, **changes)
    modules = {name.removesuffix(".weight"): model.get_parameter(name) for name in found}
    for outer in (
        "emb",
        "adaLN",
        "x_embedder",
        "final_layer",
        "in_conv",
        "out_conv",
        "input_blocks.0.0",
        "out.",
        "gate",
    ):
        assert not [name for name in modules if outer in name.split("blocks.")[0] or f".{outer}" in name]
    assert all(p.ndim >= 2 for p in modules.values())
    assert sum(p.numel() for p in modules.values()) > 0.5 * model.num_params()


def test_a_unet_divides_what_reads_a_skip_and_heads_that_come_first():
    model, found = matrices_of("digits-unet", use_new_attention_order=False, num_head_channels=16)
    for (_, block), skip in zip(model.skip_blocks(), model.skips, strict=True):
        (name,) = (n for n, module in model.named_modules() if module is block)
        assert found[f"{name}.in_layers.2.weight"].skip_width == skip.width
        assert found[f"{name}.skip_connection.weight"].skip_width == skip.width
    assert found["middle_block.1.qkv.weight"] == HiddenMatrix(0, 3, num_heads=4)
    assert found["middle_block.0.in_layers.2.weight"] == HiddenMatrix()


def test_a_weight_is_orthogonalised_map_by_map():
    weight, seen = torch.randn(24, 10, 3, 3), []

    def note(matrix: Tensor) -> Tensor:
        seen.append(matrix)
        return 2 * matrix

    assert torch.equal(HiddenMatrix(skip_width=4, num_maps=3, num_heads=2).apply(weight, note), 2 * weight)
    queries = queries_first(weight, 2).unflatten(0, (3, 8))[0]
    assert [m.shape for m in seen] == [(8, 54), (8, 36)] * 3
    assert torch.equal(seen[0], queries[:, :6].flatten(1))
    assert torch.equal(seen[1], queries[:, 6:].flatten(1))


@pytest.mark.parametrize("shape", [(32, 32), (96, 32), (16, 288)])
def test_newton_schulz_brings_singular_values_near_one_and_the_rms_to_that_of_adamw(shape):
    step = orthogonalised(torch.randn(shape) * 1e-3)
    values = torch.linalg.svdvals(step / (0.2 * max(shape) ** 0.5))
    assert AT_ONE[0] < values.quantile(0.1)
    assert values.max() < AT_ONE[1]
    assert step.square().mean().sqrt() == pytest.approx(0.2, rel=0.25)


def test_a_step_is_that_of_torch_on_each_map_and_of_adamw_on_the_rest():
    torch.manual_seed(0)
    model = make_backbone(small_config(Path()).model)
    config = OptimizerConfig(**{**MUON, "weight_decay": 0.1})
    matrices = zero.matrices_of(model, config)
    optimizer = zero.make_optimizer(zero.optimizer_groups(model, 0.1, matrices), config, model, matrices)
    parts, rest = {}, {}
    for name, parameter in model.named_parameters():
        if name not in matrices:
            rest[name] = nn.Parameter(parameter.detach().clone())
        else:
            rows = parameter.detach().chunk(3 if "qkv" in name else 1)
            parts[name] = [
                [nn.Parameter(p.clone()) for p in r.chunk(2 if "skip_linear" in name else 1, 1)] for r in rows
            ]
    flat = [part for rows in parts.values() for row in rows for part in row]
    by_torch = torch.optim.Muon(flat, lr=RATE, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest.values(), lr=RATE, weight_decay=0.1, betas=(config.beta1, config.beta2))
    for group in optimizer.param_groups:
        group["lr"] = RATE
    for _ in range(3):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            if name in rest:
                rest[name].grad = parameter.grad.clone()
                continue
            for rows, gradients in zip(parts[name], parameter.grad.chunk(len(parts[name])), strict=True):
                for part, gradient in zip(rows, gradients.chunk(len(rows), 1), strict=True):
                    part.grad = gradient.clone()
        for each in (optimizer, by_torch, adamw):
            each.step()
    for name, parameter in model.named_parameters():
        whole = rest.get(name)
        expected = whole if whole is not None else torch.cat([torch.cat(row, 1) for row in parts[name]])
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-6, msg=name)


def test_rates_of_mup_go_as_the_root_of_the_width():
    base = small_config(Path()).model
    for width, base_width in ((64, 16), (32, 32)):
        config = replace(base, width=width, num_heads=width // 16, parametrization="mup", base_width=base_width)
        model = make_backbone(config)
        groups = zero.optimizer_groups(model, 0.1, hidden_matrices(model))
        (hidden,) = (group for group in groups if group.get("is_hidden"))
        root = (width / base_width) ** 0.5
        assert hidden["learning_rate_factor"] == pytest.approx(1 / root)
        assert hidden["weight_decay"] == pytest.approx(0.1 * root)


def test_what_a_step_changes_does_not_go_with_the_width_under_mup():
    from scalelong.bench.mup.coordinates import Check, curves_of, networks, worst_growth

    config = replace(small_config(Path()).model, img_size=8, in_channels=3, num_classes=4, width=64, num_heads=4)
    config = replace(config, parametrization="mup", base_width=64)
    check = Check(widths=(64, 256), seeds=2, steps=2, optimizer="muon")
    make = networks(config, ConstantScale(0.5))
    assert worst_growth(curves_of(make, check)) < 0.4

    def as_without_mup(width: int) -> Any:
        model = make(width)
        model.parameter_groups = lambda: [ParameterGroup(tuple(name for name, _ in model.named_parameters()))]
        return model

    assert worst_growth(curves_of(as_without_mup, check)) > 0.4


def steps_on(ranks: int, stage: int, folder: Path) -> dict[str, Any]:
    run_on_ranks(ranks, "muon_run.py", stage, folder / "found.pt")
    return torch.load(folder / "found.pt")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [*(pytest.param(n, marks=pytest.mark.exhaustive) for n in (0, 1, 3)), 2])
def test_newton_schulz_runs_on_two_ranks_at_every_stage(stage, tmp_path):
    found = steps_on(2, stage, tmp_path)

    def expect_near_one(step: Tensor) -> Tensor:
        values = torch.linalg.svdvals(step / (0.2 * RATE * max(step.shape) ** 0.5))
        # Of gradients of few tokens the smallest are near zero, where five iterations leave them small.
        assert AT_ONE[0] < values[2]
        assert values[0] < AT_ONE[1]
        return step

    matrices = hidden_matrices(make_backbone(small_config(tmp_path).model))
    for before, after in pairwise(found["weights"]):
        for name, matrix in matrices.items():
            matrix.apply(before[name] - after[name], expect_near_one)
    names = found["weights"][0].keys()
    assert {name for name in names if f"exp_avg.{name}" in found["optimizer"]} == names
    assert {name for name in names if f"exp_avg_sq.{name}" in found["optimizer"]} == names - matrices.keys()


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_three_ranks_take_the_steps_of_one(stage, tmp_path):
    alone = steps_on(1, 0, tmp_path)["weights"][-1]
    found = steps_on(3, stage, tmp_path)["weights"][-1]
    # Rounding is enough for another step along directions that have next to no gradient.
    assert all((found[name] - weight).abs().mean() < 0.05 * RATE for name, weight in alone.items())


@pytest.mark.exhaustive  # test_skip_profile.py has one of them in make test
@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_run_goes_on_bit_for_bit(tmp_path, stage):
    for run, stops in (("straight", [2]), ("resumed", [1, 2])):
        for steps in stops:
            assert train(muon_config(tmp_path / run, steps, zero_stage=stage)) == 0
    for name in ("model", "ema", "optimizer"):
        found, expected = (weights(tmp_path / run, 2, name) for run in ("resumed", "straight"))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_two_ranks_go_on_bit_for_bit_for_fifty_steps(tmp_path):
    for run, stops in (("straight", [50]), ("resumed", [25, 50])):
        for steps in stops:
            flags = ["--zero-stage", 2, "--total-images", steps * STEP, "--images-per-log", 10 * STEP]
            train_on_ranks(2, "digits-uvit", *FLAGS, *flags, "--run", tmp_path / run)
    for name in ("model", "ema", "optimizer"):
        found, expected = (weights(tmp_path / run, 50, name) for run in ("resumed", "straight"))
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_bad_input(tmp_path):
    config = muon_config(tmp_path, 1, zero_stage=2, offload="optimizer")
    with pytest.raises(UserError, match=r"--optimizer.kind muon cannot offload"):
        check_engine_config(config, STEP)
    file = tmp_path / "deepspeed.json"
    file.write_text('{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}')
    with pytest.raises(UserError, match=r"--optimizer.kind muon cannot offload"):
        check_engine_config(replace(config, offload="none", deepspeed_config=file), STEP)
    with pytest.raises(UserError, match=r"momentum must be in \[0, 1\), got 1.0"):
        parse_train_arguments(["digits-uvit", "--optimizer.kind=muon", "--optimizer.momentum=1"])
    with pytest.raises(UserError, match="sgd"):
        parse_train_arguments(["digits-uvit", "--optimizer.kind=sgd"])
    with pytest.raises(UserError, match=r"optimizer's state of adamw, which --optimizer.kind muon cannot go on with"):
        check_differences(small_config(tmp_path), muon_config(tmp_path, 1))
    with pytest.raises(ValueError, match="does not say which weights are hidden matrices"):
        hidden_matrices(type("Other", (UViT,), {"matrices": None})(config.model))  # type: ignore[arg-type]
