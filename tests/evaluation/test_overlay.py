from __future__ import annotations

import cv2
import numpy as np
from matplotlib import colormaps

from zoo.evaluation.overlay import heat_of, overlay


def test_an_overlay_changes_what_is_warm_alone():
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    assert np.array_equal(overlay(image, np.zeros((5, 5))), image)
    heat = np.zeros((5, 5))
    heat[0, 0] = 1
    warm = overlay(image, heat)
    assert warm.dtype == np.uint8 and warm.shape == image.shape
    assert (warm[:4, :4] != image[:4, :4]).any() and np.array_equal(warm[20:, 20:], image[20:, 20:])


def test_its_colours_are_matplotlibs_and_its_enlarging_is_opencvs():
    draw = np.random.default_rng(1)
    image, heat = draw.integers(0, 256, (96, 80, 3), dtype=np.uint8), draw.random((7, 6))
    smooth = cv2.resize(heat.astype(np.float32), (80, 96), interpolation=cv2.INTER_LINEAR)
    colour = colormaps["inferno"](0.25 + 0.75 * smooth)[..., :3] * 255
    share = (0.6 * smooth)[..., None]
    assert np.abs(overlay(image, heat) - (image * (1 - share) + colour * share)).max() < 6


def test_evidence_against_a_class_is_no_heat_and_each_map_is_scaled_alone():
    maps = np.random.default_rng(2).normal(size=(5, 4, 3))
    maps[3] = -1
    heat = heat_of(maps)
    assert heat.dtype == np.float32 and heat.min() == 0
    assert heat.max(axis=(1, 2)).tolist() == [1, 1, 1, 0, 1]
    np.testing.assert_allclose(heat[0], np.maximum(maps[0], 0) / maps[0].max(), rtol=1e-6)
