"""Which of a CUDA card's kernels compute a run: those that give the same bits every time, as far as torch has them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_NO_SUCH_KERNEL = "does not have a deterministic implementation"
# What torch says of kernels that differ, of which the run's notes tell, and torch.compile of a format nobody chose.
_SAID = f"{_NO_SUCH_KERNEL}|defaults to a non-deterministic algorithm|TensorFloat32 tensor cores"


@contextmanager
def steady_kernels(device: torch.device, *, strict: bool) -> Iterator[None]:
    """Let a CUDA card compute the same bits from the same numbers, within the block; elsewhere nothing is changed.

    strict: what torch has no such kernel for raises RuntimeError (`lacks_steady_kernel`); else the usual one is taken.
    Attention has steady kernels in strict blocks alone.
    """
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    flags = cudnn.benchmark, cudnn.deterministic
    mode = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    # cuBLAS reads it when it is first used; without it torch does not take it for steady.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        cudnn.benchmark, cudnn.deterministic = False, True
        torch.use_deterministic_algorithms(True, warn_only=not strict)
        # Memory that was not written to is read by nobody here, and filling it takes time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=f".*({_SAID})", category=UserWarning)
            yield
    finally:
        cudnn.benchmark, cudnn.deterministic = flags
        torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def lacks_steady_kernel(error: BaseException) -> bool:
    """Return whether an error says that torch has no kernel which gives the same bits every time."""
    return isinstance(error, RuntimeError) and _NO_SUCH_KERNEL in str(error)
