"""``scalelong export RUN --out DIR``: weights in safetensors with a JSON configuration.

``scalelong.load_backbone(DIR)`` reads the folder.
"""

from dataclasses import dataclass
from pathlib import Path

from scalelong.model.backbone import Backbone
from scalelong.train.checkpoint import load_model
from scalelong.train.command_line import RunArguments, parse
from scalelong.train.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ExportArguments(RunArguments):
    """Export a run's model: safetensors weights and a JSON configuration, for ``load_backbone``."""

    out: Path
    """Folder to write; must be new or empty."""


def main(argv: list[str] | None = None) -> None:
    """The command ``scalelong export``."""
    arguments = parse(ExportArguments, argv, prog="scalelong export")
    model, _ = load_model(arguments.run, checkpoint=arguments.checkpoint, weights=arguments.weights)
    write_export(model, arguments.out)
    print(f"{model.num_params():,} parameters -> {arguments.out}")


def write_export(model: Backbone, out: Path) -> None:
    """Raises:
    UserError: the folder is not empty, or cannot be written.
    """
    try:
        if out.exists() and any(out.iterdir()):
            raise UserError(f"{out} is not empty")
        model.save_pretrained(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from error
