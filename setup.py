"""Builds the native library of CPU operators with CMake; everything else about the package is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = "libscalelong_native.so"
NATIVE = os.environ.get("SCALELONG_NATIVE", "")
"""0 leaves the library out: the operators then run in plain PyTorch on a CPU. A path takes a library built before."""


class BuildWithCMake(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1], LIBRARY))

    def build_extension(self, ext: Extension) -> None:
        built = Path(NATIVE) if NATIVE else self.compiled()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        # Another inode, so that a process which has the old library open keeps it.
        shutil.copyfile(built, target.with_suffix(".new"))
        target.with_suffix(".new").replace(target)

    def compiled(self) -> Path:
        import torch  # a build requirement: its headers have the stable ABI

        build = Path(self.build_temp).resolve() / "native"
        cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        if cmake is None:
            sys.exit("scalelong: building the native CPU library needs cmake (pip install cmake)")
        for command in (
            [cmake, "-S", str(ROOT), "-B", str(build), f"-DTORCH_ROOT={Path(torch.__file__).parent}"],
            [cmake, "--build", str(build), "--parallel", "--config", "Release"],
        ):
            subprocess.run(command, check=True)
        return build / LIBRARY


class WheelForAnyPython(bdist_wheel):
    """One wheel for a platform: the library knows torch's stable ABI, and nothing of Python's."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[] if NATIVE == "0" else [Extension("scalelong.kernels.native.library", [])],
    cmdclass={"build_ext": BuildWithCMake, "bdist_wheel": WheelForAnyPython},
)
