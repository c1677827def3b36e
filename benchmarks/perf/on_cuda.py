"""What `throughput.py` measures on a CUDA card, where processes load images beside the steps.

Turns after every update would give the loading processes a rest in each of the floor's turns, and they would work for
nothing then. So the floor is measured before and after, and ours between them without a break: `images_per_s` is of
whole epochs from the first batch asked for to the last update done, the median over all epochs but the first;
`whole_images_per_s` counts what lies between them too, scoring val and writing checkpoints. `loader_images_per_s` is
what the loading processes give where nothing else is done. `free_floor_images_per_s` is the floor's with the fastest
kernels in place of those that give the same bits every time. Every clock is read when the card has done its work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

BLOCK_S = 3.0
FLOOR_STEPS = 20  # between two readings of the clock, as training has it


class Epochs:
    """What `zoo.train` calls: when each epoch's updates were done, and when the epoch was."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.updates: list[float] = []
        self.wholes: list[float] = []
        self.last: tuple[int, int] = (0, 0)
        self.begun = 0.0

    def __call__(self, tick: Any) -> None:
        """Read the clock at the end of an epoch's updates, and again when val is scored and the epoch kept."""
        if tick.phase != "network":
            self.begun = time.perf_counter()
            return
        if tick.done == tick.total:
            torch.cuda.synchronize(self.device)
            now = time.perf_counter()
            if (tick.epoch, tick.done) != self.last:
                self.updates.append(now - self.begun)
            else:
                self.wholes.append(now - self.begun)
                self.begun = now
        self.last = (tick.epoch, tick.done)


@contextmanager
def fastest_kernels() -> Iterator[None]:
    """Let cuDNN try its kernels and take the fastest, within the block."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def step_s(floor: Callable[[int], None]) -> list[float]:
    """Return seconds of a step of the floor, of each of several rows of steps."""
    floor(FLOOR_STEPS)  # warm-up
    found: list[float] = []
    begun = time.perf_counter()
    while len(found) < 3 or time.perf_counter() - begun < BLOCK_S:
        started = time.perf_counter()
        floor(FLOOR_STEPS)
        found.append((time.perf_counter() - started) / FLOOR_STEPS)
    return found


def loader_s(plan: Any, precision: Any, device: torch.device, folder: Path) -> float:
    """Return the seconds in which the loading processes give an epoch's batches to nobody; the second of two."""
    from zoo.data.cache import open_pixels
    from zoo.training.inputs import make_inputs
    from zoo.training.parallel import ALONE
    from zoo.training.strategy import Phase

    train, val = (open_pixels(plan.dataset, split, plan.preprocessing) for split in ("train", "val"))
    phase = Phase("network", 1, 2)
    batches = make_inputs(plan, plan.model()[0], train, val, precision, device, ALONE, folder, phase).batches
    try:
        for _ in batches.epoch(1):
            pass
        started = time.perf_counter()
        for _ in batches.epoch(2):
            pass
        return time.perf_counter() - started
    finally:
        batches.close()


def measure_on_cuda(
    plan: Any, floor: Callable[[int], None], precision: Any, device: torch.device, images: int, folder: Path
) -> dict[str, Any]:
    """Return the figures of one network; floor: makes so many updates and waits for their end."""
    from zoo.training.kernels import steady_kernels
    from zoo.training.loop import train_plan
    from zoo.training.precision import choose_workers

    batch = plan.recipe.finetune.batch_size
    with steady_kernels(device, strict=True):
        before = step_s(floor)
    torch.cuda.reset_peak_memory_stats(device)
    epochs = Epochs(device)
    train_plan(plan, epochs)
    peak = torch.cuda.max_memory_allocated(device)
    with steady_kernels(device, strict=True):
        after = step_s(floor)
    with fastest_kernels():
        free = step_s(floor)
    bare = batch / float(np.median(before + after))
    ours, whole = (images / float(np.median(seconds[1:])) for seconds in (epochs.updates, epochs.wholes))
    return {
        "images_per_s": round(ours, 1),
        "floor_images_per_s": round(bare, 1),
        "ratio": round(ours / bare, 4),
        "whole_images_per_s": round(whole, 1),
        "whole_ratio": round(whole / bare, 4),
        "loader_images_per_s": round(images / loader_s(plan, precision, device, folder), 1),
        "free_floor_images_per_s": round(batch / float(np.median(free)), 1),
        "floor_before_after": [round(batch / float(np.median(each)), 1) for each in (before, after)],
        "epoch_images_per_s": [round(images / each, 1) for each in epochs.updates],
        "steps": (len(epochs.updates) - 1) * -(-images // batch),
        "batch": batch,
        "images": images,
        "workers": choose_workers(plan.recipe.workers, device),
        "peak_mib": round(peak / 2**20),
    }
