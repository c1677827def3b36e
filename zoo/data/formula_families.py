"""The families of formula images: each turns a cell of parameters (the class) and chance into a picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from zoo.data import formula_shapes as shapes
from zoo.data import formula_surfaces as surfaces
from zoo.data.formula_bodies import BRANCHES, CAVITIES, CONTENTS, WALLS, draw_bodies
from zoo.data.formula_fields import Cell, Field, Rng, product_of


@dataclass(frozen=True)
class Family:
    """One kind of picture: its cells (a class each), and what draws an instance (size, size, 3) of one in [0, 1]."""

    name: str
    summary: str
    source: str
    cells: Callable[[int], list[Cell]]
    draw: Callable[[Rng, Cell, int], Field]


def _drawn(count: int, draw: Callable[[Rng], Cell], family: int) -> Callable[[int], list[Cell]]:
    """Return what draws so many cells; `family` keeps two families' draws apart, and never changes."""
    return lambda seed: [draw(np.random.default_rng([seed, family, number])) for number in range(count)]


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "leaves",
            "opaque shapes that fall on each other",
            "Lee, Mumford and Huang 2001, doi 10.1023/A:1011109015675; Baradad et al. 2021, arXiv 2106.05963",
            lambda _: product_of(
                shape=shapes.LEAF_SHAPES, size=tuple(shapes.LEAF_SIZES), fill=("flat", "stripes", "noise")
            ),
            shapes.draw_leaves,
        ),
        Family(
            "contours",
            "closed curves with waves on their radius",
            "Kataoka et al. 2022, arXiv 2206.09132; visual atoms, arXiv 2303.01112",
            _drawn(120, shapes.contour_cell, 2),
            shapes.draw_contours,
        ),
        Family(
            "fractals",
            "iterated function systems",
            "Kataoka et al. 2020, arXiv 2101.08515; Anderson and Farrell 2022, arXiv 2110.03091",
            _drawn(60, shapes.fractal_cell, 3),
            shapes.draw_fractals,
        ),
        Family(
            "textures",
            "band-pass noise, gratings, Voronoi cells, warped noise, worms",
            "noise and stripes as in Baradad et al. 2021, arXiv 2106.05963; the rest our own",
            surfaces.texture_cells,
            surfaces.draw_textures,
        ),
        Family(
            "programs",
            "random expressions of place",
            "procedural programs as in Baradad et al. 2021, arXiv 2106.05963",
            _drawn(120, surfaces.program_cell, 5),
            surfaces.draw_programs,
        ),
        Family(
            "glyphs", "signs of a few bent strokes", "our own", _drawn(80, shapes.glyph_cell, 6), shapes.draw_glyphs
        ),
        Family(
            "spots",
            "a few or many small things of one profile and size",
            "our own",
            lambda _: product_of(
                size=tuple(shapes.SPOT_RADII),
                count=tuple(shapes.SPOT_COUNTS),
                profile=("smooth", "disc", "ring", "spiky"),
                bright=(True, False),
            ),
            shapes.draw_spots,
        ),
        Family(
            "bodies",
            "ovals with dark cavities and things in them",
            "our own",
            lambda _: product_of(cavities=CAVITIES, contents=CONTENTS, wall=WALLS, branches=tuple(BRANCHES)),
            draw_bodies,
        ),
    )
}
