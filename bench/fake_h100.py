"""Lets Inductor generate and Triton compile code for an H100 where there is none: fake CUDA tensors on torch for CPUs.

``install()`` starts the program anew and cannot be undone: it is for a process of its own (inductor_counts.py). It
patches internals of torch 2.13.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch._dynamo.device_interface as device_interface
import torch._inductor.config as inductor_config
import torch._inductor.fx_passes.fuse_attention as fuse_attention
import torch._inductor.fx_passes.joint_graph as joint_graph
import torch._inductor.fx_passes.pad_mm as pad_mm
import torch._inductor.graph as inductor_graph
from torch._inductor.runtime import triton_helpers
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    type="cuda",
    index=0,
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 * 2**30,
    gcnArchName="",
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
    clock_rate=1755000,
    uuid="",
    is_integrated=0,
    is_multi_gpu_board=0,
)
TARGET = GPUTarget("cuda", 90, 32)


class _Driver:
    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> ModuleType:
        return torch.cuda


def install(module: str) -> None:
    """To be called first in the ``main()`` of ``module``."""
    _preload_device(module)
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": H100,
        "get_device_capability": (9, 0),
        "get_device_name": H100.name,
        "is_bf16_supported": True,
        "synchronize": None,
        "set_device": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "_lazy_init": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, _always(answer))
    torch.version.cuda = "13.0"
    interface = device_interface.CudaInterface
    for name in ("is_available", "device_count", "current_device", "get_device_properties", "synchronize"):
        setattr(interface, name, staticmethod(getattr(torch.cuda, name)))
    interface.get_compute_capability = staticmethod(_always(90))
    interface.is_bf16_supported = staticmethod(_always(True))
    interface.get_raw_stream = staticmethod(_always(0))
    interface.Worker.get_device_properties = staticmethod(_always(H100))
    interface.Worker.current_device = staticmethod(_always(0))
    driver.set_active(_Driver())  # pyright: ignore[reportArgumentType]
    triton_helpers.set_driver_to_gpu = _always(None)
    # The tables of patterns for attention and padded products need real tensors, and a norm has neither.
    fuse_attention._sfdp_init = _always(None)
    pad_mm._pad_mm_init = _always(None)
    joint_graph.UniformValueConstantFolder._deduce_value = _deduce_on_the_cpu(
        joint_graph.UniformValueConstantFolder._deduce_value
    )
    inductor_config.force_disable_caches = True
    inductor_config.compile_threads = 1


def generated_code(codes: list[str]) -> None:
    """From now on, Inductor appends the code that it generates to ``codes`` and runs none of it."""

    def keep(graph: Any) -> ModuleType:
        code, _ = graph.codegen()
        codes.append(code.value)
        module = ModuleType("generated")
        module.__file__ = "generated.py"
        module.call = _always(None)  # pyright: ignore[reportAttributeAccessIssue]
        return module

    inductor_graph.GraphLowering.compile_to_module = keep  # pyright: ignore[reportAttributeAccessIssue]


def _always(answer: Any) -> Any:
    return lambda *_, **__: answer


def _deduce_on_the_cpu(deduce: Any) -> Any:
    """Constant folding makes the tensor of a ``full`` to look at its value."""

    def patched(self: Any, node: Any) -> Any:
        if node.op == "call_function" and node.target is torch.ops.aten.full.default and len(node.args) == 2:
            (_, value), _ = self.fetch_args_kwargs_from_env(node)
            if not isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
                return torch.full([1], value, dtype=node.kwargs.get("dtype"))
        return deduce(self, node)

    return patched


def _preload_device(module: str) -> None:
    """Torch asks once, when it is imported, what devices there are; so the answer has to be there before."""
    loaded = os.environ.pop("LD_PRELOAD", "")  # not for compilers that are started from here
    source = Path(__file__).with_suffix(".cpp")
    if source.stem in loaded:
        return
    root, library = Path(torch.__file__).parent, Path(tempfile.mkdtemp()) / f"{source.stem}.so"
    includes = [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"]
    libraries = [f"-L{root}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root}/lib"]
    command = ["g++", "-std=c++20", "-shared", "-fPIC", "-O0", *includes, source, "-o", library, *libraries]
    subprocess.run(command, check=True)
    arguments = [sys.executable, "-m", module, *sys.argv[1:]]
    os.execve(sys.executable, arguments, {**os.environ, "LD_PRELOAD": str(library)})
