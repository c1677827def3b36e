"""The processor cores that this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path


def cores() -> int:
    """Return how many cores this process may use, also where a container has a share of the machine's time alone."""
    known = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = core_quota()
    return known if share is None else min(known, max(1, math.ceil(share)))


def core_quota(file: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    """Return how many cores' time a control group (version 2) allows; None where it sets no limit.

    The kernel's `cpu.max`: microseconds of computing, or `max`, and of the period.
    """
    try:
        most, period = (int(each) for each in file.read_text(encoding="ascii").split())
    except (OSError, ValueError):
        return None
    return most / period if period > 0 else None
