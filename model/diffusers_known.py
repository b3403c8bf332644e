"""What ``patch_diffusers`` knows of diffusers: which blocks it stands for, by their forwards, and which it refuses."""

import ast
import hashlib
import inspect
import textwrap
from functools import cache
from typing import Any

from torch import nn

from scalelong.model.layer_calls import has_forward_of_class

# Fingerprints of the forwards that our blocks stand for, read in releases 0.33.1, 0.34.0, 0.35.2, 0.36.0, 0.37.0,
# 0.37.1, 0.38.0, 0.39.0, 0.40.0, 0.41.0, 0.42.0 and 0.42.1. The two of ResnetBlock2D, up to 0.36 and from 0.37, differ
# in when the input of the shortcut is made contiguous. Before 0.33 blocks brought gradient checkpointing of their own.
KNOWN_RELEASES = "0.33 to 0.42"
KNOWN_FORWARDS = {
    "ResnetBlock2D": {"4ae6b038709a", "2dd7902c6e9a"},
    "UpBlock2D": {"4f1ef51cd963"},
    "ResnetUpsampleBlock2D": {"bb5c749910ff"},
    "AttnUpBlock2D": {"3050f7c47d91"},
    "CrossAttnUpBlock2D": {"2e23a9aadb3c"},
    "SimpleCrossAttnUpBlock2D": {"229aad7b8c5f"},
    "SkipUpBlock2D": {"6dae38078ecc"},
    "AttnSkipUpBlock2D": {"051f3f0410c2"},
}


def import_blocks() -> Any:
    try:
        from scalelong.model import diffusers_blocks
    except (ImportError, AttributeError) as error:  # the latter where a release lacks a block
        raise ImportError(
            f"patch_diffusers needs diffusers {KNOWN_RELEASES} (pip install diffusers): {error}"
        ) from error
    return diffusers_blocks


def decoder_blocks(module: nn.Module, blocks: Any) -> dict[str, Any]:
    """The decoder blocks by name, in execution order; whatever is not supported is an error."""
    originals = tuple(blocks.BLOCK_ORIGINALS.values())
    decoder_originals = tuple(blocks.BLOCK_ORIGINALS[block] for block in blocks.DECODER_BLOCKS)
    decoders = {}
    for name, child in module.named_modules():
        if isinstance(child, originals) and not isinstance(child, tuple(blocks.BLOCK_ORIGINALS)):
            _check_known(child, originals)
        if isinstance(child, decoder_originals):
            decoders[name] = child
            for residual_block in decoders[name].resnets:
                if not isinstance(residual_block, blocks.BLOCK_ORIGINALS[blocks.ResnetBlock2D]):
                    raise ValueError(f"{described(child)} with a {type(residual_block).__name__} is not supported")
        elif _takes_skips(type(child)):
            supported = ", ".join(block.__name__ for block in blocks.DECODER_BLOCKS)
            raise ValueError(f"{described(child)} is not supported; the decoder blocks that are: {supported}")
    return decoders


def _takes_skips(kind: type[nn.Module]) -> bool:
    return any(name.startswith("res_hidden_states") for name in inspect.signature(kind.forward).parameters)


def _check_known(child: nn.Module, originals: tuple[type, ...]) -> None:
    known = KNOWN_FORWARDS[type(child).__name__] if type(child) in originals else set()
    if _fingerprint(type(child).forward) not in known:
        raise ValueError(f"{described(child)} is not known here; known are the blocks of diffusers {KNOWN_RELEASES}")
    check_forward_of_class(child)


def check_forward_of_class(child: nn.Module) -> None:
    if not has_forward_of_class(child):
        raise ValueError(f"{described(child)} was given a forward, as by accelerate's hooks; remove that first")


def set_class(child: Any, kind: type) -> None:
    vars(child).pop("forward", None)
    child.__class__ = kind


def described(child: nn.Module) -> str:
    import diffusers

    return f"{type(child).__module__}.{type(child).__qualname__} (diffusers {diffusers.__version__})"


@cache
def _fingerprint(forward: Any) -> str:
    """Of what a function does: of its source without docstring, annotations and layout."""
    try:
        source = textwrap.dedent(inspect.getsource(forward.__code__))  # of itself, not of what it may wrap
    except (AttributeError, OSError):
        return "no source"
    function: Any = ast.parse(source).body[0]
    if isinstance(function, ast.FunctionDef) and ast.get_docstring(function) is not None:
        del function.body[0]
    return hashlib.sha256(repr(_outline(function)).encode()).hexdigest()[:12]


def _outline(node: Any) -> Any:
    """A syntax tree as lists and strings, the same in every version of Python."""
    if isinstance(node, ast.AST):
        fields = [(name, value) for name, value in ast.iter_fields(node) if name not in ("annotation", "returns")]
        return [type(node).__name__, *([name, _outline(value)] for name, value in fields if value not in (None, []))]
    return [_outline(child) for child in node] if isinstance(node, list) else repr(node)
