"""A map of where a network looked, laid over its image. Needs neither torch nor matplotlib."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

_STRENGTH = 0.6  # of the colour where the map is 1
# Matplotlib's `inferno` at every 17th of its 256 colours; between them a line stays within 7 of 255 grey levels of it.
_INFERNO = np.frombuffer(
    bytes.fromhex("0000040c0826240c4f420a685d126e781c6d932667ae305cc73e4cdd513aed6925f8850ffca50afac62df2e661fcffa4"),
    np.uint8,
).reshape(16, 3)


def overlay(pixels: Pixels, heat: np.ndarray[Any, Any]) -> Pixels:
    """Return an image with its map laid over: uint8 (H, W, 3); heat: (h, w) in [0, 1], 0 changes nothing."""
    height, width = pixels.shape[:2]
    enlarged = Image.fromarray(heat.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    smooth = np.asarray(enlarged).clip(0, 1)
    place = (0.25 + 0.75 * smooth) * 255
    colour = np.stack([np.interp(place, np.arange(0, 256, 17), _INFERNO[:, each]) for each in range(3)], axis=2)
    share = (_STRENGTH * smooth)[..., None]
    return np.asarray((pixels * (1 - share) + colour * share).round(), dtype=np.uint8)
