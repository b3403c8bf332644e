"""Reads what Weights & Biases leaves offline: records of protobuf in blocks as LevelDB's log has them."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BYTES_OF_A_BLOCK = 1 << 15
BYTES_OF_A_HEADER = 7
"""Of the file, and of each part of a record: a checksum, a length, and a kind."""
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[Any]:
    """The records of a ``.wandb`` file, in their order."""
    from wandb.proto import wandb_internal_pb2

    data, place, parts = path.read_bytes(), BYTES_OF_A_HEADER, b""
    assert data.startswith(b":W&B")
    while place + BYTES_OF_A_HEADER <= len(data):
        left = BYTES_OF_A_BLOCK - place % BYTES_OF_A_BLOCK
        if left < BYTES_OF_A_HEADER:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        if not kind:
            return
        place += BYTES_OF_A_HEADER
        parts = data[place : place + length] if kind in (WHOLE, FIRST) else parts + data[place : place + length]
        place += length
        if kind in (WHOLE, LAST):
            record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
            record.ParseFromString(parts)
            yield record


def history(run: Path) -> list[dict[str, Any]]:
    """The rows that all starts of a run have logged offline, without W&B's own figures."""
    rows = []
    for path in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        for record in records(path):
            if record.WhichOneof("record_type") != "history":
                continue
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append({name: value for name, value in items.items() if name not in ("_runtime", "_timestamp")})
    return rows
