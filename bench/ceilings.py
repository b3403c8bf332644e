"""What the machine can do at most, measured: a copy (GB/s read and written), a product of 8192 x 8192 x 8192 (TFLOP/s).

python -m scalelong.bench.ceilings
"""

import os
import platform

import torch

from scalelong.bench.compare import COPY_BYTES, DEVICE, DTYPE
from scalelong.bench.record import Row, append_rows, environment
from scalelong.bench.timing import IS_DRY_RUN, Timing, gb_per_s, measure

SIDE = 64 if IS_DRY_RUN else 8192


def copy_timing() -> Timing:
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return measure(None, {"copy": lambda: target.copy_(source)}, device=DEVICE, max_seconds=0.2)["copy"]


def product_timing() -> Timing:
    """On random numbers: on zeros a GPU draws less power and runs faster than it ever will."""
    a, b = torch.randn(2, SIDE, SIDE, device=DEVICE).to(DTYPE)
    out = torch.empty_like(a)
    return measure(None, {"product": lambda: torch.mm(a, b, out=out)}, device=DEVICE, max_seconds=0.5)["product"]


def row(op: str, shape: str, timing: Timing, rate: float | None) -> Row:
    return Row(
        **environment(DEVICE),
        op=op,
        shape=shape,
        dtype=str(DTYPE).removeprefix("torch.") if op == "product" else "uint8",
        layout="contiguous",
        direction="forward",
        provider="eager",
        ms_median=timing.ms_median,
        ms_p20=timing.ms_p20,
        ms_p80=timing.ms_p80,
        host_us=timing.host_us,
        gb_per_s=rate,
    )


def main() -> None:
    copied, multiplied = copy_timing(), product_timing()
    rate = gb_per_s(2 * COPY_BYTES, copied.ms_median)
    append_rows([row("copy", f"{COPY_BYTES} B", copied, rate), row("product", f"{SIDE}^3", multiplied, None)])
    where = environment(DEVICE)
    print(f"{where['device']}, torch {where['torch']}, triton {where['triton']}, python {platform.python_version()},")
    print(f"{os.cpu_count()} cores, commit {where['commit']}: copy {rate:.0f} GB/s,")
    print(f"product {2 * SIDE**3 / multiplied.ms_median / 1e9:.0f} TFLOP/s")


if __name__ == "__main__":
    main()
