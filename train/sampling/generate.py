"""Images from a model: the noise, the condition and the guidance of each, in batches that ranks share.

Classifier-free guidance is F_c + s (F_c - F_u) of the network's outputs (Ho and Salimans, arXiv:2207.12598, with s = w;
s = 0 is none), the same as of the images that they stand for. Path-drop guidance is the same with an F_u that leaves
out the sparse middle of the network (SPRINT, arXiv:2510.21986), at less than twice the cost of none.

Shapes: B batch, C channels, H height, W width.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from scalelong.model.backbone import Backbone
from scalelong.model.skip_tuning import tuned_skips
from scalelong.model.sparse_middle import MiddleTokens
from scalelong.train.data.order import Stream, draw_noise, draw_seed
from scalelong.train.hosts.processes import Processes
from scalelong.train.objective import Denoiser, Objective
from scalelong.train.sampling.samplers import denoise

Conditions = Callable[[Sequence[int]], Tensor | None]
"""What images of these numbers are to show: labels (B,), or text features (B, L, D); None of a model without either."""


def guided(
    model: Backbone,
    objective: Objective,
    condition: Tensor | None,
    null_condition: int | Tensor | None,
    guidance: float,
    autocast: torch.dtype | None = None,
    interval: tuple[float, float] | None = None,
    *,
    path_drop: bool = False,
) -> Denoiser:
    """D(x, sigma) of the model under the condition, with classifier-free guidance of strength s = ``guidance``.

    Args:
        condition: labels (B,), or text features (B, L, D).
        null_condition: what stands for none: a label, or the features (L, D) of the empty text.
        autocast: what the model computes in; None: as its weights are.
        interval: guidance only at sigma in (low, high] (arXiv:2404.07724); None: at all of them.
        path_drop: whether the unconditional pass leaves out the sparse middle.
    """

    def with_guidance(x_BCHW: Tensor, t_B: Tensor) -> Tensor:
        assert condition is not None
        assert null_condition is not None, "guidance needs a null condition"
        null = torch.as_tensor(null_condition).to(condition).expand_as(condition)
        if path_drop:
            shallow = model(x_BCHW, t_B, null, middle=MiddleTokens.none(len(x_BCHW), x_BCHW.device))
            both = torch.cat([model(x_BCHW, t_B, condition), shallow])
        else:
            # One pass over both halves: the batch is doubled, the launches are not.
            both = model(torch.cat([x_BCHW, x_BCHW]), torch.cat([t_B, t_B]), torch.cat([condition, null]))
        conditional, unconditional = both.to(x_BCHW.dtype).chunk(2)
        return conditional + guidance * (conditional - unconditional)

    def without(x_BCHW: Tensor, t_B: Tensor) -> Tensor:
        return model(x_BCHW, t_B, condition)

    def denoiser(predict: Callable[[Tensor, Tensor], Tensor]) -> Denoiser:
        def network(x_BCHW: Tensor, t_B: Tensor) -> Tensor:
            with torch.autocast(x_BCHW.device.type, autocast, enabled=autocast is not None):
                return predict(x_BCHW, t_B)

        return objective.denoiser(network)

    if guidance == 0 or condition is None:
        return denoiser(without)
    if interval is None:
        return denoiser(with_guidance)
    inside, outside, (low, high) = denoiser(with_guidance), denoiser(without), interval
    return lambda x_BCHW, sigma: (inside if low < sigma <= high else outside)(x_BCHW, sigma)


@torch.inference_mode()
def generate(
    model: Backbone,
    objective: Objective,
    conditions: Conditions,
    numbers: Sequence[int],
    *,
    null_condition: int | Tensor | None,
    sampler: str,
    steps: int,
    guidance: float,
    guidance_interval: tuple[float, float] | None = None,
    skip_tuning: tuple[float, float] | None = None,
    path_drop: bool = False,
    seed: int = 0,
    batch_size: int = 256,
    autocast: torch.dtype | None = None,
    to_pictures: Callable[[Tensor], Tensor] | None = None,
    processes: Processes | None = None,
) -> Iterator[np.ndarray]:
    """Images (H, W, C) in uint8, one for each number, in their order.

    Image n depends on (seed, n), its condition and the settings, whatever the other images are. Only the rounding of
    the network may depend on how many it is shown together: batches of the same size give the same bits.

    Args:
        null_condition, autocast, guidance_interval: as ``guided`` takes them.
        skip_tuning: factors of the long skips while it draws, of the innermost and of the outermost
            (model/skip_tuning.py); None: as it was trained.
        path_drop: as ``guided`` takes it.
        batch_size: at most so many images together.
        to_pictures: makes images (B, C, H, W) in [-1, 1] of what the model draws; None: it draws images.
        processes: that share the work. Each must ask for the same numbers to the end, and gets all the images.

    Raises:
        UserError: what any of the processes met, on all of them.
        ValueError: path-drop guidance of a network that was not trained for it.
    """
    model.config.check_path_drop(path_drop)
    device = next(model.parameters()).device
    config = model.config
    shape = (config.in_channels, config.img_size, config.img_size)

    def denoiser_of(condition: Tensor | None) -> Denoiser:
        how = (null_condition, guidance, autocast, guidance_interval)
        return guided(model, objective, condition, *how, path_drop=path_drop)

    def draw(batch: Sequence[int]) -> np.ndarray:
        noise = np.stack([draw_noise(seed, n, shape, Stream.GENERATION) for n in batch])
        condition = conditions(batch)
        condition = None if condition is None else condition.to(device)
        with tuned_skips(model, skip_tuning):
            x_BCHW = denoise(
                denoiser_of(condition),
                objective.process,
                torch.from_numpy(noise).to(device),
                sampler=sampler,
                steps=steps,
                generators=[_torch_generator(seed, n) for n in batch],
            )
        return to_uint8(x_BCHW if to_pictures is None else to_pictures(x_BCHW))

    rank, world_size = (0, 1) if processes is None else (processes.rank, processes.world_size)
    batch_size = min(batch_size, math.ceil(len(numbers) / world_size))
    for first in range(0, len(numbers), batch_size * world_size):
        batch = numbers[first + rank * batch_size : first + (rank + 1) * batch_size]
        if processes is None:
            yield from draw(batch)
        else:
            drawn = processes.agree(lambda batch=batch: draw(batch) if batch else ())
            for images in processes.gather(drawn):
                yield from images


def _torch_generator(seed: int, number: int) -> torch.Generator:
    """Of the noise that a stochastic sampler adds to image ``number``."""
    return torch.Generator().manual_seed(draw_seed(seed, Stream.SAMPLER, number))


def to_uint8(x_BCHW: Tensor) -> np.ndarray:
    """(B, H, W, C): [-1, 1] to 0 .. 255, rounded and clamped."""
    return ((x_BCHW.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def labels_in_turn(labels: Sequence[int]) -> Conditions:
    """Image n is to show the n-th of the labels, which begin anew at their end; none of no labels."""
    return lambda numbers: torch.tensor([labels[n % len(labels)] for n in numbers]) if labels else None
