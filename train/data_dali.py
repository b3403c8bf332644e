"""Reading by NVIDIA DALI: decode, resize, crop, flip and normalise, on the CPU or, with nvJPEG, on a GPU.

DALI is fed sample by sample through a callback that knows nothing but positions, so that it holds no state to save.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from scalelong.train.data import Source, find_image_problem
from scalelong.train.data_order import BatchPlan, Order, draw_samples
from scalelong.train.errors import RankError

PREFETCH_BATCHES = 2


def read_with_dali(
    source: Source,
    order: Order,
    plan: BatchPlan,
    *,
    img_size: int,
    channels: int,
    flip: bool,
    num_threads: int,
    device: torch.device,
) -> Iterator[Tensor]:
    """Endless micro-batches (B, C, H, W), fp32 in [-1, 1], on ``device``.

    Raises:
        RankError: an image that cannot be decoded, naming it.
    """
    from nvidia.dali import fn, pipeline_def
    from nvidia.dali import types as dali_types

    types: Any = dali_types  # its members are made at run time

    on_gpu = device.type == "cuda"

    @lru_cache(maxsize=2)
    def batch_mirrors(batch: int) -> np.ndarray:
        return draw_samples(order.seed, plan.positions(batch)).flips(flip).astype(np.int32)

    def sample(info) -> tuple[np.ndarray, np.ndarray]:
        position = plan.positions(info.iteration)[info.idx_in_batch]
        data = np.frombuffer(source.read(order.index(position)), dtype=np.uint8)
        return data, batch_mirrors(info.iteration)[info.idx_in_batch]

    @pipeline_def(
        batch_size=plan.micro_batch,
        num_threads=num_threads,
        device_id=cast(int, device.index or 0 if on_gpu else None),  # None: DALI needs no driver
        prefetch_queue_depth=PREFETCH_BATCHES,
    )
    def pipeline() -> Any:
        data, mirror = fn.external_source(sample, num_outputs=2, batch=False, dtype=[types.UINT8, types.INT32])
        image = fn.decoders.image(
            data, device="mixed" if on_gpu else "cpu", output_type=types.GRAY if channels == 1 else types.RGB
        )
        image = fn.resize(
            image, size=[img_size, img_size], mode="not_smaller", interp_type=types.INTERP_LINEAR, antialias=True
        )
        return fn.crop_mirror_normalize(
            cast(Any, image),
            crop=(img_size, img_size),
            mirror=mirror,
            mean=127.5,
            std=127.5,
            dtype=types.FLOAT,
            output_layout="CHW",
        )

    built = pipeline()
    built.build()
    batch = 0
    while True:
        try:
            (images,) = built.run()
        except (RuntimeError, OSError) as error:
            raise _decoding_error(source, order, plan, batch, channels, error) from error
        # Copied, because DALI writes the next batch into the same memory.
        yield torch.from_dlpack(images.as_tensor()).clone()
        batch += 1


def _decoding_error(
    source: Source, order: Order, plan: BatchPlan, batch: int, channels: int, error: Exception
) -> RankError:
    """DALI reports a batch; find the images in it, or in those that were read ahead."""
    positions = [p for ahead in range(PREFETCH_BATCHES + 1) for p in plan.positions(batch + ahead)]
    indices = dict.fromkeys(order.index(p) for p in positions)
    broken = [problem for index in indices if (problem := find_image_problem(source, index, channels))]
    named = ", ".join(broken[:3]) or "an image: " + " ".join(str(error).split())
    return RankError(f"cannot decode {named}")
