"""What the C library does with memory that training has freed and will want again in the next step."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)
_GIB, _MIB = 2**30, 2**20


@contextmanager
def freed_memory_kept() -> Iterator[bool]:
    """Let a training process keep the memory that it frees, and say whether it does; at the end it gives all back.

    glibc returns large blocks to the system at once, and every step then asks for all its activations anew, a page
    fault for each 4 KiB: a third of a step of EfficientNet-B0 on a CPU. Blocks over 1 GiB still go back. Costs up to
    a quarter more memory at the peak; changes no number. Elsewhere than with glibc nothing is done.
    """
    libc = _glibc()
    kept = libc is not None and bool(libc.mallopt(_MMAP_THRESHOLD, _GIB) and libc.mallopt(_TRIM_THRESHOLD, -1))
    try:
        yield kept
    finally:
        if libc is not None:
            # The most that glibc itself rises to by what it sees; its rise ends once a threshold has been set.
            libc.mallopt(_MMAP_THRESHOLD, 32 * _MIB)
            libc.mallopt(_TRIM_THRESHOLD, 64 * _MIB)
            libc.malloc_trim(0)


def _glibc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
