"""The launches that Nsight Compute looks at: norms bound by different things, each called once between its marks.

    ncu --profile-from-start off --set full python -m scalelong.bench.profiled_norms

Forward of one read (contiguous, 256+128 at 32 x 32), backward of two (channels_last, 384+384 at 32 x 32), and the sums
and the second walk of 384+192 at 64 x 64, of few enough images for one step.
"""

from contextlib import nullcontext
from dataclasses import replace

import torch

from scalelong.bench.bench_group_norm import make_inputs, ours
from scalelong.bench.compare import DEVICE, as_leaves
from scalelong.bench.shapes import SKIP_CONCATS

CASES = (
    ("ddpm-cifar10-256+128:32", "contiguous", "forward", None),
    ("adm-imagenet64-384+384:32", "channels_last", "backward", None),
    ("adm-imagenet64-384+192:64", "channels_last", "forward", 4),
)


def main() -> None:
    by_name = {str(concat): concat for concat in SKIP_CONCATS}
    for name, layout, direction, batch in CASES:
        concat = by_name[name] if batch is None else replace(by_name[name], gpu_batch=batch)
        leaves = as_leaves(make_inputs(concat, torch.bfloat16, layout))
        for is_profiled in (False, True):
            marks = torch.cuda.profiler.profile if is_profiled and DEVICE.type == "cuda" else nullcontext
            with marks() if direction == "forward" else nullcontext():
                y = ours(*leaves)
            with marks() if direction == "backward" else nullcontext():
                torch.autograd.grad(y, leaves, torch.ones_like(y))
        print(f"{direction} {name} {layout}")


if __name__ == "__main__":
    main()
