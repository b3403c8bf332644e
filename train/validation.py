"""The validation loss: the objective's loss at fixed images, times and noises, of the weights and of their average.

Nothing of it depends on the seed, the batch, the processes or the position of a run, so that it compares runs of one
objective, and a run with itself over time. Its random numbers are a stream of their own: training never sees them.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from scalelong.model.architectures import make_backbone
from scalelong.train.checks import Start
from scalelong.train.config import TrainConfig
from scalelong.train.data.batches import Batch, num_reader_threads
from scalelong.train.data.images import resize_and_crop
from scalelong.train.data.order import BatchPlan, Stream, draw_noise, generator
from scalelong.train.data.source import LatentSource
from scalelong.train.data.stand_ins import SoundImages, spread_indices
from scalelong.train.hosts.cores import cores_per_process
from scalelong.train.objective import make_objective
from scalelong.train.run import Run
from scalelong.train.zero.averages import averaged_network
from scalelong.train.zero.engine_config import AUTOCAST

SEED = 0
"""Of times and noises, in every run: runs of different seeds are compared."""
ORDER_OF_TIMES = 0
"""The counter of the stream at which the order of the times is drawn; image k has the next two of its own."""


class Validation:
    """A run's validation images, this rank's share of which is read when it is first needed, and kept."""

    def __init__(self, start: Start):
        self._start = start
        source, count = start.validation_source, start.config.num_validation_images
        self._indices = spread_indices(len(source), count) if count else []
        self._shares = list(_shares(start.plan, len(self._indices)))
        self._batches: list[Batch] = []

    def describe(self) -> str | None:
        """A line for people where the images are trained on; None where they are held out, or there are none."""
        if not self._indices or self._start.validates_on_held_out:
            return None
        path = self._start.config.data.path
        return f"{path} has no test split: the validation loss is at {len(self._indices):,} images that are trained on"

    def first_batch(self) -> Batch:
        """The first of this rank's images, as many as it trains on at a time at most."""
        return self._read()[0]

    def losses(self, run: Run) -> dict[str, float]:
        """``validation_loss`` and, of the averaged weights, ``validation_loss_ema``, the same on all ranks.

        Every rank must call it: under ZeRO 3 they gather the weights together.

        Raises:
            UserError: an image that a rank cannot read.
        """
        config, engine = run.config, run.engine
        self._batches = self._batches or run.processes.agree(self._read)
        run.monitor.active = False  # or it would take down what happens here
        engine.eval()
        plain = self._mean_loss(run, engine)
        engine.train()
        average = averaged_network(run.ema, lambda: make_backbone(config.model, skip_scale=config.skip_scale))
        dtype = AUTOCAST.get(config.precision)
        with torch.autocast(run.processes.device.type, dtype, enabled=dtype is not None):
            averaged = self._mean_loss(run, average)
        return {"validation_loss": plain, "validation_loss_ema": averaged}

    @torch.no_grad()
    def _mean_loss(self, run: Run, network: Callable[..., Tensor]) -> float:
        """Over the images of all ranks, each of the same weight whatever batch it is in."""
        objective, device = make_objective(run.config.objective), run.processes.device
        total = torch.zeros((), dtype=torch.float64, device=device)
        for share, batch in zip(self._shares, self._batches, strict=True):
            condition = None if batch.condition is None else batch.condition.to(device)
            images_BCHW, noise_BCHW = batch.images_BCHW.to(device), batch.noise_BCHW.to(device)
            loss = objective.loss(network, images_BCHW, noise_BCHW, batch.time_u_B.to(device), condition)
            if share:
                total += loss.double() * len(share)
        return sum(run.processes.gather(total.item())) / len(self._indices)

    def _read(self) -> list[Batch]:
        config, source, count = self._start.config, self._start.validation_source, len(self._indices)
        order = generator(SEED, Stream.VALIDATION, ORDER_OF_TIMES).permutation(count)
        # The middles of equal parts of [0, 1), so that all times are looked at; in an order that no class follows.
        time_u = ((order + 0.5) / count).astype(np.float32)
        # Where a rank has nothing left to do it does something all the same, which does not count.
        numbers = [share or range(1) for share in self._shares]
        with ThreadPoolExecutor(num_reader_threads(config, cores_per_process())) as pool:
            return [self._batch(config, source, batch, time_u, pool) for batch in numbers]

    def _batch(
        self,
        config: TrainConfig,
        source: SoundImages | LatentSource,
        numbers: range,
        time_u: np.ndarray,
        pool: ThreadPoolExecutor,
    ) -> Batch:
        indices = np.array([self._indices[n] for n in numbers])
        condition = None
        if source.holds == "latents":
            images = _latents(source, indices, numbers)
            if config.context_shape is not None:
                condition = source.contexts(indices, np.zeros_like(indices))
        else:
            images = np.stack(list(pool.map(lambda index: _pixels(source, int(index), config.model.img_size), indices)))
        if config.model.num_classes:
            condition = torch.tensor([source.label(int(index)) for index in indices])
        noise = np.stack([draw_noise(SEED, 1 + 2 * n, images.shape[1:], Stream.VALIDATION) for n in numbers])
        return Batch(
            images_BCHW=torch.from_numpy(images),
            noise_BCHW=torch.from_numpy(noise),
            time_u_B=torch.from_numpy(time_u[list(numbers)]),
            condition=condition,
            dropout_seed=0,
        )


def _shares(plan: BatchPlan, count: int) -> Iterator[range]:
    """The numbers of this rank's images, in batches of the size that it trains on; as many batches on every rank, of
    which the last may be empty."""
    for first in range(0, count, plan.micro_batch * plan.world_size):
        mine = first + plan.rank * plan.micro_batch
        yield range(count)[mine : mine + plan.micro_batch]


def _pixels(images: SoundImages, index: int, size: int) -> np.ndarray:
    """(C, H, W), fp32 in [-1, 1], by Pillow whoever reads the images that are trained on."""
    image = resize_and_crop(images.image(index), size)
    array = np.asarray(image, dtype=np.float32).reshape(size, size, images.channels).transpose(2, 0, 1)
    return (array - np.float32(127.5)) * np.float32(1 / 127.5)


def _latents(source: LatentSource, indices: np.ndarray, numbers: range) -> np.ndarray:
    """(B, C, H, W), fp32: scale (mean + std ε)."""
    mean, std = source.moments(indices, np.zeros(len(indices), dtype=bool)).float().numpy().swapaxes(0, 1)
    noise = np.stack([draw_noise(SEED, 2 + 2 * n, source.shape, Stream.VALIDATION) for n in numbers])
    return (source.scale * (mean + std * noise)).astype(np.float32)
