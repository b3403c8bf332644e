"""Cells of a grid: ordinary runs that differ in named axes, each value of which stands for flags of training."""

import hashlib
import json
import math
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from itertools import product
from pathlib import Path
from typing import Any

from scalelong.model.skip_scale import SkipScale
from scalelong.train.command_line import parse_train_arguments
from scalelong.train.config import TrainConfig
from scalelong.train.config_json import kind_of
from scalelong.train.errors import UserError
from scalelong.train.recipes import RECIPES

Flags = tuple[str, ...]
VARIANT = "variant"
"""The axis of named sets of flags."""
STARTS = ("published", "preserving")
"""How weights begin in a grid without training: as the recipe's, or with projections of skips that preserve norms."""


@dataclass(frozen=True)
class Axis:
    """What cells differ in."""

    name: str
    values: Mapping[str, Flags]
    """The flags that each value stands for, by the value as it is shown."""


@dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    preset: str
    place: tuple[tuple[str, str], ...]
    """(axis, value) of each axis."""
    flags: Flags
    is_probed: bool = False
    """Whether linear probes of its blocks are measured, once it is trained."""

    @property
    def name(self) -> str:
        """ "depth=24 skip-scale=cs:0.7 ..."; which cell of the table it is."""
        return " ".join(f"{axis}={value}" for axis, value in self.place)

    @property
    def folder(self) -> str:
        """The name of its run folder."""
        return re.sub(r"[^\w.=+-]+", "_", self.name) or "cell"

    @property
    def start(self) -> str:
        return dict(self.place).get("start", STARTS[0])

    def config(self, run: Path) -> TrainConfig:
        """
        Raises:
            UserError: the preset's model cannot have what the cell asks for.
        """
        return parse_train_arguments([self.preset, "--run", str(run), *self.flags])

    def command(self) -> str:
        """The training command of the cell alone."""
        return f"python -m scalelong.train {self.preset} {' '.join(self.flags)}"


def make_cells(preset: str, axes: Iterable[Axis], fixed: Flags = (), *, is_probed: bool = False) -> list[Cell]:
    """All combinations, the last axis running fastest; flags of axes stand behind those that all cells share."""
    axes = list(axes)
    cells = []
    for values in product(*(axis.values.items() for axis in axes)):
        place = tuple((axis.name, label) for axis, (label, _) in zip(axes, values, strict=True))
        flags = (*fixed, *(flag for _, flags in values for flag in flags))
        cells.append(Cell(preset, place, flags, is_probed))
    return cells


def digest_of(cell: Cell, config: TrainConfig) -> str:
    """What a cell computes, in twelve digits: equal where its row may stand for it, on whatever machine.

    Values that are the defaults of their class do not count, so that a later version with more fields has the same.
    """
    values = {"preset": cell.preset, "start": cell.start, "images": config.total_images, "run": _computed(config)}
    values |= {"probed": True} if cell.is_probed else {}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _computed(part: Any) -> dict[str, Any]:
    """The fields that a run's results depend on, where they are not the default."""
    found: dict[str, Any] = {}
    if (kind := kind_of(part)) is not None:
        found["kind"] = kind
    for field in fields(part):
        value = getattr(part, field.name)
        if field.metadata.get("bookkeeping"):
            continue
        if is_dataclass(value):
            found[field.name] = _computed(value)
        elif field.default is MISSING or value != field.default:
            found[field.name] = value
    return found


def expand(text: str) -> list[str]:
    """The values of a list: "1,2,8", "12..24" (whole numbers), "2^-11..2^-5" (octaves), "2^-9..2^-6:0.5" (halves).

    Raises:
        UserError: a range that is none.
    """
    values: list[str] = []
    for part in text.split(","):
        octaves = re.fullmatch(r"2\^(-?[\d.]+)\.\.2\^(-?[\d.]+)(?::([\d.]+))?", part.strip())
        whole = re.fullmatch(r"(\d+)\.\.(\d+)", part.strip())
        if octaves:
            first, last, step = float(octaves[1]), float(octaves[2]), float(octaves[3] or 1)
            if last < first or step <= 0:
                raise UserError(f"the range {part!r} is empty")
            values += [f"2^{first + n * step:g}" for n in range(math.floor((last - first) / step + 1e-9) + 1)]
        elif whole:
            values += [str(n) for n in range(int(whole[1]), int(whole[2]) + 1)]
        elif part.strip():
            values.append(part.strip())
        else:
            raise UserError(f"an empty value in {text!r}")
    return list(dict.fromkeys(values))


def number(text: str) -> float:
    """Of "2^-8" or "0.003".

    Raises:
        UserError: it is none.
    """
    try:
        base, power, exponent = text.partition("^")
        return float(base) ** float(exponent) if power else float(text)
    except (ValueError, OverflowError):
        raise UserError(f"expected a number, got {text!r}") from None


def depth_flags(preset: str, value: str) -> Flags:
    """A U-ViT's blocks, or the residual blocks of each level of a UNet."""
    model = RECIPES[preset].model
    has_depth = any(field.name == "depth" for field in fields(model))
    return ("--model.depth" if has_depth else "--model.num-res-blocks", value)


def skip_scale_flags(_preset: str, value: str) -> Flags:
    """ "cs:0.7", "geometric:0.7:False": a policy, and the values of its first fields."""
    kind, *values = value.split(":")
    if kind not in SkipScale.known:
        raise UserError(f"unknown skip scale {kind!r}; there are {', '.join(SkipScale.known)}")
    names = [field.name for field in fields(SkipScale.known[kind].policy)]
    if len(values) > len(names):
        takes = f"values of {', '.join(names)} at most" if names else "no value"
        raise UserError(f"skip scale {value!r}: {kind!r} takes {takes}")
    flags = ((f"--skip-scale.{name}", text) for name, text in zip(names, values, strict=False))
    return ("--skip-scale", kind, *(part for flag in flags for part in flag))


def clipping_flags(_preset: str, value: str) -> Flags:
    """ "none", "norm:1", "z-score:2.5"."""
    kind, _, threshold = value.partition(":")
    flags = {"norm": "clip-grad-norm", "z-score": "clip-z-score"}
    if kind == "none":
        return ()
    if kind not in flags or not threshold:
        raise UserError(f"clipping {value!r}: none, norm:1 or z-score:2.5, say")
    return (f"--optimizer.{flags[kind]}", threshold)


def magnitude_flags(_preset: str, value: str) -> Flags:
    """ "plain", or "mp": magnitude-preserving layers, with what their recipes have beside them."""
    if value == "plain":
        return ()
    if value != "mp":
        raise UserError(f"magnitude {value!r}: plain or mp")
    flags = {"--model.magnitude-preserving": "True", "--optimizer.weight-decay": "0", "--optimizer.schedule": "cosine"}
    return tuple(part for flag in flags.items() for part in flag)


def sparse_flags(_preset: str, value: str) -> Flags:
    """ "dense", or "0.75:25600": the share of the patches that the middle does not see, for so many images."""
    if value == "dense":
        return ()
    ratio, _, images = value.partition(":")
    number(ratio)
    return ("--model.sparse-ratio", ratio, *(("--sparse-images", images) if images else ()))


AXES: dict[str, tuple[str, Callable[[str, str], Flags]]] = {
    "depths": ("depth", depth_flags),
    "skip-scale": ("skip-scale", skip_scale_flags),
    "sparse": ("sparse", sparse_flags),
    "positions": ("position", lambda _, value: ("--skip-position", value)),
    "qk-norm": ("qk-norm", lambda _, value: ("--model.qk-norm", value)),
    "magnitude": ("magnitude", magnitude_flags),
    "clipping": ("clipping", clipping_flags),
    "batches": ("batch", lambda _, value: ("--images-per-step", value)),
    "starts": ("start", lambda _, value: ()),
    "learning-rates": ("learning-rate", lambda _, value: ("--optimizer.learning-rate", repr(number(value)))),
    "seeds": ("seed", lambda _, value: ("--seed", value)),
}
"""The axes by their names on the command line: the name in a cell, and the flags of a value. The order of a grid."""


def named_axis(option: str, preset: str, text: str) -> Axis:
    """One of AXES from its values as a command line gives them; ``--seeds 3`` stands for 0, 1 and 2.

    Raises:
        UserError: a value that is none of the axis.
    """
    name, flags = AXES[option]
    if option == "seeds" and text.isdigit():
        text = ",".join(map(str, range(int(text))))
    values = expand(text) if text else []
    if not values:
        raise UserError(f"--{option} names no value")
    if option == "starts" and (unknown := set(values) - set(STARTS)):
        raise UserError(f"--starts {', '.join(sorted(unknown))}: there are {', '.join(STARTS)}")
    return Axis(name, {value: flags(preset, value) for value in values})


def free_axis(text: str) -> Axis:
    """ "model.width=64,128": any flag of training as an axis.

    Raises:
        UserError: no flag, or no value.
    """
    name, equals, values = text.partition("=")
    name = name.removeprefix("--")
    if not equals or not name or not values:
        raise UserError(f"--axis {text!r}: expected FLAG=VALUE,VALUE, as in model.width=64,128")
    return Axis(name, {value: (f"--{name}", value) for value in expand(values)})


def variant_axis(texts: Sequence[str]) -> Axis:
    """Each "muon=--optimizer.kind muon": a name, and the flags of training that it stands for, none of the plain one.

    Raises:
        UserError: no name, one given twice, or flags that are no words of a shell.
    """
    values: dict[str, Flags] = {}
    for text in texts:
        name, equals, flags = text.partition("=")
        if not equals or not re.fullmatch(r"[^\s,]+", name):
            raise UserError(f"--variant {text!r}: expected NAME=FLAGS, as in 'muon=--optimizer.kind muon'")
        if name in values:
            raise UserError(f"--variant {name} is given twice")
        try:
            values[name] = tuple(shlex.split(flags))
        except ValueError as error:
            raise UserError(f"--variant {text!r}: {error}") from None
    return Axis(VARIANT, values)


def place_of(name: str) -> dict[str, str]:
    """The axes of a cell from its name."""
    return dict(part.split("=", 1) for part in name.split(" ") if part)


def sorted_values(values: Sequence[str]) -> list[str]:
    """Numbers by size, other values in the order that they come in."""
    values = list(dict.fromkeys(values))
    try:
        return sorted(values, key=number)
    except UserError:
        return values
