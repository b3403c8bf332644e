"""Samples of a model, drawn by all processes together, and what a judge makes of them; while a run trains, too."""

from typing import Any

import numpy as np
import torch

from scalelong.model.architectures import make_backbone
from scalelong.model.backbone import Backbone
from scalelong.train.config import EvaluationConfig, TrainConfig
from scalelong.train.hosts.processes import Processes
from scalelong.train.objective import make_objective
from scalelong.train.run import Run
from scalelong.train.sampling.conditions import settings_of
from scalelong.train.sampling.generate import generate, labels_in_turn
from scalelong.train.scores.feature_spaces import make_feature_space
from scalelong.train.scores.judge import Judge, Scores
from scalelong.train.scores.real_images import read_real_images
from scalelong.train.zero.averages import averaged_network
from scalelong.train.zero.engine_config import AUTOCAST

ROW_NAMES = {
    "accuracy": "label_accuracy",
    "kernel_distance": "kernel_distance",
    "kernel_distance_error": "kernel_distance_error",
    "precision": "precision",
    "recall": "recall",
    "distance": "frechet_distance",
}
"""Of the scores, in rows of the log."""


def make_judge(config: TrainConfig, evaluation: EvaluationConfig, processes: Processes) -> Judge:
    """The judge of a run's samples. Every process must call it.

    Raises:
        UserError: too few real images, or a feature space that is missing, on all processes.
    """
    real = processes.agree(lambda: read_real_images(config, evaluation.max_real_images))
    space = processes.agree(lambda: make_feature_space(evaluation, real.train))
    return Judge(real, space, processes)


def score_samples(
    judge: Judge,
    model: Backbone,
    config: TrainConfig,
    settings: dict[str, Any],
    num_images: int,
    processes: Processes,
    autocast: torch.dtype | None = None,
) -> Scores | None:
    """The scores of so many samples, every class in turn, on rank 0; None on the others.

    Args:
        settings: of ``generate``: null_condition, sampler, steps, guidance, its interval, seed.
        autocast: what the model computes in; None: as its weights are.
    """
    classes, numbers = range(config.num_data_classes), range(num_images)
    objective, conditions = make_objective(config.objective), labels_in_turn(classes)
    drawn = generate(model, objective, conditions, numbers, **settings, autocast=autocast, processes=processes)
    labels = np.arange(num_images) % len(classes) if classes else None
    return judge(np.stack(list(drawn)), labels)


class Evaluation:
    """Scores of a run's averaged weights while it trains; the judge is made when it is needed first, and kept."""

    def __init__(self):
        self._judge: Judge | None = None

    def scores(self, run: Run) -> dict[str, float]:
        """Figures for a row of the log, on rank 0; none on the others. Every rank must call it.

        The samples are those of grids: the run's sampler, guidance and seed, in the precision that it computes in.

        Raises:
            UserError: what any rank met, on all of them.
        """
        config, processes = run.config, run.processes
        if self._judge is None:
            self._judge = make_judge(config, config.evaluation, processes)
        model = averaged_network(run.ema, lambda: make_backbone(config.model, skip_scale=config.skip_scale))
        settings = {"null_condition": config.null_label, **settings_of(config)}
        autocast, count = AUTOCAST.get(config.precision), config.evaluation.num_images
        scores = score_samples(self._judge, model, config, settings, count, processes, autocast)
        values = {name: getattr(scores, field) for field, name in ROW_NAMES.items()} if scores is not None else {}
        return {name: value for name, value in values.items() if value is not None}
