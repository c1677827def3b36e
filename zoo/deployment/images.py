"""Which images a prediction is asked for: files, folders, patterns, or bytes that have no file."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
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


@dataclass(frozen=True)
class Lost:
    """What a list names and gives no image: its row says why."""

    name: str
    reason: str


Source = Path | Encoded | Lost


def find_images(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Return the files that paths mean, in the order given.

    A file is itself, whatever its ending; a folder all images below it, in order of names, DICOM without an ending
    included, hidden ones not. What is no path but a pattern (`*`, `?`, `[...]`, `**` for any depth) stands for what it
    matches, each file once, and of folders that it matches only images count. Links are followed, but not back to a
    folder that they lie in; one that leads nowhere is a file that cannot be read.

    Raises ZooError where a path is none, empty or not there, a pattern matches nothing, a folder holds no image, or no
    path is given.
    """
    found: list[Path] = []
    for given in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        if not isinstance(given, (str, os.PathLike)):
            raise ZooError(f"images are given by their paths. Got {type(given).__name__}; write it to a file first")
        if not os.fspath(given):
            raise ZooError("a path is empty; give files, folders or patterns, . for the current folder")
        path = user_path(given)
        if os.path.lexists(path):  # unlike Path.exists it takes a name that is too long
            found += _folder(path) if os.path.isdir(path) else [path]  # noqa: PTH112  # Path.is_dir raises EACCES
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
    return [path for path in files_below(folder) if may_be_image(path) and _counts(path)]


def _counts(path: Path) -> bool:
    """Return whether a path is a regular file, or cannot be looked at: then its row says why."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return True
    except ValueError:  # a zero byte
        return False


def _matching(pattern: Path) -> list[Path]:
    text, deep = os.fspath(pattern), "**" in pattern.parts
    matched = sorted(set(_walked(Path(), list(pattern.parts))) if deep else map(Path, glob.glob(text)), key=os.fspath)  # noqa: PTH207
    # `**/*` matches everything, so what an ending of the pattern did not ask for must look like an image.
    named = bool(Path(text).suffix) and not glob.has_magic(Path(text).suffix)
    files = {path: None for path in matched if _counts(path) and (named or may_be_image(path))}
    if not deep:  # else what lies below matches by itself
        folders = [path for path in matched if os.path.isdir(path)]  # noqa: PTH112
        files |= {path: None for folder in folders for path in _below(folder)}
    if not files:
        raise ZooError(f"pattern {one_line(text)!r} matches no image; check it, and put it in quotes")
    return list(files)


def _walked(folder: Path, parts: list[str], above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """Yield what a pattern's parts match in a folder, as `glob` does, which follows a link to `.` 40 times over.

    above: the folders that `**` has gone through, which it does not enter again.
    """
    if not parts:
        yield folder
        return
    first, rest = parts[0], parts[1:]
    if not glob.has_magic(first):
        if os.path.lexists(folder / first):
            yield from _walked(folder / first, rest)
        return
    try:
        facts, names = folder.stat(), sorted(os.listdir(folder))  # noqa: PTH208
    except OSError:  # no folder, or not to be read: as `glob`, which passes it over
        return
    here = (facts.st_dev, facts.st_ino)
    if first != "**":
        for name in names:
            if fnmatchcase(name, first) and (name[0] != "." or first[0] == "."):
                yield from _walked(folder / name, rest)
    elif here not in above:
        yield from _walked(folder, rest) if rest else ()
        for name in names:
            if name[0] != ".":
                yield from () if rest else (folder / name,)
                yield from _walked(folder / name, parts, above | {here})


def listed_images(stream: IO[bytes], name: str) -> list[Source]:
    """Return the files of a list, one a line, or with zero bytes between them as `find -print0` writes them.

    A folder means all images below it. Names are bytes, whatever their encoding; empty lines are left out. What is not
    there is listed too, and so is a folder that holds no image or cannot be read: it becomes a row with that reason, so
    that one lost file costs no list its other rows. Raises ZooError where the list, called so, names nothing or is
    larger than 256 MiB.
    """
    data = stream.read(MAX_LIST_BYTES + 1)
    if len(data) > MAX_LIST_BYTES:
        raise ZooError(f"list {one_line(name)!r} is larger than {MAX_LIST_BYTES >> 20} MiB; give folders or patterns")
    data = data.removeprefix(b"\xef\xbb\xbf")  # as some editors begin a text
    parts = data.split(b"\0") if b"\0" in data else [line.removesuffix(b"\r") for line in data.split(b"\n")]
    paths = [Path(os.fsdecode(part)) for part in parts if part.strip()]
    if not paths:
        raise ZooError(f"list {one_line(name)!r} names no path; write one on each line")
    return [source for path in paths for source in _of_list(path)]


def _of_list(path: Path) -> list[Source]:
    if not os.path.isdir(path):  # noqa: PTH112
        return [path]
    try:
        return [*_below(path)] or [Lost(str(path), "the folder holds no image")]
    except ZooError as error:
        return [Lost(str(path), str(error))]


def bytes_of(source: Source) -> bytes:
    """Return an image's bytes.

    Raises OSError where the file cannot be read, ValueError where it is no regular file, larger than MAX_FILE_BYTES, or
    Lost.
    """
    if isinstance(source, Lost):
        raise ValueError(source.reason)  # noqa: TRY004
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
    return str(source) if isinstance(source, Path) else source.name
