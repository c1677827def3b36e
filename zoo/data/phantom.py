"""`lung-phantom`: generated axial chest slices of invented patients; synthetic, and fit for no clinical claim."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

from zoo.errors import ZooError

LABELS = ("normal", "benign", "malignant")
Field = np.ndarray[Any, np.dtype[np.float64]]

# Grey levels in [0, 1] under a wide window: what a reader of CT expects relative to each other.
_AIR, _LUNG, _FAT, _SOFT, _VESSEL, _BONE = 0.02, 0.14, 0.42, 0.60, 0.50, 0.95


@dataclass(frozen=True)
class PhantomSlice:
    """One slice: the patient it belongs to, its place in the scan, its class, and uint8 pixels (H, W)."""

    patient: str
    slice_index: int
    label: str
    pixels: np.ndarray[Any, np.dtype[np.uint8]]


def generate_phantom(
    patients: int = 420, slices_per_patient: int = 3, image_size_px: int = 96, seed: int = 0
) -> Iterator[PhantomSlice]:
    """Yield the slices of invented patients, patient by patient; the same arguments give the same bytes.

    Every patient has one class (`normal`, `benign`: one small smooth nodule, `malignant`: a larger spiculated
    one; their sizes overlap), one anatomy, and is drawn from (seed, patient) alone: fewer patients are a prefix
    of more. Vessels, seen across, and airways are confounders in all classes. Raises ZooError for counts below 1
    and sizes outside 32 to 1024 px.
    """
    for name, value, low, high in (
        ("patients", patients, 1, 1_000_000),
        ("slices_per_patient", slices_per_patient, 1, 1000),
        ("image_size_px", image_size_px, 32, 1024),
        ("seed", seed, 0, 2**31 - 1),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ZooError(f"lung-phantom: {name} must be a whole number from {low} to {high}. Got {value!r}")
    for number in range(patients):
        patient = _Patient(np.random.default_rng([seed, number]), LABELS[number % 3])
        for index in range(slices_per_patient):
            depth = 0.0 if slices_per_patient == 1 else 2 * index / (slices_per_patient - 1) - 1
            noise = np.random.default_rng([seed, number, index])
            pixels = _render(patient, depth, image_size_px, noise)
            yield PhantomSlice(f"p{number:04d}", index, patient.label, pixels)


class _Patient:
    """What all slices of one patient share; lengths in half image widths, x to the right, y down."""

    def __init__(self, rng: np.random.Generator, label: str) -> None:
        self.label = label
        self.body = np.array([rng.uniform(0.92, 0.98), rng.uniform(0.74, 0.84)])
        self.shift = rng.uniform(-0.03, 0.03, 2)
        self.fat = rng.uniform(0.03, 0.09)
        self.lungs = [
            (
                np.array([side * rng.uniform(0.43, 0.48), rng.uniform(-0.04, 0.03)]),
                np.array([rng.uniform(0.31, 0.36), rng.uniform(0.50, 0.58)]),
                rng.uniform(-0.15, 0.15),
            )
            for side in (-1, 1)
        ]
        self.heart = np.array([rng.uniform(0.06, 0.14), rng.uniform(0.08, 0.18), rng.uniform(0.22, 0.28)])
        self.aorta = np.array([rng.uniform(0.05, 0.10), rng.uniform(0.30, 0.36), rng.uniform(0.06, 0.08)])
        self.ribs = rng.uniform(0, 2 * np.pi)
        self.gain, self.offset = rng.uniform(0.92, 1.08), rng.uniform(-0.04, 0.04)
        self.noise = rng.uniform(0.020, 0.035)
        self.vessels = [self._tree(rng, side) for side in (0, 1)]
        self.dots = [self._dot(rng) for _ in range(int(rng.integers(4, 9)))]
        self.airways = [(self._inside(rng, 0.35), rng.uniform(0.025, 0.045)) for _ in range(int(rng.integers(2, 5)))]
        self.nodule = self._nodule(rng)

    def _inside(self, rng: np.random.Generator, reach: float) -> Field:
        """Return a place within a lung, at most `reach` of its radius from the middle."""
        centre, radii, _ = self.lungs[int(rng.integers(2))]
        angle, radius = rng.uniform(0, 2 * np.pi), reach * np.sqrt(rng.uniform())
        return np.asarray(centre + radii * radius * np.array([np.cos(angle), np.sin(angle)]))

    def _tree(self, rng: np.random.Generator, side: int) -> list[tuple[Field, Field, float]]:
        """Return segments (from, to, radius) that branch from the hilum outwards."""
        centre, radii, _ = self.lungs[side]
        hilum = centre + np.array([-np.sign(centre[0]) * radii[0] * 0.85, 0.02])
        segments = []
        for start_angle in rng.uniform(-1.2, 1.2, int(rng.integers(3, 5))):
            stack = [(hilum, start_angle, rng.uniform(0.016, 0.023), 0)]
            while stack:
                place, angle, radius, level = stack.pop()
                length = rng.uniform(0.10, 0.17) * 0.85**level
                direction = np.array([np.sign(centre[0]) * np.cos(angle), np.sin(angle)])
                end = place + length * direction
                segments.append((place, end, radius))
                if level < 3 and radius > 0.006:
                    for turn in (rng.uniform(0.15, 0.6), -rng.uniform(0.15, 0.6)):
                        stack.append((end, angle + turn, radius * rng.uniform(0.60, 0.75), level + 1))
        return segments

    def _dot(self, rng: np.random.Generator) -> tuple[Field, float, float, Field]:
        """Return a vessel that crosses the slice: place, radius, elongation, and its drift through the scan."""
        return self._inside(rng, 0.92), rng.uniform(0.010, 0.036), rng.uniform(1.0, 1.5), rng.normal(0, 0.05, 2)

    def _nodule(self, rng: np.random.Generator) -> dict[str, Any] | None:
        place, waves = self._inside(rng, 0.72), rng.uniform(0, 2 * np.pi, 4)
        benign, malignant = rng.uniform(0.085, 0.125), rng.uniform(0.110, 0.180)
        angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(7, 13))))
        lengths, drift = rng.uniform(0.5, 1.1, len(angles)), rng.normal(0, 0.02, 2)
        level = rng.uniform(-0.06, 0.04)
        if self.label == "normal":
            return None
        radius = benign if self.label == "benign" else malignant
        return {
            "place": place,
            "radius": radius,
            "waves": waves,
            "angles": angles,
            "lengths": lengths,
            "drift": drift,
            "level": level,
        }


def _render(
    patient: _Patient, depth: float, size: int, rng: np.random.Generator
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    x, y = np.meshgrid(axis - patient.shift[0], axis - patient.shift[1])
    soft = 1.2 / size  # half a pixel's worth of partial volume
    image = np.full((size, size), _AIR)
    rim = 1 - np.hypot(x / patient.body[0], y / patient.body[1])
    image = _paint(image, rim * patient.body[1], _FAT, soft)
    image = _paint(image, (rim - patient.fat) * patient.body[1], _SOFT, soft)
    image = _paint_ribs(image, patient, x, y, soft)
    lung = np.zeros((size, size))
    for centre, radii, tilt in patient.lungs:
        shrink = np.sqrt(1 - 0.22 * depth * depth)
        dx, dy = x - centre[0], y - centre[1]
        u, v = (dx + tilt * dy) / (radii[0] * shrink), dy / (radii[1] * shrink)
        lung = np.maximum(lung, _cover((1 - (np.abs(u) ** 2.3 + np.abs(v) ** 2.3) ** (1 / 2.3)) * radii[0], soft))
    heart_x, heart_y, heart_r = patient.heart
    heart = _cover((heart_r * (1 - 0.15 * depth) - np.hypot(x - heart_x, (y - heart_y) * 0.9)), soft)
    lung *= 1 - heart
    texture = gaussian_filter(np.random.default_rng(1).standard_normal((size, size)), size / 40)
    inner = np.full((size, size), _LUNG) + 0.02 * texture / (texture.std() + 1e-9)
    _paint_vessels(inner, patient, depth, x, y, soft)
    if patient.nodule is not None:
        _paint_nodule(inner, patient.nodule, depth, malignant=patient.label == "malignant", x=x, y=y, soft=soft)
    image = image * (1 - lung) + inner * lung
    image = _paint(image, patient.aorta[2] - np.hypot(x + patient.aorta[0], y - patient.aorta[1]), _SOFT + 0.06, soft)
    image = _paint(image, 0.045 - np.hypot(x, y + 0.06), _AIR + 0.03, soft)
    image = gaussian_filter(image, 0.45 * size / 96)
    grain = gaussian_filter(rng.standard_normal((size, size)), 0.6 * size / 96)
    image = image + patient.noise * grain / grain.std()
    image = (image * patient.gain + patient.offset + rng.normal(0, 0.01)) * 255
    return np.asarray(np.clip(np.rint(image), 0, 255), dtype=np.uint8)


def _cover(inside: Field, soft: float) -> Field:
    """Return how much of each pixel is covered, from its signed distance to the border."""
    return np.asarray(np.clip(0.5 + inside / (2 * soft), 0, 1))


def _paint(image: Field, inside: Field, level: float, soft: float) -> Field:
    part = _cover(inside, soft)
    return np.asarray(image * (1 - part) + level * part)


def _paint_ribs(image: Field, patient: _Patient, x: Field, y: Field, soft: float) -> Field:
    """Paint ribs around the chest, the breast bone, and a vertebra with its canal."""
    for angle in patient.ribs + np.arange(11) * (2 * np.pi / 11):
        cx, cy = 0.84 * patient.body[0] * np.cos(angle), 0.83 * patient.body[1] * np.sin(angle)
        along = -np.sin(angle) * (x - cx) + np.cos(angle) * (y - cy)
        across = np.cos(angle) * (x - cx) + np.sin(angle) * (y - cy)
        image = _paint(image, (1 - np.hypot(along / 0.10, across / 0.028)) * 0.028, _BONE, soft)
    image = _paint(image, (1 - np.hypot(x / 0.13, (y - 0.50) / 0.10)) * 0.10, _BONE - 0.08, soft)
    image = _paint(image, (1 - np.hypot(x / 0.035, (y - 0.63) / 0.09)) * 0.035, _BONE - 0.12, soft)
    return _paint(image, 0.038 - np.hypot(x, y - 0.605), _SOFT - 0.12, soft)


def _near(image: Field, x: Field, y: Field, low: Field, high: Field) -> tuple[Field, Field, Field]:
    """Return views of the image and its coordinates around a box: most of a slice is far from a small thing."""
    columns = slice(*np.searchsorted(x[0], (low[0], high[0])))
    rows = slice(*np.searchsorted(y[:, 0], (low[1], high[1])))
    return image[rows, columns], x[rows, columns], y[rows, columns]


def _paint_vessels(image: Field, patient: _Patient, depth: float, x: Field, y: Field, soft: float) -> None:
    for segments in patient.vessels:
        for start, end, radius in segments:
            step, rise = end - start, np.array([0.0, 0.03 * depth])
            margin = radius + 2 * soft
            low, high = np.minimum(start, end) + rise - margin, np.maximum(start, end) + rise + margin
            part, px, py = _near(image, x, y, low, high)
            t = np.clip(((px - start[0]) * step[0] + (py - rise[1] - start[1]) * step[1]) / (step @ step), 0, 1)
            distance = np.hypot(px - start[0] - t * step[0], py - rise[1] - start[1] - t * step[1])
            part[:] = _paint(part, radius * (1 - 0.15 * abs(depth)) - distance, _VESSEL, soft)
    for place, radius, longer, drift in patient.dots:
        centre = place + drift * depth
        part, px, py = _near(image, x, y, centre - radius * longer - 2 * soft, centre + radius * longer + 2 * soft)
        part[:] = _paint(part, radius - np.hypot((px - centre[0]) / longer, py - centre[1]), _VESSEL, soft)
    for place, radius in patient.airways:
        centre = place + np.array([0.0, 0.02 * depth])
        part, px, py = _near(image, x, y, centre - radius - 2 * soft, centre + radius + 2 * soft)
        distance = np.hypot(px - centre[0], py - centre[1])
        part[:] = _paint(part, radius - distance, _VESSEL - 0.06, soft)
        part[:] = _paint(part, radius * 0.62 - distance, _AIR + 0.03, soft)


def _paint_nodule(
    whole: Field, nodule: dict[str, Any], depth: float, *, malignant: bool, x: Field, y: Field, soft: float
) -> None:
    centre = nodule["place"] + nodule["drift"] * depth
    radius = nodule["radius"] * np.sqrt(1 - (0.62 * depth) ** 2)
    image, px, py = _near(whole, x, y, centre - 2.5 * radius, centre + 2.5 * radius)
    dx, dy = px - centre[0], py - centre[1]
    distance, angle = np.hypot(dx, dy), np.arctan2(dy, dx)
    level = _SOFT + 0.08 + nodule["level"]
    if not malignant:
        image[:] = _paint(image, radius - distance, level, soft)
        return
    ragged = sum(
        size * np.cos(k * angle + phase)
        for size, k, phase in zip((0.14, 0.10, 0.07, 0.05), (2, 3, 5, 8), nodule["waves"], strict=True)
    )
    image[:] = _paint(image, radius * (0.92 + ragged) - distance, level, soft)
    for spicule, length in zip(nodule["angles"], nodule["lengths"], strict=True):
        along = np.cos(spicule) * dx + np.sin(spicule) * dy
        across = -np.sin(spicule) * dx + np.cos(spicule) * dy
        reach = radius * (1 + length)
        width = 0.016 * np.clip(1 - along / reach, 0, 1) + 0.003
        inside = np.where((along > 0) & (along < reach), width - np.abs(across), -1.0)
        image[:] = _paint(image, inside, level - 0.05, soft)
