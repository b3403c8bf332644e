"""The learned gates of a patched network: of which dtype they are made, and how they are read from a file.

They are the child ``skip_gates`` of the network, and part of its state dict.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from scalelong.model.checkpoint_file import FLOAT_DTYPES, plain_name
from scalelong.model.skip_scale import SkipScale

GATES = "skip_gates"
"""What the learned gates are called in the module that holds them, and so in its state dict."""


def made_like(network: nn.Module, gates: nn.Module) -> nn.Module:
    """On the device of the network's parameters, in the dtype that it computes in."""
    parameters = [p for p in network.parameters() if p.is_floating_point()]
    device = parameters[0].device if parameters else torch.device("cpu")
    # A network of diffusers knows in what it computes, also where layers are stored in 8 bits and cast when called.
    dtypes = [getattr(network, "dtype", None), *(p.dtype for p in parameters), torch.float32]
    dtype = next(dtype for dtype in dtypes if dtype in FLOAT_DTYPES)
    gates.register_load_state_dict_pre_hook(_say_that_gates_are_missing)
    return gates.to(device, dtype).train(network.training)


def _say_that_gates_are_missing(
    gates: nn.Module,
    state: dict[str, Tensor],
    prefix: str,
    metadata: Any,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    if strict and not any(name.startswith(prefix) for name in state):
        errors.append(
            "the state dict has no learned gates for the skips: it is of a network that was loaded or made plain. "
            "Where that was UNet2DModel.from_pretrained(...), use scalelong.PatchedUNet.from_pretrained(...)"
        )


def shapes(gates: nn.Module | dict[str, Tensor]) -> dict[str, torch.Size]:
    state = gates.state_dict() if isinstance(gates, nn.Module) else gates
    return {name: x.shape for name, x in state.items()}


def load(gates: nn.Module, path: Path, network: str, policy: SkipScale) -> None:
    """Reads the gates of the network of that name in a safetensors file, or in those of a folder.

    Raises:
        ValueError: no such file, none of its tensors are gates, or they do not fit.
    """
    saved: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        if not file.is_file():
            raise ValueError(f"no gates to be read: there is no file {file}")
        saved.update({plain_name(name): x for name, x in load_file(file).items()})
    prefixes = [f"{network}.{GATES}.", f"{GATES}."] if network else [f"{GATES}."]
    for prefix in prefixes:
        state = {name.removeprefix(prefix): x for name, x in saved.items() if name.startswith(prefix)}
        if state:
            break
    else:
        raise ValueError(f"no gates to be read: nothing in {path} is called {GATES}")
    if shapes(state) != shapes(gates):
        raise ValueError(f"the gates in {path} are not those of {policy} for this module")
    gates.load_state_dict(state)


def remove(holder: nn.Module | None) -> None:
    if holder is not None and GATES in holder._modules:
        delattr(holder, GATES)
