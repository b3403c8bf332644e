"""Lets the C allocator keep freed memory, for runs on a CPU.

glibc maps every allocation above 32 MB anew and returns it when freed, so each large tensor pays page faults at every
step: up to 5x on `a * 2` over 36 MB (docs/log.md).
"""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Call before the first large allocation. False where the C library is not glibc, and nothing is changed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1))
