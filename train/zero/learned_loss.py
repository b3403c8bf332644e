"""What a loss learns beside the network, which hangs on the engine's module as ``LOSS_WEIGHTING``."""

from collections.abc import Iterator

from torch import Tensor, nn

from scalelong.train.zero import shards


def loss_weighting(engine) -> nn.Module | None:
    """What the loss learns; None of one that is fixed."""
    return getattr(engine.module, shards.LOSS_WEIGHTING, None)


def whole_loss_weighting(engine) -> Iterator[tuple[str, Tensor]]:
    """(name, whole parameter on the CPU) of what the loss learns. Every rank must iterate to the end."""
    learned, stage = loss_weighting(engine), engine.zero_optimization_stage()
    assert learned is not None
    for name, parameter in learned.named_parameters():
        yield name, shards.gather(parameter, shards.master_shard(parameter, stage).to(engine.device), stage).cpu()
