"""Self-contained HTML pages: one shell, everything escaped, no script, no address outside the file."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np


def render(template: str, **values: Any) -> str:
    """Return a page: a template of the folder `pages`, filled in, with every value escaped.

    The page runs no script and asks for nothing outside itself; pictures are data addresses (`picture`).
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("zoo.reporting", "pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def picture(pixels: np.ndarray[Any, np.dtype[np.uint8]], side: int = 192) -> str:
    """Return uint8 pixels (H, W, 3) as a data address of a JPEG whose longer side has at most `side` pixels."""
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    return _data_address(image, "JPEG")


def figure(figure: Any) -> str:
    """Return a matplotlib figure as a data address of a PNG."""
    import warnings

    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        figure.savefig(stream, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _data_address(image: Any, kind: str) -> str:
    stream = io.BytesIO()
    image.save(stream, kind, quality=80)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(stream.getvalue()).decode()
