"""``scalelong plan RECIPE --nodes 2 --gpus-per-node 8 --gpu-memory 80``: what a run will take.

For each ZeRO stage: the memory of one GPU, what it sends in a step, and the largest micro-batch that fits; then the
flags to take. Nothing is allocated: the step is carried out on tensors without data.

DeepSpeed has estimators of its own, but for weights in 16 bits and 18 bytes of state a parameter; here weights are fp32
and averages are sharded with the optimizer, so the sums are done here, for DeepSpeed 0.19.8 as ``engine`` sets it up.
"""

import re
import sys
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scalelong.model.architectures import make_backbone
from scalelong.model.backbone import Backbone
from scalelong.model.parameter_kinds import ParameterKind, kind_of
from scalelong.train.command_line import RecipeArguments, choose_recipe, parse_recipe
from scalelong.train.config import TrainConfig
from scalelong.train.data.middle import draw_middle
from scalelong.train.errors import UserError
from scalelong.train.objective import make_objective
from scalelong.train.recipes import RECIPES
from scalelong.train.resources import describe_middle
from scalelong.train.zero.engine_config import AUTOCAST, BUCKET_SIZE, HALVED_LAYERS

GB = 10**9
STAGES = (0, 1, 2, 3)
# Left for the CUDA context, libraries' workspaces and what the allocator cannot fill.
USABLE_SHARE = 0.9
# ZeRO 3 lets go of gathered weights beyond 10^9 elements only.
GATHERED_BYTES = 4 * GB
# Of the gradients in waiting and of their copy that is scattered: 1.19 in fp32 on two ranks, 1.27 on one.
ZERO3_COPIES = 1.2


@dataclass(frozen=True, kw_only=True)
class PlanArguments(RecipeArguments):
    """Memory of a GPU, bytes on the wire, and the ZeRO stage and micro-batch to take for a recipe."""

    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 8
    """GPUs of each."""
    gpu_memory: float = 80.0
    """Of each GPU, in GB of 10^9 bytes."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """Bytes of a network's parameters in fp32, of its gradients as they are sent, and of the buckets they wait in."""

    weights: int
    sent: int
    bucket_bytes: int

    @property
    def num_params(self) -> int:
        return self.weights // 4


@dataclass(frozen=True, kw_only=True)
class Need:
    """What one GPU takes under a ZeRO stage, in bytes."""

    stage: int
    micro_batch: int
    accumulation_steps: int
    weights: int
    optimizer: int
    averages: int
    step: int
    """Activations, gradients and buffers, at the step's worst moment."""
    sent: int

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.averages + self.step


def main(argv: list[str] | None = None) -> None:
    """The command ``scalelong plan``."""
    name, flags = choose_recipe(sys.argv[1:] if argv is None else argv, program="scalelong plan")
    default = PlanArguments(train=RECIPES[name])
    arguments = parse_recipe(PlanArguments, flags, prog=f"scalelong plan {name}", default=default)
    check_arguments(arguments)
    num_gpus = arguments.nodes * arguments.gpus_per_node
    budget = USABLE_SHARE * arguments.gpu_memory * GB
    needs = [largest_need(arguments.train, stage, num_gpus, budget) for stage in STAGES]
    print(describe(name, arguments, needs))
    if arguments.train.model.sparse_ratio is not None:
        with FakeTensorMode():
            print(f"\n{describe_middle(_make_model(arguments.train))}")
    if arguments.train.model.parametrization == "mup":
        print(describe_mup(arguments.train))
    fitting = [need for need in needs if need.total <= budget]
    if not fitting:
        raise UserError("no stage fits, at one image at a time: take --recompute blocks, or more or larger GPUs")
    best = min(fitting, key=lambda need: (need.accumulation_steps, need.stage))
    print(f"\ntake --zero-stage {best.stage} --accumulation-steps {best.accumulation_steps}")


def check_arguments(arguments: PlanArguments) -> None:
    """Raises:
    UserError: no GPU, no memory, or a global batch that the GPUs cannot share evenly.
    """
    if arguments.nodes < 1 or arguments.gpus_per_node < 1 or arguments.gpu_memory <= 0:
        raise UserError("--nodes and --gpus-per-node must be at least 1, and --gpu-memory positive")
    num_gpus, batch = arguments.nodes * arguments.gpus_per_node, arguments.train.images_per_step
    if batch % num_gpus:
        raise UserError(f"--images-per-step {batch} does not divide by {num_gpus} GPUs")
    if arguments.train.offload != "none" or arguments.train.deepspeed_config is not None:
        raise UserError("plans are made without --offload and --deepspeed-config")
    if arguments.train.optimizer.kind != "adamw":
        raise UserError("plans are made with --optimizer.kind adamw; muon keeps half as much of hidden matrices")


def largest_need(config: TrainConfig, stage: int, num_gpus: int, budget: float) -> Need:
    """With the largest micro-batch that fits the budget, or of 1 where none does."""
    images = config.images_per_step // num_gpus
    sizes = [size for size in range(images, 0, -1) if images % size == 0]
    for size in sizes:
        need = find_need(config, stage, num_gpus, size)
        if need.total <= budget:
            break
    return need


def find_need(config: TrainConfig, stage: int, num_gpus: int, micro_batch: int) -> Need:
    """What one of ``num_gpus`` takes with this micro-batch, which must divide its share of the global batch."""
    network = measure_network(config)
    accumulation_steps = config.images_per_step // num_gpus // micro_batch
    shards = num_gpus if stage > 0 else 1
    num_averages = 1 + len(config.optimizer.ema_stds)
    weights = network.weights
    # ZeRO 1 and 2 step a copy of the rank's partition; the partition of ZeRO 3 is the only one.
    kept_weights = {0: weights, 1: weights + weights // shards, 2: weights + weights // shards, 3: weights // shards}
    return Need(
        stage=stage,
        micro_batch=micro_batch,
        accumulation_steps=accumulation_steps,
        weights=kept_weights[stage],
        optimizer=2 * weights // shards,
        averages=num_averages * weights // shards,
        step=step_bytes(config, network, stage, num_gpus, micro_batch, accumulation_steps),
        sent=sent_bytes(network, stage, num_gpus, accumulation_steps),
    )


def step_bytes(
    config: TrainConfig, network: Network, stage: int, num_gpus: int, micro_batch: int, accumulation_steps: int
) -> int:
    """Activations, gradients and buffers at the worst moment of a step, which is in backward or behind it."""
    gradients, bucket = network.weights, network.bucket_bytes
    # Gradients in fp32, and as they are sent; under autocast there is a bucket of each width, and neither is full.
    waiting, sending = min(gradients, 4 * BUCKET_SIZE), min(network.sent, bucket)
    shard, accumulates = gradients // num_gpus, accumulation_steps > 1
    if stage == 0:
        kept = gradients if accumulates else 0
        # The gradients are reduced in flat copies of at most 500 M elements.
        return max(simulate(config, micro_batch, keeps_gradients=True) + kept, gradients + min(gradients, 2 * GB))
    if stage == 1:
        kept = gradients if accumulates else 0
        backward = simulate(config, micro_batch, keeps_gradients=not accumulates) + kept + bucket
        return max(backward, bucket + gradients)
    handed_on = simulate(config, micro_batch, keeps_gradients=False)
    if stage == 2:
        # What is in the bucket is reduced in a flat copy of it. Gradients of its width have moved there; others wait.
        reduced = sending if config.precision == "fp32" else waiting + sending
        return bucket + max(handed_on, reduced, shard) + (shard if accumulates else 0)
    gathered, copies = min(gradients, GATHERED_BYTES), round(ZERO3_COPIES * (waiting + sending))
    return bucket + shard + gathered + max(handed_on, copies)


@cache
def measure_network(config: TrainConfig) -> Network:
    """Of the network's parameters; under autocast, ZeRO sends those of linear and convolution layers in 16 bits."""
    with FakeTensorMode():
        model = _make_model(config)
    sizes_by_width = {4: 0, 2: 0}
    for module in model.modules():
        width = 2 if config.precision in AUTOCAST and type(module) in HALVED_LAYERS else 4
        sizes_by_width[width] += sum(parameter.numel() for parameter in module.parameters(recurse=False))
    num_params = sum(sizes_by_width.values())
    bucket_size = min(BUCKET_SIZE, num_params)
    return Network(
        weights=4 * num_params,
        sent=sum(width * size for width, size in sizes_by_width.items()),
        bucket_bytes=sum(width * bucket_size for width, size in sizes_by_width.items() if size),
    )


@cache
def simulate(config: TrainConfig, micro_batch: int, *, keeps_gradients: bool) -> int:
    """The most bytes that forward and backward hold beyond the weights.

    Args:
        keeps_gradients: those of the weights pile up until the end; else each is handed on as soon as it is there.
    """
    side, channels = config.model.img_size, config.model.in_channels
    autocast = torch.autocast("cpu", AUTOCAST[config.precision]) if config.precision in AUTOCAST else nullcontext()
    with FakeTensorMode():
        model = _make_model(config)
        if not keeps_gradients:
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        images, noise = (torch.empty(micro_batch, channels, side, side) for _ in range(2))
        condition = torch.zeros(micro_batch, dtype=torch.long) if config.model.num_classes else None
        if config.context_shape is not None:
            condition = torch.empty(micro_batch, *config.context_shape)
        middle = draw_middle(config.model, 0, range(micro_batch), drops=config.drops_tokens_at(0))
        network = model if middle is None else partial(model, middle=middle)
        with _LiveBytes() as live, autocast:
            objective = make_objective(config.objective)
            objective.loss(network, images, noise, torch.rand(micro_batch), condition).backward()
    return live.peak


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _make_model(config: TrainConfig) -> Backbone:
    # It draws until all values lie within bounds, and there are no values.
    with patch("torch.nn.init.trunc_normal_"):
        return make_backbone(config.model, skip_scale=config.skip_scale, recompute=config.recompute)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of what operators make, until it is freed."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.counted: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, Tensor) and id(value.untyped_storage()) not in before | self.counted.keys():
                self._count(value.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        self.counted[id(storage)] = weakref.finalize(storage, self._free, id(storage), storage.nbytes())

    def _free(self, identity: int, nbytes: int) -> None:
        self.live -= nbytes
        del self.counted[identity]


def sent_bytes(network: Network, stage: int, num_gpus: int, accumulation_steps: int) -> int:
    """By one GPU in one step, where every collective goes around a ring."""
    once = (num_gpus - 1) / num_gpus  # a gather or a scatter; a reduction that all see is both
    sent = {
        0: 2 * network.weights,
        1: 2 * network.sent + network.weights,
        2: 2 * network.sent * accumulation_steps + network.weights,
        3: 3 * network.sent * accumulation_steps,
    }
    return round(once * sent[stage])


def describe(name: str, arguments: PlanArguments, needs: list[Need]) -> str:
    """The table, one line for each ZeRO stage."""
    config, num_gpus = arguments.train, arguments.nodes * arguments.gpus_per_node
    heads = ("ZeRO", "micro-batch", "weights", "AdamW", "averages", "step", "total GB", "sent GB", "fits")
    budget = USABLE_SHARE * arguments.gpu_memory * GB
    rows: list[tuple[str, ...]] = [heads]
    for need in needs:
        sizes = (need.weights, need.optimizer, need.averages, need.step, need.total, need.sent)
        fits = "yes" if need.total <= budget else "no"
        rows.append((str(need.stage), str(need.micro_batch), *(f"{size / GB:.3g}" for size in sizes), fits))
    lines = aligned(rows)
    return "\n".join(
        [
            f"{name}: {measure_network(config).num_params:,} parameters, {config.precision}, "
            f"recompute {config.recompute}; {config.images_per_step:,} images a step on {num_gpus} GPUs "
            f"({arguments.nodes} x {arguments.gpus_per_node}) of {arguments.gpu_memory:g} GB, "
            f"{config.images_per_step // num_gpus:,} a GPU",
            "",
            *lines,
            "",
            "GB of 10^9 bytes for one GPU. step: activations, gradients and buffers at the worst moment. "
            f"sent: in a step, around a ring. fits: in {100 * USABLE_SHARE:.0f} % of the memory.",
        ]
    )


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """The lines of a table whose columns end flush."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]


def describe_mup(config: TrainConfig) -> str:
    """The factors of muP, a line for each group of parameters that have the same."""
    with FakeTensorMode():
        network = _make_model(config)
    kinds = network.parameter_kinds()
    groups: dict[tuple[float, ...], list[str]] = {}
    for name, _ in network.named_parameters():
        groups.setdefault(_factors(kind_of(name, kinds)), []).append(name)
    rate, decay = config.optimizer.learning_rate, config.optimizer.weight_decay
    rows: list[tuple[str, ...]] = [("learning rate", "weight decay", "output", "epsilon", "parameters")]
    rows += [
        (f"{rate * factors[0]:.3g}", *(f"{x:.3g}" for x in (decay * factors[1], *factors[2:])), f"{len(names)}")
        for factors, names in groups.items()
    ]
    named = ["", *(", ".join(dict.fromkeys(map(_without_numbers, names))) for names in groups.values())]
    model: Any = config.model
    return "\n".join(
        [
            "",
            f"muP: base learning rate {rate:g} at width {model.base_width}; width {model.width}, "
            f"m = {model.width / model.base_width:g}. output and epsilon are factors.",
            "",
            *(f"{line}  {names}".rstrip() for line, names in zip(aligned(rows), named, strict=True)),
        ]
    )


def _factors(kind: ParameterKind) -> tuple[float, ...]:
    return kind.learning_rate, kind.weight_decay, kind.output, kind.epsilon


def _without_numbers(name: str) -> str:
    """ "attn.qkv.weight" of "in_blocks.3.attn.qkv.weight"."""
    return re.sub(r"^(in_blocks\.\d+|mid_block|out_blocks\.\d+|blocks\.\d+)\.", "", name)
