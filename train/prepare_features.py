"""Writes a shard of latents with text features: what ``scalelong prepare`` makes of U-ViT's features of MS-COCO."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

# Room for the header of safetensors, which is padded with spaces: shapes are known when all is written.
HEADER_BYTES = 512
DTYPES: dict[str, tuple[type[np.floating], str]] = {"fp16": (np.float16, "F16"), "fp32": (np.float32, "F32")}


def write_shard(
    path: Path, features: Iterable[tuple[np.ndarray, list[np.ndarray]]], num_captions: int, dtype: str
) -> None:
    """``moments`` (N, 1, 2, C, H, W) and ``context`` (N, K, L, D) in safetensors; no file where there is no image.

    Texts are written as they come, because those of a shard are gigabytes.

    Args:
        features: of each image, mean and standard deviation (2, C, H, W), and the text (L, D) of each caption.
        num_captions: K; an image with fewer repeats its own in turn.
    """
    kind, name = DTYPES[dtype]
    staging = path.with_name(f".{path.name}.writing")
    moments, shapes = [], {}
    with staging.open("wb") as file:
        file.write(bytes(HEADER_BYTES))
        for mean_and_std, texts in features:
            context = np.stack([texts[k % len(texts)] for k in range(num_captions)]).astype(kind)
            file.write(context.tobytes())
            moments.append(mean_and_std.astype(kind)[None])
            shapes = {"context": (len(moments), *context.shape), "moments": (len(moments), *moments[0].shape)}
        file.write(b"".join(array.tobytes() for array in moments))
        file.seek(0)
        file.write(_header(shapes, name, np.dtype(kind).itemsize))
    if moments:
        staging.rename(path)
    else:
        staging.unlink()


def _header(shapes: dict[str, tuple[int, ...]], dtype: str, itemsize: int) -> bytes:
    """Of tensors that follow each other in this order."""
    tensors, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + itemsize * int(np.prod(shape))
        tensors[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text_bytes = HEADER_BYTES - 8
    return text_bytes.to_bytes(8, "little") + json.dumps(tensors).encode().ljust(text_bytes)
