"""Groups of parameters with factors of their own, and what is done to rows after each step, under every ZeRO stage."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed")

from grouped_uvit import grouped_uvit
from running import run_on_ranks, small_config

from scalelong.model.architectures import make_backbone
from scalelong.train.hosts.processes import join_processes
from scalelong.train.zero import engine as zero

FIRST_PART, STEPS = 3, 6
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory) -> dict[int, dict[str, dict[str, torch.Tensor]]]:
    """What plain AdamW comes to after half of the steps and after all."""
    folder = tmp_path_factory.mktemp("plain")
    for last in (FIRST_PART, STEPS):
        run_on_ranks(1, "grouped_run.py", "plain", 1, last, "-", folder / f"{last}.pt")
    return {last: torch.load(folder / f"{last}.pt") for last in (FIRST_PART, STEPS)}


def steps(world_size: int, stage: int, first: int, last: int, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What the engine comes to; it goes on from what the steps before have left in the folder."""
    run_on_ranks(world_size, "grouped_run.py", stage, first, last, folder / f"{first - 1}.pt", folder / f"{last}.pt")
    return torch.load(folder / f"{last}.pt")


Tensors = dict[str, dict[str, torch.Tensor]]


def assert_same(found: Tensors, expected: Tensors, tolerance: float = 0.0) -> None:
    for part, tensors in expected.items():
        assert found[part].keys() == tensors.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(found[part][name], tensor, rtol=0, atol=tolerance, msg=f"{part} of {name}")


def tolerance(*stages: int) -> float:
    """AdamW's kernel may round the ends of a tensor otherwise, and ZeRO 3 has a linear layer of its own.

    After one step all weights have moved by LEARNING_RATE times their factor, 2.5e-3 to 2e-2.
    """
    return 1e-4 if 3 in stages else 1e-6 if {1, 2} & set(stages) else 0.0


def exhaustive(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize(
    ("world_size", "stage"),
    [(1, 0), (2, 1), (4, 2), (4, 3), exhaustive(2, 0), exhaustive(1, 3)],
)
def test_every_stage_takes_the_steps_of_plain_adamw(world_size, stage, by_hand, tmp_path):
    found = steps(world_size, stage, 1, STEPS, tmp_path)
    assert_same(found, by_hand[STEPS], tolerance(stage))
    norms = [torch.linalg.vector_norm(w, dim=1) for n, w in found["model"].items() if "blocks" in n and w.ndim == 2]
    assert norms
    torch.testing.assert_close(torch.cat(norms), torch.ones(sum(map(len, norms))), rtol=0, atol=1e-6)


@pytest.mark.parametrize("how", [exhaustive("2offload"), "3offload", "3partitioned"])
def test_wherever_state_and_parameters_lie(how, by_hand, tmp_path):
    """Small parameters, which here all are, stay whole under ZeRO 3 unless DeepSpeed is told otherwise."""
    run_on_ranks(2, "grouped_run.py", how, 1, STEPS, "-", tmp_path / "found.pt")
    assert_same(torch.load(tmp_path / "found.pt"), by_hand[STEPS], tolerance(int(how[0])))


@pytest.mark.parametrize(
    ("before", "after"),
    [((4, 3), (1, 0)), exhaustive((2, 0), (1, 3)), exhaustive((4, 2), (2, 1))],
)
def test_other_stages_and_numbers_of_ranks_go_on(before, after, by_hand, tmp_path):
    (ranks_before, stage_before), (ranks_after, stage_after) = before, after
    assert_same(
        steps(ranks_before, stage_before, 1, FIRST_PART, tmp_path), by_hand[FIRST_PART], tolerance(stage_before)
    )
    found = steps(ranks_after, stage_after, FIRST_PART + 1, STEPS, tmp_path)
    assert_same(found, by_hand[STEPS], tolerance(stage_before, stage_after))


@pytest.mark.parametrize(("world_size", "stage"), [exhaustive(2, 1), (2, 3)])
def test_the_same_ranks_go_on_bit_for_bit(world_size, stage, tmp_path):
    straight = steps(world_size, stage, 1, STEPS, tmp_path)
    steps(world_size, stage, 1, FIRST_PART, tmp_path)
    assert_same(steps(world_size, stage, FIRST_PART + 1, STEPS, tmp_path), straight)


def test_one_group_is_what_adamw_makes_of_all_parameters(tmp_path):
    config = small_config(tmp_path)
    model = make_backbone(config.model)
    (group,) = zero.optimizer_groups(model, 0.03)
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
    assert (group["weight_decay"], group["learning_rate_factor"]) == (0.03, 1.0)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_loss_scale_of_fp16_grows_behind_a_step_whatever_the_groups(stage, tmp_path):
    """Were it to grow between two groups, the gradients of the second would be divided by the wrong scale."""
    config = small_config(tmp_path, zero_stage=stage, precision="fp16", images_per_step=4)
    torch.manual_seed(0)
    engine = zero.make_engine(grouped_uvit(config), config, join_processes(), 4)
    zero.restore_scaler(engine, {**(zero.scaler_state(engine) or {}), "scale": 4.0, "growth_interval": 2})
    zero.set_learning_rate(engine, 1e-4)
    scales = []
    for _ in range(5):
        engine.backward(engine(torch.randn(4, 1, 8, 8), torch.rand(4), torch.arange(4)).float().square().mean())
        assert zero.take_step(engine).applied
        scales.append(zero.loss_scale(engine))
    assert scales == [4.0, 8.0, 8.0, 16.0, 16.0]
    state = zero.scaler_state(engine)
    assert state is not None
    assert (state["growth_interval"], state["_growth_tracker"]) == (2, 1)
