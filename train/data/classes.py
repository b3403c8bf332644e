"""How many classes a model has that is trained on a folder of one's own: as many as the folder."""

from dataclasses import replace

from scalelong.train.command_line import TrainArguments
from scalelong.train.config import TrainConfig
from scalelong.train.data.source import EMBEDDED, recognise_source


def with_classes_of_data(arguments: TrainArguments) -> TrainConfig:
    """The configuration with the classes of the data, where a recipe of embedded data is given other data.

    Those recipes are there to be tried, on other data too. Published ones are of the classes that they name.

    A command that gives ``--model.num-classes`` has those. Data that has no labels, or is not there, changes nothing:
    what is wrong with it is said when it is opened.

    Raises:
        UserError: data that cannot be read.
    """
    config, path = arguments.config, arguments.config.data.path
    is_own = arguments.base.data.path in EMBEDDED and path not in (*EMBEDDED, "")
    if not is_own or not config.model.num_classes or "--model.num-classes" in arguments.given:
        return config
    source = recognise_source(path)
    count = 0 if source.holds == "features" else len(source.class_names)
    if not count:
        return config
    return replace(config, model=replace(config.model, num_classes=count + (1 if config.label_drop else 0)))
