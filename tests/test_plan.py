"""The plan of a run: its memory against what real steps take, what it sends, and what it advises."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")

from running import run_on_ranks, small_config

from scalelong.model.architectures import make_backbone
from scalelong.train.commands.plan import find_need, largest_need, main, measure_network, sent_bytes
from scalelong.train.config import TrainConfig
from scalelong.train.config_json import config_to_dict
from scalelong.train.errors import UserError
from scalelong.train.recipes import RECIPES


def network_of(kind: str) -> TrainConfig:
    base = small_config(Path("unused"))
    if kind == "unet":
        return replace(RECIPES["digits-unet"], run=base.run)
    if kind == "weights":
        return replace(base, model=replace(base.model, width=512, num_heads=8, depth=4))
    return replace(base, model=replace(base.model, img_size=32, width=192, num_heads=6, depth=4))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "precision", "stage", "ranks", "micro_batch", "accumulation_steps"),
    [
        pytest.param("weights", "fp32", 0, 1, 2, 1, marks=pytest.mark.exhaustive),
        pytest.param("weights", "fp32", 2, 1, 2, 2, marks=pytest.mark.exhaustive),
        pytest.param("weights", "fp32", 3, 2, 2, 1, marks=pytest.mark.exhaustive),
        ("activations", "fp32", 1, 2, 16, 1),
        pytest.param("activations", "fp32", 3, 2, 16, 2, marks=pytest.mark.exhaustive),
        ("weights", "bf16", 2, 2, 2, 1),
        pytest.param("weights", "bf16", 3, 2, 2, 1, marks=pytest.mark.exhaustive),
        ("unet", "fp32", 2, 2, 32, 1),
    ],
)
def test_the_memory_is_what_real_steps_take(kind, precision, stage, ranks, micro_batch, accumulation_steps):
    batch = micro_batch * ranks * accumulation_steps
    config = replace(network_of(kind), precision=precision, zero_stage=stage, images_per_step=batch)
    config = replace(config, accumulation_steps=accumulation_steps)
    printed = run_on_ranks(ranks, "measured_step.py", json.dumps(config_to_dict(config)), micro_batch)
    taken = int(printed[0].split("peak ")[1].split()[0])
    assert find_need(config, stage, ranks, micro_batch).total == pytest.approx(taken, rel=0.15)


def test_what_is_sent_grows_with_the_stage_and_with_accumulation():
    network = measure_network(replace(network_of("weights"), precision="bf16"))
    assert 0.5 * network.weights < network.sent < 0.6 * network.weights
    assert sent_bytes(network, 0, 1, 1) == 0
    assert sent_bytes(network, 0, 4, 1) == 2 * 3 * network.weights // 4
    assert sent_bytes(network, 3, 4, 2) == 2 * sent_bytes(network, 3, 4, 1)
    assert sent_bytes(network, 1, 4, 8) == sent_bytes(network, 1, 4, 1)


def test_the_largest_micro_batch_that_fits_is_found():
    config = replace(network_of("activations"), images_per_step=64)
    whole, half = (find_need(config, 1, 2, size).total for size in (32, 16))
    assert whole > 1.2 * half
    assert largest_need(config, 1, 2, whole).micro_batch == 32
    assert largest_need(config, 1, 2, whole - 1).micro_batch == 16
    assert largest_need(config, 1, 2, 1.0).micro_batch == 1


def test_the_command_prints_a_line_for_each_stage_and_what_to_take(capsys):
    main(["digits-uvit", "--nodes", "2", "--gpus-per-node", "2", "--gpu-memory", "8", "--model.width", "48"])
    lines = capsys.readouterr().out.splitlines()
    assert "64 images a step on 4 GPUs (2 x 2) of 8 GB, 16 a GPU" in lines[0]
    assert lines[2].split()[:2] == ["ZeRO", "micro-batch"]
    assert [line.split()[:2] for line in lines[3:7]] == [[stage, "16"] for stage in "0123"]
    assert all(line.endswith("yes") for line in lines[3:7])
    assert lines[-1] == "take --zero-stage 0 --accumulation-steps 1"


def test_a_plan_of_mup_tells_the_factors_of_each_group(capsys):
    width = ["--model.width", "96", "--model.num-heads", "4", "--parametrization", "mup", "--base-width", "24"]
    main(["digits-uvit", "--gpus-per-node", "1", "--optimizer.learning-rate", "0.004", *width])
    lines = capsys.readouterr().out.splitlines()
    first = lines.index("muP: base learning rate 0.004 at width 24; width 96, m = 4. output and epsilon are factors.")
    rows = [line.split() for line in lines[first + 3 : lines.index("", first + 3)]]
    hidden = next(row for row in rows if "attn.qkv.weight," in row)
    assert hidden[:5] == ["0.001", "0.12", "1", "0.25", "22"]
    readout = next(row for row in rows if row[-1] == "decoder_pred.weight")
    assert readout[:5] == ["0.004", "0.03", "0.25", "0.25", "1"]
    assert sum(int(row[4]) for row in rows) == len(list(make_backbone(RECIPES["digits-uvit"].model).named_parameters()))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nope"], "unknown recipe 'nope'"),
        ([], "which recipe"),
        (["digits-uvit", "--nodes", "3"], "--images-per-step 64 does not divide by 24 GPUs"),
        (["digits-uvit", "--gpus-per-node", "0"], "must be at least 1"),
        (["digits-uvit", "--model.width", "48", "--gpu-memory", "0.0001"], "no stage fits"),
        (["digits-uvit", "--zero-stage", "1", "--offload", "optimizer"], "without --offload"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(arguments, words):
    with pytest.raises(UserError, match=words) as caught:
        main(arguments)
    assert "\n" not in str(caught.value)
