"""One line that gives a UNet of Hugging Face diffusers our operators and scaled skips (ScaleLong, arXiv:2310.13545).

``patch_diffusers(unet, skip_scale="cs", kappa=0.7)`` changes the class of blocks and layers in place: parameters, their
names and the model's own class stay, and ``unpatch_diffusers(unet)`` changes all of it back. Skips are counted over the
decoder blocks in the order in which the module holds them, i = 1 the last. diffusers is imported when this is called.
"""

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from scalelong.model.skip_scale import SkipPosition, SkipScale, make_skip_scale

GATES = "skip_gates"
"""What the learned gates are called in the module that holds them, and so in its state dict."""

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


@dataclass(frozen=True)
class PatchedSkip:
    """A long skip: where it is among all, and what becomes of it."""

    i: int
    """1 is the outermost."""
    hidden_channels: int
    skip_channels: int
    factor: float | None
    """None where it is learned."""
    straddles: bool
    """Whether a group of the norm holds channels of both the hidden stream and the skip."""


@dataclass(frozen=True)
class PatchReport:
    """What a patch has put in place; ``str`` gives a table."""

    policy: SkipScale
    num_decoder_blocks: int
    num_resnets: int
    num_norms: int
    num_shortcuts: int
    skips: tuple[PatchedSkip, ...]
    """In execution order, i = N first."""

    @property
    def num_straddling(self) -> int:
        return sum(skip.straddles for skip in self.skips)

    def __str__(self) -> str:
        lines = [
            f"{len(self.skips)} skips scaled by {self.policy}",
            f"replaced: {self.num_decoder_blocks} decoder blocks, {self.num_resnets} residual blocks, "
            f"{self.num_norms} norms, {self.num_shortcuts} shortcuts",
            f"{'i':>3}  {'hidden':>6}  {'skip':>6}  {'factor':>7}  group over both",
        ]
        for skip in self.skips:
            factor = "learned" if skip.factor is None else f"{skip.factor:.3g}"
            straddles = "yes" if skip.straddles else "no"
            lines.append(f"{skip.i:>3}  {skip.hidden_channels:>6}  {skip.skip_channels:>6}  {factor:>7}  {straddles}")
        return "\n".join(lines)


def patch_diffusers(
    module: nn.Module,
    *,
    skip_scale: str | SkipScale = "cs",
    kappa: float = 0.5,
    position: SkipPosition = "before-norm",
    gates_from: str | Path | None = None,
) -> PatchReport:
    """Gives the blocks of diffusers inside ``module`` our operators, and scales its long skips.

    Call it before DistributedDataParallel, FSDP or DeepSpeed wrap the module and, for learned gates, before the
    optimizer is made. Called again it changes the policy; learned gates of the same shapes are kept.

    Args:
        module: a UNet2DModel, a UNet2DConditionModel, or any module that holds their decoder blocks.
        skip_scale: "none", "inv-sqrt2", "cs", "ls", "ls-separate", or a policy.
        kappa, position: of a policy that is given by name.
        gates_from: a safetensors file, or a folder with some, of a module with learned gates; they replace new ones.

    Learned gates become the module's last child, ``skip_gates``, in the dtype and on the device of its parameters. Of a
    bare container (nn.ModuleList and the like), where a child more would do harm, they go to its first decoder block.

    Raises:
        ImportError: no diffusers, or none with the blocks that we stand for.
        TypeError: ``module`` is no nn.Module, as a pipeline is none.
        ValueError: an unknown policy or position, a kappa outside (0, 1], a module without long skips, a block that is
            not supported or whose forward is not known, gates that do not fit; nothing has been changed then.
    """
    module = _plain_module(module)
    policy = skip_scale if isinstance(skip_scale, SkipScale) else make_skip_scale(skip_scale, kappa, position)
    blocks = _import_blocks()
    decoders = _decoder_blocks(module, blocks)
    if not decoders:
        raise ValueError(f"{type(module).__name__} holds no decoder block of diffusers, so it has no skips to scale")
    channels = _channels(decoders)
    old_gates = [block.skips.gates for block in decoders.values() if "skips" in vars(block)]
    gates = _make_gates(module, policy, [skip for _, skip in channels], next(iter(old_gates), None), gates_from)

    _change_classes(module, blocks)
    _assign_skips(decoders.values(), blocks.BlockSkips, policy, len(channels), gates)
    for old in old_gates:
        if old is not gates:
            _remove_gates(module, old)
    if gates is not None and all(gates is not old for old in old_gates):
        is_container = isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential)
        holder = next(iter(decoders.values())) if is_container else module
        holder.add_module(GATES, gates)
    return PatchReport(
        policy,
        len(decoders),
        _count(module, blocks.ResnetBlock2D),
        _count(module, blocks.GroupNorm),
        _count(module, blocks.SkipConv1x1),
        _patched_skips(decoders.values(), policy, channels, gates),
    )


def unpatch_diffusers(module: nn.Module) -> None:
    """Makes ``module`` what it was before ``patch_diffusers``; parameters keep their values, learned gates are dropped.

    A module that is not patched stays as it is.

    Raises:
        ImportError, TypeError: as for ``patch_diffusers``.
        ValueError: something was wrapped around a block since; nothing has been changed then.
    """
    module = _plain_module(module)
    originals = _import_blocks().ORIGINALS
    patched = [child for child in module.modules() if isinstance(child, tuple(originals))]
    for child in patched:
        if type(child) not in originals:
            raise ValueError(f"{_described(child)} was made of a patched block since; undo that first")
        _check_forward_of_class(child)
    for child in patched:
        skips = vars(child).pop("skips", None)
        if skips is not None:
            _remove_gates(module, skips.gates)
        _set_class(child, originals[type(child)])


def _plain_module(module: nn.Module) -> nn.Module:
    """Without what torch.compile puts around it, which compiles again when it sees other classes."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected an nn.Module, got a {type(module).__name__}; of a pipeline, pass its unet")
    return getattr(module, "_orig_mod", module)


def _import_blocks() -> Any:
    try:
        from scalelong.model import diffusers_blocks
    except (ImportError, AttributeError) as error:  # the latter where a release lacks a block
        raise ImportError(
            f"patch_diffusers needs diffusers {KNOWN_RELEASES} (pip install diffusers): {error}"
        ) from error
    return diffusers_blocks


def _decoder_blocks(module: nn.Module, blocks: Any) -> dict[str, Any]:
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
                    raise ValueError(f"{_described(child)} with a {type(residual_block).__name__} is not supported")
        elif _takes_skips(type(child)):
            supported = ", ".join(block.__name__ for block in blocks.DECODER_BLOCKS)
            raise ValueError(f"{_described(child)} is not supported; the decoder blocks that are: {supported}")
    return decoders


def _takes_skips(kind: type[nn.Module]) -> bool:
    return any(name.startswith("res_hidden_states") for name in inspect.signature(kind.forward).parameters)


def _check_known(child: nn.Module, originals: tuple[type, ...]) -> None:
    known = KNOWN_FORWARDS[type(child).__name__] if type(child) in originals else set()
    if _fingerprint(type(child).forward) not in known:
        raise ValueError(f"{_described(child)} is not known here; known are the blocks of diffusers {KNOWN_RELEASES}")
    _check_forward_of_class(child)


def _check_forward_of_class(child: nn.Module) -> None:
    if not _has_forward_of_class(child):
        raise ValueError(f"{_described(child)} was given a forward, as by accelerate's hooks; remove that first")


def _has_forward_of_class(child: nn.Module) -> bool:
    """Also where it stands in the instance once more, as accelerate's hooks leave it when they go."""
    return "forward" not in vars(child) or getattr(child.forward, "__func__", None) is type(child).forward


def _set_class(child: Any, kind: type) -> None:
    vars(child).pop("forward", None)
    child.__class__ = kind


def _described(child: nn.Module) -> str:
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


def _channels(decoders: dict[str, Any]) -> list[tuple[int, int]]:
    """(hidden, skip) channels of every concatenation, in execution order.

    The hidden stream has the channels that the residual block before put out. Before the first of a decoder there is
    none: there the skip has as many channels as the block puts out or, if the block takes but one, the hidden stream.
    """
    channels: list[tuple[int, int]] = []
    hidden_after: dict[str, Any] = {}
    for name, block in decoders.items():
        parent, first = name.rpartition(".")[0], block.resnets[0]
        alone = first.out_channels if len(block.resnets) == 1 else first.in_channels - first.out_channels
        hidden = hidden_after.get(parent, alone)
        for residual_block in block.resnets:
            if not 0 < hidden < residual_block.in_channels:
                raise ValueError(f"{name or type(block).__name__}: a skip without channels beside {hidden} hidden ones")
            channels.append((hidden, residual_block.in_channels - hidden))
            hidden = residual_block.out_channels
        hidden_after[parent] = hidden
    return channels


def _make_gates(
    module: nn.Module, policy: SkipScale, channels: list[int], old: nn.Module | None, saved: str | Path | None
) -> nn.Module | None:
    gates = policy.make_channel_gates(channels)
    if gates is None:
        if saved is not None:
            raise ValueError(f"{policy} learns no gates, so there are none to be read from {saved}")
        return None
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    gates = gates.to(like.device, like.dtype).train(module.training)
    if old is not None and _shapes(old.state_dict()) == _shapes(gates.state_dict()):
        gates = old
    if saved is not None:
        state = _saved_gates(Path(saved))
        if _shapes(state) != _shapes(gates.state_dict()):
            raise ValueError(f"the gates in {saved} are not those of {policy} for this module")
        gates.load_state_dict(state)
    return gates


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: x.shape for name, x in state.items()}


def _saved_gates(path: Path) -> dict[str, Tensor]:
    """The gates in a safetensors file, or in those of a folder."""
    gates = {}
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        if not file.is_file():
            raise ValueError(f"no gates to be read: there is no file {file}")
        saved = load_file(file)
        gates.update({name.removeprefix(f"{GATES}."): x for name, x in saved.items() if name.startswith(f"{GATES}.")})
    if not gates:
        raise ValueError(f"no gates to be read: nothing in {path} is called {GATES}")
    return gates


def _change_classes(module: nn.Module, blocks: Any) -> None:
    ours = {original: block for block, original in blocks.BLOCK_ORIGINALS.items()} | {nn.GroupNorm: blocks.GroupNorm}
    for child in cast(Iterable[Any], module.modules()):
        if type(child) in ours and _has_forward_of_class(child):
            _set_class(child, ours[type(child)])
        if _is_plain_conv(child, 3):
            _set_class(child, blocks.Conv3x3)
        if isinstance(child, blocks.DECODER_BLOCKS):
            for residual_block in child.resnets:
                # Any other shortcut, one inside an adapter too, stays as it is and is given the concatenation.
                if _is_plain_conv(residual_block.conv_shortcut, 1):
                    _set_class(residual_block.conv_shortcut, blocks.SkipConv1x1)


def _is_plain_conv(conv: Any, size: int) -> bool:
    """Whether it is a convolution that keeps the sides, and nothing else."""
    if type(conv) is not nn.Conv2d or not _has_forward_of_class(conv):
        return False
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return shape == ((size, size), (1, 1), (size // 2, size // 2), (1, 1), 1, "zeros")


def _assign_skips(
    decoders: Iterable[Any], skips_of_block: Any, policy: SkipScale, num_skips: int, gates: nn.Module | None
) -> None:
    first = num_skips
    for block in decoders:
        block.skips = skips_of_block(policy, num_skips, first, gates)
        first -= len(block.resnets)


def _remove_gates(module: nn.Module, gates: nn.Module | None) -> None:
    for child in module.modules():
        if gates is not None and child._modules.get(GATES) is gates:
            delattr(child, GATES)
            return


def _count(module: nn.Module, kind: type) -> int:
    return sum(isinstance(child, kind) for child in module.modules())


def _patched_skips(
    decoders: Iterable[Any], policy: SkipScale, channels: list[tuple[int, int]], gates: nn.Module | None
) -> tuple[PatchedSkip, ...]:
    def constant_factor(i: int) -> Any:
        factor = policy.scale(i, len(channels), torch.empty(0), None)
        return 1.0 if factor is None else factor

    def straddles(norm: nn.Module, hidden: int, skip: int) -> bool:
        return isinstance(norm, nn.GroupNorm) and hidden % ((hidden + skip) // norm.num_groups) != 0

    norms = [residual_block.norm1 for block in decoders for residual_block in block.resnets]
    counted = zip(range(len(channels), 0, -1), channels, norms, strict=True)
    return tuple(
        PatchedSkip(i, *both, constant_factor(i) if gates is None else None, straddles(norm, *both))
        for i, both, norm in counted
    )
