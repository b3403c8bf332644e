"""The light reader: Pillow on threads, for platforms that DALI lacks. Same protocol, same pixels up to resampling."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from scalelong.train.data.images import resize_and_crop
from scalelong.train.data.order import BatchPlan, Order, draw_samples
from scalelong.train.data.stand_ins import SoundImages


def read_with_pillow(
    images: SoundImages, order: Order, plan: BatchPlan, *, img_size: int, flip: bool, num_threads: int
) -> Iterator[Tensor]:
    """Endless micro-batches (B, C, H, W), fp32 in [-1, 1], on the CPU.

    Raises:
        RankError: as good as all images are bad.
    """

    def pixels(index: int, mirror: bool) -> np.ndarray:
        image = resize_and_crop(images.image(index), img_size)
        array = np.asarray(image, dtype=np.float32).reshape(img_size, img_size, images.channels).transpose(2, 0, 1)
        if mirror:
            array = array[:, :, ::-1]
        # The arithmetic of DALI, to the bit.
        return (array - np.float32(127.5)) * np.float32(1 / 127.5)

    with ThreadPoolExecutor(num_threads) as pool:

        def submit(batch: int) -> list:
            positions = plan.positions(batch)
            mirrors = draw_samples(order.seed, positions).flips(flip)
            return [pool.submit(pixels, order.index(p), m) for p, m in zip(positions, mirrors, strict=True)]

        batch, ahead = 0, submit(0)
        while True:
            current, ahead = ahead, submit(batch + 1)
            yield torch.from_numpy(np.stack([future.result() for future in current]))
            batch += 1
