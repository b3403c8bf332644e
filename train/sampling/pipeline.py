"""``scalelong.Pipeline``: images from an export in three lines, with the core and Pillow alone.

    pipe = scalelong.Pipeline.from_pretrained("digits-model")
    pipe(labels=[3, 5], steps=30, guidance=1.0, seed=0)[0].save("three.png")

Shapes: L tokens, D features of a token.
"""

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from scalelong.model.architectures import load_backbone, read_export
from scalelong.model.backbone import Backbone
from scalelong.train.errors import UserError, warn
from scalelong.train.objective import make_objective
from scalelong.train.objective_config import ObjectiveConfig
from scalelong.train.sampling.autoencoder import make_decoder
from scalelong.train.sampling.generate import Conditions, generate, labels_in_turn
from scalelong.train.sampling.hub import fetch, make_repository, upload
from scalelong.train.sampling.model_card import model_card
from scalelong.train.sampling.pipeline_config import PipelineConfig

if TYPE_CHECKING:
    from PIL.Image import Image

AUTOENCODER, EMPTY_CONTEXT = "autoencoder", "empty_context.npy"
"""What an export calls them."""
REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
"""A model on the hub, OWNER/NAME."""
PARTS_OF_AUTOENCODER = "config.json", "diffusion_pytorch_model*"


class Pipeline:
    """A trained network, and how it is asked for images.

    Args:
        model: the network, in evaluation mode.
        config: how it was trained, and the settings where a call does not say.
        autoencoder: folder of the AutoencoderKL that makes pictures of what a network of latents draws.
        empty_context: (L, D), features of the empty text, which a network of texts needs for guidance.
        card: the text of its model card; one is written of the configuration if not given.

    Raises:
        ValueError: labels that are not the network's, or a network that learns the variance.
    """

    def __init__(
        self,
        model: Backbone,
        config: PipelineConfig,
        *,
        autoencoder: str | Path | None = None,
        empty_context: Tensor | None = None,
        card: str | None = None,
    ):
        config.check_fits(model.config.num_classes)
        if model.config.channels_out != model.config.in_channels:
            raise ValueError("a network that predicts the variance too (out_channels) is not drawn from")
        self.model, self.config, self.card = model, config, card
        self.autoencoder = None if autoencoder is None else Path(autoencoder)
        self.empty_context = empty_context

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: str | torch.device | None = None,
        autoencoder: str | Path | None = None,
        objective: ObjectiveConfig | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> Self:
        """The pipeline of a folder that ``scalelong export`` or ``save_pretrained`` wrote, or of a model on the hub.

        Args:
            source: the folder, or OWNER/NAME on the hub (which needs huggingface_hub).
            device: where the network computes; a GPU if there is one.
            autoencoder: folder of an AutoencoderKL in the place of the export's.
            objective: what the network predicts, in the place of what the export says. Exports of the first format say
                nothing of it, and are taken to predict the noise under the VP-SDE, with a warning.
            revision: a branch, a tag or a commit of the model on the hub.
            token: of the hub; the one that ``hf auth login`` or HF_TOKEN has set if not given.

        Raises:
            FileNotFoundError: no such folder, or a part of it is missing.
            ValueError: one of its files is damaged, describes no model, or is of a newer version; says what it found.
            ConnectionError: the hub does not answer, or refuses.
        """
        folder = Path(source)
        if not folder.is_dir():
            # A path below a folder that is here is a folder that is missing, and no name on the hub.
            if not REPOSITORY.fullmatch(str(source)) or folder.parent.is_dir():
                raise FileNotFoundError(f"no such folder of an export: {source}")
            folder = fetch(str(source), revision=revision, token=token)
        config = read_pipeline_config(folder)
        if objective is not None:
            config = replace(config, objective=objective)
        if autoencoder is None and config.autoencoder is not None:
            autoencoder = folder / config.autoencoder
        empty = None if config.empty_context is None else _read_context(folder / config.empty_context)
        where = device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
        card = folder / "README.md"
        text = card.read_text(encoding="utf-8") if card.is_file() else None
        return cls(load_backbone(folder).to(where), config, autoencoder=autoencoder, empty_context=empty, card=text)

    @property
    def class_names(self) -> list[str]:
        """What labels stand for, from 0 on: their numbers where they have no names; empty without labels."""
        count = self.config.num_data_classes(self.model.config.num_classes)
        return list(self.config.class_names) or [str(label) for label in range(count)]

    def __call__(
        self,
        labels: int | str | Sequence[int | str] | None = None,
        *,
        num_images: int | None = None,
        contexts: Tensor | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        skip_tuning: tuple[float, float] | None = None,
        path_drop: bool | None = None,
        sampler: str | None = None,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        batch_size: int = 256,
    ) -> "list[Image]":
        """Draws images: those of ``scalelong sample`` with the same seed, numbers and labels.

        Args:
            labels: classes, by number or by name, of which the images take turns; all of them if not given.
            num_images: how many; one for each label given (or text), or one.
            contexts: (N, L, D), features of N texts, of which the images take turns; for a network of texts.
            steps: network evaluations for each image; the export's own if not given, as all below.
            guidance: s in eps_c + s (eps_c - eps_u); 0: none.
            guidance_interval: guidance only at noise levels sigma in (low, high].
            skip_tuning: factors of the innermost and of the outermost long skip, those between on a line.
            path_drop: whether guidance leaves out the sparse middle, of a network that was trained for it.
            sampler: docs/objectives.md.
            seed: of the noise.
            numbers: which images of the seed; the first ``num_images`` if not given.
            batch_size: at most so many together.

        Returns:
            Pictures of Pillow, of mode "L" for one channel, else "RGB".

        Raises:
            ValueError: a label, a text or a setting that the network cannot serve.
        """
        how: dict[str, Any] = {"steps": steps, "guidance": guidance, "sampler": sampler}
        how |= {"guidance_interval": guidance_interval, "skip_tuning": skip_tuning, "path_drop": path_drop}
        config = replace(self.config, **{name: value for name, value in how.items() if value is not None})
        conditions, count = self._conditions(labels, contexts)
        chosen = list(range(count if num_images is None else num_images) if numbers is None else numbers)
        if not chosen or num_images not in (None, len(chosen)):
            raise ValueError(f"there must be images, as many as numbers: num_images {num_images}, numbers {numbers}")
        if not 0 <= seed < 2**63 or min(chosen) < 0 or batch_size < 1:
            raise ValueError("seed (below 2^63) and numbers must not be negative, and batch_size at least 1")
        with _as_value_errors():
            drawn = generate(
                self.model,
                make_objective(config.objective),
                conditions,
                chosen,
                null_condition=self._null_condition(config.guidance),
                sampler=config.sampler,
                steps=config.steps,
                guidance=config.guidance,
                guidance_interval=config.guidance_interval,
                skip_tuning=config.skip_tuning,
                path_drop=config.path_drop,
                seed=seed,
                batch_size=batch_size,
                to_pictures=self._to_pictures,
            )
            return [to_pillow(image) for image in drawn]

    def _conditions(
        self, labels: int | str | Sequence[int | str] | None, contexts: Tensor | None
    ) -> tuple[Conditions, int]:
        """What the images are to show, and how many there are of it."""
        shape = self.model.config.context_shape
        if (contexts is None) != (shape is None):
            takes = "no texts" if shape is None else f"texts: give contexts, of features (N, {shape[0]}, {shape[1]})"
            raise ValueError(f"the network takes {takes}")
        if contexts is not None:
            if labels is not None:
                raise ValueError("the network takes texts, no labels")
            if contexts.dim() != 3 or tuple(contexts.shape[1:]) != shape or not len(contexts):
                raise ValueError(f"contexts must be (N, {shape[0]}, {shape[1]}), got {tuple(contexts.shape)}")  # pyright: ignore[reportOptionalSubscript]
            texts = contexts
            return lambda numbers: texts[[n % len(texts) for n in numbers]], len(texts)
        if labels is None:
            return labels_in_turn(range(len(self.class_names))), 1
        given = [labels] if isinstance(labels, int | str) else list(labels)
        if not given:
            raise ValueError("labels are empty: leave them out for all classes")
        return labels_in_turn([self._label(label) for label in given]), len(given)

    def _label(self, label: int | str) -> int:
        names = self.class_names
        if isinstance(label, str) and label in names:
            return names.index(label)
        if not isinstance(label, str) and 0 <= int(label) < len(names):
            return int(label)
        known = f"0 to {len(names) - 1}" if names else "none: it was trained without labels"
        shown = f" ({', '.join(names[:10])}{', ...' if len(names) > 10 else ''})" if self.config.class_names else ""
        raise ValueError(f"no label {label!r}: the network's labels are {known}{shown}")

    def _null_condition(self, guidance: float) -> int | Tensor | None:
        null = self.config.null_label if self.empty_context is None else self.empty_context
        if guidance and null is None:
            raise ValueError(f"guidance {guidance:g}, but the network was not trained for guidance: it takes 0")
        return null

    @cached_property
    def _to_pictures(self) -> Callable[[Tensor], Tensor] | None:
        return make_decoder(self.model.config.in_channels, self.autoencoder)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the network, how to ask it for images, its autoencoder, and a model card into a folder.

        Raises:
            OSError: it cannot be written.
        """
        folder = Path(folder)
        config = replace(
            self.config,
            autoencoder=None if self.autoencoder is None else AUTOENCODER,
            empty_context=None if self.empty_context is None else EMPTY_CONTEXT,
        )
        self.model.save_pretrained(folder, pipeline=config.to_dict())
        if self.empty_context is not None:
            np.save(folder / EMPTY_CONTEXT, self.empty_context.cpu().float().numpy())
        if self.autoencoder is not None and self.autoencoder.resolve() != (folder / AUTOENCODER).resolve():
            (folder / AUTOENCODER).mkdir(exist_ok=True)
            for part in PARTS_OF_AUTOENCODER:
                for path in self.autoencoder.glob(part):
                    shutil.copyfile(path, folder / AUTOENCODER / path.name)
        card = model_card(self.model, config, name=folder.resolve().name) if self.card is None else self.card
        (folder / "README.md").write_text(card, encoding="utf-8")

    def push_to_hub(
        self, repository: str, *, private: bool = False, token: str | None = None, message: str = "Upload the model"
    ) -> str:
        """Puts the export, with its model card, onto the Hugging Face hub; makes the repository if need be.

        Args:
            repository: OWNER/NAME.
            private: whether a new repository can be seen by its owner alone.
            token: of the hub, with the right to write; the one that ``hf auth login`` or HF_TOKEN has set if not given.
            message: of the commit.

        Returns:
            The address of the commit.

        Raises:
            ValueError: no name of a repository.
            ConnectionError: the hub does not answer, or refuses.
        """
        make_repository(repository, private=private, token=token)
        return upload(self.save_pretrained, repository, token=token, message=message)


def read_pipeline_config(folder: Path) -> PipelineConfig:
    """What an export says of how its network is asked for images; of the first format, a guess, with a warning.

    Raises:
        FileNotFoundError: no ``config.json``.
        ValueError: it describes no model, or is of a newer version.
    """
    path = folder / "config.json"
    description = read_export(path)
    if "pipeline" not in description:
        warn(
            f"{folder} says nothing of its training: taken to predict the noise under the VP-SDE, without guidance "
            f"(export it again from its run, or give objective=)"
        )
        return PipelineConfig()
    try:
        return PipelineConfig.from_dict(description["pipeline"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} describes no pipeline of this version: {error}") from error


def _read_context(path: Path) -> Tensor:
    try:
        context = torch.from_numpy(np.load(path, allow_pickle=False))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} has no {path.name}: not a whole export") from None
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return context.float()


def to_pillow(image_HWC: np.ndarray) -> "Image":
    """A picture of an image (H, W, C) in uint8.

    Raises:
        ImportError: Pillow is missing.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("pictures need Pillow: pip install pillow") from error
    return Image.fromarray(image_HWC.squeeze(-1) if image_HWC.shape[-1] == 1 else image_HWC)


@contextmanager
def _as_value_errors() -> Iterator[None]:
    """What a command would say in a line is a ValueError for callers in Python."""
    try:
        yield
    except UserError as error:
        raise ValueError(str(error)) from error
