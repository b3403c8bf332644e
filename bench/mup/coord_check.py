"""``scalelong coord-check``: whether what layers put out keeps its size as the width grows (coordinates.py says how).

Leaves ``slopes.csv``, ``coordinates.csv`` and a picture for each policy in --out; the exit code is 1 past the gate.
"""

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from scalelong.bench.lab.cells import expand, number
from scalelong.bench.lab.report_page import csv_of, markdown_table
from scalelong.bench.lab.report_table import Table
from scalelong.bench.mup.coordinates import (
    BUGS,
    MODELS,
    Check,
    Curve,
    curves_of,
    networks,
    worst_growth,
    worst_of_kinds,
)
from scalelong.model.skip_scale import SKIP_SCALE_NAMES, SkipScale, make_skip_scale
from scalelong.train.errors import UserError, run_command, warn
from scalelong.train.write_whole import write_whole

PARAMETRIZATIONS = ("standard", "mup")
GATE = 0.25


@dataclass(frozen=True)
class Case:
    """One parametrisation with one policy, and what was found."""

    parametrization: str
    policy: str
    curves: Sequence[Curve]


def main(argv: list[str] | None = None) -> None:
    """The command ``scalelong coord-check``."""
    arguments = parser().parse_args(sys.argv[1:] if argv is None else argv)
    check = check_of(arguments)
    cases = []
    for parametrization in listed(arguments.parametrization, PARAMETRIZATIONS, "--parametrization"):
        for name, policy in policies_of(arguments).items():
            case = Case(parametrization, name, run_case(arguments, check, parametrization, policy))
            print(f"{describe(case)}\n", flush=True)
            cases.append(case)
    write_results(arguments.out, arguments.model, cases, check)
    print(f"tables and plots: {arguments.out}", flush=True)
    past = [case for case in cases if worst_growth(case.curves) > arguments.gate]
    if past:
        names = ", ".join(f"{case.parametrization} {case.policy} ({worst_growth(case.curves):.2f})" for case in past)
        print(f"past the gate of {arguments.gate:g}: {names}", file=sys.stderr, flush=True)
        sys.exit(1)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="scalelong coord-check",
        allow_abbrev=False,
        description="Slopes of what layers put out over the width, in the first steps of training: near 0 where a "
        "parametrisation is right. Exit code 1 past the gate.",
    )
    made.add_argument("--model", choices=sorted(MODELS), default="uvit", help="a small one of these (uvit)")
    made.add_argument("--parametrization", default="mup", metavar="LIST", help="standard, mup, or both (mup)")
    made.add_argument("--skip-scale", default="all", metavar="LIST", help="policies, as cs or cs:0.7; all (all)")
    made.add_argument("--widths", default="64,128,256", metavar="LIST", help="multiples of 16, a head (64,128,256)")
    made.add_argument("--base-width", type=int, help="of mup (the first of the widths)")
    made.add_argument("--depth", type=int, help="blocks (4)")
    made.add_argument("--skip", help="long skips of a DiT: layer-norm, plain or none (layer-norm)")
    made.add_argument("--seeds", type=int, default=Check.seeds, help="networks of each width (4)")
    made.add_argument("--steps", type=int, default=Check.steps, help="of AdamW (4)")
    made.add_argument("--learning-rate", default="2^-9", help="at the base width (2^-9)")
    made.add_argument("--bug", choices=sorted(BUGS), help="spoil the table of muP, to see that the check finds it")
    made.add_argument("--gate", type=float, default=GATE, help=f"the largest slope that passes ({GATE})")
    made.add_argument("--out", type=Path, default=Path("runs/coord-check"), help="folder (runs/coord-check)")
    return made


def listed(text: str, known: Sequence[str], flag: str) -> list[str]:
    """
    Raises:
        UserError: a value that is not known, or none.
    """
    values = expand(text)
    unknown = [value for value in values if value not in known]
    if unknown:
        raise UserError(f"{flag} {unknown[0]}: there are {', '.join(known)}")
    return values


def check_of(arguments: argparse.Namespace) -> Check:
    """
    Raises:
        UserError: numbers that make no check.
    """
    widths = widths_of(arguments.widths)
    if arguments.seeds < 1 or arguments.steps < 1:
        raise UserError("--seeds and --steps must be at least 1")
    rate = number(arguments.learning_rate)
    if not 0 < rate < 1:
        raise UserError(f"--learning-rate must be in (0, 1), got {arguments.learning_rate}")
    return Check(widths=widths, seeds=arguments.seeds, steps=arguments.steps, learning_rate=rate)


def widths_of(text: str) -> tuple[int, ...]:
    """
    Raises:
        UserError: fewer than two whole numbers.
    """
    values = expand(text)
    if len(values) < 2 or not all(value.isdigit() and int(value) for value in values):
        raise UserError(f"--widths {text}: expected at least two widths, as in 64,128,256")
    return tuple(sorted(int(value) for value in values))


def policies_of(arguments: argparse.Namespace) -> dict[str, SkipScale]:
    """The policies by the names they were asked for: all that come with the package, or all that fit.

    Raises:
        UserError: a policy that is not known, or a value that it does not take.
    """
    if arguments.skip_scale == "all":
        names = ["none"] if arguments.skip == "none" else list(SKIP_SCALE_NAMES)
        return {name: make_skip_scale(name) for name in names}
    return {text: policy_of(text) for text in expand(arguments.skip_scale)}


def policy_of(text: str) -> SkipScale:
    """ "cs:0.7": a policy, and the value of its first field.

    Raises:
        UserError: there is no such policy, or it takes no such value.
    """
    name, colon, value = text.partition(":")
    known = SkipScale.known.get(name)
    first = [field.name for field in fields(known.policy)][:1] if known else []
    if colon and known and not first:
        raise UserError(f"skip scale {text!r}: {name!r} takes no value")
    try:
        return make_skip_scale(name, **({first[0]: number(value)} if colon and first else {}))
    except ValueError as error:
        raise UserError(f"--skip-scale {text}: {error}") from error


def run_case(arguments: argparse.Namespace, check: Check, parametrization: str, policy: SkipScale) -> list[Curve]:
    """
    Raises:
        UserError: a network that cannot be.
    """
    try:
        config = config_of(arguments, check, parametrization)
        config.check_skip_scale(policy)
        return curves_of(networks(config, policy, arguments.bug), check)
    except ValueError as error:
        raise UserError(str(error)) from error


def config_of(arguments: argparse.Namespace, check: Check, parametrization: str) -> Any:
    """
    Raises:
        UserError: an option that the network does not have, or a bug in a table without muP.
        ValueError: sizes that do not fit.
    """
    changes: dict[str, Any] = {}
    if arguments.depth is not None:
        changes["depth"] = arguments.depth
    if arguments.skip is not None:
        if arguments.model != "dit":
            raise UserError("--skip is of a DiT: a U-ViT always has its long skips")
        changes["skip"] = arguments.skip
    if parametrization == "mup":
        base_width = check.widths[0] if arguments.base_width is None else arguments.base_width
        changes |= {"parametrization": "mup", "base_width": base_width}
    elif arguments.base_width is not None and arguments.parametrization == "standard":
        raise UserError("--base-width is of --parametrization mup")
    elif arguments.bug is not None:
        raise UserError("--bug spoils the table of --parametrization mup")
    return replace(MODELS[arguments.model], **changes)


def describe(case: Case) -> str:
    table = slopes_table([case])
    return f"{case.parametrization}, skip scale {case.policy}: worst slope {worst_growth(case.curves):.2f}\n\n" + (
        markdown_table(replace(table, header=table.header[2:], lines=[line[2:] for line in table.lines]))
    )


def slopes_table(cases: Sequence[Case]) -> Table:
    """The worst slopes of each kind of layer."""
    lines: list[list[Any]] = []
    for case in cases:
        worst = worst_of_kinds(case.curves)
        for kind in dict.fromkeys(kind for kind, _ in worst):
            line: list[Any] = [case.parametrization, case.policy, kind]
            for measure in ("size", "update"):
                curve = worst.get((kind, measure))
                line += [f"{curve.slope:+.2f}", f"{curve.layer or 'network'}, step {curve.step}"] if curve else ["", ""]
            lines.append(line)
    header = ("parametrization", "skip scale", "kind", "size", "worst size", "update", "worst update")
    note = "Slopes of log2 of the mean absolute value over log2 of the width, the worst layer and step of each kind."
    return Table("slopes", "Slopes over the width", note, header, lines)


def coordinates_csv(cases: Sequence[Case], check: Check) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("parametrization", "skip scale", "layer", "measure", "step", "width", "value"))
    for case in cases:
        for curve in case.curves:
            place = case.parametrization, case.policy, curve.layer, curve.measure, curve.step
            pairs = zip(check.widths, curve.values, strict=True)
            writer.writerows((*place, width, f"{value:.5g}") for width, value in pairs)
    return text.getvalue().encode()


def write_results(folder: Path, model: str, cases: Sequence[Case], check: Check) -> None:
    """
    Raises:
        UserError: they cannot be written.
    """
    files = {"slopes.csv": csv_of(slopes_table(cases)).encode(), "coordinates.csv": coordinates_csv(cases, check)}
    try:
        from scalelong.bench.mup.plots import coordinates_picture
    except ModuleNotFoundError as error:
        warn(f"no plots: {error.name} is not installed (pip install 'scalelong[lab]')")
    else:
        for policy in dict.fromkeys(case.policy for case in cases):
            shown = {case.parametrization: case.curves for case in cases if case.policy == policy}
            for measure in ("size", "update"):
                name = f"{model}-{policy.replace(':', '')}-{measure}.png"
                files[name] = coordinates_picture(shown, measure, check)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            write_whole(folder / name, data)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error


if __name__ == "__main__":
    run_command(main)
