"""How many classes a model has that is trained on a folder of one's own: as many as the folder."""

from dataclasses import replace

from scalelong.train.command_line import TrainArguments
from scalelong.train.config import TrainConfig
from scalelong.train.data.image_folder import NoClassFoldersError
from scalelong.train.data.source import EMBEDDED, recognise_source
from scalelong.train.errors import UserError
from scalelong.train.recipes import FOR_ONES_OWN


def with_classes_of_data(arguments: TrainArguments) -> TrainConfig:
    """The configuration with the classes of the data, where a recipe is made for any, or of embedded data given other.

    Recipes of embedded data are there to be tried, on other data too. Published ones are of the classes that they name.

    A command that gives ``--model.num-classes`` has those. A recipe for one's own images learns images alone where they
    have no labels, or all the same. Elsewhere, data that has no labels, or is not there, changes nothing: what is wrong
    with it is said when it is opened.

    Raises:
        UserError: data that cannot be read, or has fewer images than a step of a recipe for one's own takes.
    """
    config, path = arguments.config, arguments.config.data.path
    is_for_any = arguments.base in FOR_ONES_OWN.values()
    is_other = arguments.base.data.path in EMBEDDED and path not in EMBEDDED
    if not path or not (is_for_any or is_other):
        return config
    if not config.model.num_classes and not is_for_any:
        return config
    try:
        source = recognise_source(path, img_size=config.model.img_size)
    except NoClassFoldersError:
        if not is_for_any:
            raise
        source = recognise_source(path, labelled=False)
    if source.holds == "features":
        return config
    if is_for_any and len(source) < config.images_per_step:
        raise UserError(
            f"{path} has {len(source):,} images, fewer than the {config.images_per_step:,} of one step: give more, or "
            f"a smaller --images-per-step"
        )
    count = len(source.class_names)
    if "--model.num-classes" in arguments.given or not config.model.num_classes:
        return config
    if count > 1 or (count and not is_for_any):
        return replace(config, model=replace(config.model, num_classes=count + (1 if config.label_drop else 0)))
    return without_labels(config) if is_for_any else config


def without_labels(config: TrainConfig) -> TrainConfig:
    """The configuration of the same network without classes, labels to drop, and guidance."""
    model, sample = replace(config.model, num_classes=0), replace(config.sample, guidance=0.0, guidance_interval=None)
    return replace(config, model=model, label_drop=0.0, sample=sample)
