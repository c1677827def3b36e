"""Several views of one image, of which a network's answers are averaged: the plain centre, its mirror, the corners.

A network that was trained on mirrored images may be asked about the mirror; one that never saw any should not be. In CT
the sides mean something: where a label names a side, or situs, a mirrored view is another patient, so score without
`flip` (and train without mirroring: `zoo.data.transforms` says what each policy does).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from zoo.data.decode import resize
from zoo.data.transforms import center_crop
from zoo.runs import Preprocessing

Image = np.ndarray[Any, np.dtype[np.uint8]]

_CORNERS = ("top left", "top right", "bottom left", "bottom right")
VIEWS: dict[str, tuple[str, ...]] = {
    "none": ("centre",),
    "flip": ("centre", "centre mirrored"),
    "crops": ("centre", *_CORNERS),
    "flip-crops": ("centre", *_CORNERS, "centre mirrored", *(f"{corner} mirrored" for corner in _CORNERS)),
}


def views_of(pixels: Image, preprocessing: Preprocessing, tta: str = "none") -> list[Image]:
    """Return the views of a resized image in the order of `VIEWS[tta]`, each uint8 (size, size, 3).

    pixels: (H, W, 3), the shorter side being preprocessing.resize_size, as `zoo.data.cache.Pixels` holds them. The
    first view is always the plain centre crop. The four corners with centre and mirrors are the ten crops of Krizhevsky
    et al. 2012: squares of image_size, but of at most 7/8 of the shorter side (their 224 of 256) and then enlarged, for
    networks that see the whole of the image have no other corners.

    >>> one = Preprocessing(image_size=16, crop_pct=1, interpolation="bilinear", mean=(0, 0, 0), std=(1, 1, 1))
    >>> [view.shape for view in views_of(np.zeros((16, 20, 3), np.uint8), one, "flip")]
    [(16, 16, 3), (16, 16, 3)]
    """
    size = preprocessing.image_size
    views = [center_crop(pixels, size)]
    if tta in ("crops", "flip-crops"):
        views += [resize(corner, size, preprocessing.interpolation) for corner in _corners(pixels, size)]
    if tta in ("flip", "flip-crops"):
        views += [np.ascontiguousarray(view[:, ::-1]) for view in views]
    return views


def _corners(pixels: Image, size: int) -> list[Image]:
    height, width = pixels.shape[:2]
    side = min(size, -(-min(height, width) * 7 // 8))  # rounded up: a shorter side of int(size / 0.875) gives size
    return [pixels[top : top + side, left : left + side] for top in (0, height - side) for left in (0, width - side)]
