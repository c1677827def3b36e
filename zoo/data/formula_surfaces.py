"""Families that fill the picture: textures, and programs of place; what gives a class its cell, and what draws it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from zoo.data.formula_fields import (
    SHIFT,
    Cell,
    Field,
    Rng,
    blend,
    colour_map,
    fbm,
    filtered_noise,
    frequencies,
    grid,
    on_canvas,
    posed,
    product_of,
    relief,
    stretch,
)

# -- textures: band-pass noise, gratings, Voronoi cells, warped noise, worms ----------------------------------------

_SHAPINGS: dict[str, Callable[[Field], Field]] = {
    "linear": lambda z: z,
    "tanh": lambda z: np.tanh(5 * z),
    "abs": np.abs,
    "peaks": lambda z: np.maximum(z - 1, 0),
}


def texture_cells(_: int) -> list[Cell]:
    """Return the cells of all kinds of texture."""
    return [
        *product_of(kind=("noise",), centre=(4, 7, 12, 20, 30), oriented=(False, True), shaping=tuple(_SHAPINGS)),
        *product_of(kind=("grating",), frequency=(2, 4, 7, 12), square=(False, True), waves=(1, 2, 3)),
        *product_of(kind=("voronoi",), points=(7, 16, 36, 80), shown=("flat", "near", "edge"), jitter=(True, False)),
        *product_of(kind=("warped",), slope=(0.8, 1.3, 2.0), warp=(0.25, 0.6), ridged=(False, True)),
        *product_of(kind=("worms",), bend=(0.03, 0.15, 0.4), width=(1, 3, 6), count=(5, 20)),
    ]


def _noise(rng: Rng, cell: Cell, size_px: int) -> Field:
    radius, angle = frequencies(size_px)
    gain = np.exp(-((np.log(radius / cell["centre"]) / 0.25) ** 2) / 2)
    if cell["oriented"]:
        # Orientation knows no direction: half a turn is the whole circle.
        away = (angle - rng.uniform(0, np.pi) + np.pi / 2) % np.pi - np.pi / 2
        gain = gain * np.exp(-((away / 0.25) ** 2) / 2)
    return _SHAPINGS[cell["shaping"]](filtered_noise(rng, gain.astype(np.float32)))


def _grating(rng: Rng, cell: Cell, size_px: int) -> Field:
    x, y = posed(rng, size_px, (0.85, 1.2))
    x, y = (each + np.float32(rng.uniform(0, 0.1)) * fbm(rng, size_px, 2.2) for each in (x, y))
    total = np.zeros_like(x)
    for turn in np.arange(cell["waves"]) * np.pi / cell["waves"]:
        wave = np.sin((np.cos(turn) * x + np.sin(turn) * y) * (np.pi * cell["frequency"]) + rng.uniform(0, 2 * np.pi))
        total += np.sign(wave) if cell["square"] else wave
    return total


def _voronoi(rng: Rng, cell: Cell, size_px: int) -> Field:
    side = round(np.sqrt(cell["points"]))
    if cell["jitter"]:
        line = (np.arange(side) + 0.5) * 2 / side - 1
        points = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2) + rng.normal(0, 0.25 / side, (side**2, 2))
    else:
        points = rng.uniform(-1, 1, (cell["points"], 2))
    x, y = posed(rng, size_px, (0.85, 1.1))
    away = (x[..., None] - points[:, 0].astype(np.float32)) ** 2 + (y[..., None] - points[:, 1].astype(np.float32)) ** 2
    if cell["shown"] == "flat":
        made: Field = rng.uniform(0, 1, len(points)).astype(np.float32)[away.argmin(-1)]
        return made
    two = np.sqrt(np.partition(away, 1, axis=-1)[..., :2])
    return two[..., 0] if cell["shown"] == "near" else np.minimum(two[..., 1] - two[..., 0], 0.6 / side)


def _warped(rng: Rng, cell: Cell, size_px: int) -> Field:
    field = fbm(rng, size_px, cell["slope"])
    x, y = grid(size_px)
    half, reach = size_px / 2, np.float32(cell["warp"])
    to_x = (x + 1 + reach * 0.5 * fbm(rng, size_px, 2)) * half
    to_y = (y + 1 + reach * 0.5 * fbm(rng, size_px, 2)) * half
    field = cv2.remap(
        field, to_x.astype(np.float32), to_y.astype(np.float32), cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
    )
    made: Field = -np.abs(field) if cell["ridged"] else field
    return made


def _worms(rng: Rng, cell: Cell, size_px: int) -> Field:
    mask = np.zeros((size_px, size_px), np.uint8)
    turns = rng.uniform(0, 2 * np.pi, (cell["count"], 1)) + np.cumsum(
        rng.normal(0, cell["bend"], (cell["count"], 60)), 1
    )
    steps = np.stack([np.cos(turns), np.sin(turns)], -1) * 0.03
    paths = np.cumsum(steps, 1) - steps.sum(1, keepdims=True) / 2 + rng.uniform(-0.9, 0.9, (cell["count"], 1, 2))
    scaled = on_canvas(paths, size_px)
    levels: list[int] = np.atleast_1d(rng.integers(90, 256, cell["count"])).tolist()
    for path, level in zip(scaled, levels, strict=True):
        cv2.polylines(mask, [path], False, (level,), cell["width"], cv2.LINE_AA, SHIFT)
    made: Field = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 0.6)
    return made


_TEXTURES = {"noise": _noise, "grating": _grating, "voronoi": _voronoi, "warped": _warped, "worms": _worms}


def draw_textures(rng: Rng, cell: Cell, size_px: int) -> Field:
    """Return one texture in colours, (size, size, 3)."""
    field = stretch(_TEXTURES[cell["kind"]](rng, cell, size_px).astype(np.float32))
    image = colour_map(rng, field)
    return relief(rng, image, field) if rng.uniform() < 0.25 else image


# -- programs: random expressions of place (Baradad et al. 2021, arXiv 2106.05963, for noise made by programs) --------

_ONE: tuple[Callable[[Field], Field], ...] = (
    np.sin,
    lambda a: np.sin(3 * a),
    np.abs,
    np.tanh,
    lambda a: np.exp(-a * a),
    lambda a: a - np.floor(a),
    lambda a: np.cos(6 * a),
    lambda a: np.sign(a) * np.sqrt(np.abs(a)),
    lambda a: a * a,
    lambda a: np.tanh(8 * a),
)
_TWO: tuple[Callable[[Field, Field], Field], ...] = (
    np.add,
    np.multiply,
    np.minimum,
    np.maximum,
    np.hypot,
    np.arctan2,
    np.subtract,
    lambda a, b: np.where(a > 0, b, -b),
)
_LIMIT = 6.0


def program_cell(rng: Rng) -> Cell:
    """Return a program whose picture is neither flat nor mere noise."""
    x, y = grid(32)
    while True:
        steps = []
        for known in range(4, 4 + int(rng.integers(7, 12))):
            kind = int(rng.integers(2))
            operation = int(rng.integers(len(_TWO if kind else _ONE)))
            # A later value is likelier to be read, so that programs grow deep.
            reads = [int(known * rng.uniform() ** 0.5) for _ in range(2)]
            steps.append((kind, operation, *reads, float(rng.normal(0, 1.6)), float(rng.normal(0, 0.7))))
        field = _run_program(tuple(steps), x, y)[-1]
        shown = stretch(field)
        step = np.abs(np.diff(shown, axis=0)).mean() + np.abs(np.diff(shown, axis=1)).mean()
        # Judged at a third of the size, where a pixel's step is three times as long.
        if field.std() > 0.05 and 0.06 < step < 0.5 and shown.std() > 0.12:
            return {"steps": tuple(steps)}


def _run_program(steps: tuple[Any, ...], x: Field, y: Field) -> list[Field]:
    values = [x, y, np.hypot(x, y), (np.arctan2(y, x) / np.pi).astype(np.float32)]
    for kind, operation, one, two, scale, offset in steps:
        a = values[one] * np.float32(scale) + np.float32(offset)
        out = _TWO[operation](a, values[two]) if kind else _ONE[operation](a)
        values.append(np.clip(out, -_LIMIT, _LIMIT).astype(np.float32))
    return values


def draw_programs(rng: Rng, cell: Cell, size_px: int) -> Field:
    """Return what a class's program makes of a turned and scaled plane, (size, size, 3)."""
    jitter = rng.normal(1, 0.08, (len(cell["steps"]), 2))
    steps = tuple(
        (*step[:4], step[4] * one, step[5] * two) for step, (one, two) in zip(cell["steps"], jitter, strict=True)
    )
    values = _run_program(steps, *posed(rng, size_px, (0.8, 2.0)))
    field = stretch(values[-1])
    image = colour_map(rng, field)
    if rng.uniform() < 0.4:
        others = [stretch(values[int(rng.integers(4, len(values)))]) for _ in range(3)]
        image = blend(image, np.stack(others, -1), np.full_like(field, rng.uniform(0.2, 0.8)))
    return relief(rng, image, field) if rng.uniform() < 0.3 else image
