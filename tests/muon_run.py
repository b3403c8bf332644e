"""Run on every rank: two steps of Muon on a small U-ViT, of which rank 0 writes the weights before and after each.

Arguments: a ZeRO stage, and the file that they go to, with what the optimizer remembers at the end.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from running import small_config

from scalelong.model.architectures import make_backbone
from scalelong.train.hosts.processes import join_processes, leave_processes
from scalelong.train.zero import engine as zero
from scalelong.train.zero import shards

BATCH, LEARNING_RATE = 32, 1e-2


def weights_of(engine) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in shards.whole_weights(engine)}


stage, goes_to = int(sys.argv[1]), Path(sys.argv[2])
processes = join_processes()
config = small_config(Path("unused"), zero_stage=stage, images_per_step=BATCH * processes.world_size, skip_scale="none")
config = replace(config, optimizer=replace(config.optimizer, kind="muon", weight_decay=0.0))
torch.manual_seed(0)
engine = zero.make_engine(make_backbone(config.model), config, processes, BATCH)
zero.set_learning_rate(engine, LEARNING_RATE)
weights = [weights_of(engine)]
for step in range(2):
    # The same on every rank, so that their mean is what one process has.
    generator = torch.Generator().manual_seed(step)
    images, noise = (torch.randn(BATCH, 1, 8, 8, generator=generator) for _ in range(2))
    times = torch.linspace(1, 999, BATCH)
    engine.backward((engine(images, times, torch.arange(BATCH) % 10) - noise).square().mean())
    assert zero.take_step(engine).applied
    weights.append(weights_of(engine))
state = {name: tensor.clone() for name, tensor in zero.optimizer_state(engine)}
if processes.is_main:
    torch.save({"weights": weights, "optimizer": state}, goes_to)
leave_processes()
