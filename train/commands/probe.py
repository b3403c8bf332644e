"""``scalelong probe RUN`` or an export: how well a linear classifier reads labels from the features of each block.

With ``--init-from PATH`` the first argument is a recipe, whose network takes weights from elsewhere; flags of training
behind ``--`` change it. Nothing of the network is trained.
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from scalelong.model.architectures import make_backbone
from scalelong.model.backbone import Backbone
from scalelong.train.checkpoint import find_checkpoint, load_weights
from scalelong.train.command_line import RunArguments, choose_recipe, parse_train_arguments
from scalelong.train.commands.load import DataArguments, config_of, is_export, load_export
from scalelong.train.config import TrainConfig
from scalelong.train.errors import UserError, warn
from scalelong.train.initial_weights import find_weights, read_weights
from scalelong.train.objective import make_objective
from scalelong.train.parsing import parse
from scalelong.train.probing.features import BlockFeatures, EfficientNetFeatures, Extractor, PixelFeatures
from scalelong.train.probing.heads import HeadsConfig
from scalelong.train.probing.images import open_probe_images
from scalelong.train.probing.probe import ProbeRow, run_probe
from scalelong.train.probing.report import write_probe
from scalelong.train.recipes import RECIPES
from scalelong.train.run_folder import read_config

SIGMAS = (0.0229, 0.0599, 0.1395)
"""Steps 5, 4 and 3 from the end of EDM's 18, where DDAE looks."""


@dataclass(frozen=True, kw_only=True)
class ProbeArguments:
    """Linear probes of every block of a network at several noise levels, by the protocol of DDAE."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder, or an export; with --init-from, or --weights random, a recipe."""
    init_from: str | None = None
    """Weights for the network of a recipe: a file, an export, RUN or RUN@IMAGES, or a folder of diffusers."""
    checkpoint: int | None = None
    """Of a run: which one, by its images_seen; the newest if not given."""
    weights: Literal["ema", "model", "random"] = "ema"
    """The averaged weights, those of the last step, or those that a network of the run begins with."""
    data: DataArguments = field(default_factory=DataArguments)
    blocks: tuple[str, ...] = ("all",)
    """Blocks by their names or numbers (negative from the last), or all of them."""
    times: tuple[float, ...] = SIGMAS
    """Noise levels sigma, of x = x_0 + sigma noise: EDM's, whatever the network was trained under."""
    features: tuple[Literal["network", "efficientnet", "pixels"], ...] = ("network",)
    """What is probed: the network's blocks, EfficientNet-Lite0's features, or the pixels, to compare with."""
    max_images: int = 50_000
    """At most so many images to fit the probes to, and as many held-out ones."""
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    seed: int = 0
    """Of the noise, and of the order of the images."""
    work: Path | None = None
    """Where the features lie while it runs, 2 bytes each; the folder of --out if not given."""
    out: Path | None = None
    """Table, rows and plot: .md, .csv and .png; RUN/probe.csv, or probe.csv here of a recipe, if not given."""


def main(argv: list[str] | None = None) -> None:
    """The command ``scalelong probe``."""
    argv = sys.argv[1:] if argv is None else argv
    argv, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    arguments = parse(ProbeArguments, argv, prog="scalelong probe")
    rows = probe(arguments, flags)
    known = {"weights": arguments.init_from or arguments.weights, "data": arguments.data.path, "seed": arguments.seed}
    heads = arguments.heads
    how = "features of mean 0 and variance 1, " if heads.standardise else ""
    about = f"probes: {how}{heads.epochs} epochs, batches of {heads.batch_size}, rate {heads.learning_rate:g}"
    write_probe(rows, known, [about], _out(arguments))


def probe(arguments: ProbeArguments, flags: list[str]) -> list[ProbeRow]:
    """The rows of the table.

    Args:
        flags: of training, that change the recipe.

    Raises:
        UserError: no such run, recipe, weights, block or data; data without labels or with one class.
    """
    check_arguments(arguments)
    model, config = load_network(arguments, flags)
    extractors = make_extractors(arguments, model, config)
    train, test, names = open_probe_images(config.data.path, config.model, arguments.max_images)
    if train.source.holds == "latents" and "efficientnet" in arguments.features:
        raise UserError(f"{config.data.path} holds latents: --features efficientnet are of images")
    folder = arguments.work or _out(arguments).parent
    if not folder.is_dir():
        raise UserError(f"no such folder to work in: {folder}")
    heads = replace(arguments.heads, seed=arguments.seed)
    return run_probe(
        train, test, len(names), extractors, heads, folder=folder, say=lambda line: print(line, flush=True)
    )


def check_arguments(arguments: ProbeArguments) -> None:
    """
    Raises:
        UserError: numbers out of range, or nothing to probe.
    """
    heads = arguments.heads
    if min(heads.epochs, heads.batch_size, arguments.max_images) < 1 or heads.learning_rate <= 0:
        raise UserError("--heads.epochs, --heads.batch-size and --max-images must be at least 1, the rate positive")
    if not 0 <= arguments.seed < 2**63:
        raise UserError(f"--seed must be in 0 .. 2^63 - 1, got {arguments.seed}")
    for name in ("blocks", "times", "features"):
        if not getattr(arguments, name):
            raise UserError(f"--{name} names nothing to probe")


def load_network(arguments: ProbeArguments, flags: list[str]) -> tuple[Backbone, TrainConfig]:
    """The network in evaluation mode, on a GPU if there is one, and the configuration with the data that is probed.

    Raises:
        UserError: no such run, export, recipe, checkpoint or weights.
    """
    run, is_random = Path(arguments.run), arguments.weights == "random"
    of_recipe = arguments.init_from is not None or (is_random and not run.is_dir())
    if of_recipe:
        name, _ = choose_recipe([arguments.run], program="scalelong probe")
        given = [] if arguments.init_from is None else ["--init-from", arguments.init_from]
        config, model = parse_train_arguments([name, *flags, *given]), None
    elif flags:
        raise UserError(f"flags of training behind -- change a recipe, with --init-from; {run} is none")
    elif is_export(run):
        weights: Literal["ema", "model"] = "model" if arguments.weights == "model" else "ema"
        pipeline = load_export(RunArguments(run=run, checkpoint=arguments.checkpoint, weights=weights))
        model, config = pipeline.model, config_of(pipeline, run)
    elif arguments.run in RECIPES and not run.is_dir():
        raise UserError(f"the recipe {run} has no weights: --init-from PATH, or --weights random")
    else:
        config = read_config(run)
        model = (
            None if is_random else load_weights(config, find_checkpoint(run, arguments.checkpoint), arguments.weights)
        )
    if model is None or is_random:
        model = begun_network(config)
    if arguments.data.path:
        config = replace(config, data=replace(config.data, path=arguments.data.path))
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), config


def begun_network(config: TrainConfig) -> Backbone:
    """The network as a run of the configuration begins: from its seed, or from weights."""
    torch.manual_seed(config.seed)
    model = make_backbone(config.model, skip_scale=config.skip_scale)
    if config.init_from is not None:
        config = replace(config, init_from=find_weights(config))
        weights = read_weights(config)
        print("\n".join(weights.lines))
        weights.put_into(model, config)
    return model


def make_extractors(arguments: ProbeArguments, model: Backbone, config: TrainConfig) -> list[Extractor]:
    """What is probed, in the order given.

    Raises:
        UserError: a block that the network does not have, a noise level out of range, or a network of text.
    """
    made: list[Extractor] = []
    for name in dict.fromkeys(arguments.features):
        if name == "network":
            made.append(block_features(model, config, arguments.blocks, arguments.times, arguments.seed))
        elif name == "pixels":
            made.append(PixelFeatures(config.model.in_channels * config.model.img_size**2))
        else:
            made.append(EfficientNetFeatures())
    return made


def block_features(
    model: Backbone, config: TrainConfig, blocks: tuple[str, ...], sigmas: tuple[float, ...], seed: int
) -> BlockFeatures:
    """Features of blocks, for which a network of labels is told none, or where it knows no such label, the first.

    Raises:
        UserError: as ``make_extractors``.
    """
    objective, names = make_objective(config.objective), [name for name, _ in model.named_blocks()]
    if config.model.context_tokens:
        raise UserError("a network of text is not probed: its features would need captions")
    largest = objective.process.largest_sigma
    if wrong := [sigma for sigma in sigmas if not 0 < sigma <= largest]:
        raise UserError(f"--times {wrong[0]:g}: noise levels of this network are above 0, up to {largest:.4g}")
    try:
        numbers = range(len(names)) if "all" in blocks else [model.number_of_block(_as_number(b)) for b in blocks]
    except ValueError as error:
        raise UserError(f"--blocks: {error}") from error
    label = config.null_label
    if label is None and config.model.num_classes:
        warn("the network was trained without a null label: it is told the first label of every image")
        label = 0
    chosen = [names[number] for number in sorted(set(numbers))]
    return BlockFeatures(model, objective, chosen, list(dict.fromkeys(sigmas)), label=label, seed=seed)


def _as_number(block: str) -> str | int:
    return int(block) if block.lstrip("-").isdigit() else block


def _out(arguments: ProbeArguments) -> Path:
    run = Path(arguments.run)
    return arguments.out or (run / "probe.csv" if run.is_dir() else Path("probe.csv"))
