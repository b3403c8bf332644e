"""Sample number p of a run, as a stateless function of (seed, p): which image, caption, flip, label drop, time, noise.

The position of a run in its data is therefore one integer, ``images_seen``, and resuming is exact on any number of
processes and with any reader. Random numbers are NumPy's Philox, a counter-based generator (Salmon et al., 2011).
"""

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache, partial

import numpy as np


class Stream(IntEnum):
    """One family of random numbers for each purpose, so that none disturbs another."""

    ORDER = 0
    SAMPLE = 1
    NOISE = 2
    GENERATION = 3
    SAMPLER = 4
    DROPOUT = 5
    STAND_IN = 6
    LATENT = 7
    VALIDATION = 8
    AUGMENT = 9
    TEACHER = 10
    PROBE = 11
    NUISANCE = 12
    MIDDLE = 13


def generator(seed: int, stream: Stream, counter: int) -> np.random.Generator:
    """Random numbers that depend on the three arguments alone."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, counter]))


class Order:
    """Which image is sample number p: each epoch is a new permutation of the n images."""

    def __init__(self, seed: int, num_images: int):
        self.seed, self.num_images = seed, num_images
        # Two, because readers that are ahead ask for the next epoch while this one's labels are still asked for.
        self._permutation = lru_cache(maxsize=2)(partial(_permutation, seed, num_images))

    def index(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_images)
        return int(self._permutation(epoch)[offset])


def _permutation(seed: int, num_images: int, epoch: int) -> np.ndarray:
    return generator(seed, Stream.ORDER, epoch).permutation(num_images)


@dataclass(frozen=True)
class SampleDraws:
    """Four uniform numbers in [0, 1) for each of B samples, fp32, and what they decide."""

    flip_u: np.ndarray
    drop_u: np.ndarray
    time_u: np.ndarray
    caption_u: np.ndarray

    def flips(self, enabled: bool) -> np.ndarray:
        return (self.flip_u < 0.5) & enabled

    def drops_label(self, probability: float) -> np.ndarray:
        return self.drop_u < probability

    def captions(self, counts: np.ndarray) -> np.ndarray:
        """Which of its image's captions each sample takes, where the images have so many."""
        # In fp64, where u * count stays below count.
        return (self.caption_u.astype(np.float64) * counts).astype(np.int64)


def draw_samples(seed: int, positions: range) -> SampleDraws:
    """The draws of consecutive positions, together: position p owns the p-th block of four numbers of the stream."""
    philox = np.random.Philox(key=[seed, Stream.SAMPLE], counter=positions.start)
    raw = philox.random_raw(4 * len(positions)).reshape(-1, 4)
    # 24 bits are exact in fp32: a number rounded up to 1 would be a time past the end.
    uniform = (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    return SampleDraws(*uniform.T)


def draw_seed(seed: int, stream: Stream, position: int) -> int:
    """A seed for a generator of torch."""
    # Hashed down to 32 bits, all that torch's CPU generator makes use of.
    return int(generator(seed, stream, position).integers(2**32))


def draw_noise(seed: int, position: int, shape: tuple[int, ...], stream: Stream = Stream.NOISE) -> np.ndarray:
    """Standard normal, fp32."""
    return generator(seed, stream, position).standard_normal(shape, dtype=np.float32)


@dataclass(frozen=True)
class BatchPlan:
    """Which positions each process takes, micro-batch by micro-batch.

    A step covers the positions [images_seen, images_seen + images_per_step); within it, accumulation step a of
    rank r takes the (a * world_size + r)-th run of ``micro_batch`` positions.
    """

    first_position: int
    images_per_step: int
    accumulation_steps: int = 1
    rank: int = 0
    world_size: int = 1

    def __post_init__(self):
        if self.images_per_step % (self.world_size * self.accumulation_steps):
            raise ValueError(
                f"images_per_step {self.images_per_step} does not divide by {self.world_size} processes "
                f"x {self.accumulation_steps} accumulation steps"
            )

    @property
    def micro_batch(self) -> int:
        return self.images_per_step // (self.world_size * self.accumulation_steps)

    def positions(self, batch: int) -> range:
        """The positions of this rank's micro-batch number ``batch``, counted from the start of the plan."""
        run = batch % self.accumulation_steps * self.world_size + self.rank
        first = self.step_of(batch) + run * self.micro_batch
        return range(first, first + self.micro_batch)

    def step_of(self, batch: int) -> int:
        """The first position of the step that micro-batch number ``batch`` is of, whichever process takes it."""
        return self.first_position + batch // self.accumulation_steps * self.images_per_step
