"""What torch.compile would launch on an H100 for norms of shapes.py, counted and modelled as issue_model.py does ours.

    python -m scalelong.bench.inductor_counts > bench/results/modelled/compile-h100.csv     minutes; g++, no GPU

Inductor of torch 2.13 generates its code for fake CUDA tensors with an H100's properties; its kernels are compiled with
every configuration that it would time, and the fastest by the model is taken. Parameters are of bf16, and in
channels_last the output may have any layout, both of which favour it. Kernels that touch no tensor of a megabyte are
not compiled.
"""

import argparse
import copy
import csv
import importlib.util
import math
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._inductor.runtime.hints import HeuristicType
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.compiler import ASTSource

from scalelong.bench import fake_h100
from scalelong.bench.issue_model import LAUNCH_US, LEAST_US, NUM_MULTIPROCESSORS, KernelFigures, ModelledLaunch
from scalelong.bench.machine_code import REGISTERS, machine_code
from scalelong.bench.memory_traffic import L2, LEAST_BYTES
from scalelong.bench.shapes import GROUPS, SKIP_CONCATS, SkipConcat
from scalelong.bench.warp_path import LaunchTotals, WarpPath

UNORDERED = {"loop_ordering_after_fusion": False}
UNINDEXED = {**UNORDERED, "loop_reindexing_after_fusion": False}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "unordered": UNORDERED,  # fuses more of backward in NCHW
    "unordered unindexed": UNINDEXED,
    "unordered unindexed autotuned": {**UNINDEXED, "max_autotune": True},
}
SHAPES = (  # of which the project states ratios
    "ddpm-cifar10-256+128:32",
    "adm-imagenet64-384+192:64",
    "adm-imagenet64-384+384:32",
    "adm-imagenet64-576+384:32",
    "adm-imagenet64-768+576:16",
    "sd-1.5-640+320:64",
    "sd-1.5-1280+640:32",
    "sdxl-640+320:128",
)
LAYOUTS = ("NCHW", "NHWC")
MOST_SPILL_BYTES = 16  # Inductor takes no configuration that spills more
_ITEMSIZES = {"*bf16": 2, "*fp16": 2, "*fp32": 4, "*i64": 8, "*i32": 4, "*i1": 1, "*fp64": 8}


@dataclass(frozen=True, kw_only=True)
class Row:
    torch: str
    triton: str
    shape: str
    layout: str
    direction: str
    options: str
    num_launches: int
    passes: float  # bytes from and to DRAM or L2, second reads too, in units of the output
    instructions_per_element: float
    modelled_us: float


class Call(NamedTuple):
    source: str
    arguments: list[str]  # names of buffers, and numbers


def skip_group_norm(h: Tensor, s: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(torch.cat([h, s * scale], 1), GROUPS, weight, bias))


def generated(concat: SkipConcat, channels_last: bool, options: dict[str, Any]) -> list[str]:
    """Inductor's code for forward and for backward."""
    torch._dynamo.reset()
    codes: list[str] = []
    fake_h100.generated_code(codes)
    N, size = concat.gpu_batch, concat.size

    def image(channels: int) -> Tensor:
        x = torch.empty(N, channels, size, size, dtype=torch.bfloat16, device="cuda")
        return x.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format).requires_grad_()

    def parameter(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.bfloat16, device="cuda", requires_grad=True)

    with FakeTensorMode(allow_non_fake_inputs=True), functorch_config.patch(force_non_lazy_backward_lowering=True):
        C = concat.num_channels
        inputs = (image(concat.num_hidden), image(concat.num_skip), parameter(), parameter(C), parameter(C))
        try:
            torch.compile(skip_group_norm, fullgraph=True, dynamic=False, options=options or None)(*inputs)
        except Exception:
            if len(codes) < 2:  # what was compiled cannot run, and fails once it is there
                raise
    return codes


def calls(code: str) -> tuple[list[Call], dict[str, tuple[str, int]]]:
    """The kernels that generated code launches, and for each buffer its memory and number of elements."""
    sources = dict(re.findall(r"^(triton_\w+) = async_compile\.triton\('\w+', '''(.*?)'''", code, re.M | re.S))
    buffers: dict[str, tuple[str, int]] = {}
    found = []
    body = code[code.index("def call(self") :].partition("\n        return (")[0]
    for line in map(str.strip, body.splitlines()):
        if match := re.match(r"assert_size_stride\((\w+), \(([^)]*)\)", line):
            buffers.setdefault(match[1], (match[1], _product(match[2])))
        elif match := re.match(r"(\w+) = empty_strided_cuda\(\(([^)]*)\)", line):
            buffers[match[1]] = (match[1], _product(match[2]))
        elif match := re.match(r"(\w+) = reinterpret_tensor\((\w+), \(([^)]*)\)", line):
            buffers[match[1]] = (buffers[match[2]][0], _product(match[3]))
        elif match := re.match(r"(\w+) = (\w+); del", line):
            buffers[match[1]] = buffers[match[2]]
        elif match := re.match(r"(triton_\w+)\.run\((.*), stream=", line):
            arguments = match[2]
            for view, of, size in re.findall(r"(reinterpret_tensor\((\w+), \(([^)]*)\), \([^)]*\), \d+\))", arguments):
                name = f"view_{len(buffers)}"
                buffers[name] = (buffers[of][0], _product(size))
                arguments = arguments.replace(view, name, 1)
            found.append(Call(sources[match[1]], arguments.split(", ")))
        elif "extern_kernels." in line:
            raise ValueError(f"Inductor calls a kernel that is not its own: {line}")
    return found, buffers


def _product(sizes: str) -> int:
    return math.prod(int(x) for x in sizes.split(",") if x.strip())


def modelled_launches(code: str, folder: Path) -> Iterator[ModelledLaunch | None]:
    """In their order; None for one that touches no large tensor."""
    found, buffers = calls(code)
    l2 = L2()
    for call in found:
        autotuner = _autotuner(call.source, folder)
        kinds = autotuner.triton_meta["signature"]
        given = [name for name, kind in kinds.items() if kind != "constexpr" or name.endswith("numel")]
        bound = dict(zip(given, call.arguments, strict=True))
        sizes = {name.removesuffix("numel"): int(x) for name, x in bound.items() if name.endswith("numel")}
        bound = {name: x for name, x in bound.items() if kinds[name] != "constexpr"}
        num_points = math.prod(sizes.values())
        tensors = {
            i: (buffers[x][0], min(buffers[x][1], num_points) * _ITEMSIZES[kinds[name]])
            for i, (name, x) in enumerate(bound.items())
            if kinds[name].startswith("*")
        }
        if all(num_bytes < LEAST_BYTES for _, num_bytes in tensors.values()):
            yield None
            continue
        parameters = [None if kinds[name].startswith("*") else int(x) for name, x in bound.items()]
        candidates = _candidates(autotuner, parameters, sizes)
        traffic = l2.launch(candidates[0][0].accesses, tensors)
        launches = [ModelledLaunch(*candidate, traffic) for candidate in candidates]
        yield min(launches, key=lambda x: (x.kernel.stack_bytes > MOST_SPILL_BYTES, x.us))


def _candidates(
    autotuner: Any, parameters: list[int | None], sizes: dict[str, int]
) -> list[tuple[KernelFigures, int, LaunchTotals]]:
    """Of each configuration, and of those with half the block that Inductor adds where registers leave room for few."""
    found = [_candidate(autotuner, config, parameters, sizes) for config in autotuner.configs]
    if autotuner.heuristic_type != HeuristicType.REDUCTION:
        return found
    for config, (kernel, _, _) in zip(autotuner.configs, tuple(found), strict=True):
        block = config.kwargs.get("R0_BLOCK", 0)
        at_once = NUM_MULTIPROCESSORS * max(1, REGISTERS // (32 * kernel.registers * kernel.num_warps))
        num_blocks = math.ceil(autotuner.size_hints["x"] / config.kwargs.get("XBLOCK", 1))
        if block > 64 and kernel.registers > 32 and num_blocks > at_once and len(found) < len(autotuner.configs) + 3:
            halved = copy.deepcopy(config)
            halved.kwargs["R0_BLOCK"] = block // 2
            found.append(_candidate(autotuner, halved, parameters, sizes))
    return found


def _candidate(
    autotuner: Any, config: Any, parameters: list[int | None], sizes: dict[str, int]
) -> tuple[KernelFigures, int, LaunchTotals]:
    meta = autotuner._create_compile_meta(config)
    options = autotuner._create_compile_options(config, meta)
    source = ASTSource(autotuner.fn, meta["signature"], meta["constants"], meta["configs"][0])
    compiled = triton.compile(source, target=fake_h100.TARGET, options=options)
    code = machine_code(compiled, 90)
    blocks = {axis: config.kwargs.get(f"{axis.upper()}BLOCK", 1) for axis in "xyz"}
    grid = tuple(math.ceil(sizes.get(axis, 1) / block) for axis, block in blocks.items())
    totals = WarpPath(code).totals_of_a_launch(parameters, grid)
    return KernelFigures.of(autotuner.fn.__name__, code, compiled.asm["ttir"]), math.prod(grid), totals


def _autotuner(source: str, folder: Path) -> Any:
    """Executes the generated file of a kernel, which defines it."""
    name = re.findall(r"^def (triton_\w+)\(", source, re.M)[0]
    path = folder / f"{name}_{len(list(folder.iterdir()))}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def rows(concat: SkipConcat, layout: str, name: str) -> Iterator[Row]:
    num_elements = concat.num_elements(concat.gpu_batch)
    with tempfile.TemporaryDirectory() as folder:
        codes = generated(concat, layout == "NHWC", OPTIONS[name])
        for direction, code in zip(("forward", "backward"), codes, strict=True):
            launches = list(modelled_launches(code, Path(folder)))
            large = [x for x in launches if x is not None]
            yield Row(
                torch=torch.__version__,
                triton=triton.__version__,
                shape=str(concat),
                layout=layout,
                direction=direction,
                options=name,
                num_launches=len(launches),
                passes=round(sum(x.traffic.in_use + x.traffic.second_reads for x in large) / (2 * num_elements), 2),
                instructions_per_element=round(32 * sum(x.totals.instructions for x in large) / num_elements, 1),
                modelled_us=round(sum(x.us for x in large) + (len(launches) - len(large)) * (LAUNCH_US + LEAST_US), 1),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=re.compile, default=re.compile(""), help="only those that this finds")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    arguments = parser.parse_args()
    fake_h100.install("scalelong.bench.inductor_counts")
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([field.name for field in fields(Row)])
    for concat in SKIP_CONCATS:
        if str(concat) in SHAPES and arguments.shapes.search(str(concat)):
            for layout, name in product(arguments.layouts, arguments.options):
                writer.writerows(astuple(row) for row in rows(concat, layout, name))
                sys.stdout.flush()


if __name__ == "__main__":
    main()
