"""What a loss learns beside the network, which hangs on the engine's module under the names ``LEARNED_BY_LOSS``."""

from collections.abc import Iterator

from torch import Tensor, nn

from scalelong.train.zero import shards

LOSS_WEIGHTING, CONTRAST_HEADS = shards.LEARNED_BY_LOSS


def loss_weighting(engine) -> nn.Module | None:
    """What the weighting of errors learns; None of one that is fixed."""
    return getattr(engine.module, LOSS_WEIGHTING, None)


def learned_by_loss(engine) -> dict[str, nn.Module]:
    """All that the loss learns, by its names; empty where all is fixed."""
    return {name: getattr(engine.module, name) for name in shards.LEARNED_BY_LOSS if hasattr(engine.module, name)}


def whole_parameters(engine, learned: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, whole parameter on the CPU) of what the loss learns. Every rank must iterate to the end."""
    stage = engine.zero_optimization_stage()
    for name, parameter in learned.named_parameters():
        yield name, shards.gather(parameter, shards.master_shard(parameter, stage).to(engine.device), stage).cpu()
