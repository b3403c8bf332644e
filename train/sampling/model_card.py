"""The model card of an export: README.md, which the hub shows, with how to load it, its recipe and its scores."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scalelong import __version__
from scalelong.model.backbone import Backbone
from scalelong.train.sampling.pipeline_config import PipelineConfig

SCORES = "evaluation.json"
"""What ``scalelong evaluate`` leaves in a run or an export."""


def model_card(model: Backbone, config: PipelineConfig, *, name: str) -> str:
    """The text: how to load the model, what it is, how it was trained, how it scores where that is known.

    Args:
        name: what the model is called where its training has no name.
    """
    architecture, training = type(model).__name__, config.training
    title = training.get("name") or name
    data = f" on {training['data']}" if training.get("data") else ""
    skips = f"long skips scaled by `{model.skip_scale.kind}`" if model.config.has_skips else "without long skips"
    size, channels = model.config.img_size, model.config.in_channels
    what = f"images of {size}x{size}" if channels in (1, 3) else f"latents of {channels}x{size}x{size}"
    parts = [
        f"---\nlibrary_name: scalelong\npipeline_tag: {_task(model)}\ntags:\n- diffusion\n- scalelong\n"
        f"- {architecture.lower()}\n---",
        f"# {title}",
        f"A diffusion model of {what}, trained{data} with [ScaleLong](https://arxiv.org/abs/2310.13545)'s `scalelong` "
        f"{__version__}: a {architecture} of {model.num_params():,} parameters, {skips}.",
        "```python\n" + _usage(model, config) + "```",
        _classes(config),
        "## Recipe",
        _table(dict(_recipe(model, config))),
        *_scores(training.get("scores")),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _task(model: Backbone) -> str:
    return "text-to-image" if model.config.context_tokens else "unconditional-image-generation"


def _usage(model: Backbone, config: PipelineConfig) -> str:
    arguments = [f"steps={config.steps}"]
    if model.config.context_tokens:
        arguments.insert(0, "contexts=features")  # (N, L, D)
    elif model.config.num_classes:
        arguments.insert(0, "labels=[0]")
    if config.guidance:
        arguments.append(f"guidance={config.guidance:g}")
    return (
        "import scalelong\n\n"
        "pipe = scalelong.Pipeline.from_pretrained(FOLDER)  # this folder, or OWNER/NAME on the hub\n"
        f"images = pipe({', '.join(arguments)}, seed=0)\n"
    )


def _classes(config: PipelineConfig) -> str:
    names = config.class_names
    if not names or list(names) == [str(n) for n in range(len(names))]:
        return ""
    shown = ", ".join(f"{n} {name}" for n, name in enumerate(names[:20]))
    return f"Classes: {shown}{f', ... ({len(names)} in all)' if len(names) > 20 else ''}."


def _recipe(model: Backbone, config: PipelineConfig) -> Iterator[tuple[str, Any]]:
    objective, training = config.objective, config.training
    yield "predicts", objective.prediction
    yield "noise", objective.prediction if objective.has_own_noise else objective.noise
    yield "times, weighting", f"{objective.times}, {objective.weighting}"
    for name, value in training.items():
        if name not in ("name", "scores", "optimizer"):
            yield name.replace("_", " "), value
    for name, value in training.get("optimizer", {}).items():
        if value:  # what is 0 is off
            yield name.replace("_", " "), value
    guidance = f", guidance {config.guidance:g}" if config.guidance else ""
    yield "drawn by", f"{config.sampler}, {config.steps} steps{guidance}"


def _scores(scores: Any) -> list[str]:
    if not isinstance(scores, dict) or not scores.get("samples"):
        return []
    rows = []
    for sample in scores["samples"]:
        named = {"guidance": sample.get("guidance"), **sample}
        rows.append({name: value for name, value in named.items() if value is not None})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [
        "| " + " | ".join(name.replace("_", " ") for name in columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(_shown(row.get(name, "")) for name in columns) + " |" for row in rows),
    ]
    about = f"`scalelong evaluate`: {scores.get('settings', '')}; features: {scores.get('features', '')}."
    return ["## Scores", about, "\n".join(lines)]


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_shown(value)} |" for name, value in rows.items())])


def _shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    else:
        text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return text.replace("|", "\\|").replace("\n", " ")


def read_scores(folder: Path) -> dict[str, Any] | None:
    """What ``scalelong evaluate`` has written beside a run; None where it has not, or it cannot be read."""
    try:
        scores = json.loads((folder / SCORES).read_text())
    except (OSError, ValueError):
        return None
    return scores if isinstance(scores, dict) else None
