"""torch.compile in the trainer: of the whole network, or of its blocks one by one (``--compile``).

A module's forward is compiled in its place, so that its parameters keep their names and hooks around it go on as they
were. Sizes and factors are constants in the graphs: what a graph computes depends on nothing that was computed before
it, and a run that resumes compiles what it had.
"""

import os
import shutil
from typing import Any

import torch
from torch import nn

from scalelong.model.backbone import Backbone
from scalelong.train.config import TrainConfig
from scalelong.train.errors import UserError

BACKEND = "inductor"


def compile_network(model: Backbone, config: TrainConfig) -> None:
    """Compiles, while the network trains, what ``config.compile`` names; elsewhere it runs as it is.

    Validation, grids and what is watched of blocks run uncompiled, at whatever batch they come.
    """
    if config.compile == "none":
        return
    # What another start in this process has compiled, and has learned of sizes, is none of this one's.
    torch._dynamo.reset()
    parts = [model] if config.compile == "model" else [block for _, block in model.named_blocks()]
    # Blocks of one class share a cache, which holds eight graphs by default; a UNet's differ in their channels and
    # sides, and skips of constant factors in those.
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 4 * len(parts))
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 4 * len(parts))
    for part in parts:
        part.forward = CompiledForward(part)


class CompiledForward:
    """Stands for a module's forward: compiled where gradients are wanted in training, as it was elsewhere."""

    def __init__(self, module: nn.Module):
        self._module, self._eager = module, module.forward
        self._compiled = torch.compile(module.forward, dynamic=False, backend=BACKEND)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        compiles = self._module.training and torch.is_grad_enabled()
        return (self._compiled if compiles else self._eager)(*arguments, **named)


def check_compile(config: TrainConfig, device: torch.device) -> None:
    """Refuses what cannot be compiled, before anything is written.

    Raises:
        UserError: ZeRO 3, a share of ``recompute`` in blocks that are compiled, or no C++ compiler for a CPU.
    """
    if config.compile == "none":
        return
    flag = f"--compile {config.compile}"
    if config.zero_stage == 3:
        raise UserError(f"{flag} cannot trace layers whose parameters ZeRO 3 gathers as it goes: take --zero-stage 2")
    if config.compile == "blocks" and config.recompute not in ("none", "blocks"):
        raise UserError(
            f"{flag} hides from --recompute {config.recompute} the products that it would keep: take --recompute "
            f"blocks, or --compile model"
        )
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(f"{flag} needs a C++ compiler on a CPU, and there is no {compiler}: install g++, or set CXX")
