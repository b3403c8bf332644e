"""Launches each operator's kernels by Triton's own launcher for NVIDIA GPUs, over a libcuda that notes what it gets.

Prints how many launches handed over, bit for bit, what Triton's path hands over. test_nvidia_launcher.py runs it.
"""

import ctypes
import os
import re
import sys
from typing import Any

from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel

from scalelong.bench import host
from scalelong.kernels.launches import Plan

libcuda = ctypes.CDLL(sys.argv[1], mode=os.RTLD_GLOBAL)
libcuda.parameter.restype = ctypes.c_uint64


class NvidiaDriver(host.StubbedDriver):
    """With the launchers of a real one; "functions" are what the library above takes for them."""

    def __init__(self, *_: Any) -> None:
        super().__init__()
        self.launcher_cls = nvidia.CudaLauncher
        if hasattr(nvidia, "annotate_arguments"):  # Triton 3.7 has one launcher, 3.6 generates one for each signature
            utils = nvidia.CudaUtils()
            self.utils.launch = utils.launch
            self.utils.build_signature_metadata = utils.build_signature_metadata


def init_handles(kernel: Any, real: Any = CompiledKernel._init_handles) -> None:
    """Gives a kernel a function that knows what its PTX says of its parameters."""
    if kernel.module is not None:
        return
    real(kernel)
    (head,) = re.findall(r"\.entry \w+\((.*?)\)", kernel.asm["ptx"], re.DOTALL)
    sizes = [int(bits) // 8 for bits in re.findall(r"\.param \.[a-z](\d+)", head)]
    kernel.own_function = (ctypes.c_int * (len(sizes) + 1))(len(sizes), *sizes)
    kernel.function = ctypes.addressof(kernel.own_function)


def handed_over() -> list[list[int]]:
    found = [[libcuda.parameter(i, j) for j in range(libcuda.parameters(i))] for i in range(libcuda.launches())]
    libcuda.forget()
    return found


num_same = 0


def run(plan: Plan, tensors: Any, real: Any = Plan.run) -> None:
    global num_same
    if not plan.is_compiled:
        real(plan, tensors)
    handed_over()
    real(plan, tensors)
    ours = handed_over()
    for launch in plan.launches:
        launch.through_triton(tensors)
    assert ours == handed_over(), plan.launches
    assert len(ours) == len(plan.launches)
    num_same += len(ours)


host.StubbedDriver = NvidiaDriver  # type: ignore[misc]
CompiledKernel._init_handles = init_handles  # type: ignore[assignment, method-assign]
Plan.run = run  # type: ignore[method-assign]
with host.stubbed_launches():
    for case in host.make_cases().values():
        if case.op != "attention":
            host.forward_and_backward(case.call, case.inputs)()
print(num_same)
