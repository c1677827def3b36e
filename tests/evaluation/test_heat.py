from __future__ import annotations

import cv2
import numpy as np
from matplotlib import colormaps

from zoo.evaluation.heat import overlay


def test_colours_are_matplotlibs_and_enlarging_is_opencvs():
    draw = np.random.default_rng(1)
    image, heat = draw.integers(0, 256, (96, 80, 3), dtype=np.uint8), draw.random((7, 6))
    smooth = cv2.resize(heat.astype(np.float32), (80, 96), interpolation=cv2.INTER_LINEAR)
    colour = colormaps["inferno"](0.25 + 0.75 * smooth)[..., :3] * 255
    share = (0.6 * smooth)[..., None]
    assert np.abs(overlay(image, heat) - (image * (1 - share) + colour * share)).max() < 6
