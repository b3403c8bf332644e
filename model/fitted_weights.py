"""Weights of one network put into another of its architecture, whose labels, image size or skips may differ.

What is the same in both is taken bit for bit. Rows of the label embedding are taken by number; a null label, the last
row, stays the last. Positions of a U-ViT are interpolated bicubically, those of its extra tokens taken by what they
mean; those of a DiT are the network's own. Gates of another policy, and what conditions blocks on the features of
another one, are made anew.

Shapes: T tokens (extras + patches), D width, S side of the grid of patches, K labels, C channels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

import torch.nn.functional as F
from torch import Tensor

from scalelong.model.backbone_config import BackboneConfig
from scalelong.model.dit_config import DiTConfig
from scalelong.model.linear_wrappers import SINGULAR_VECTOR
from scalelong.model.nearest_preset import differing_sizes, nearest_preset
from scalelong.model.skip_scale import SkipScale, described
from scalelong.model.sparse_middle import MASK_TOKEN
from scalelong.model.unet_config import UNetConfig
from scalelong.model.uvit_config import UViTConfig

LABELS = ("label_emb.weight", "y_embedder.embedding_table.weight")
"""The embedding of labels of a U-ViT or UNet, and of a DiT."""
POSITIONS = "pos_embed"
CONTEXT = "context_embed."
GATES = ("se.", "skip_gates.")
OUTPUTS = ("out.2", "final_layer.linear")
"""The last layer of a UNet and of a DiT, whose second half of channels is the variance where that is learned."""
MAY_DIFFER = frozenset(
    {
        *("img_size", "num_classes", "context_tokens", "out_channels", "dropout", "skip_position"),
        "use_new_attention_order",
        *("self_condition_block", "self_condition_form", "augment_dim"),
        *("sparse_ratio", "dense_blocks", "path_drop"),
    }
)
"""Fields of a configuration that leave the meaning of the weights as it is, or have a rule here."""


@dataclass(frozen=True)
class Weights:
    """Weights, and what is known of the network that they are of."""

    state: dict[str, Tensor]
    """By the names of the network of this project."""
    config: BackboneConfig | None = None
    skip_scale: SkipScale | None = None
    has_null_label: bool | None = None
    """Whether the last row of the label embedding is the null label. Not known: as in the network that takes them."""
    remarks: tuple[str, ...] = ()
    """Lines on what the network does otherwise than its likeness here."""


@dataclass
class _Fitting:
    """Weights on their way into a network."""

    given: dict[str, Tensor]
    """What has not found its place yet."""
    fresh: Mapping[str, Tensor]
    """The state dict of the network, as it begins."""
    placed: dict[str, Tensor] = field(default_factory=dict)
    """What has."""
    interpolated: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def begin_anew(self, prefix: str | tuple[str, ...], what: str) -> None:
        """Parameters of these names begin as in any new network, whatever is given for them."""
        if given := [name for name in self.given if name.startswith(prefix)]:
            self.unused.append(what)
            for name in given:
                del self.given[name]
        if fresh := {name: tensor for name, tensor in self.fresh.items() if name.startswith(prefix)}:
            self.new.append(f"{what}, {sum(tensor.numel() for tensor in fresh.values()):,} parameters")
            self.placed |= fresh


def fit(
    weights: Weights,
    config: BackboneConfig,
    skip_scale: SkipScale,
    fresh: Mapping[str, Tensor],
    *,
    has_null_label: bool,
) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict of a network that starts from weights.

    Args:
        config, skip_scale: of the network.
        fresh: its state dict as it begins; that of a network without storage (device "meta") tells whether they fit.
        has_null_label: whether its last label is the null label.

    Returns:
        The state dict, in the dtype of the network, and lines that say what was taken, interpolated, made new or left.

    Raises:
        ValueError: weights of another network; says which sizes differ, and which preset is nearest.
    """
    _check_config(weights, config)
    # Singular vectors are found for the weights where these are loaded.
    given, fresh = (
        {name: x for name, x in state.items() if not name.endswith(SINGULAR_VECTOR)} for state in (weights.state, fresh)
    )
    fitting = _Fitting(given, fresh)
    if weights.config is not None:
        _reorder_attention(fitting, weights.config, config)
    _fit_gates(fitting)
    _fit_conditions(fitting, weights.config, config)
    _fit_middle(fitting, weights.config, config)
    if isinstance(config, UViTConfig):
        _fit_positions(fitting, weights.config, config)  # first, as labels and text tell of extra tokens
        _fit_context(fitting)
    else:
        _leave_variance(fitting, config)
    if isinstance(config, DiTConfig):
        _compute_positions(fitting)
    for labels in LABELS:
        _fit_labels(fitting, labels, weights.has_null_label, has_null_label)
    same = [name for name, x in fresh.items() if name not in fitting.placed and name in fitting.given]
    same = [name for name in same if fitting.given[name].shape == fresh[name].shape]
    fitting.placed |= {name: fitting.given.pop(name) for name in same}
    if fitting.given or fitting.placed.keys() != fresh.keys():
        raise ValueError(_misfit(weights, config, fitting))
    lines = [f"taken: {len(same)} tensors, {sum(fresh[name].numel() for name in same):,} parameters"]
    if weights.skip_scale not in (None, skip_scale):
        lines.append(f"skips: {described(weights.skip_scale)} before, {described(skip_scale)} now")
    for kind in ("interpolated", "new", "unused"):
        lines += [f"{kind.replace('unused', 'not used')}: {what}" for what in getattr(fitting, kind)]
    state = {name: fitting.placed[name].to(x.dtype) for name, x in fresh.items()}
    return state, [*lines, *weights.remarks]


def _check_config(weights: Weights, config: BackboneConfig) -> None:
    before = weights.config
    if before is None:
        return
    if type(before) is not type(config):
        raise ValueError(f"they are of a {before.architecture}, not of a {config.architecture}{_nearest(weights)}")
    sizes = [_sizes(one) for one in (before, config)]
    if not (before.context_tokens and config.context_tokens):
        sizes = [{name: value for name, value in one.items() if name != "context_dim"} for one in sizes]
    differences = [f"{name} {value} -> {sizes[1][name]}" for name, value in sizes[0].items() if value != sizes[1][name]]
    if before.channels_out not in (config.channels_out, _with_variance(config)):
        differences.append(f"channels out {before.channels_out} -> {config.channels_out}")
    if differences:
        raise ValueError(f"{', '.join(differences)}{_nearest(weights)}")


def _sizes(config: BackboneConfig) -> dict[str, object]:
    """What must be the same in both, by value."""
    sizes: dict[str, object] = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in MAY_DIFFER}
    if isinstance(config, UNetConfig):  # which have two ways to say how many heads there are
        del sizes["num_head_channels"]
        sizes["num_heads"] = tuple(config.num_heads_of(channels) for channels in config.channels)
        sizes["attention_resolutions"] = tuple(sorted(config.attention_resolutions))
    return sizes


def _with_variance(config: BackboneConfig) -> int | None:
    """Channels out of the same network that learns the variance, where that is known to come second."""
    comes_second = not isinstance(config, UViTConfig) and config.channels_out == config.in_channels
    return 2 * config.in_channels if comes_second else None


def _reorder_attention(fitting: _Fitting, before: BackboneConfig, config: BackboneConfig) -> None:
    """Rows of the projections of a UNet from (3, heads, features) to (heads, 3, features), or back."""
    if not (isinstance(before, UNetConfig) and isinstance(config, UNetConfig)):
        return
    if before.use_new_attention_order == config.use_new_attention_order:
        return
    for name, rows in fitting.given.items():
        if ".qkv." in name:
            heads = config.num_heads_of(rows.shape[0] // 3)
            split = (3, heads, -1) if before.use_new_attention_order else (heads, 3, -1)
            fitting.given[name] = rows.unflatten(0, split).transpose(0, 1).flatten(0, 2)


def _fit_gates(fitting: _Fitting) -> None:
    """All of them, or none."""
    given, fresh = (
        {name: x.shape for name, x in state.items() if name.startswith(GATES)}
        for state in (fitting.given, fitting.fresh)
    )
    if given != fresh:
        fitting.begin_anew(GATES, "gates of the skips")


def _fit_conditions(fitting: _Fitting, before: BackboneConfig | None, config: BackboneConfig) -> None:
    """Taken where blocks are conditioned on the features of the same one, in the same form; else made anew."""
    tells = {"self_condition.": ("self_condition_block", "self_condition_form"), "augment_embed.": ("augment_dim",)}
    names = {"self_condition.": "internal self-conditioning", "augment_embed.": "the embedding of augmentations"}
    for prefix, fields_of in tells.items():
        known = before if before is not None else config
        is_same = all(getattr(known, name, None) == getattr(config, name, None) for name in fields_of)
        has_it = [any(name.startswith(prefix) for name in state) for state in (fitting.given, fitting.fresh)]
        if has_it[0] != has_it[1] or not is_same:
            fitting.begin_anew(prefix, names[prefix])


def _fit_middle(fitting: _Fitting, before: BackboneConfig | None, config: BackboneConfig) -> None:
    """The mask token of a sparse middle and, of a DiT without other skips, the projection past it; or they are new."""
    if (MASK_TOKEN in fitting.given) != (MASK_TOKEN in fitting.fresh):
        fitting.begin_anew(MASK_TOKEN, "the mask token of a sparse middle")
    if isinstance(before, DiTConfig) and isinstance(config, DiTConfig) and config.skip == "none":
        for block in before.skip_sources.keys() ^ config.skip_sources.keys():
            fitting.begin_anew(f"blocks.{block}.skip_linear.", "the projection past a sparse middle")


def _fit_labels(fitting: _Fitting, labels: str, had_null: bool | None, has_null: bool) -> None:
    if (labels in fitting.given) != (labels in fitting.fresh):
        fitting.begin_anew(labels, "the embedding of labels")
    if labels not in fitting.given:
        return
    before_KD, rows_KD = fitting.given[labels], fitting.fresh[labels].clone()
    had_null = has_null if had_null is None else had_null
    if before_KD.shape[1:] != rows_KD.shape[1:] or (before_KD.shape == rows_KD.shape and had_null == has_null):
        return
    old, new = len(before_KD) - had_null, len(rows_KD) - has_null
    kept = min(old, new)
    rows_KD[:kept] = before_KD[:kept].to(rows_KD.dtype)
    said = [f"rows 0 to {kept - 1} of {labels} are those of the same number"]
    if had_null and has_null:
        rows_KD[-1] = before_KD[-1].to(rows_KD.dtype)
        said.append("the null label's is the last")
    made = new - kept + (has_null and not had_null)
    said += [f"{made} {'row is' if made == 1 else 'rows are'} new"] if made else []
    left = old - kept + (had_null and not has_null)
    said += [f"{left} {'is' if left == 1 else 'are'} not used"] if left else []
    fitting.placed[labels] = rows_KD
    del fitting.given[labels]
    fitting.new.append(", ".join(said))


def _fit_positions(fitting: _Fitting, before: BackboneConfig | None, config: UViTConfig) -> None:
    old_1TD, new_1TD = fitting.given.get(POSITIONS), fitting.fresh[POSITIONS].clone()
    if old_1TD is None or old_1TD.dim() != 3 or old_1TD.shape[2] != new_1TD.shape[2]:
        return
    old = before.extras if isinstance(before, UViTConfig) else _extras_in(fitting.given, old_1TD.shape[1], config)
    side, new_side = math.isqrt(old_1TD.shape[1] - len(old)), config.img_size // config.patch_size
    if side**2 != old_1TD.shape[1] - len(old) or (old == config.extras and side == new_side):
        return
    patches_DSS = old_1TD[0, len(old) :].unflatten(0, (side, side)).permute(2, 0, 1)
    if side != new_side:
        size = (new_side, new_side)
        patches_DSS = F.interpolate(patches_DSS[None].float(), size, mode="bicubic", align_corners=False)[0]
        fitting.interpolated.append(f"positions of {side} x {side} patches to {new_side} x {new_side}, bicubically")
    new_1TD[0, config.num_extras :] = patches_DSS.flatten(1).T.to(new_1TD.dtype)
    for place, extra in enumerate(config.extras):
        if extra in old:
            new_1TD[0, place] = old_1TD[0, old.index(extra)].to(new_1TD.dtype)
    for named, these, those in ((fitting.new, config.extras, old), (fitting.unused, old, config.extras)):
        if missing := [extra for extra in these if extra not in those]:
            named.append(f"positions of {missing[0] if len(missing) == 1 else f'{len(missing)} extra tokens'}")
    fitting.placed[POSITIONS] = new_1TD
    del fitting.given[POSITIONS]


def _extras_in(state: Mapping[str, Tensor], num_tokens: int, config: UViTConfig) -> tuple[str, ...]:
    """The extra tokens of a U-ViT of which only the tensors are known. Text has as many as here, or 77 as published."""
    num_texts = [0]
    if f"{CONTEXT}weight" in state:
        left = num_tokens - 1
        num_texts = [n for n in (config.context_tokens, 77) if 0 < n < left and math.isqrt(left - n) ** 2 == left - n]
    changes = {"num_classes": int(any(labels in state for labels in LABELS)), "context_tokens": (num_texts or [0])[0]}
    return replace(config, **changes).extras


def _fit_context(fitting: _Fitting) -> None:
    has_text = [any(name.startswith(CONTEXT) for name in state) for state in (fitting.given, fitting.fresh)]
    if has_text[0] != has_text[1]:
        fitting.begin_anew(CONTEXT, "the projection of text")


def _compute_positions(fitting: _Fitting) -> None:
    """Positions of a DiT are sines and cosines of the grid: where they are of another or none are given, its own."""
    given, fresh_1TD = fitting.given.get(POSITIONS), fitting.fresh[POSITIONS]
    if given is None or (given.shape != fresh_1TD.shape and given.shape[-1:] == fresh_1TD.shape[-1:]):
        fitting.given.pop(POSITIONS, None)
        fitting.placed[POSITIONS] = fresh_1TD


def _leave_variance(fitting: _Fitting, config: BackboneConfig) -> None:
    """Of a network that learns the variance, the one that does not is the first half of the channels."""
    # The rows of a DiT's last layer are, pixel by pixel of a patch, the channels; a UNet's are the channels.
    num_pixels = config.patch_size**2 if isinstance(config, DiTConfig) else 1
    for name in (f"{layer}.{kind}" for layer in OUTPUTS for kind in ("weight", "bias")):
        given, fresh = fitting.given.get(name), fitting.fresh.get(name)
        if given is None or fresh is None or given.shape != (2 * len(fresh), *fresh.shape[1:]):
            continue
        num_channels = len(fresh) // num_pixels
        fitting.placed[name] = given.unflatten(0, (num_pixels, -1))[:, :num_channels].flatten(0, 1)
        del fitting.given[name]
        if name.endswith("weight"):
            fitting.unused.append(f"the variance, channels {num_channels} and up of {name.removesuffix('.weight')}")


def _misfit(weights: Weights, config: BackboneConfig, fitting: _Fitting) -> str:
    sizes = differing_sizes(weights.state, fitting.fresh)
    if sizes:
        return f"{', '.join(sizes)}{_nearest(weights)}"
    lacking = [name for name in fitting.fresh if name not in fitting.placed and name not in fitting.given]
    unknown = [name for name in fitting.given if name not in fitting.fresh]
    others = [
        f"{name} {tuple(x.shape)} -> {tuple(fitting.fresh[name].shape)}"
        for name, x in fitting.given.items()
        if name in fitting.fresh
    ]
    parts = [f"they lack {', '.join(lacking[:3])}"] if lacking else []
    parts += [f"{', '.join(unknown[:3])} of them {'is' if len(unknown) == 1 else 'are'} not known"] if unknown else []
    return f"of a {config.architecture} {' and '.join([*parts, *others[:3]])}{_nearest(weights)}"


def _nearest(weights: Weights) -> str:
    found = nearest_preset(weights.state)
    return "; no architecture here has such tensors" if found is None else f"; nearest to them is the {found}"
