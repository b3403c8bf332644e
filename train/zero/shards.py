"""Whole tensors in and out of the ZeRO shards of an engine.

Weights are fp32 in every precision (bf16 and fp16 are autocast), so the module's parameters are the master weights:
replicated under ZeRO 0 to 2, sharded under ZeRO 3.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from scalelong.model.linear_wrappers import SINGULAR_VECTOR

LEARNED_BY_LOSS = ("loss_weighting", "contrast_heads")
"""What the loss learns beside the network hangs on it under these names: it is trained and cut with it, and is no part
of its weights, of their averages, or of what is exported."""


def network_parameters(engine) -> list[tuple[str, Any]]:
    """Those of the network by their names, in its order, without what the loss learns."""
    learned = tuple(f"{name}." for name in LEARNED_BY_LOSS)
    return [(name, p) for name, p in engine.module.named_parameters() if not name.startswith(learned)]


def master_shards(engine) -> list[Tensor]:
    """This rank's part of every weight, in the order of the parameters, where its optimizer updates it.

    All of it without ZeRO; under ZeRO 1 and 2 the flat fragment that lies in the rank's partition, for most parameters
    none or all of it; under ZeRO 3 the flat shard, padded.
    """
    stage = engine.zero_optimization_stage()
    return [master_shard(parameter, stage) for _, parameter in network_parameters(engine)]


def whole_weights(engine) -> Iterator[tuple[str, Tensor]]:
    """(name, whole weight on the CPU), then what layers keep beside them. Every rank must iterate to the end."""
    if engine.zero_optimization_stage() == 3:
        yield from whole_tensors(engine, master_shards(engine))
    else:
        for name, parameter in network_parameters(engine):
            yield name, parameter.detach().cpu()
    for name, layer in engine.sigma_layers:
        yield f"{name}.{SINGULAR_VECTOR}", layer.singular_vector.cpu()


def whole_tensors(engine, shards: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor on the CPU) from parts laid out as ``master_shards``. Every rank must iterate to the end."""
    return ((name, whole.cpu()) for name, whole in gathered(engine, shards))


def gathered(engine, shards: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The same on the engine's device; without ZeRO, where the parts lie there, the parts themselves."""
    stage = engine.zero_optimization_stage()
    for (name, parameter), shard in zip(network_parameters(engine), shards, strict=True):
        yield name, gather(parameter, shard.to(engine.device), stage)


def shards_of(engine, whole: dict[str, Tensor]) -> list[Tensor]:
    """The inverse of ``whole_tensors``: this rank's part of every tensor, on the device of its master weights."""
    stage = engine.zero_optimization_stage()
    parts = (cut(parameter, whole[name], stage) for name, parameter in network_parameters(engine))
    return [part.to(master.device, copy=True) for part, master in zip(parts, master_shards(engine), strict=True)]


def stage_of(parameter: Any, stage: int) -> int:
    """The stage that a parameter lies as in: ZeRO 1 and 2 leave frozen ones whole on every rank, as no ZeRO does."""
    return 0 if stage in (1, 2) and not parameter.requires_grad else stage


def master_shard(parameter: Any, stage: int) -> Tensor:
    stage = stage_of(parameter, stage)
    if stage == 0:
        return parameter.detach()
    if stage == 3:
        return parameter.ds_tensor.detach()
    fragment = parameter._hp_mapping
    return parameter.new_empty(0).detach() if fragment is None else fragment.hp_fragment.detach()


def gather(parameter: Any, shard: Tensor, stage: int) -> Tensor:
    """The whole of a parameter, or of a tensor laid out as it is, from this rank's part, which lies on its device."""
    stage = stage_of(parameter, stage)
    if stage == 0:
        return shard
    if stage == 3:
        parts = [torch.empty_like(shard) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, shard.contiguous())
        return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)
    # Fragments differ in size from rank to rank; each element is on one rank, so that the sum is exact.
    whole = shard.new_zeros(parameter.numel())
    if parameter._hp_mapping is not None:
        address = parameter._hp_mapping.lp_fragment_address
        whole[address.start :][: address.numel] = shard
    torch.distributed.all_reduce(whole)
    return whole.view(parameter.shape)


def cut(parameter: Any, whole: Tensor, stage: int) -> Tensor:
    """The inverse of ``gather``."""
    stage = stage_of(parameter, stage)
    if stage == 0:
        return whole
    if stage == 3:
        size = parameter.ds_tensor.numel()
        padded = whole.new_zeros(size * torch.distributed.get_world_size())
        padded[: whole.numel()] = whole.flatten()
        return padded[size * torch.distributed.get_rank() :][:size]
    if parameter._hp_mapping is None:
        return whole.new_empty(0)
    address = parameter._hp_mapping.lp_fragment_address
    return whole.flatten()[address.start :][: address.numel]
