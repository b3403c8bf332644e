"""The light reader: Pillow on threads, for platforms that DALI lacks. Same protocol, same pixels up to resampling."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from scalelong.train.data import IMAGE_ERRORS, Source, decode_image, describe_image_error, resize_and_crop
from scalelong.train.data_order import BatchPlan, Order, draw_samples
from scalelong.train.errors import RankError


def read_with_pillow(
    source: Source, order: Order, plan: BatchPlan, *, img_size: int, channels: int, flip: bool, num_threads: int
) -> Iterator[Tensor]:
    """Endless micro-batches (B, C, H, W), fp32 in [-1, 1], on the CPU.

    Raises:
        RankError: an image that cannot be decoded, naming it.
    """

    def pixels(index: int, mirror: bool) -> np.ndarray:
        try:
            image = resize_and_crop(decode_image(source.read(index), channels), img_size)
        except IMAGE_ERRORS as error:
            raise RankError(f"cannot decode {describe_image_error(source, index, error)}") from error
        array = np.asarray(image, dtype=np.float32).reshape(img_size, img_size, channels).transpose(2, 0, 1)
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
