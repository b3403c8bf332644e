"""Compiles Triton kernels for a GPU that need not be there, as their launchers would."""

import math
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.pool import Pool
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from scalelong.bench.machine_code import resource_usage
from scalelong.kernels import group_norm_triton
from scalelong.kernels.group_norm_arguments import Options, Tensors, Wanted


@dataclass(frozen=True)
class Launch:
    kernel: Any
    arguments: tuple[Any, ...]  # constants too, in the order of the kernel's parameters
    options: dict[str, int]
    num_programs: int = 1  # of the whole grid

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def compile(self, arch: int) -> Any:
        """Triton itself decides what to specialise on, as in a launch."""
        target = GPUTarget("cuda", arch, 32)
        source, options, _ = self._source(target)
        return triton.compile(source, target=target, options=options.__dict__)

    def parameters(self, arch: int) -> list[Any]:
        """What a launch hands over: the arguments that are not compiled in."""
        source, _, bound = self._source(GPUTarget("cuda", arch, 32))
        return [x for name, kind in source.signature.items() for x in _handed_over(bound[name], kind)]

    def key(self, arch: int) -> str:
        """The same for launches of one compiled kernel."""
        source, options, _ = self._source(GPUTarget("cuda", arch, 32))
        return f"{source.hash()} {options.hash()}"

    def _source(self, target: GPUTarget) -> tuple[ASTSource, Any, dict[str, Any]]:
        backend = make_backend(target)
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        keywords = {**self.options, "debug": False, "instrumentation_mode": ""}
        bound, specialization, options = bind(*self.arguments, **keywords)
        options, signature, constants, attributes = self.kernel._pack_args(
            backend, keywords, bound, specialization, options
        )
        return ASTSource(self.kernel, signature, constants, attributes), options, bound


def compiling_processes() -> Pool:
    """On all cores but two, which are left to whoever measures meanwhile."""
    return multiprocessing.get_context("fork").Pool(max(1, len(os.sched_getaffinity(0)) - 2))


def _handed_over(value: Any, kind: Any) -> Iterator[Any]:
    """Of a tuple, each part by itself."""
    if isinstance(kind, tuple | list):
        for part, of_part in zip(value, kind, strict=True):
            yield from _handed_over(part, of_part)
    elif kind != "constexpr":
        yield value


def spill_bytes(compiled: Any) -> int:
    """Of the stack, per thread: the kernels put nothing else there."""
    return resource_usage(compiled)["STACK"]


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Launches inside run nothing and are listed instead."""
    found: list[Launch] = []

    def record(kernel: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool, **keywords: Any) -> None:
        constants = [keywords.pop(name) for name in kernel.arg_names[len(arguments) :] if name in keywords]
        found.append(Launch(kernel, (*arguments, *constants), keywords, math.prod(grid)))

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
    """Of skip_group_norm at (N, Ch, Cs, G, height, width), in their order."""
    N, Ch, Cs, G, *spatial = shape
    C = Ch + Cs

    def image(channels: int) -> torch.Tensor:
        x = torch.empty(N, channels, *spatial, dtype=dtype, device="meta")
        return x.to(memory_format=torch.channels_last) if channels_last else x

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, device="meta")

    gain, shift = empty(N, 2 * C).chunk(2, dim=1) if is_adaptive else (None, None)
    scale, weight, bias = (empty(*size).to(parameter_dtype) for size in ((), (C,), (C,)))
    tensors = Tensors(image(Ch), image(Cs), scale, weight, bias, gain, shift)
    options, wanted = Options(1.0, G, 1e-5, act), Wanted(gain=is_adaptive, shift=is_adaptive)
    statistics = (empty(N, G), empty(N, G))
    with recorded_launches() as launches:
        if direction == "forward":
            group_norm_triton.forward(tensors, options, channels_last, image(C), *statistics)
        else:
            group_norm_triton.backward(image(C), tensors, *statistics, options, channels_last, wanted)
    return launches


def distinct(launches: Iterable[Launch]) -> list[Launch]:
    """The first of each kernel and stage."""
    return list({launch.name: launch for launch in reversed(list(launches))}.values())[::-1]
