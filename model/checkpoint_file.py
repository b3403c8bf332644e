"""Reads state dicts of other projects, safely, and writes weights."""

import argparse
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# What torch.compile, FSDP and activation checkpointing put into names, wherever a module was wrapped.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def read_state_dict(
    source: str | Path | Mapping[str, Tensor], *, parts: Sequence[str] = ("state_dict",)
) -> dict[str, Tensor]:
    """The tensors of a ``.pth``, ``.pt`` or ``.safetensors`` file or a state dict, by the names of the plain network.

    Of ``{"state_dict": ...}``, or the first of ``parts`` that there is, it takes what is in there. Names lose what
    DistributedDataParallel ("module."), torch.compile ("_orig_mod.") and FSDP add to them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read safely, or something else than tensors by name; says what it is.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"no such checkpoint: {path}")
        return _checked(read_tensors(path), f"the checkpoint {path}", parts)
    return _checked(source, "the checkpoint", parts)


def read_tensors(path: Path) -> object:
    """What a file of weights holds, safetensors or of torch.save, whatever its name.

    Raises:
        ValueError: the file is damaged, is something else, or holds more than tensors; says which.
    """
    try:
        with path.open("rb") as file:
            start = file.read(512)
        if kind := _described_start(start):
            raise ValueError(kind)
        # A safetensors file begins with the length of its header, of less than 4 GiB, and the header.
        if start[4:9] == b"\0\0\0\0{" or (path.suffix == ".safetensors" and start[:1] not in (b"P", b"\x80")):
            return load_file(path)
        # Plain values, which DiT's training keeps beside the weights.
        plain = torch.serialization.safe_globals([argparse.Namespace])
        with path.open("rb") as file, plain:  # whose name would tell torch.load what to expect
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make a reader fail in any way
        raise ValueError(f"cannot read the checkpoint {path}: {_reason(error)}") from None


def _described_start(start: bytes) -> str | None:
    """What a file is that begins like this, if it is no file of weights."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not text:
        return "it is empty"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--")):
        return "it is a web page, not a checkpoint: the download gave an error, or asked to log in"
    if text.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the file itself: fetch that with git lfs pull"
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start):
        return f"it is a text, not a checkpoint, and begins with {start[:40].decode()!r}"
    return None


def _reason(error: Exception) -> str:
    """In one line, without torch's explanation of how to load a file unsafely."""
    text = str(error).strip()
    if "Unsupported global" in text:
        name = text.split("GLOBAL", 1)[-1].split()[0]
        return f"it holds objects of {name}, which only running code could load; save its state_dict() instead"
    if "weights_only" in text or "Weights only" in text:
        return "it is damaged, or no file of torch.save"
    line = text.splitlines()[0].split(". ")[0] if text else "it ends too early"
    return line if type(error) in (OSError, RuntimeError, ValueError) else f"it is damaged ({line})"


def _checked(found: object, origin: str, parts: Sequence[str]) -> dict[str, Tensor]:
    if isinstance(found, Mapping):
        found = next((found[part] for part in parts if isinstance(found.get(part), Mapping)), found)
    not_state_dict = f"{origin} is not a state dict: expected a mapping from names to tensors"
    if not isinstance(found, Mapping):
        raise ValueError(f"{not_state_dict}, found a {type(found).__name__}")
    state: dict[str, Tensor] = {}
    for name, value in found.items():
        if not isinstance(name, str):
            raise ValueError(f"{not_state_dict}, found the name {name!r}, which is no text but {type(name).__name__}")
        if not isinstance(value, Tensor):
            hint = ": if the weights are in there, pass that part" if isinstance(value, Mapping) else ""
            raise ValueError(f"{not_state_dict}, found {name!r} to be a {type(value).__name__}{hint}")
        plain = plain_name(name)
        if plain in state:
            raise ValueError(f"{origin} holds {plain} twice, once as {name}")
        state[plain] = value
    return state


def plain_name(name: str) -> str:
    """The name of a parameter before its network was wrapped."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def with_one_dtype(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In the most precise dtype that occurs, also where only a part was stored in half precision.

    Raises:
        ValueError: a tensor that is not of 16, 32 or 64 floating bits, naming it.
    """
    for name, tensor in state.items():
        if tensor.dtype not in FLOAT_DTYPES:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{name} is stored in {dtype}; weights are in float64, float32, bfloat16 or float16")
    dtype = reduce(torch.promote_types, {tensor.dtype for tensor in state.values()})
    return {name: tensor.to(dtype) for name, tensor in state.items()}


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


def check_dimensions(state: Mapping[str, Tensor], dimensions: Mapping[str, int], network: str) -> None:
    """Of the tensors that tell a network's sizes, where they are there.

    Raises:
        ValueError: one of another number of dimensions.
    """
    for name, number in dimensions.items():
        if name in state and state[name].dim() != number:
            shape = tuple(state[name].shape)
            raise ValueError(f"not a {network} checkpoint: {name} has shape {shape}, expected {number} dimensions")


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file with the permissions of any new file; those of the library can be read by the owner alone."""
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path)
    path.chmod(mode)
