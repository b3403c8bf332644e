"""Run on every rank: the allocator's peak over building a run's engine and taking three of its steps.

Arguments: the configuration as JSON (``config_to_dict``), and the micro-batch. Prints "peak <bytes>".
"""

import json
import sys

import torch

from scalelong.bench.timing import peak_bytes
from scalelong.model.architectures import make_backbone
from scalelong.train.config_json import config_from_dict
from scalelong.train.hosts.processes import join_processes, leave_processes
from scalelong.train.objective import make_objective
from scalelong.train.zero import engine as zero
from scalelong.train.zero.averages import Ema

config, micro_batch = config_from_dict(json.loads(sys.argv[1])), int(sys.argv[2])
processes = join_processes()
kept = []


def build_and_step() -> None:
    model = make_backbone(config.model, skip_scale=config.skip_scale, recompute=config.recompute)
    engine = zero.make_engine(model, config, processes, micro_batch)
    ema = Ema(engine, config.optimizer.ema_decay, config.optimizer.ema_stds)
    kept.extend((engine, ema))
    side, channels = config.model.img_size, config.model.in_channels
    for step in range(1, 4):
        zero.set_learning_rate(engine, 1e-4)
        for _ in range(config.accumulation_steps):
            images = torch.randn(micro_batch, channels, side, side)
            labels = torch.zeros(micro_batch, dtype=torch.long) if config.model.num_classes else None
            noise, times = torch.randn_like(images), torch.rand(micro_batch)
            loss = make_objective(config.objective).loss(engine, images, noise, times, labels)
            engine.backward(loss)
            zero.take_step(engine) if engine.is_gradient_accumulation_boundary() else engine.step()
        ema.update(step)


print("peak", peak_bytes(build_and_step, (), "cpu"), flush=True)
leave_processes()
