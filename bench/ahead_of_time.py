"""Compiles Triton kernels for a GPU that need not be there, as their launchers would."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from scalelong.kernels import group_norm_triton

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
STAGES = ("resident", "looped", "sums", "apply")


@dataclass(frozen=True)
class Launch:
    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, int]

    @property
    def stage(self) -> str | None:
        """None for the small kernels, which hold no tile of an image."""
        return next((x for x in self.arguments if x in STAGES), None)

    @property
    def name(self) -> str:
        return f"{self.kernel.__name__} {self.stage or ''}".rstrip()

    def compile(self, arch: int) -> Any:
        """Triton itself decides what to specialise on, as in a launch."""
        target = GPUTarget("cuda", arch, 32)
        backend = make_backend(target)
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        keywords = {**self.options, "debug": False, "instrumentation_mode": ""}
        bound, specialization, options = bind(*self.arguments, **keywords)
        options, signature, constants, attributes = self.kernel._pack_args(
            backend, keywords, bound, specialization, options
        )
        source = ASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(source, target=target, options=options.__dict__)


def spill_bytes(compiled: Any) -> int:
    """Of the stack, per thread: the kernels put nothing else there."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return int(re.findall(r"STACK:(\d+)", usage)[0])


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Launches inside run nothing and are listed instead."""
    found: list[Launch] = []

    def record(kernel: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool, **options: int) -> None:
        found.append(Launch(kernel, arguments, options))

    with patch.object(JITFunction, "run", record):
        yield found


def launches_of(
    direction: str,
    shape: tuple[int, ...],
    *,
    channels_last: bool,
    dtype: torch.dtype,
    is_adaptive: bool = False,
    act: str | None = "silu",
    parameter_dtype: torch.dtype = torch.float32,
) -> list[Launch]:
    """Of skip_group_norm, one of each kernel and stage that (N, Ch, Cs, G, height, width) takes."""
    found: dict[str, Launch] = {}

    def record(kernel: Any, *arguments: Any, **options: int) -> Any:
        def launch(num_programs: int, first_image: int = 0) -> None:
            recorded = Launch(kernel, (first_image, *arguments), options)
            found.setdefault(recorded.name, recorded)

        return launch

    N, Ch, Cs, G, *spatial = shape
    C = Ch + Cs

    def image(channels: int) -> torch.Tensor:
        x = torch.empty(N, channels, *spatial, dtype=dtype, device="meta")
        return x.to(memory_format=torch.channels_last) if channels_last else x

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, device="meta")

    gain, shift = empty(N, 2 * C).chunk(2, dim=1) if is_adaptive else (None, None)
    scale, weight, bias = (empty(*size).to(parameter_dtype) for size in ((), (C,), (C,)))
    inputs = (image(Ch), image(Cs), scale, 1.0, weight, bias, gain, shift)
    statistics = (empty(N, G), empty(N, G))
    with patch.object(group_norm_triton, "_launcher", record):
        if direction == "forward":
            group_norm_triton.forward(*inputs, G, 1e-5, act, channels_last, image(C), *statistics)
        else:
            group_norm_triton.backward(image(C), *inputs, *statistics, G, act, channels_last, image(Ch), image(Cs))
    return list(found.values())
