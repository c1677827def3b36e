"""What a result was computed with: versions and hardware."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    names = ("torch", "timm", "torchvision", "albumentations", "numpy", "pillow", "scikit-learn", "zoo")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def processor() -> str:
    """Return the processor's name; Linux alone says it in a file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{named[0]} ({platform.machine()})" if named else platform.machine()


def device_name(device: torch.device) -> str:
    """Return the device in words: its kind, the chip, and for a CPU the threads."""
    import torch

    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"{device.type}: {processor()}, {torch.get_num_threads()} threads"
