"""Labelled images from formulas: no photograph, no patient, nobody's licence; to pretrain backbones on."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from zoo.data.formula_families import FAMILIES
from zoo.data.formula_fields import Cell, photographed
from zoo.errors import ZooError, nearest, one_line
from zoo.files import atomic_writer, check_writable, digest_of

# Raised whenever the same arguments give other pixels; it is written into every card.
GENERATOR_VERSION = 1
_OVERSAMPLING = 4 / 3
IMAGE_SIZES_PX = (16, 512)
_LARGEST_SEED = 2**31 - 1

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class FormulaClass:
    """One class: the family that draws it and its cell of parameters.

    label: its number among the classes that were chosen together; place: its number within its family.
    """

    label: int
    family: str
    place: int
    cell: Cell


def formula_classes(families: Sequence[str] = (), seed: int = 0) -> tuple[FormulaClass, ...]:
    """Return the classes of some families, of all where none is named; labels count from 0 in that choice.

    seed: what cells that are drawn at random are drawn from. Raises ZooError for an unknown family or seed.

    >>> {each.family for each in formula_classes(["spots"])}, len(formula_classes(["spots"]))
    ({'spots'}, 72)
    """
    for name in families:
        if name not in FAMILIES:
            hint = nearest(name, FAMILIES) or ";"
            raise ZooError(f"unknown family {one_line(name)!r} of formula images{hint} known: {', '.join(FAMILIES)}")
    _check_whole("seed", seed, 0, _LARGEST_SEED)
    chosen = [name for name in FAMILIES if not families or name in families]
    cells = [(name, place, cell) for name in chosen for place, cell in enumerate(_cells(name, seed))]
    return tuple(FormulaClass(label, *each) for label, each in enumerate(cells))


@cache
def _cells(family: str, seed: int) -> list[Cell]:
    return FAMILIES[family].cells(seed)


def formula_image(of: FormulaClass, instance: int, image_size_px: int = 72, seed: int = 0) -> Pixels:
    """Return one image of a class: uint8 (image_size_px, image_size_px, 3), RGB.

    It depends on seed, family, place within the family, size and instance alone: not on the other families chosen, nor
    on what was drawn before. Raises ZooError for an instance below 0 and a size outside 16 to 512 px.

    >>> a, b = (formula_image(formula_classes(["glyphs"])[3], 7, 32) for _ in range(2))
    >>> a.shape, bool((a == b).all())
    ((32, 32, 3), True)
    """
    _check_whole("instance", instance, 0, _LARGEST_SEED)
    _check_whole("image_size_px", image_size_px, *IMAGE_SIZES_PX)
    family = list(FAMILIES).index(of.family)
    rng = np.random.default_rng([seed, GENERATOR_VERSION, family, of.place, instance])
    drawn = FAMILIES[of.family].draw(rng, of.cell, round(image_size_px * _OVERSAMPLING))
    return photographed(rng, drawn, image_size_px)


def _check_whole(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ZooError(f"formula images: {name} must be a whole number from {low} to {high}. Got {value!r}")


def formula_pool(
    folder: Path,
    families: Sequence[str] = (),
    images_per_class: int = 200,
    image_size_px: int = 72,
    seed: int = 0,
    processes: int = 1,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Pixels:
    """Return all images of some classes, drawn once and kept in a folder: uint8 (classes * n, size, size, 3).

    The array is memory-mapped. Image `label * images_per_class + instance` is `formula_image(class, instance)`. The
    file comes to its name only when it is whole; it is named by everything that it depends on. processes: how many
    draw side by side; their number changes nothing. progress: called with the classes done and their number. Raises
    ZooError for bad arguments, and where the folder cannot be written or the disk is full.
    """
    classes = formula_classes(families, seed)
    _check_whole("images_per_class", images_per_class, 1, 1_000_000)
    _check_whole("image_size_px", image_size_px, *IMAGE_SIZES_PX)
    named = {"version": GENERATOR_VERSION, "families": sorted({each.family for each in classes})}
    drawn = {"images_per_class": images_per_class, "image_size_px": image_size_px, "seed": seed}
    path = folder / f"formula-{digest_of({**named, **drawn})[:12]}.npy"
    shape = (len(classes) * images_per_class, image_size_px, image_size_px, 3)
    pool = _read_pool(path, shape)
    if pool is None:
        check_writable(folder, math.prod(shape))
        draw = partial(_draw_class, count=images_per_class, image_size_px=image_size_px, seed=seed)
        with _side_by_side(processes) as each_of, atomic_writer(path) as stream:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_2_0(stream, header)
            for label, images in enumerate(each_of(draw, classes)):
                stream.write(images.data)
                progress(label + 1, len(classes))
        pool = _read_pool(path, shape)
        assert pool is not None
    return pool


def _read_pool(path: Path, shape: tuple[int, ...]) -> Pixels | None:
    """Return the images of a file, None where there is none or it is not what its name says."""
    try:
        pool: Pixels = np.load(path, mmap_mode="r")
    except (OSError, ValueError):
        return None
    return pool if pool.shape == shape and pool.dtype == np.uint8 else None


@contextmanager
def _side_by_side(processes: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """Give a `map` that works in so many processes, in order; where it is left early, what has not begun is dropped."""
    if processes == 1:
        yield map
        return
    # Started anew, not forked: torch's threads in the parent do not survive a fork. Ctrl-C is the parent's to handle.
    ignore = (signal.SIGINT, signal.SIG_IGN)
    workers = ProcessPoolExecutor(processes, get_context("spawn"), initializer=signal.signal, initargs=ignore)
    try:
        yield workers.map
    finally:
        workers.shutdown(cancel_futures=True)


def _draw_class(of: FormulaClass, count: int, image_size_px: int, seed: int) -> Pixels:
    cv2.setNumThreads(1)
    return np.stack([formula_image(of, instance, image_size_px, seed) for instance in range(count)])
