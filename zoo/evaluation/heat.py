"""A map of where a network looked, laid over its image."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
_STRENGTH = 0.6  # of the colour where the map is 1


def overlay(pixels: Pixels, heat: np.ndarray[Any, Any]) -> Pixels:
    """Return an image with its map laid over: uint8 (H, W, 3); heat: (h, w) in [0, 1], 0 changes nothing."""
    height, width = pixels.shape[:2]
    smooth = cv2.resize(heat.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR).clip(0, 1)
    levels = np.asarray((255 * (0.25 + 0.75 * smooth)).round(), dtype=np.uint8)
    colour = cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO)[..., ::-1].astype(np.float32)
    share = (_STRENGTH * smooth)[..., None]
    return np.asarray((pixels * (1 - share) + colour * share).round(), dtype=np.uint8)
