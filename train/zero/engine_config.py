"""What DeepSpeed is told: every value that matters, of a run's flags and of the user's own file."""

from typing import Any

import torch
from torch import nn

from scalelong.model.linear_layers import GeluLinear, SkipLinear, TokenConv1d
from scalelong.train.config import OffloadName, TrainConfig
from scalelong.train.errors import UserError
from scalelong.train.zero.user_config import merge_file

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What networks compute in, by --precision; in fp32 as their weights are."""
# Elements that are reduced or gathered at a time.
BUCKET_SIZE = 200_000_000
# Layers whose parameters are sent in 16 bits under autocast: DeepSpeed's own list, which goes by the exact class, and
# what stands in their place in our networks.
HALVED_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, SkipLinear, GeluLinear, TokenConv1d)


def deepspeed_config(config: TrainConfig, micro_batch: int, num_params: int) -> dict[str, Any]:
    """Every DeepSpeed value that matters, written out: its defaults change between releases.

    What the user's own file adds is merged in.

    Raises:
        UserError: the file does not fit, or offloading does not fit the ZeRO stage.
    """
    # DeepSpeed takes memory for a whole bucket, however small the network, and wants an even number of elements.
    bucket_size = min(BUCKET_SIZE, num_params + num_params % 2)
    values: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": config.accumulation_steps,
        "gradient_clipping": config.optimizer.clip_grad_norm,
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": bucket_size,
            "allgather_bucket_size": bucket_size,
            **_offload_sections(config.offload),
        },
        # AdamW of torch has a fused kernel on CPUs too, where DeepSpeed's own is compiled on first use.
        "zero_force_ds_cpu_optimizer": False,
        # DeepSpeed goes by the exact class, and Muon here derives from AdamW.
        "zero_allow_untested_optimizer": config.optimizer.kind == "muon",
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
    if config.precision != "fp32":
        dtype = str(AUTOCAST[config.precision]).removeprefix("torch.")
        halved = [f"{layer.__module__}.{layer.__qualname__}" for layer in HALVED_LAYERS]
        values["torch_autocast"] = {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": halved}
    if config.deepspeed_config is not None:
        offloads = config.offload != "none"
        values = merge_file(config.deepspeed_config, values, batch=config.images_per_step, offloads=offloads)
    _check_offload(values["zero_optimization"])
    return values


def _offload_sections(offload: OffloadName) -> dict[str, Any]:
    where = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    sections = {"none": (), "optimizer": ("offload_optimizer",), "parameters": ("offload_optimizer", "offload_param")}
    return {section: dict(where) for section in sections[offload]}


def _check_offload(zero: dict[str, Any]) -> None:
    def is_off(section: str) -> bool:
        return (zero.get(section) or {}).get("device", "none") == "none"

    if not is_off("offload_optimizer") and zero["stage"] == 0:
        raise UserError("optimizer state can be offloaded with --zero-stage 1, 2 or 3, not 0")
    if not is_off("offload_param") and zero["stage"] != 3:
        raise UserError(f"parameters can be offloaded with --zero-stage 3, not {zero['stage']}")


def check_engine_config(config: TrainConfig, micro_batch: int) -> None:
    """Refuses what DeepSpeed cannot do, or would accept and compute wrongly.

    Raises:
        UserError: a DeepSpeed file or offloading that does not fit; fp16 with clipping under ZeRO (0.19.8 clips the
            gradients before the loss scale is taken out) or with offloading (not tested); clipping that follows the
            gradients, or Muon, with offloading.
    """
    zero = deepspeed_config(config, micro_batch, num_params=1)["zero_optimization"]
    offloads = any((zero.get(f"offload_{what}") or {}).get("device") == "cpu" for what in ("optimizer", "param"))
    if offloads and config.optimizer.kind == "muon":
        raise UserError("--optimizer.kind muon cannot offload: its steps are made of whole matrices on the device")
    if config.precision == "fp16" and (zero.get("offload_optimizer") or {}).get("device") == "cpu":
        raise UserError("--precision fp16 cannot offload: take bf16")
    if config.optimizer.clip_z_score and config.offload != "none":
        raise UserError("--optimizer.clip-z-score cannot clip what is offloaded: take --offload none")
    if config.precision == "fp16" and config.zero_stage > 0 and config.optimizer.clip_grad_norm > 0:
        raise UserError("--precision fp16 cannot clip gradients under ZeRO: take bf16, or --zero-stage 0")
