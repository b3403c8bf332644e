"""Loads the C++ library of CPU operators (kernels/native/), which CMake builds when the package is installed."""

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


# At import, because torch.compile cannot trace the loading of a library.
ERROR = _load()
