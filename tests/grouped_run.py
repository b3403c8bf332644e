"""Run on every rank: steps of a network with three groups of parameters, whose rows have norm 1 after each step.

Arguments: a ZeRO stage, with "offload" behind it if its state is offloaded or "partitioned" if it keeps no parameter
whole, or "plain" for AdamW of torch without DeepSpeed; the number of the first step and of the last; where what came of
the steps before is read from; where what comes of these is written to.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from grouped_uvit import GroupedUViT, grouped_uvit
from running import small_config
from torch import Tensor

from scalelong.train.hosts.processes import Processes, join_processes, leave_processes
from scalelong.train.objective import make_objective
from scalelong.train.objective_config import ObjectiveConfig
from scalelong.train.zero import engine as zero
from scalelong.train.zero import shards
from scalelong.train.zero.averages import FIXED_DECAY, Ema
from scalelong.train.zero.rows import apply_to_rows

BATCH, DECAY, LEARNING_RATE = 4, 0.9, 1e-2
OBJECTIVE = make_objective(ObjectiveConfig())


def loss_of(network, step: int) -> Tensor:
    """The same on every rank, so that their mean is what one process has."""
    generator = torch.Generator().manual_seed(step)
    images, noise = (torch.randn(BATCH, 1, 8, 8, generator=generator) for _ in range(2))
    return OBJECTIVE.loss(network, images, noise, torch.rand(BATCH, generator=generator), torch.arange(BATCH))


def plain_steps(model: GroupedUViT, last: int) -> dict[str, dict[str, Tensor]]:
    """By hand: what the engine must come to."""
    parameters = dict(model.named_parameters())
    groups = [
        {
            "params": [parameters[name] for name in group.names],
            "lr": LEARNING_RATE * group.learning_rate_factor,
            "weight_decay": WEIGHT_DECAY * group.weight_decay_factor,
            "eps": 1e-8 * group.epsilon_factor,
        }
        for group in model.parameter_groups()
    ]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, fused=True)
    averages = {name: p.detach().clone() for name, p in parameters.items()}
    for step in range(1, last + 1):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        with torch.no_grad():
            for name, function in model.after_step().items():
                parameters[name].copy_(function(parameters[name]))
            for name, average in averages.items():
                average.lerp_(parameters[name], 1 - DECAY)
    state = {f"{key}.{n}": optimizer.state[p][key] for n, p in parameters.items() for key in zero.OPTIMIZER_STATES}
    return {"model": {n: p.detach() for n, p in parameters.items()}, "optimizer": state, "ema": averages}


def engine_steps(model: GroupedUViT, processes: Processes, first: int, last: int, came_from: Path):
    engine = zero.make_engine(model, config, processes, BATCH)
    ema = Ema(engine, DECAY)
    if first > 1:
        before = torch.load(came_from)
        ema.restore(FIXED_DECAY, before["ema"])
        zero.restore_optimizer(engine, before["optimizer"], first - 1)
    for step in range(first, last + 1):
        zero.set_learning_rate(engine, LEARNING_RATE)
        engine.backward(loss_of(engine, step))
        taken = zero.take_step(engine)
        assert taken.applied
        assert taken.is_finite
        expect_rows_alone_to_change(engine)
        ema.update(step)
    assert zero.optimizer_step_count(engine) == last
    whole = {"model": shards.whole_weights(engine), "optimizer": zero.optimizer_state(engine)}
    whole["ema"] = shards.whole_tensors(engine, ema.averages[FIXED_DECAY])
    return {name: dict(clones(tensors)) for name, tensors in whole.items()}


def expect_rows_alone_to_change(engine) -> None:
    """Bit for bit: in the master weights, and in those that the network computes with."""
    expected = dict(clones(shards.whole_tensors(engine, shards.master_shards(engine))))
    assert engine.row_functions
    expected.update({name: function(expected[name]) for name, function in engine.row_functions.items()})
    apply_to_rows(engine)
    for name, weight in shards.whole_tensors(engine, shards.master_shards(engine)):
        assert torch.equal(weight, expected[name]), name
    for name, weight in engine.module.named_parameters():
        if weight.numel() == expected[name].numel():  # else it is gathered where it is used
            assert torch.equal(weight, expected[name]), name


def clones(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor.clone()) for name, tensor in tensors)


how, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
came_from, goes_to = Path(sys.argv[4]), Path(sys.argv[5])
config = small_config(Path("unused"), zero_stage=0 if how == "plain" else int(how[0]))
config = replace(config, offload="parameters" if how == "3offload" else "optimizer" if "offload" in how else "none")
if "partitioned" in how:
    rank_file = goes_to.with_name(f"deepspeed-{os.environ['RANK']}.json")
    rank_file.write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    config = replace(config, deepspeed_config=rank_file)
config = replace(config, images_per_step=BATCH, optimizer=replace(config.optimizer, weight_decay=0.1))
BETAS, WEIGHT_DECAY = (config.optimizer.beta1, config.optimizer.beta2), config.optimizer.weight_decay
torch.manual_seed(0)
model = grouped_uvit(config)
if first > 1:
    model.load_state_dict(torch.load(came_from)["model"])
if how == "plain":
    torch.save(plain_steps(model, last), goes_to)
else:
    processes = join_processes()
    config = replace(config, images_per_step=BATCH * processes.world_size)
    came_to = engine_steps(model, processes, first, last, came_from)
    if processes.is_main:
        torch.save(came_to, goes_to)
    leave_processes()
