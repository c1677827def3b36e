"""Memory: that which training has freed is kept for its next step, and where it is short less is done at a time."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from zoo.errors import ZooError, one_line

T = TypeVar("T")

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


# Where it is short ----------------------------------------------------------------------------------------------------

OUT_OF_MEMORY_FIX = "take a smaller model.image_size or network, or free memory"
# The last four are cuDNN's and oneDNN's words where they get no memory for their work.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "std::bad_alloc",
    "unable to find an engine to execute this computation",
    "could not create a memory",
    "could not create a primitive",
    "could not execute a primitive",
)
_sufficed: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory, of the machine or the card, did not suffice."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def give_back() -> None:
    """Give back what nothing refers to any more, such as what an error had kept."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def in_pieces(model: nn.Module, batch: Any, forward: Callable[[Any], T], least: int = 1) -> Iterator[T]:
    """Yield what forward gives for a batch: at once, or where memory does not suffice for pieces of it, in order.

    model: what forward runs; its next batches begin with the size that sufficed. batch: anything that can be sliced.
    least: the fewest images of a piece. Raises ZooError where memory does not suffice for those either.
    """
    start = 0
    while start < len(batch):
        stop = start + max(least, images_at_a_time(model, len(batch)))
        stop = len(batch) if len(batch) - stop < least else stop
        try:
            found = forward(batch[start:stop])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if stop - start < 2 * least:
                count = "one image" if stop - start == 1 else f"{stop - start} images"
                said = one_line(error, 120)
                raise ZooError(f"out of memory even with {count} at a time ({said}); {OUT_OF_MEMORY_FIX}") from error
        else:
            yield found
            start = stop
            continue
        _sufficed[model] = (stop - start + 1) // 2
        give_back()


def images_at_a_time(model: nn.Module, wanted: int) -> int:
    """Return how many images memory sufficed for in `in_pieces` of this model; wanted, where it never fell short."""
    return min(wanted, _sufficed.get(model, wanted))
