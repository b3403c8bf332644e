"""Recomputing activations of blocks: what backward finds, and what it computes again."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from scalelong.model.backbone_config import BlockMemory, Recompute

aten = torch.ops.aten
_PRODUCTS = {aten.mm.default: 1, aten.addmm.default: 2}  # which argument is the transposed weight
_ATTENTION = {
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}


def run_block(
    block: Callable[..., Tensor],
    *arguments: Any,
    recompute: Recompute,
    memory: BlockMemory | None = None,
    is_random: bool = False,
) -> Tensor:
    """``block(*arguments)``, keeping for backward what ``recompute`` allows.

    Args:
        recompute: "none" keeps all that backward reads, "blocks" the block's inputs, a share at most that part of
            what "none" keeps: torch's selective checkpointing then saves the products that fit, those that cost most
            for their size first.
        memory: what backward reads of the block, for a share.
        is_random: the block drops activations out.
    """
    if recompute == "none" or not torch.is_grad_enabled():
        return block(*arguments)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": is_random}
    if recompute != "blocks":
        assert memory is not None, "a share of what is not known"
        kept = kept_parts(float(recompute), memory)
        if F.linear is not torch._C._nn.linear:  # type: ignore[attr-defined]
            # DeepSpeed's, under ZeRO 3: it adds the bias in place, to a product that would have been kept.
            kept &= {"attention"}
        policy = partial(_policy, kept)
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(block, *arguments, **options)


def kept_parts(share: float, memory: BlockMemory) -> frozenset[float | str]:
    """Which outputs are kept within ``share`` of what backward reads: "attention", and products by outputs an input.

    The block's input is kept always.
    """
    sizes: dict[float | str, float] = {"attention": memory.attention}
    for ratio in memory.products:
        sizes[ratio] = sizes.get(ratio, 0.0) + ratio
    room = share * memory.total - 1
    kept = set()
    for part, size in sizes.items():
        if size <= room:
            kept.add(part)
            room -= size
    return frozenset(kept)


def _policy(kept: frozenset[float | str], _: Any, op: Any, *arguments: Any, **__: Any) -> CheckpointPolicy:
    is_kept = op in _ATTENTION and "attention" in kept
    if op in _PRODUCTS:
        num_inputs, num_outputs = arguments[_PRODUCTS[op]].shape
        is_kept = num_outputs / num_inputs in kept
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
