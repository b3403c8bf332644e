"""Reads state dicts of other projects, safely."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def read_state_dict(source: str | Path | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a ``.pth``, ``.pt`` or ``.safetensors`` file or a state dict, names without a leading "module.".

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read safely, or something else than tensors by name.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"no such checkpoint: {path}")
        try:
            if path.suffix == ".safetensors":
                source = load_file(path)
            else:
                source = torch.load(path, map_location="cpu", weights_only=True)
        except (EOFError, OSError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
            # The first line only: torch goes on to explain how to load the file unsafely.
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "it is empty"
            raise ValueError(f"cannot read the checkpoint {path}: {reason}") from None
    if not isinstance(source, Mapping) or not all(isinstance(v, Tensor) for v in source.values()):
        raise ValueError("not a state dict: expected a mapping from names to tensors")
    return {name.removeprefix("module."): tensor for name, tensor in source.items()}


def check_keys(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], network: str) -> None:
    """
    Raises:
        ValueError: names or shapes that are not those of ``expected``.
    """
    missing, extra = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing or extra:
        parts = [f"lacks {', '.join(sorted(missing)[:3])}"] if missing else []
        parts += [f"has the unknown {', '.join(sorted(extra)[:3])}"] if extra else []
        raise ValueError(f"not a {network} checkpoint: it {' and '.join(parts)}")
    for name, tensor in expected.items():
        if tensor.shape != state[name].shape:
            raise ValueError(f"{name} has shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}")
