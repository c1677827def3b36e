"""Where and in which number format a run is computed."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from zoo.errors import ZooError, one_line


@dataclass(frozen=True)
class PrecisionPlan:
    """The number format of the forward pass; weights, gradients and optimiser stay float32."""

    dtype: str
    channels_last: bool

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return the context in which a forward pass runs."""
        if self.dtype == "float32":
            return nullcontext()
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[self.dtype]
        return torch.autocast(device.type, dtype=kind)

    def place(self, images: torch.Tensor) -> torch.Tensor:
        """Return images of shape (B, C, H, W) in the plan's memory format."""
        return images.contiguous(memory_format=self.memory_format)

    @property
    def memory_format(self) -> torch.memory_format:
        """Return torch's name of the memory format."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def facts(self) -> dict[str, Any]:
        """Return the plan as run.json records it."""
        return asdict(self)


def choose_device(wanted: str) -> torch.device:
    """Return the device: `auto` takes CUDA, then MPS, then the CPU.

    Raises ZooError where the wanted device is not there.
    """
    there = ["cpu"]
    if torch.backends.mps.is_available():
        there.insert(0, "mps")
    if torch.cuda.is_available():
        there.insert(0, "cuda")
    if wanted == "auto":
        return torch.device(there[0])
    kind, colon, index = wanted.partition(":")
    counts = {"cuda": torch.cuda.device_count()}
    if kind not in there or (colon and not (index.isdecimal() and int(index) < counts.get(kind, 1))):
        listed = ", ".join(there)
        raise ZooError(f"device {one_line(wanted, 60)!r} is not on this machine; take auto or one of {listed}")
    return torch.device(wanted)


def choose_plan(wanted: str, device: torch.device) -> PrecisionPlan:
    """Return the number format for a device: bf16 on CUDA cards that have it, else float32.

    On a CPU bf16 makes some networks twice as fast and others slower, so it is only taken when asked for.
    Raises ZooError for fp16, which needs CUDA.
    """
    if wanted == "fp16":
        raise ZooError("precision 'fp16' is not offered for training; take bf16 or float32: --set precision=auto")
    if wanted != "auto":
        return PrecisionPlan(wanted, channels_last=True)
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return PrecisionPlan("bf16" if has_bf16 else "float32", channels_last=True)


def cores() -> int:
    """Return the CPU cores that this process may use; unlike os.cpu_count it knows of containers."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def choose_workers(wanted: int | str, device: torch.device) -> int:
    """Return the loading processes: none beside CPU training, which needs every core itself.

    Cached pixels make loading cheap; a GPU gets up to eight.
    """
    if isinstance(wanted, int):
        return wanted
    return 0 if device.type == "cpu" else max(0, min(8, cores() - 1))


def set_threads() -> int:
    """Let torch use the cores that this process may use, and return their number."""
    if torch.get_num_threads() > cores():
        torch.set_num_threads(cores())
    return torch.get_num_threads()
