"""Reading by NVIDIA DALI: decode, resize, crop, flip and normalise, on the CPU or, with nvJPEG, on a GPU.

DALI is fed through a callback that knows nothing but positions, so that it holds no state to save. It drops a whole
batch for one image that it cannot decode, so such images are kept from it: see data_sound.py.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from scalelong.train.data_order import BatchPlan, Order, draw_samples
from scalelong.train.data_sound import SoundImages
from scalelong.train.errors import RankError

PREFETCH_BATCHES = 2


def read_with_dali(
    images: SoundImages,
    order: Order,
    plan: BatchPlan,
    *,
    img_size: int,
    flip: bool,
    num_threads: int,
    device: torch.device,
) -> Iterator[Tensor]:
    """Endless micro-batches (B, C, H, W), fp32 in [-1, 1], on ``device``.

    Raises:
        RankError: as good as all images are bad, or DALI fails at what it should not.
    """
    from nvidia.dali import fn, pipeline_def
    from nvidia.dali import types as dali_types

    types: Any = dali_types  # its members are made at run time

    on_gpu = device.type == "cuda"
    decoded_before = 0  # batches below it are given to DALI as plain pixels

    def read_batch(batch: int) -> tuple[list[np.ndarray], np.ndarray]:
        positions = plan.positions(batch)
        read = images.read_decoded if batch < decoded_before else images.read_for_decoder
        data = pool.map(read, [order.index(p) for p in positions])
        mirrors = draw_samples(order.seed, positions).flips(flip).astype(np.int32)
        return [np.frombuffer(encoded, dtype=np.uint8) for encoded in data], mirrors

    @pipeline_def(
        batch_size=plan.micro_batch,
        num_threads=num_threads,
        device_id=cast(int, device.index or 0 if on_gpu else None),  # None: DALI needs no driver
        prefetch_queue_depth=PREFETCH_BATCHES,
    )
    def pipeline(first: int) -> Any:
        data, mirror = fn.external_source(
            lambda batch: read_batch(first + batch), num_outputs=2, dtype=[types.UINT8, types.INT32]
        )
        image = fn.decoders.image(
            data, device="mixed" if on_gpu else "cpu", output_type=types.GRAY if images.channels == 1 else types.RGB
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

    def built(first: int) -> Any:
        made = pipeline(first)
        made.build()
        return made

    with ThreadPoolExecutor(num_threads) as pool:
        batch, running = 0, built(0)
        while True:
            try:
                (decoded,) = running.run()
            except (RuntimeError, OSError) as error:
                if batch < decoded_before:
                    raise RankError(f"DALI cannot read plain pixels: {' '.join(str(error).split())}") from error
                # Pillow's check let an image pass that DALI refuses, in this batch or in those that it reads ahead.
                decoded_before = batch + PREFETCH_BATCHES + 1
                running = built(batch)
                continue
            # Copied, because DALI writes the next batch into the same memory.
            yield torch.from_dlpack(decoded.as_tensor()).clone()
            batch += 1
