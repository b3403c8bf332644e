"""One line that gives a UNet of Hugging Face diffusers our operators and scaled skips (ScaleLong, arXiv:2310.13545).

``patch_diffusers(unet, skip_scale="cs", kappa=0.7)`` changes the class of blocks and layers in place: parameters, their
names and the model's own class stay, and ``unpatch_diffusers(unet)`` changes all of it back. Skips are counted over the
decoder blocks in the order in which a network holds them, i = 1 the last. The policy is written into the network's
configuration, so that it is saved with it. diffusers is imported when this is called.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from scalelong.model import diffusers_gates, diffusers_saved
from scalelong.model.diffusers_known import (
    check_forward_of_class,
    decoder_blocks,
    described,
    import_blocks,
    set_class,
)
from scalelong.model.diffusers_saved import Scaling
from scalelong.model.layer_calls import has_forward_of_class
from scalelong.model.skip_layers import keeps_sides
from scalelong.model.skip_scale import SkipScale, SkipShape, make_skip_scale
from scalelong.model.unet_config import SkipPosition, check_position


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
    """In execution order, i = N first, of one network after the other."""
    position: SkipPosition = "before-norm"

    @property
    def num_straddling(self) -> int:
        return sum(skip.straddles for skip in self.skips)

    def __str__(self) -> str:
        lines = [
            f"{len(self.skips)} skips scaled by {Scaling(self.policy, self.position)}",
            f"replaced: {self.num_decoder_blocks} decoder blocks, {self.num_resnets} residual blocks, "
            f"{self.num_norms} norms, {self.num_shortcuts} shortcuts",
            f"{'i':>3}  {'hidden':>6}  {'skip':>6}  {'factor':>7}  group over both",
        ]
        for skip in self.skips:
            factor = "learned" if skip.factor is None else f"{skip.factor:.3g}"
            straddles = "yes" if skip.straddles else "no"
            lines.append(f"{skip.i:>3}  {skip.hidden_channels:>6}  {skip.skip_channels:>6}  {factor:>7}  {straddles}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Network:
    """A network of diffusers inside the module that is patched, or that module itself."""

    name: str
    module: nn.Module
    decoders: dict[str, Any]
    shapes: tuple[SkipShape, ...]
    """The long skips, in execution order."""

    @property
    def is_patched(self) -> bool:
        return any("skips" in vars(block) for block in self.decoders.values())

    @property
    def holder(self) -> nn.Module:
        """What holds learned gates: a child more would do harm in a bare container."""
        is_container = isinstance(self.module, nn.ModuleList | nn.ModuleDict | nn.Sequential)
        return next(iter(self.decoders.values())) if is_container else self.module


def patch_diffusers(
    module: nn.Module,
    *,
    skip_scale: str | SkipScale | None = None,
    kappa: float | None = None,
    position: SkipPosition | None = None,
    gates_from: str | Path | None = None,
) -> PatchReport:
    """Gives the blocks of diffusers inside ``module`` our operators, and scales its long skips.

    Call it before DistributedDataParallel, FSDP or DeepSpeed wrap the module and, for learned gates, before the
    optimizer is made. Called again it changes the policy; learned gates of the same shapes are kept.

    Args:
        module: a UNet2DModel, a UNet2DConditionModel, or any module that holds their decoder blocks. Where it holds
            several networks of diffusers, the skips of each are counted by themselves.
        skip_scale: "none", "inv-sqrt2", "cs", "geometric", "ls", "ls-separate", or a policy. Left out, it is the policy
            that the network was saved with, if its configuration has one, else "cs".
        kappa: of "cs" and "geometric", if it is given by name; 0.5 if left out.
        position: whether the first norm of a decoder block reads the scaled skip, or what it yields of the skip is
            scaled; "before-norm" if left out.
        gates_from: a safetensors file, or a folder with some, of a module with learned gates; they replace new ones.

    Learned gates become the network's last child, ``skip_gates``, in the dtype that it computes in and on the device of
    its parameters. Of a bare container (nn.ModuleList and the like) they go to the first decoder block.

    Raises:
        ImportError: no diffusers, or none with the blocks that we stand for.
        TypeError: ``module`` is no nn.Module, as a pipeline is none.
        ValueError: an unknown policy or position, a kappa outside (0, 1], a module without long skips, a block that is
            not supported or whose forward is not known, gates that do not fit, or a saved policy whose learned gates
            ``gates_from`` does not name; nothing has been changed then.
    """
    module = _plain_module(module)
    given = None
    if skip_scale is not None or kappa is not None or position is not None:
        check_position(position or "before-norm")
        policy = skip_scale if isinstance(skip_scale, SkipScale) else make_skip_scale(skip_scale or "cs", kappa)
        given = Scaling(policy, position or "before-norm")
    blocks = import_blocks()
    networks = _networks(module, blocks)
    scaling = diffusers_saved.scaling_of([network.module for network in networks], given)
    policy, gates = scaling.policy, []
    for network in networks:
        gates.append(_gates(network, policy, gates_from, is_saved=given is None))

    _change_classes(module, blocks)
    for network, its_gates in zip(networks, gates, strict=True):
        _assign_skips(network, scaling, its_gates, blocks)
        diffusers_saved.write_scaling(network.module, scaling)
    diffusers_saved.refuse_conversions()
    return PatchReport(
        policy,
        sum(len(network.decoders) for network in networks),
        _count(module, blocks.ResnetBlock2D),
        _count(module, blocks.GroupNorm),
        _count(module, blocks.SkipConv1x1),
        tuple(skip for network in networks for skip in _patched_skips(network, policy)),
        scaling.position,
    )


def unpatch_diffusers(module: nn.Module) -> None:
    """Makes ``module`` what it was before ``patch_diffusers``; parameters keep their values, learned gates are dropped.

    A module that is not patched stays as it is.

    Raises:
        ImportError, TypeError: as for ``patch_diffusers``.
        ValueError: something was wrapped around a block since; nothing has been changed then.
    """
    module = _plain_module(module)
    originals = import_blocks().ORIGINALS
    patched = [child for child in module.modules() if isinstance(child, tuple(originals))]
    for child in patched:
        if type(child) not in originals:
            raise ValueError(f"{described(child)} was made of a patched block since; undo that first")
        check_forward_of_class(child)
    for child in patched:
        skips = vars(child).pop("skips", None)
        if skips is not None:
            diffusers_gates.remove(skips.network.holder)
        vars(child).pop("long_skip", None)
        set_class(child, originals[type(child)])
    for child in module.modules() if patched else ():
        diffusers_saved.forget_scaling(child)


def _plain_module(module: nn.Module) -> nn.Module:
    """Without what torch.compile puts around it, which compiles again when it sees other classes."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected an nn.Module, got a {type(module).__name__}; of a pipeline, pass its unet")
    return getattr(module, "_orig_mod", module)


def _networks(module: nn.Module, blocks: Any) -> list[_Network]:
    """The networks of diffusers that the decoder blocks belong to; those of none belong to ``module``."""
    decoders = decoder_blocks(module, blocks)
    if not decoders:
        raise ValueError(f"{type(module).__name__} holds no decoder block of diffusers, so it has no skips to scale")
    by_network: dict[str, dict[str, Any]] = {}
    for name, block in decoders.items():
        parts = name.split(".")
        above = (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
        owner = next((name for name in above if isinstance(module.get_submodule(name), blocks.ModelMixin)), "")
        by_network.setdefault(owner, {})[name] = block
    return [
        _Network(name, module.get_submodule(name), its_blocks, _shapes(its_blocks))
        for name, its_blocks in by_network.items()
    ]


def _shapes(decoders: dict[str, Any]) -> tuple[SkipShape, ...]:
    """The long skips, in execution order.

    The hidden stream has the channels that the residual block before put out. Before the first of a decoder there is
    none: there the skip has as many channels as the block puts out or, if the block takes but one, the hidden stream.
    """
    shapes: list[SkipShape] = []
    hidden_after: dict[str, Any] = {}
    for name, block in decoders.items():
        parent, first = name.rpartition(".")[0], block.resnets[0]
        alone = first.out_channels if len(block.resnets) == 1 else first.in_channels - first.out_channels
        hidden = hidden_after.get(parent, alone)
        for residual_block in block.resnets:
            if not 0 < hidden < residual_block.in_channels:
                raise ValueError(f"{name or type(block).__name__}: a skip without channels beside {hidden} hidden ones")
            shapes.append(SkipShape("channels", residual_block.in_channels - hidden, hidden))
            hidden = residual_block.out_channels
        hidden_after[parent] = hidden
    return tuple(shapes)


def _gates(network: _Network, policy: SkipScale, saved: str | Path | None, *, is_saved: bool) -> nn.Module | None:
    """The learned part of a policy: what the network has, if it fits, else a new one, or what was saved."""
    gates = policy.make_gates(network.shapes)
    if gates is None:
        if saved is not None:
            raise ValueError(f"{policy} learns no gates, so there are none to be read from {saved}")
        return None
    if saved is None and not network.is_patched:
        diffusers_saved.check_gates_are_not_forgotten(network.module, network.shapes, is_saved=is_saved)
    old = [block.skips.gates for block in network.decoders.values() if "skips" in vars(block)]
    gates = diffusers_gates.made_like(network.module, gates)
    if old and old[0] is not None and diffusers_gates.shapes(old[0]) == diffusers_gates.shapes(gates):
        gates = old[0]
    if saved is not None:
        diffusers_gates.load(gates, Path(saved), network.name, policy)
    return gates


def _change_classes(module: nn.Module, blocks: Any) -> None:
    ours = {original: block for block, original in blocks.BLOCK_ORIGINALS.items()} | {nn.GroupNorm: blocks.GroupNorm}
    for child in cast(Iterable[Any], module.modules()):
        if type(child) in ours and has_forward_of_class(child):
            set_class(child, ours[type(child)])
        if _is_plain_conv(child, 3):
            set_class(child, blocks.Conv3x3)
        if isinstance(child, blocks.DECODER_BLOCKS):
            for residual_block in child.resnets:
                # Any other shortcut, one inside an adapter too, stays as it is and is given the concatenation.
                if _is_plain_conv(residual_block.conv_shortcut, 1):
                    set_class(residual_block.conv_shortcut, blocks.SkipConv1x1)


def _is_plain_conv(conv: Any, size: int) -> bool:
    return type(conv) is nn.Conv2d and has_forward_of_class(conv) and keeps_sides(conv, size)


def _assign_skips(network: _Network, scaling: Scaling, gates: nn.Module | None, blocks: Any) -> None:
    """Each residual block of a decoder learns of its skip; gates that are no longer used go."""
    holder = None if gates is None else network.holder
    for block in network.decoders.values():
        if "skips" in vars(block) and block.skips.gates is not gates:
            diffusers_gates.remove(block.skips.network.holder)
    skips = blocks.NetworkSkips(scaling.policy, scaling.position, network.shapes, holder)
    places = iter(range(len(network.shapes), 0, -1))
    for block in network.decoders.values():
        long_skips = []
        for residual_block in block.resnets:
            residual_block.long_skip = blocks.SkipPlace(next(places), skips)
            long_skips.append(residual_block.long_skip)
        block.skips = blocks.BlockSkips(skips, tuple(long_skips))
    if holder is not None and skips.gates is not gates:
        holder.add_module(diffusers_gates.GATES, gates)


def _count(module: nn.Module, kind: type) -> int:
    return sum(isinstance(child, kind) for child in module.modules())


def _patched_skips(network: _Network, policy: SkipScale) -> tuple[PatchedSkip, ...]:
    is_learned = next(iter(network.decoders.values())).skips.gates is not None

    def constant_factor(i: int) -> Any:
        factor = policy.scale(i, len(network.shapes), torch.empty(0), None)
        return 1.0 if factor is None else factor

    def straddles(norm: nn.Module, hidden: int, skip: int) -> bool:
        return isinstance(norm, nn.GroupNorm) and hidden % ((hidden + skip) // norm.num_groups) != 0

    norms = [residual_block.norm1 for block in network.decoders.values() for residual_block in block.resnets]
    counted = zip(range(len(network.shapes), 0, -1), network.shapes, norms, strict=True)
    return tuple(
        PatchedSkip(
            i,
            shape.stream_width,
            shape.width,
            None if is_learned else constant_factor(i),
            straddles(norm, shape.stream_width, shape.width),
        )
        for i, shape, norm in counted
    )
