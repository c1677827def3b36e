"""Pictures for tests that look at likeness."""

from __future__ import annotations

from typing import Any


def draw_scene(seed: int, side: int = 64) -> Any:
    """Return a smooth random picture with structure, as photographs have it: uint8 (side, side, 3)."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(seed)
    small = Image.fromarray(draw.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    return np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))


# Numbers of different pictures in a ready split, for `write_scenes`.
READY_SPLIT = {
    "train/a": range(20),
    "train/b": range(20, 40),
    "val/a": range(40, 46),
    "val/b": range(46, 52),
    "test/a": range(52, 58),
    "test/b": range(58, 64),
}

# What scripts may rely on in the audit's JSON.
AUDIT_KEYS = {
    "dataset",
    "images",
    "unreadable",
    "exact_duplicate_pairs",
    "near_duplicate_pairs",
    "label_conflicts",
    "cross_split_leaks",
    "leak_tax",
    "ok",
}
