"""Families of things: leaves, contours, fractals, glyphs and spots; what gives a class its cell, and what draws it."""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np

from zoo.data.formula_fields import (
    SHIFT,
    Cell,
    Field,
    Rng,
    affine,
    blend,
    colour_map,
    fbm,
    fill,
    grid,
    ground,
    on_canvas,
    palette,
    relief,
    rotation,
    stretch,
)

_ALL_ROUND = (0, 2 * np.pi)

# -- leaves: opaque shapes that fall on each other ----------------------------------------------------------------

LEAF_SIZES = {"small": (160, 0.05, 0.13), "mixed": (90, 0.04, 0.7), "large": (30, 0.22, 0.65)}
LEAF_SHAPES = ("disc", "rectangle", "triangle", "star", "blob", "bar")


def _leaf_outline(rng: Rng, shape: str) -> Field:
    """Return an outline (n, 2) of radius about 1."""
    if shape == "rectangle":
        w = rng.uniform(0.4, 1)
        return np.array([[-1, -w], [1, -w], [1, w], [-1, w]], np.float32) * 0.8
    if shape == "bar":
        return np.array([[-1.4, -0.12], [1.4, -0.12], [1.4, 0.12], [-1.4, 0.12]], np.float32)
    count = {"disc": 20, "triangle": 3, "star": 2 * int(rng.integers(4, 8)), "blob": 32}[shape]
    angles = np.arange(count) * (2 * np.pi / count)
    radius = np.ones(count)
    if shape == "star":
        radius[1::2] = 0.42
    if shape == "blob":
        waves = np.arange(2, 6)
        phases, heights = rng.uniform(0, 2 * np.pi, 4), rng.uniform(0, 0.28, 4)
        radius = 1 + (heights * np.cos(angles[:, None] * waves + phases)).sum(1)
    made: Field = (radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)).astype(np.float32)
    return made


def draw_leaves(rng: Rng, cell: Cell, size_px: int) -> Field:
    """Return opaque shapes that fall on each other, (size, size, 3)."""
    count, low, high = LEAF_SIZES[cell["size"]]
    # A power law with exponent 3 shows as many areas of every size (Lee, Mumford and Huang 2001).
    radii = (low**-2 - rng.uniform(0, 1, count) * (low**-2 - high**-2)) ** -0.5
    ids = np.zeros((size_px, size_px), np.int32)
    outline = _leaf_outline(rng, cell["shape"])
    turns, places = rng.uniform(0, 2 * np.pi, count), rng.uniform(-1.15, 1.15, (count, 2))
    for number in range(count):
        cos, sin = np.cos(turns[number]), np.sin(turns[number])
        turned = outline @ np.array([[cos, sin], [-sin, cos]], np.float32) * radii[number] + places[number]
        fill(ids, turned.astype(np.float32), number + 1)
    image = palette(rng, count + 1)[ids]
    if cell["fill"] == "flat":
        return image
    x, y = grid(size_px)
    if cell["fill"] == "stripes":
        waves = rng.normal(0, 22, (2, count + 1)).astype(np.float32)
        texture = np.sign(np.sin(waves[0][ids] * x + waves[1][ids] * y))
    else:
        texture = fbm(rng, size_px, rng.uniform(0.3, 1.5))
    made: Field = image + texture[..., None] * rng.uniform(0.04, 0.3, count + 1).astype(np.float32)[ids][..., None]
    return made


# -- contours: closed curves with waves on their radius (Kataoka et al. 2022, arXiv 2206.09132; visual atoms,
# -- arXiv 2303.01112) ------------------------------------------------------------------------------------------------


def contour_cell(rng: Rng) -> Cell:
    """Return the waves, rings and style of one class."""
    return {
        "waves": (int(rng.integers(2, 14)), int(rng.integers(2, 26))),
        "heights": (float(rng.uniform(0.05, 0.5)), float(rng.choice((0.0, 0.1, 0.25)))),
        "phase": float(rng.uniform(0, 0.6)),
        "rough": float(rng.choice((0.0, 0.0, 0.12, 0.3))),
        "rings": int(rng.integers(1, 6)),
        "style": int(rng.integers(3)),
    }


def _contour(rng: Rng, cell: Cell) -> Field:
    angles = np.linspace(0, 2 * np.pi, 160, endpoint=False)
    first, second = np.array(cell["heights"]) * rng.uniform(0.8, 1.2, 2)
    radius = 1 + first * np.cos(cell["waves"][0] * angles) + second * np.cos(cell["waves"][1] * angles + cell["phase"])
    if cell["rough"]:
        noise = np.convolve(np.tile(rng.standard_normal(160), 3), np.ones(5) / 5, "same")[160:320]
        radius = radius + cell["rough"] * noise
    made: Field = (radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1) / (1 + first)).astype(np.float32)
    return made


def draw_contours(rng: Rng, cell: Cell, size_px: int) -> Field:
    """Return one to three closed curves with waves on their radius, (size, size, 3)."""
    image, height = ground(rng, size_px), np.zeros((size_px, size_px), np.float32)
    copies = int(rng.integers(1, 4))
    for _ in range(copies):
        radius = rng.uniform(0.45, 0.85) / np.sqrt(copies)
        place, matrix = rng.uniform(-0.9, 0.9, 2) * (1 - 0.7 * radius) * 0.8, affine(rng, _ALL_ROUND).astype(np.float32)
        outline, colours = _contour(rng, cell), palette(rng, cell["rings"] + 1)
        textured = blend(
            image, colour_map(rng, stretch(fbm(rng, size_px, 1.2))), np.full_like(height, 0.6 * rng.uniform())
        )
        for ring in range(cell["rings"]):
            points = outline @ matrix.T * (radius * (1 - ring / cell["rings"])) + place
            mask = np.zeros((size_px, size_px), np.uint8)
            if cell["style"] == 1:
                scaled = on_canvas(points, size_px)
                cv2.polylines(mask, [scaled], True, (255,), int(rng.integers(1, 4)), cv2.LINE_AA, SHIFT)
            else:
                fill(mask, points.astype(np.float32), 255)
            alpha = mask.astype(np.float32) / 255
            over = np.broadcast_to(colours[ring], image.shape).astype(np.float32)
            if cell["style"] == 2:
                over = (0.6 * colours[ring] + 0.4 * textured).astype(np.float32)
            image = blend(image, over, alpha)
            height = np.maximum(height, alpha * (ring + 1) / cell["rings"])
    return relief(rng, image, height) if rng.uniform() < 0.4 else image


# -- fractals: iterated function systems (Kataoka et al. 2020, arXiv 2101.08515; Anderson and Farrell 2022, ----------
# -- arXiv 2110.03091, for singular values that give pictures with geometry) ------------------------------------------

_CHAINS, _STEPS, _DROPPED = 220, 60, 14


def fractal_cell(rng: Rng) -> Cell:
    """Return the affine maps of one class, whose singular values give a picture with geometry."""
    count = int(rng.integers(2, 5))
    target = (5 + count) / 2 + rng.uniform(0, 0.5)
    while True:
        values = np.sort(rng.uniform(0.1, 0.95, (count, 2)), axis=1)[:, ::-1]
        if abs((values[:, 0] + 2 * values[:, 1]).sum() - target) < 0.15:
            break
    turns = rng.uniform(0, 2 * np.pi, (count, 2))
    signs = rng.choice((-1.0, 1.0), (count, 2))
    matrices = [
        rotation(one) @ np.diag(value * sign) @ rotation(two)
        for (one, two), value, sign in zip(turns, values, signs, strict=True)
    ]
    return {"matrices": np.array(matrices), "shifts": rng.uniform(-1, 1, (count, 2))}


def _chaos_game(rng: Rng, matrices: Field, shifts: Field) -> Field:
    """Return points (n, 2) of the attractor: chains that choose a map in proportion to its area."""
    weights = np.abs(np.linalg.det(matrices)) + 0.02
    chosen = rng.choice(len(matrices), (_STEPS, _CHAINS), p=weights / weights.sum())
    place, points = np.zeros((_CHAINS, 2)), []
    for step, maps in enumerate(chosen):
        place = (matrices[maps] @ place[..., None])[..., 0] + shifts[maps]
        if step >= _DROPPED:
            points.append(place)
    return np.concatenate(points).astype(np.float32)


def draw_fractals(rng: Rng, cell: Cell, size_px: int) -> Field:
    """Return the attractor of the class's maps, each a little changed, (size, size, 3)."""
    matrices = cell["matrices"] * rng.uniform(0.92, 1.06, cell["matrices"].shape)
    shifts = cell["shifts"] + rng.normal(0, 0.06, cell["shifts"].shape)
    points = _chaos_game(rng, matrices, shifts)
    low, high = np.percentile(points, (1, 99), axis=0)
    points = (points - (low + high) / 2) / (np.max(high - low) / 2 + 1e-6)
    points = points @ affine(rng, _ALL_ROUND).astype(np.float32).T * rng.uniform(0.55, 0.95) + rng.uniform(-0.2, 0.2, 2)
    cells = np.floor((points + 1) * (size_px / 2)).astype(np.int64)
    cells = cells[((cells >= 0) & (cells < size_px)).all(axis=1)]
    counts = np.bincount(cells[:, 1] * size_px + cells[:, 0], minlength=size_px**2).reshape(size_px, size_px)
    density = np.log1p(cv2.GaussianBlur(counts.astype(np.float32), (0, 0), rng.uniform(0.5, 1.0)))
    density /= density.max() + np.float32(1e-6)
    image = blend(ground(rng, size_px), colour_map(rng, density), np.clip(density * 3, 0, 1))
    return relief(rng, image, density) if rng.uniform() < 0.3 else image


# -- glyphs: signs of a few bent strokes -----------------------------------------------------------------------------


def glyph_cell(rng: Rng) -> Cell:
    """Return the control points of one sign's strokes."""
    strokes, end = [], rng.uniform(-0.8, 0.8, 2)
    for _ in range(int(rng.integers(2, 6))):
        start = end if rng.uniform() < 0.6 else rng.uniform(-0.8, 0.8, 2)
        controls = rng.uniform(-1, 1, (int(rng.integers(1, 4)), 2))
        strokes.append(np.concatenate([start[None], controls]))
        end = controls[-1]
    return {"strokes": strokes}


@cache
def _bernstein(count: int) -> Field:
    from math import comb

    t = np.linspace(0, 1, 24)[:, None]
    powers = np.arange(count)
    weights = np.array([comb(count - 1, k) for k in powers])
    return (weights * t**powers * (1 - t) ** (count - 1 - powers)).astype(np.float32)


def draw_glyphs(rng: Rng, cell: Cell, size_px: int) -> Field:
    """Return one sign, its strokes a little bent and turned, (size, size, 3)."""
    # Turned by 20 degrees at most: a sign on its head is another sign.
    matrix = (affine(rng, (-0.35, 0.35), 0.3) * rng.uniform(0.5, 0.95)).astype(np.float32)
    shift, width = rng.uniform(-0.15, 0.15, 2), int(rng.integers(2, max(4, size_px // 9)))
    mask = np.zeros((size_px, size_px), np.uint8)
    for stroke in cell["strokes"]:
        controls = stroke + rng.normal(0, 0.08, stroke.shape)
        path = _bernstein(len(controls)) @ controls @ matrix.T + shift
        scaled = on_canvas(path, size_px)
        cv2.polylines(mask, [scaled], False, (255,), width, cv2.LINE_AA, SHIFT)
    soft = rng.uniform(0.4, 3.0) if rng.uniform() < 0.5 else 0.4
    alpha = cv2.GaussianBlur(mask.astype(np.float32) / 255, (0, 0), soft)
    over = palette(rng, 1)[0] if rng.uniform() < 0.6 else ground(rng, size_px)
    under = ground(rng, size_px) if rng.uniform() < 0.6 else palette(rng, 1)[0]
    full = np.zeros((size_px, size_px, 3), np.float32)
    return blend(full + under, full + over, alpha)


# -- spots: a few or many small things of one profile and size -------------------------------------------------------

SPOT_RADII = {"small": (0.04, 0.07), "middle": (0.09, 0.14), "large": (0.18, 0.27)}
SPOT_COUNTS = {"one": (1, 2), "few": (3, 7), "many": (14, 30)}


def _spot(rng: Rng, profile: str, x: Field, y: Field) -> Field:
    """Return the opacity of one spot of radius 1 at the origin of x and y."""
    distance = np.hypot(x, y)
    if profile == "smooth":
        return np.exp(-((distance / 0.75) ** 2))
    if profile == "ring":
        return np.exp(-(((distance - 0.8) / 0.22) ** 2))
    if profile == "spiky":
        waves, phase = int(rng.integers(6, 13)), rng.uniform(0, 2 * np.pi)
        ridge = np.cos(waves * np.arctan2(y, x) + phase + rng.uniform(0.5, 2) * np.sin(2 * np.arctan2(y, x)))
        distance = distance / (0.85 + 0.55 * np.maximum(ridge, 0) ** 3)
    made: Field = 1 / (1 + np.exp(np.clip((distance - 1) * 12, -30, 30)))
    return made


def draw_spots(rng: Rng, cell: Cell, size_px: int) -> Field:
    """Return small things of one profile, size and number on a cloudy ground, (size, size, 3)."""
    x, y = grid(size_px)
    alpha = np.zeros((size_px, size_px), np.float32)
    for _ in range(int(rng.integers(*SPOT_COUNTS[cell["count"]], endpoint=True))):
        radius, place = rng.uniform(*SPOT_RADII[cell["size"]]), rng.uniform(-0.8, 0.8, 2)
        # Only the spot's surroundings are drawn; all else would be zero.
        low = np.clip(np.floor((place - 2.4 * radius + 1) * size_px / 2).astype(int), 0, size_px - 1)
        high = np.clip(np.ceil((place + 2.4 * radius + 1) * size_px / 2).astype(int), low + 1, size_px)
        part = (slice(low[1], high[1]), slice(low[0], high[0]))
        scale = np.float32(1 / radius)
        spot = _spot(
            rng, cell["profile"], (x[part] - np.float32(place[0])) * scale, (y[part] - np.float32(place[1])) * scale
        )
        alpha[part] = np.maximum(alpha[part], spot * rng.uniform(0.7, 1))
    level = fbm(rng, size_px, rng.uniform(0.8, 2.2)) * rng.uniform(0, 0.12)
    step = rng.uniform(0.2, 0.6) * (1 if cell["bright"] else -1)
    base = rng.uniform(0.05, 0.35) if cell["bright"] else rng.uniform(0.65, 0.95)
    field = np.clip(base + level + step * alpha, 0, 1).astype(np.float32)
    if rng.uniform() < 0.5:
        return np.repeat(field[..., None], 3, axis=2)
    tint = palette(rng, 1)[0]
    made: Field = field[..., None] * (0.5 + tint / (2 * tint.max() + 1e-6))
    return made
