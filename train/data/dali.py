"""Reading by NVIDIA DALI: decode, resize, crop, flip and normalise, on the CPU or, with nvJPEG, on a GPU.

DALI is fed through a callback that knows nothing but positions, so that it holds no state to save. It drops a whole
batch for one image that it cannot decode, so such images are kept from it: see stand_ins.py.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from scalelong.train.data.order import BatchPlan, Order, draw_samples
from scalelong.train.data.side_stream import beside_training
from scalelong.train.data.stand_ins import SoundImages
from scalelong.train.errors import RankError, UserError

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
        RankError: as good as all images are bad, one has vanished, or DALI fails at what it should not.
    """
    from nvidia.dali import fn, pipeline_def
    from nvidia.dali import types as dali_types

    types: Any = dali_types  # its members are made at run time
    on_gpu = device.type == "cuda"
    failures: list[UserError] = []
    given_up: set[int] = set()  # images that DALI gets from Pillow

    def read(index: int) -> bytes:
        data = images.read_for_decoder(index)
        if not parses(data):
            images.decode_with_pillow(index)
            data = images.read_for_decoder(index)
        return data

    def read_batch(batch: int) -> tuple[list[np.ndarray], np.ndarray]:
        positions = plan.positions(batch)
        try:
            data = pool.map(read, [order.index(p) for p in positions])
            mirrors = draw_samples(order.seed, positions).flips(flip).astype(np.int32)
            return [np.frombuffer(encoded, dtype=np.uint8) for encoded in data], mirrors
        except UserError as error:
            failures.append(error)  # DALI would wrap it in an error of its own
            raise

    def decode(data: Any) -> Any:
        # Images that are not upright are turned by Pillow.
        return fn.decoders.image(
            data,
            device="mixed" if on_gpu else "cpu",
            output_type=types.GRAY if images.channels == 1 else types.RGB,
            adjust_orientation=False,
        )

    how: dict[str, Any] = {"num_threads": num_threads, "prefetch_queue_depth": PREFETCH_BATCHES}
    how["device_id"] = (device.index or 0) if on_gpu else None  # None: DALI needs no driver

    @pipeline_def(batch_size=plan.micro_batch, **how)
    def pipeline(first: int) -> Any:
        data, mirror = fn.external_source(
            lambda batch: read_batch(first + batch), num_outputs=2, dtype=[types.UINT8, types.INT32]
        )
        image = fn.resize(
            decode(data), size=[img_size, img_size], mode="not_smaller", interp_type=types.INTERP_LINEAR, antialias=True
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

    @pipeline_def(batch_size=1, **how)
    def single_image(data: bytes) -> Any:
        return decode(fn.external_source(lambda: [np.frombuffer(data, dtype=np.uint8)], dtype=types.UINT8))

    def is_refused(index: int) -> bool:
        try:
            built(single_image(read(index))).run()
        except (RuntimeError, OSError):
            return True
        return False

    with ThreadPoolExecutor(num_threads) as pool:
        batch, running = 0, built(pipeline(0))
        while True:
            try:
                (decoded,) = running.run()
            except (RuntimeError, OSError) as error:
                if failures:
                    raise failures[0] from error
                # Pillow's check let an image pass that DALI refuses, in this batch or in those that it reads ahead.
                ahead = range(batch, batch + PREFETCH_BATCHES + 1)
                indices = {order.index(p) for b in ahead for p in plan.positions(b)} - given_up
                refused = [index for index in sorted(indices) if is_refused(index)]
                if not refused:
                    raise RankError(f"DALI cannot go on: {' '.join(str(error).split())}") from error
                for index in refused:
                    images.decode_with_pillow(index)
                given_up.update(refused)
                running = built(pipeline(batch))
                continue
            with beside_training(device):
                # Copied, because DALI writes the next batch into the same memory.
                copied = torch.from_dlpack(decoded.as_tensor()).clone()
            yield copied
            batch += 1


def parses(data: bytes) -> bool:
    """Whether DALI's parser takes the header.

    Asked before DALI is: 2.4.0 parses a batch on several threads, and where one of them fails the others may go on with
    memory that is gone, which ends the process by a segmentation fault.
    """
    from nvidia import nvimgcodec

    codec: Any = nvimgcodec  # its members are made at run time
    try:
        return codec.CodeStream(data).width > 0
    except RuntimeError:
        return False


def built(pipeline: Any) -> Any:
    pipeline.build()
    return pipeline
