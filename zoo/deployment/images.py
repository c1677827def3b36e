"""Which images a user means: files, folders, patterns, lists, standard input; and their bytes, within a limit."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from zoo.data.decode import BadImage
from zoo.data.layouts import IMAGE_SUFFIXES, files_below, may_be_image
from zoo.errors import ZooError, one_line
from zoo.files import user_path

MAX_FILE_BYTES = 512 << 20  # 64 million pixels of 16 bits in three channels have 384 MB
MAX_LIST_BYTES = 256 << 20
STDIN = "-"


@dataclass(frozen=True)
class LoadedImage:
    """An image whose bytes are in memory already; name stands for its path in what is said of it."""

    name: str
    data: bytes

    def __str__(self) -> str:
        return self.name


Source = Path | LoadedImage


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
            found += _below(path) if path.is_dir() else [path]
        elif glob.has_magic(os.fspath(path)):
            found += _matching(path)
        else:
            raise ZooError(f"there is no file or folder {one_line(path)!r}; check the path")
    if not found:
        raise ZooError("no image was named; give files, folders or patterns")
    return found


def _below(folder: Path) -> list[Path]:
    inside = [path for path in files_below(folder) if may_be_image(path) and path.is_file()]
    if not inside:
        raise ZooError(f"folder {one_line(folder)!r} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return inside


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


def listed_paths(stream: IO[bytes], name: str) -> list[str]:
    """Return the paths of a list, one a line, or with zero bytes between them as `find -print0` writes them.

    Empty lines are left out. Raises ZooError where the list, called so, is empty or larger than 256 MiB.
    """
    data = stream.read(MAX_LIST_BYTES + 1)
    if len(data) > MAX_LIST_BYTES:
        raise ZooError(f"list {one_line(name)!r} is larger than {MAX_LIST_BYTES >> 20} MiB; give folders or patterns")
    parts = data.split(b"\0") if b"\0" in data else [line.removesuffix(b"\r") for line in data.split(b"\n")]
    paths = [os.fsdecode(part) for part in parts if part.strip()]
    if not paths:
        raise ZooError(f"list {one_line(name)!r} names no path; write one on each line")
    return paths


def read_image(source: Source) -> bytes:
    """Return a file's bytes, of a pipe too; raises BadImage with the reason, without its name."""
    if isinstance(source, LoadedImage):
        return source.data
    try:
        with source.open("rb") as stream:
            return read_limited(stream)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise BadImage(one_line(getattr(error, "strerror", None) or error)) from error


def read_limited(stream: IO[bytes]) -> bytes:
    """Return all bytes of a stream; raises BadImage beyond 512 MiB."""
    data = stream.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise BadImage(f"too large: more than {MAX_FILE_BYTES >> 20} MiB")
    return data
