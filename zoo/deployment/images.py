"""Which images a prediction is asked for: files, folders, patterns, or bytes that have no file."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from zoo.data.layouts import IMAGE_SUFFIXES, files_below, may_be_image
from zoo.errors import ZooError, one_line
from zoo.files import user_path

MAX_FILE_BYTES = 1 << 30
MAX_LIST_BYTES = 256 << 20


@dataclass(frozen=True)
class Encoded:
    """An image that came as bytes, and what its row is called."""

    name: str
    data: bytes


Source = Path | Encoded


def find_images(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Return the files that paths mean, in the order given.

    A file is itself, whatever its ending; a folder all images below it, in order of names, DICOM without an ending
    included, hidden ones not. What is no path but a pattern (`*`, `?`, `[...]`, `**` for any depth) stands for what it
    matches, each file once, and of folders that it matches only images count.

    Raises ZooError where a path is not there, a pattern matches nothing, a folder holds no image, or no path is given.
    """
    found: list[Path] = []
    for given in paths:
        path = user_path(given)
        if os.path.lexists(path):  # unlike Path.exists it takes a name that is too long
            found += _folder(path) if path.is_dir() else [path]
        elif glob.has_magic(os.fspath(path)):
            found += _matching(path)
        else:
            raise ZooError(f"there is no file or folder {one_line(path)!r}; check the path")
    if not found:
        raise ZooError("no image was named; give files, folders or patterns")
    return found


def _folder(folder: Path) -> list[Path]:
    inside = _below(folder)
    if not inside:
        raise ZooError(f"folder {one_line(folder)!r} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return inside


def _below(folder: Path) -> list[Path]:
    return [path for path in files_below(folder) if may_be_image(path) and path.is_file()]


def _matching(pattern: Path) -> list[Path]:
    text = os.fspath(pattern)
    matched = [Path(each) for each in sorted(glob.glob(text, recursive=True))]  # noqa: PTH207
    # `**/*` matches everything, so what an ending of the pattern did not ask for must look like an image.
    named = bool(Path(text).suffix) and not glob.has_magic(Path(text).suffix)
    files = {path: None for path in matched if path.is_file() and (named or may_be_image(path))}
    if "**" not in Path(text).parts:  # else what lies below matches by itself
        files |= {path: None for folder in matched if folder.is_dir() for path in _below(folder)}
    if not files:
        raise ZooError(f"pattern {one_line(text)!r} matches no image; check it, and put it in quotes")
    return list(files)


def listed_images(stream: IO[bytes], name: str) -> list[Path]:
    """Return the files of a list, one a line, or with zero bytes between them as `find -print0` writes them.

    A folder means all images below it. Names are bytes, whatever their encoding; empty lines are left out. What is not
    there is listed too: it becomes a row with that reason, so that one lost file costs no list its other rows. Raises
    ZooError where the list, called so, names nothing or is larger than 256 MiB.
    """
    data = stream.read(MAX_LIST_BYTES + 1)
    if len(data) > MAX_LIST_BYTES:
        raise ZooError(f"list {one_line(name)!r} is larger than {MAX_LIST_BYTES >> 20} MiB; give folders or patterns")
    data = data.removeprefix(b"\xef\xbb\xbf")  # as some editors begin a text
    parts = data.split(b"\0") if b"\0" in data else [line.removesuffix(b"\r") for line in data.split(b"\n")]
    paths = [Path(os.fsdecode(part)) for part in parts if part.strip()]
    if not paths:
        raise ZooError(f"list {one_line(name)!r} names no path; write one on each line")
    return [file for path in paths for file in (_folder(path) if os.path.isdir(path) else [path])]  # noqa: PTH112


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
