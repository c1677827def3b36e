"""Which images a prediction is asked for: files, folders, patterns, or bytes that have no file."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from zoo.data.dicom import maybe_dicom
from zoo.data.layouts import IMAGE_SUFFIXES
from zoo.errors import ZooError, one_line
from zoo.files import user_path

MAX_FILE_BYTES = 1 << 30


@dataclass(frozen=True)
class Encoded:
    """An image that came as bytes, and what its row is called."""

    name: str
    data: bytes


Source = Path | Encoded


def find_images(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Return the files that paths mean, in the order given: a file is itself, a folder all images below it by name.

    What is not there but is a pattern (`*`, `?`, `[...]`, `**` for any depth) means the images it fits. DICOMs need no
    suffix. Raises ZooError where a path is not there, a folder or pattern has no image, or no path is given.
    """
    found: list[Path] = []
    for path in (user_path(each) for each in paths):
        if os.path.lexists(path):  # unlike Path.exists it takes a name that is too long
            found += _below(path) if path.is_dir() else [path]
        elif glob.has_magic(str(path)):
            found += _fitting(str(path))
        else:
            raise ZooError(f"there is no file or folder {one_line(path)!r}; check the path")
    if not found:
        raise ZooError("no image was named; give files or folders")
    return found


def listed_paths(text: str) -> list[str]:
    """Return the paths of a list, one a line; empty lines are passed over."""
    return [line.removesuffix("\r") for line in text.split("\n") if line.strip()]


def bytes_of(source: Source) -> bytes:
    """Return an image's bytes.

    Raises OSError where the file cannot be read, ValueError where it is no regular file or larger than MAX_FILE_BYTES.
    """
    if isinstance(source, Encoded):
        return source.data
    size = source.stat().st_size
    if not source.is_file():
        raise ValueError("no regular file")
    if size > MAX_FILE_BYTES:
        raise ValueError(f"too large: {size >> 20} MiB, at most {MAX_FILE_BYTES >> 20}")
    return source.read_bytes()


def name_of(source: Source) -> str:
    """Return what the row of an image is called."""
    return source.name if isinstance(source, Encoded) else str(source)


def _below(folder: Path) -> list[Path]:
    inside = sorted(path for path in folder.rglob("*") if _is_image(path))
    if not inside:
        raise ZooError(f"folder {one_line(folder)!r} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return inside


def _fitting(pattern: str) -> list[Path]:
    inside = sorted(path for path in map(Path, _matches(pattern)) if _is_image(path))
    if not inside:
        raise ZooError(f"no image fits the pattern {one_line(pattern)!r}; check it")
    return inside


def _matches(pattern: str) -> list[str]:
    return glob.glob(pattern, recursive=True)  # noqa: PTH207  # Path.glob takes no absolute pattern


def _is_image(path: Path) -> bool:
    if path.name.startswith("."):
        return False
    return path.is_file() if path.suffix.lower() in IMAGE_SUFFIXES else not path.suffix and maybe_dicom(path)
