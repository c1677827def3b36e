"""What all formula families draw with: coordinates, noise, colours, grounds, light and the camera's faults."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import cv2
import numpy as np

Field = np.ndarray[Any, np.dtype[np.floating[Any]]]
Rng = np.random.Generator
Cell = dict[str, Any]

SHIFT = 4  # OpenCV's lines and polygons take sixteenths of a pixel

_LUT_STEPS = 256


@cache
def grid(size_px: int) -> tuple[Field, Field]:
    """Return x and y of every pixel's middle, each (size, size), from -1 to 1."""
    line = (np.arange(size_px, dtype=np.float32) + 0.5) * (2 / size_px) - 1
    x, y = np.meshgrid(line, line)
    return x, y


@cache
def frequencies(size_px: int) -> tuple[Field, Field]:
    """Return radius (cycles per image, at least 1) and angle of `rfft2`'s frequencies, each (size, size // 2 + 1)."""
    fy, fx = np.fft.fftfreq(size_px) * size_px, np.fft.rfftfreq(size_px) * size_px
    radius = np.maximum(np.hypot(fx[None, :], fy[:, None]), 1)
    angle = np.arctan2(fy[:, None], fx[None, :])
    return radius.astype(np.float32), angle.astype(np.float32)


def filtered_noise(rng: Rng, gain: Field) -> Field:
    """Return white Gaussian noise seen through a gain (size, size // 2 + 1) on its frequencies: mean 0, sd 1."""
    size = gain.shape[0]
    white = rng.standard_normal((2, *gain.shape), dtype=np.float32)
    spectrum = (white[0] + 1j * white[1]) * gain
    spectrum[0, 0] = 0
    field: Field = np.fft.irfft2(spectrum, s=(size, size)).astype(np.float32)
    scaled: Field = field / (field.std() + np.float32(1e-9))
    return scaled


def fbm(rng: Rng, size_px: int, slope: float) -> Field:
    """Return fractional Brownian noise whose amplitude falls with frequency to the power of -slope: mean 0, sd 1."""
    return filtered_noise(rng, frequencies(size_px)[0] ** np.float32(-slope))


def stretch(field: Field) -> Field:
    """Return the field with its 1st and 99th percentile taken to 0 and 1, clipped there.

    >>> stretch(np.linspace(-5, 5, 100, dtype=np.float32).reshape(10, 10)).max()
    np.float32(1.0)
    """
    # Percentiles of every third value are as good here, and quicker.
    low, high = np.percentile(field.ravel()[::3], (1, 99))
    stretched: Field = np.clip((field - low) / (high - low + 1e-6), 0, 1).astype(np.float32)
    return stretched


def palette(rng: Rng, count: int) -> Field:
    """Return colours (count, 3) in [0, 1]: around one hue, or greys, or any."""
    kind = rng.uniform()
    if kind < 0.5:
        hue = rng.uniform() + rng.normal(0, rng.choice((0.05, 0.15, 0.5)), count)
        saturation, value = rng.beta(1.5, 1.5, count), rng.uniform(0.05, 1, count)
        # hue, saturation and value to red, green and blue without a colour library's 8 bits
        wave = np.clip(np.abs((hue[:, None] * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
        made: Field = (value[:, None] * (1 - saturation[:, None] * (1 - wave))).astype(np.float32)
        return made
    if kind < 0.8:
        return np.repeat(rng.uniform(0, 1, (count, 1)), 3, axis=1).astype(np.float32)
    return rng.uniform(0, 1, (count, 3)).astype(np.float32)


def colour_map(rng: Rng, field: Field) -> Field:
    """Return a field in [0, 1] seen through 2 to 5 colours one after another: (size, size, 3)."""
    colours = palette(rng, int(rng.integers(2, 6)))
    steps = np.linspace(0, len(colours) - 1, _LUT_STEPS)
    table = np.stack([np.interp(steps, np.arange(len(colours)), channel) for channel in colours.T], axis=1)
    shown: Field = table.astype(np.float32)[(field * (_LUT_STEPS - 1)).astype(np.int32)]
    return shown


def ground(rng: Rng, size_px: int) -> Field:
    """Return a background (size, size, 3): flat, a gradient, noise, or a wave."""
    kind, (x, y) = rng.uniform(), grid(size_px)
    turn = rng.uniform(0, 2 * np.pi)
    along = np.cos(turn).astype(np.float32) * x + np.sin(turn).astype(np.float32) * y
    if kind < 0.2:
        return np.broadcast_to(palette(rng, 1)[0], (size_px, size_px, 3)).astype(np.float32)
    if kind < 0.4:
        return colour_map(rng, stretch(along))
    if kind < 0.8:
        return colour_map(rng, stretch(fbm(rng, size_px, rng.uniform(0.8, 2.2))))
    return colour_map(rng, (0.5 + 0.5 * np.sin(along * np.float32(rng.uniform(4, 40)))).astype(np.float32))


def relief(rng: Rng, image: Field, height: Field) -> Field:
    """Return the image (size, size, 3) as if its height field (size, size) were lit from a side."""
    blurred = cv2.GaussianBlur(height, (0, 0), 1.2)
    dy, dx = np.gradient(blurred)
    turn, strength = rng.uniform(0, 2 * np.pi), rng.uniform(4, 12)
    light = 1 + 0.7 * np.tanh(strength * (np.cos(turn) * dx + np.sin(turn) * dy))
    made: Field = image * light[..., None].astype(np.float32)
    return made


def rotation(angle: float) -> Field:
    """Return the 2 x 2 matrix that turns by an angle in radians."""
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def affine(rng: Rng, turns: tuple[float, float], stretched: float = 0.28) -> Field:
    """Return a 2 x 2 matrix that shears, stretches by up to exp(stretched), and turns by a draw of radians."""
    turn, aspect, shear = rng.uniform(*turns), np.exp(rng.uniform(-stretched, stretched)), rng.uniform(-0.3, 0.3)
    made: Field = rotation(turn) @ np.array([[aspect, shear], [0, 1 / aspect]])
    return made


def posed(rng: Rng, size_px: int, zoom: tuple[float, float]) -> tuple[Field, Field]:
    """Return the grid turned, sheared, stretched, shifted, and scaled by a draw of zoom."""
    x, y = grid(size_px)
    matrix, scale = affine(rng, (-np.pi, np.pi)), rng.uniform(*zoom)
    matrix = scale * matrix
    shift = rng.uniform(-0.25, 0.25, 2) * scale
    a, b, c, d = matrix.astype(np.float32).ravel()
    return a * x + b * y + np.float32(shift[0]), c * x + d * y + np.float32(shift[1])


def blend(under: Field, over: Field, alpha: Field) -> Field:
    """Return `over` laid on `under` (each (size, size, 3)) by an opacity (size, size) in [0, 1]."""
    return under + (over - under) * alpha[..., None]


def photographed(rng: Rng, image: Field, size_px: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the image made smaller, (size_px, size_px, 3) uint8, with uneven light, gamma, blur, noise or grey."""
    faults: list[tuple[float, Callable[[Rng, Field], Field]]] = [
        (0.3, _uneven_light),
        (0.3, lambda rng, image: np.clip(image, 0, 1) ** np.float32(rng.uniform(0.6, 1.6))),
        (0.25, lambda rng, image: cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.2))),
        (0.3, lambda rng, image: image + rng.uniform(0.01, 0.06) * rng.standard_normal(image.shape, dtype=np.float32)),
        (0.2, lambda rng, image: np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2)),
    ]
    image = cv2.resize(image.astype(np.float32), (size_px, size_px), interpolation=cv2.INTER_AREA)
    for chance, fault in faults:
        if rng.uniform() < chance:
            image = fault(rng, image).astype(np.float32)
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def _uneven_light(rng: Rng, image: Field) -> Field:
    x, y = grid(image.shape[0])
    turn, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.5)
    made: Field = image * (1 + strength * (np.cos(turn) * x + np.sin(turn) * y))[..., None]
    return made


def product_of(**axes: tuple[Any, ...]) -> list[Cell]:
    """Return a cell for each combination of values.

    >>> product_of(size=("small", "large"), bright=(True,))
    [{'size': 'small', 'bright': True}, {'size': 'large', 'bright': True}]
    """
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def on_canvas(points: Field, size_px: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Return points (..., 2) in [-1, 1] as OpenCV takes them with `SHIFT`."""
    placed: np.ndarray[Any, np.dtype[np.int32]] = np.rint((points + 1) * (size_px / 2 * (1 << SHIFT))).astype(np.int32)
    return placed


def fill(mask: np.ndarray[Any, Any], outline: Field, value: float) -> None:
    """Fill a polygon (outline (n, 2) in [-1, 1]) of a mask, in place; uint8 masks have soft edges."""
    line = cv2.LINE_AA if mask.dtype == np.uint8 else cv2.LINE_8
    cv2.fillPoly(mask, [on_canvas(outline, mask.shape[0])], (float(value),), line, SHIFT)
