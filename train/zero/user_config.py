"""A user's own DeepSpeed JSON (``--deepspeed-config FILE``), merged into the configuration that the flags give.

The file may set what DeepSpeed alone knows. What a flag sets is refused there unless the two agree, so that a run's
``config.json`` stays true; so is what the trainer does itself, and what DeepSpeed does not know or no longer has.
"""

import difflib
import json
from pathlib import Path
from typing import Any

from scalelong.train.errors import UserError

Values = dict[str, Any]

PASSED_ON = {
    "comms_logger",
    "communication_data_type",
    "data_types",
    "disable_python_gc",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "steps_per_print",
    "torch_autocast",
    "wall_clock_breakdown",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
}
# Of sections whose keys DeepSpeed does not check itself.
KEYS_OF_SECTION = {
    "data_types": {"grad_accum_dtype"},
    "flops_profiler": {
        *("enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed", "output_file"),
    },
    "torch_autocast": {"enabled", "dtype", "lower_precision_safe_modules"},
}
DONE_HERE = {
    "bf16": "--precision",
    "fp16": "--precision",
    "optimizer": "--optimizer.*",
    "scheduler": "--optimizer.*",
    "checkpoint": "--images-per-checkpoint",
    "activation_checkpointing": "--recompute",
    "tensorboard": "the run folder's tensorboard/",
    "csv_monitor": "the run folder's log.jsonl",
}
SET_BY_FLAG = {
    "train_batch_size": "--images-per-step",
    "train_micro_batch_size_per_gpu": "--images-per-step and --accumulation-steps",
    "gradient_accumulation_steps": "--accumulation-steps",
    "gradient_clipping": "--optimizer.clip-grad-norm",
    "zero_optimization.stage": "--zero-stage",
    "torch_autocast.enabled": "--precision",
    "torch_autocast.dtype": "--precision",
}
SET_BY_OFFLOAD = ("zero_optimization.offload_optimizer.device", "zero_optimization.offload_param.device")
# They change what a shard holds, or where, in ways that checkpoints and averages here have not been tested with.
NOT_SUPPORTED = (
    "cpu_offload",
    "cpu_offload_param",
    "cpu_offload_use_pin_memory",
    "zenflow",
    "zero_hpz_partition_size",
    "zero_quantized_gradients",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_weights",
)


def merge_file(path: Path, ours: Values, *, batch: int, offloads: bool) -> Values:
    """Our configuration with the file's values put in.

    Args:
        ours: what the flags give.
        batch: images in a step, over all ranks.
        offloads: whether a flag asks for offloading, so that the file may not say otherwise.

    Raises:
        UserError: the file cannot be read, contradicts a flag, or holds what is unknown, removed or not supported.
    """
    theirs = _without_auto(_read(path))
    try:
        _check_flags(theirs, {**ours, "train_batch_size": batch}, offloads)
        _check_names(theirs)
        _check_offload(theirs.get("zero_optimization", {}))
        merged = _merged(ours, theirs)
        _check_by_deepspeed(merged)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return merged


def _read(path: Path) -> Values:
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object")
    return values


def _without_auto(values: Values) -> Values:
    """Less what is "auto", which other trainers fill in."""
    return {k: _without_auto(v) if isinstance(v, dict) else v for k, v in values.items() if v != "auto"}


def _check_flags(theirs: Values, ours: Values, offloads: bool) -> None:
    flags = {**SET_BY_FLAG, **(dict.fromkeys(SET_BY_OFFLOAD, "--offload") if offloads else {})}
    for key, flag in flags.items():
        there, here = _look_up(theirs, key), _look_up(ours, key)
        if there is not None and there != (False if key == "torch_autocast.enabled" and here is None else here):
            says = "nothing" if here is None else json.dumps(here)
            raise UserError(f"{key} is {json.dumps(there)}, but {flag} gives {says}; change the flag or remove the key")


def _check_names(theirs: Values) -> None:
    for key, value in theirs.items():
        if key in SET_BY_FLAG or key in PASSED_ON:
            for name in value if key in KEYS_OF_SECTION and isinstance(value, dict) else ():
                if name not in KEYS_OF_SECTION[key]:
                    raise UserError(f"unknown key {key}.{name}{_hint(name, KEYS_OF_SECTION[key])}")
        elif key in DONE_HERE:
            if not (isinstance(value, dict) and value.get("enabled") is False):
                raise UserError(f"{key} is not DeepSpeed's here: see {DONE_HERE[key]}")
        else:
            _check_by_deepspeed({"train_batch_size": 1 << 20, key: value}, only_removed=True)
            raise UserError(f"unknown key {key}{_hint(key, PASSED_ON | SET_BY_FLAG.keys())}")


def _check_offload(zero: Values) -> None:
    for key in NOT_SUPPORTED:
        if key in zero:
            raise UserError(f"zero_optimization.{key} is not supported")
    for section in ("offload_optimizer", "offload_param"):
        values = zero.get(section) or {}
        if isinstance(values, dict) and values.get("device") == "nvme":
            raise UserError(f"zero_optimization.{section}.device nvme is not supported: take cpu or none")
        for key in ("ratio", "super_offload"):
            if isinstance(values, dict) and key in values:
                raise UserError(f"zero_optimization.{section}.{key} is not supported")


def _merged(ours: Values, theirs: Values) -> Values:
    merged = dict(ours)
    for key, value in theirs.items():
        if key in DONE_HERE:
            continue
        both = isinstance(value, dict) and isinstance(ours.get(key), dict)
        merged[key] = _merged(ours[key], value) if both else value
    return merged


def _check_by_deepspeed(values: Values, *, only_removed: bool = False) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
    from pydantic import ValidationError

    try:
        DeepSpeedConfig(values)
    except DeepSpeedConfigError as error:
        raise UserError(str(error).split(". ")[0].rstrip(".")) from error
    except ValidationError as error:
        if not only_removed:
            raise UserError(_first_problem(error)) from error
    except (AssertionError, TypeError, ValueError) as error:
        if not only_removed:
            raise UserError(str(error).splitlines()[0]) from error


def _first_problem(error: Any) -> str:
    first = error.errors()[0]
    section = {"DeepSpeedZeroConfig": "zero_optimization", "CommsLoggerConfig": "comms_logger"}.get(error.title, "")
    key = ".".join(str(part) for part in (section, *first["loc"]) if part)
    return f"unknown key {key}" if first["type"] == "extra_forbidden" else f"{key}: {first['msg']}"


def _look_up(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _hint(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; perhaps you meant {close[0]}" if close else ""
