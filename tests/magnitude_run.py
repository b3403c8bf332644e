"""Run on every rank: steps of a magnitude-preserving network under every stage of ZeRO, from the same weights.

Argument: a recipe. Prints one line of JSON: by stage the largest distance of a row's RMS from 1 after any step, and a
digest of the weights on this rank.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from scalelong.model.architectures import make_backbone
from scalelong.train.hosts.processes import join_processes, leave_processes
from scalelong.train.objective import make_objective
from scalelong.train.recipes import RECIPES
from scalelong.train.zero import engine as zero
from scalelong.train.zero import shards
from scalelong.train.zero.rows import apply_to_rows

STEPS, BATCH = 3, 4


def small(name: str):
    if name == "edm2":
        from scalelong.model.edm2_unet import EDM2UNetConfig

        return EDM2UNetConfig(
            img_size=8, in_channels=1, model_channels=16, channel_mult=(1, 2), num_res_blocks=1,
            attention_resolutions=(2,), num_head_channels=16, num_classes=11,
        )  # fmt: skip
    return replace(RECIPES[name].model, width=32, depth=2)


def weights_of(engine) -> dict[str, torch.Tensor]:
    return {name: whole.clone() for name, whole in shards.whole_weights(engine)}


def row_errors(engine) -> Iterator[float]:
    for name, weight in weights_of(engine).items():
        if name in engine.row_functions:
            rms_R = weight.flatten(0, -2 if name == "pos_embed" else 0).flatten(1).square().mean(1).sqrt()
            yield float((rms_R - 1).abs().max())


def steps(stage: int) -> tuple[float, str]:
    run = replace(base, zero_stage=stage)
    torch.manual_seed(0)
    network = make_backbone(run.model)
    engine, worst = zero.make_engine(network, run, processes, BATCH), 0.0
    for step in range(STEPS):
        zero.set_learning_rate(engine, 1e-1)
        generator = torch.Generator().manual_seed(2 * step + processes.rank)
        images, noise = (torch.randn(BATCH, 1, 8, 8, generator=generator) for _ in range(2))
        u_B, labels_B = torch.rand(BATCH, generator=generator), torch.arange(BATCH)
        engine.backward(objective.loss(engine, images, noise, u_B, labels_B))
        assert zero.take_step(engine).applied
        before = max(row_errors(engine))
        assert step == 0 or before > 1e-3, "nothing has to be normalised"  # the first moves the last gain alone
        apply_to_rows(engine)
        worst = max(worst, *row_errors(engine))
    digest = hashlib.sha256(b"".join(x.numpy().tobytes() for x in weights_of(engine).values())).hexdigest()
    zero.destroy(engine)
    return worst, digest


processes = join_processes()
base = RECIPES["digits-mpdit" if sys.argv[1] == "edm2" else sys.argv[1]]
base = replace(base, run=Path("unused"), model=small(sys.argv[1]), images_per_step=BATCH * processes.world_size)
objective = make_objective(replace(base.objective, weighting="uniform"))
print(json.dumps({stage: steps(stage) for stage in range(4)}))
leave_processes()
