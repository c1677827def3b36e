"""Public data sets whose clean split the project publishes: known by the content of their files, not by their names."""

from __future__ import annotations

import lzma
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from zoo.data.layouts import IMAGE_SUFFIXES, Found, find_in_folder
from zoo.data.manifest import Progress, Row, read_rows
from zoo.errors import ZooError, one_line
from zoo.files import builtin_folder, read_toml, sha256_bytes, user_path, write_new

_MAX_MEMBER_BYTES = 256 << 20
_ZIP_FAULTS = (
    OSError,
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    RuntimeError,
    EOFError,
    ValueError,
    zlib.error,
    lzma.LZMAError,
)


def canonical_names() -> dict[str, str]:
    """Return the public data sets that are known: name to summary."""
    names = {}
    for file in sorted(builtin_folder("data").glob("*/dataset.toml")):
        record = read_toml(file)
        if "original" in record:
            names[file.parent.name] = str(record.get("summary", ""))
    return names


def is_canonical(source: str | Path) -> bool:
    """Return whether a source is the name of such a data set."""
    return isinstance(source, str) and source in canonical_names()


def canonical_record(name: str) -> dict[str, Any]:
    """Return the published `dataset.toml` of a public data set."""
    return read_toml(builtin_folder("data") / name / "dataset.toml")


def published_rows(name: str) -> list[Row] | None:
    """Return the published manifest's rows, or None where the images were not at hand to publish one."""
    file = builtin_folder("data") / name / "manifest.csv"
    return read_rows(file) if file.is_file() else None


def stage_published(name: str, rows: list[Row], original: Path, images: Path, progress: Progress | None) -> None:
    """Put the images of a published manifest into a folder, found by their SHA-256 among the original's files.

    original: the download, a folder or a .zip. Raises ZooError where it is another version of the data.
    """
    wanted: dict[str, list[str]] = {}
    for _, path, _, _, _, sha256, _ in rows:
        wanted.setdefault(sha256, []).append(path)
    done, seen = 0, 0
    for data in _contents(original):
        seen += 1
        for path in wanted.pop(sha256_bytes(data), []):
            write_new(images / path, data)
            done += 1
            if progress:
                progress(done, len(rows))
    if wanted:
        first = min(path for paths in wanted.values() for path in paths)
        raise ZooError(
            f"{one_line(original)!r} is not the {name} that is published here: {done} of its {len(rows)} images are "
            f"in it (of {seen} looked at), {one_line(first)!r} for one is not; take the original download, or import "
            "it as a folder under another --name"
        )


def find_original(name: str, original: Path, stage: Path) -> Found:
    """Return what the original download of a data set holds whose manifest is not published: classes harmonised.

    It is known by its folders and how many images each holds. Raises ZooError where these differ.
    """
    record = canonical_record(name)
    facts: dict[str, Any] = record["original"]
    root = original
    if zipfile.is_zipfile(original):
        root = _unpack(original, stage / "unpacked")
    root = _root_with(root, {PurePosixPath(key).parts[0] for key in facts["images"]})
    found = find_in_folder(root, {})
    counts: dict[str, int] = {}
    for path in found.paths:
        folder = str(PurePosixPath(path).parent)
        counts[folder] = counts.get(folder, 0) + 1
    if counts != facts["images"]:
        key = min(key for key in counts.keys() | facts["images"].keys() if counts.get(key) != facts["images"].get(key))
        raise ZooError(
            f"{one_line(original)!r} is not the original {name}: the folder {one_line(key)!r} holds "
            f"{counts.get(key, 0)} images, and should hold {facts['images'].get(key, 0)}; import it as a folder under "
            "another --name"
        )
    found.kind, found.options = "canonical", {"name": name}
    found.negative_class = record.get("negative_class")
    found.described = {
        key: record[key]
        for key in ("summary", "licence", "source", "note", "medical", "faults", "original")
        if key in record
    }
    return found


def _root_with(folder: Path, names: set[str]) -> Path:
    """Return the folder, or the only one below it at most two levels down, that has folders of these names."""
    for place in (folder, *sorted(folder.glob("*")), *sorted(folder.glob("*/*"))):
        if place.is_dir() and all((place / name).is_dir() for name in names):
            return place
    raise ZooError(f"{one_line(folder)!r} has no folders {', '.join(sorted(names))}; give the original download")


def _contents(original: Path) -> Iterator[bytes]:
    """Yield the bytes of every image file of a folder or .zip."""
    if original.is_dir():
        for folder, _, names in sorted(os.walk(original)):
            for name in sorted(names):
                if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES:
                    try:
                        yield (Path(folder) / name).read_bytes()
                    except OSError as error:
                        reason = one_line(error.strerror or error)
                        raise ZooError(
                            f"cannot read {one_line(Path(folder) / name)!r}: {reason}; check its rights"
                        ) from error
    else:
        for _, data in _members(original):
            yield data


def _members(archive: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Yield path and bytes of every image of a .zip; what leads out of the archive's folder is passed over."""
    try:
        with zipfile.ZipFile(archive) as opened:
            for member in opened.infolist():
                path = PurePosixPath(member.filename.replace("\\", "/"))
                inside = not path.is_absolute() and ".." not in path.parts and "__MACOSX" not in path.parts
                if member.is_dir() or not inside or path.suffix.lower() not in IMAGE_SUFFIXES:
                    continue
                if member.file_size > _MAX_MEMBER_BYTES:
                    raise ZooError(
                        f"{one_line(archive)!r}: {one_line(path)!r} is too large: {member.file_size >> 20} MiB"
                    )
                yield path, opened.read(member)
    except _ZIP_FAULTS as error:
        raise ZooError(f"cannot read {one_line(archive)!r} as a .zip: {one_line(error)}; download it again") from error


def _unpack(archive: Path, folder: Path) -> Path:
    for path, data in _members(archive):
        write_new(folder / path, data)
    if not folder.is_dir():
        raise ZooError(f"{one_line(archive)!r} holds no image; give the original download")
    return folder


def check_original(name: str, original: str | Path | None) -> Path:
    """Return the path of the download; raises ZooError where none is given or there is nothing."""
    if original is None:
        source = canonical_record(name).get("source", "")
        raise ZooError(
            f"{name} is not downloaded here; download it ({source}) and give its folder or .zip: "
            f"`zoo data import {name} --from FOLDER_OR_ZIP`"
        )
    path = user_path(original)
    if not path.is_dir() and not (path.is_file() and zipfile.is_zipfile(path)):
        raise ZooError(f"--from must be a folder or a .zip. Got {one_line(original)!r}; give the original download")
    return path.resolve()


def unpacked(stage: Path, images: Path) -> None:
    """Move what a .zip gave into the dataset's own images."""
    if (stage / "unpacked").is_dir():
        shutil.move(stage / "unpacked", images)
