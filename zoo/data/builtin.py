"""Data that need no download: the generated lung phantom, and scikit-learn's handwritten digits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from zoo.errors import ZooError, nearest, one_line


class BuiltinImage(TypedDict):
    """A written image: its path relative to the images' folder, label, and group (empty: its own)."""

    path: str
    label: str
    group: str


@dataclass(frozen=True)
class BuiltinDataset:
    """What `dataset.toml` says of built-in data, and the function that writes their images to a folder.

    ratios: of train, val and test, where no option is given; None: as everywhere.
    """

    name: str
    summary: str
    licence: str
    source: str
    note: str
    make: Callable[[Path, dict[str, Any]], list[BuiltinImage]]
    medical: bool = False
    negative_class: str | None = None
    ratios: tuple[float, float, float] | None = None


def _options(name: str, given: dict[str, Any], known: dict[str, int]) -> dict[str, int]:
    for key in given:
        if key not in known:
            hint = nearest(key, known) or ";"
            raise ZooError(f"{name} has no option {one_line(key)!r}{hint} it knows {', '.join(known) or 'none'}")
    return {**known, **given}


def _write_png(folder: Path, path: str, pixels: np.ndarray[Any, Any]) -> None:
    from PIL import Image

    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, format="PNG", optimize=False)


def _make_phantom(folder: Path, given: dict[str, Any]) -> list[BuiltinImage]:
    from zoo.data.phantom import generate_phantom

    known = {"patients": 420, "slices_per_patient": 3, "image_size_px": 96, "seed": 0}
    images = []
    for each in generate_phantom(**_options("lung-phantom", given, known)):
        path = f"{each.label}/{each.patient}-{each.slice_index:03d}.png"
        _write_png(folder, path, each.pixels)
        images.append(BuiltinImage(path=path, label=each.label, group=each.patient))
    return images


def generate_digits() -> Iterator[tuple[str, str, np.ndarray[Any, np.dtype[np.uint8]]]]:
    """Yield name, label and uint8 pixels (32, 32) of scikit-learn's 1797 handwritten digits.

    Source: Alpaydin and Kaynak 1998, doi 10.24432/C50P49. The 8 x 8 counts from 0 to 16 are scaled and enlarged.
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    for number, (counts, label) in enumerate(zip(data.images, data.target, strict=True)):
        small = Image.fromarray(np.rint(counts * (255 / 16)).astype(np.uint8))
        yield f"digit-{number:04d}", str(label), np.asarray(small.resize((32, 32), Image.Resampling.BICUBIC))


def _make_digits(folder: Path, given: dict[str, Any]) -> list[BuiltinImage]:
    _options("digits", given, {})
    images = []
    for name, label, pixels in generate_digits():
        _write_png(folder, f"{label}/{name}.png", pixels)
        images.append(BuiltinImage(path=f"{label}/{name}.png", label=label, group=""))
    return images


_DIGITS_SOURCE = "UCI Optical Recognition of Handwritten Digits, doi 10.24432/C50P49, by way of scikit-learn"
_WRITERS = "The writers are not named in the data, so a writer may stand in more than one split."

BUILTIN: dict[str, BuiltinDataset] = {
    "lung-phantom": BuiltinDataset(
        name="lung-phantom",
        summary="generated axial chest slices of invented patients: normal, benign, malignant",
        licence="free to use, made by a formula",
        source="zoo/data/phantom.py",
        note="Synthetic. No patient was scanned; a score on these images is fit for no clinical claim.",
        make=_make_phantom,
        medical=True,
        negative_class="normal",
        # Few patients to learn from, as on a real ward, but enough of them in test to tell models apart.
        ratios=(0.4, 0.15, 0.45),
    ),
    "digits": BuiltinDataset(
        name="digits",
        summary="1797 handwritten digits of 43 writers, 8 x 8 pixels enlarged to 32 x 32",
        licence="CC BY 4.0",
        source=_DIGITS_SOURCE,
        note=_WRITERS,
        make=_make_digits,
    ),
    "digits-few": BuiltinDataset(
        name="digits-few",
        summary="the same digits, a tenth of them to learn from and most of them to test on",
        licence="CC BY 4.0",
        source=_DIGITS_SOURCE,
        note=_WRITERS,
        make=_make_digits,
        ratios=(0.1, 0.1, 0.8),
    ),
}
