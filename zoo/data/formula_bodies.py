"""The family of bodies: ovals with dark cavities and things in them, as tomography shows many objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from zoo.data.formula_fields import SHIFT, Cell, Field, Rng, blend, colour_map, fbm, fill, grid, ground, on_canvas

_DEPTH = 3  # of branching lines

CAVITIES = (1, 2, 4)
CONTENTS = ("none", "small", "large", "spiky", "ring", "several")
WALLS = ("thin", "thick")
BRANCHES = {"few": (0, 1), "many": (3, 4)}  # in each cavity, both included
_RADII = {"small": (0.06, 0.095), "large": (0.12, 0.18), "spiky": (0.08, 0.17), "ring": (0.08, 0.17)}


def _oval(rng: Rng, size_px: int, centre: Field, radii: Field, rough: float) -> Field:
    """Return the opacity of an oval whose outline has a few low waves."""
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    waves = np.arange(2, 6)
    heights, phases = rng.normal(0, rough, 4), rng.uniform(0, 2 * np.pi, 4)
    radius = 1 + (heights * np.cos(angles[:, None] * waves + phases)).sum(1)
    turn = rng.uniform(-0.25, 0.25)
    outline = radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1) * radii
    cos, sin = np.cos(turn), np.sin(turn)
    outline = outline @ np.array([[cos, sin], [-sin, cos]]) + centre
    mask = np.zeros((size_px, size_px), np.uint8)
    fill(mask, outline, 255)
    return mask.astype(np.float32) / 255


def _branches(rng: Rng, mask: Any, start: Field, turn: float, length: float, depth: int) -> None:
    """Draw lines that part and grow thinner, in place."""
    end = start + length * np.array([np.cos(turn), np.sin(turn)])
    ends = on_canvas(np.stack([start, end]), mask.shape[0])
    one, two = (int(ends[0, 0]), int(ends[0, 1])), (int(ends[1, 0]), int(ends[1, 1]))
    cv2.line(mask, one, two, (int(80 + 50 * depth),), 1 + (depth > 2), cv2.LINE_AA, SHIFT)
    if depth > 1:
        for _ in range(2):
            _branches(rng, mask, end, turn + rng.normal(0, 0.7), length * rng.uniform(0.65, 0.9), depth - 1)


def _thing(rng: Rng, profile: str, size_px: int, place: Field, radius: float) -> Field:
    """Return the opacity of a round, a spiky or a hollow thing."""
    x, y = grid(size_px)
    dx, dy = (x - np.float32(place[0])) / np.float32(radius), (y - np.float32(place[1])) / np.float32(radius)
    distance = np.hypot(dx, dy * np.float32(rng.uniform(0.8, 1.25)))
    if profile == "ring":
        hollow: Field = np.exp(-(((distance - 0.8) / 0.3) ** 2)).astype(np.float32)
        return hollow
    if profile == "spiky":
        angle = np.arctan2(dy, dx)
        ridge = np.cos(
            int(rng.integers(5, 10)) * angle + rng.uniform(0, 6.28) + rng.uniform(0.5, 2) * np.sin(2 * angle)
        )
        distance = distance / (0.85 + rng.uniform(0.5, 0.9) * np.maximum(ridge, 0) ** 3)
    shown: Field = (1 / (1 + np.exp(np.clip((distance - 1) * 9, -30, 30)))).astype(np.float32)
    return shown


def _centres(rng: Rng, count: int) -> Field:
    """Return where the cavities lie: in the middle, side by side, or four around it."""
    places = {
        1: [(0.0, 0.0)],
        2: [(-0.42, 0.0), (0.42, 0.0)],
        4: [(-0.38, -0.3), (0.38, -0.3), (-0.38, 0.3), (0.38, 0.3)],
    }
    made: Field = np.array(places[count]) + rng.normal(0, 0.03, (count, 2))
    return made


def _things(rng: Rng, cell: Cell, size_px: int, inside: Callable[[], Field]) -> Field:
    """Return the opacity of the dots, which every class has, and of the class's contents; inside: draws a place."""
    things = np.zeros((size_px, size_px), np.float32)

    def add(profile: str, low: float, high: float) -> None:
        nonlocal things
        things = np.maximum(things, _thing(rng, profile, size_px, inside(), rng.uniform(low, high)))

    for _ in range(int(rng.integers(2, 7))):
        add("smooth", 0.015, 0.035)
    if cell["contents"] == "several":
        for _ in range(int(rng.integers(5, 10))):
            add("smooth", 0.045, 0.075)
    elif cell["contents"] != "none":
        size = rng.uniform(*_RADII[cell["contents"]])
        things = np.maximum(things, _thing(rng, cell["contents"], size_px, inside(), size))
    return things


def draw_bodies(rng: Rng, cell: Cell, size_px: int) -> Field:
    """Return a body (size, size, 3) in [0, 1]: cavities with dots in every class, contents and branches in most."""
    zero = np.zeros(2)
    aspect = rng.uniform(0.72, 1.0)
    body = _oval(rng, size_px, zero + rng.uniform(-0.05, 0.05, 2), np.array([0.93, 0.93 * aspect]), 0.02)
    inner = 0.93 - (rng.uniform(0.03, 0.07) if cell["wall"] == "thin" else rng.uniform(0.12, 0.2))
    flesh = _oval(rng, size_px, zero, np.array([inner, inner * aspect]), 0.02)
    radius = {1: 0.62, 2: 0.33, 4: 0.27}[cell["cavities"]] * rng.uniform(0.85, 1.05)
    centres = _centres(rng, cell["cavities"]) * np.array([1.0, aspect])
    tall = {1: 0.95, 2: 1.55, 4: 0.9}[cell["cavities"]]
    ovals = [_oval(rng, size_px, each, radius * np.array([1.0, tall * aspect]), 0.05) for each in centres]
    cavity = np.maximum.reduce(ovals)
    lines = np.zeros((size_px, size_px), np.uint8)
    for centre in centres:
        for turn in rng.uniform(0, 2 * np.pi, int(rng.integers(*BRANCHES[cell["branches"]], endpoint=True))):
            _branches(rng, lines, centre + rng.normal(0, 0.08, 2), turn, radius * rng.uniform(0.3, 0.5), _DEPTH)

    def inside() -> Field:
        centre = centres[int(rng.integers(len(centres)))]
        turn, away = rng.uniform(0, 2 * np.pi), radius * 0.75 * np.sqrt(rng.uniform())
        made: Field = centre + away * np.array([np.cos(turn), np.sin(turn) * tall * aspect])
        return made

    things = _things(rng, cell, size_px, inside)
    air, fat, soft = rng.uniform(0, 0.15), rng.uniform(0.3, 0.5), rng.uniform(0.5, 0.75)
    dark = rng.uniform(0.08, 0.3)
    field = air + (fat - air) * body
    field = field + (soft - field) * flesh
    field = field + (dark - field) * cavity
    inner_things = np.maximum(things, lines.astype(np.float32) / 255 * rng.uniform(0.5, 1)) * cavity
    field = field + (soft * rng.uniform(0.85, 1.1) - field) * inner_things
    field = field + fbm(rng, size_px, rng.uniform(0.2, 1.5)) * rng.uniform(0.01, 0.05)
    field = np.clip(field if rng.uniform() < 0.8 else 1 - field, 0, 1).astype(np.float32)
    if rng.uniform() < 0.7:
        return np.repeat(field[..., None], 3, axis=2)
    image = colour_map(rng, field)
    return blend(ground(rng, size_px), image, body) if rng.uniform() < 0.5 else image
