"""What the instruments of a run cost: a training step with them, as on logging steps, against one without.

Shapes are RECIPE B=batch. Both steps compute the gradient's norm, as every logged step does; "watched" has the norms of
blocks and skips too, the weights' norms and cosines with their gradients, and what a row of the log takes. The note
says what share that is of all steps at the default interval (``--images-per-log``).
"""

import json
from dataclasses import replace

import pytest
import torch

from scalelong.bench.compare import DEVICE
from scalelong.bench.timing import IS_DRY_RUN
from scalelong.bench.training_step import Trainer, noisy_batch, step_rows
from scalelong.model.architectures import make_backbone
from scalelong.train.config import TrainConfig
from scalelong.train.monitor import Monitor
from scalelong.train.recipes import RECIPES

DEFAULT_IMAGES_PER_LOG = TrainConfig.__dataclass_fields__["images_per_log"].default
CASES = {"digits-uvit": {"depth": 24, "width": 64}, "digits-unet": {}, "cifar10-uvit-s2": {}}


@pytest.mark.parametrize("recipe", CASES)
def test_monitor(benchmark, report, note, recipe):
    config = RECIPES[recipe]
    shape = CASES[recipe] if not (IS_DRY_RUN and "uvit" in recipe) else {"depth": 2, "width": 32}
    model = make_backbone(replace(config.model, **shape), skip_scale=config.skip_scale).to(DEVICE)
    batch = 2 if IS_DRY_RUN else 4 if recipe.startswith("cifar10") else config.images_per_step
    trainer, monitor = Trainer(model, noisy_batch(model.config, batch), torch.float32), Monitor(model)

    def step(watches: bool) -> None:
        monitor.active = watches
        trainer.find_gradients(model)
        norms = torch.stack(torch._foreach_norm([p.grad for p in model.parameters() if p.grad is not None]))
        row = {"grad_norm": float(torch.linalg.vector_norm(norms))}
        if watches:
            pairs = [(p.detach().flatten(), p.grad.flatten()) for p in model.parameters() if p.grad is not None]
            weight_norms = torch.stack(torch._foreach_norm([weight for weight, _ in pairs]))
            monitor.record_gradients(norms, weight_norms, torch.stack([torch.dot(*pair) for pair in pairs]))
            row |= monitor.take()
        json.dumps(row)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    steps = {"plain": lambda: step(False), "watched": lambda: step(True)}
    rows, timings = step_rows(benchmark, "monitor", f"{recipe} B={batch}", torch.float32, "", steps)
    report(rows)
    more = timings["watched"].ms_median / timings["plain"].ms_median - 1
    interval = max(1, DEFAULT_IMAGES_PER_LOG // batch)
    share = 100 * more / interval
    note(f"{recipe}: {100 * more:.2g} % of a logged step, {share:.2g} % of all, of which one in {interval} is logged")
