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
