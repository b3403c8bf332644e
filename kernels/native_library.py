"""Loads the C++ library of CPU operators (kernels/native/), which CMake builds when the package is installed."""

import json
from importlib import metadata
from pathlib import Path

import torch

PATH = Path(__file__).resolve().parent / "native" / "libscalelong_native.so"


def _load() -> str | None:
    """Why the library is not there; None when it is loaded."""
    if not PATH.exists():
        return f"the native library is not built ({PATH} is missing)"
    try:
        torch.ops.load_library(PATH)
    except OSError as error:
        return f"the native library does not load ({error})"
    return None


def how_to_build() -> str:
    """What makes the library, in a clone of the project or where it was installed without one."""
    if (PATH.parents[2] / "setup.py").is_file():
        return "build it with: pip install -e . (or, without installing, python setup.py build_ext --inplace)"
    return (
        "install scalelong again with a C++ compiler at hand and SCALELONG_NATIVE unset: "
        f"pip install --force-reinstall --no-deps --no-cache-dir --no-binary scalelong {_installed_from()}"
    )


def _installed_from() -> str:
    """What pip was given, as it notes it (PEP 610)."""
    try:
        origin = json.loads(metadata.distribution("scalelong").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        return "scalelong"
    repository = origin.get("vcs_info", {}).get("vcs")
    url = origin.get("url", "scalelong")
    return f"{repository}+{url}" if repository else url


# At import, because torch.compile cannot trace the loading of a library.
ERROR = _load()
