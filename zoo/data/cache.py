"""Decoded pixels, kept once per dataset, split and size on disk, memory-mapped, and shared by all recipes."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.decode import BadImage, decode, resize
from zoo.data.manifest import Dataset
from zoo.data.window import windowing_of
from zoo.errors import ZooError, one_line
from zoo.files import atomic_writer, digest_of, sha256_bytes, sha256_file
from zoo.runs import Preprocessing

CACHE_VERSION = 2
ImageProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Pixels:
    """The readable images of one split: uint8 RGB, the shorter side resized, the aspect kept.

    `pixels[i]` is an array of shape (height, width, 3). y_true: (N,) int64 places in the dataset's classes.
    skipped: path and reason of every image left out by the policy `skip`.
    """

    file: Path
    sample_ids: np.ndarray[Any, np.dtype[np.str_]]
    paths: list[str]
    groups: np.ndarray[Any, np.dtype[np.str_]]
    y_true: np.ndarray[Any, np.dtype[np.int64]]
    shapes: np.ndarray[Any, np.dtype[np.int32]]
    offsets: np.ndarray[Any, np.dtype[np.int64]]
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        height, width = (int(side) for side in self.shapes[index])
        start = int(self.offsets[index])
        return self._buffer[start : start + height * width * 3].reshape(height, width, 3)

    @property
    def _buffer(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        # Opened on first use in each process: a pickled memory map would travel as a copy of the whole file.
        buffer = self.__dict__.get("_map")
        if buffer is None:
            empty = self.file.stat().st_size == 0
            buffer = np.empty(0, np.uint8) if empty else np.memmap(self.file, np.uint8, "r")
            self.__dict__["_map"] = buffer
        return buffer

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_map"}


def open_pixels(
    dataset: Dataset,
    split: str,
    preprocessing: Preprocessing,
    bad_images: str | None = None,
    progress: ImageProgress | None = None,
) -> Pixels:
    """Return a split's pixels, decoding them where the cache has none for this split and size.

    bad_images: `fail` or `skip`; left out, the dataset's own. progress is called with images done and in all.
    Raises ZooError that names the first image that is gone, changed since the import, or cannot be decoded
    (policy `fail`), or where no image of the split can be read.
    """
    rows = dataset.of_split(split)
    policy = bad_images or dataset.bad_images
    key = digest_of(
        [
            CACHE_VERSION,
            dataset.split_digest,
            split,
            preprocessing.resize_size,
            preprocessing.interpolation,
            policy,
            [preprocessing.window, preprocessing.rescale_slope, preprocessing.rescale_intercept],
        ]
    )
    stem = f"pixels-{split}-{preprocessing.resize_size}-{preprocessing.interpolation}-{key[:12]}"
    index_file = dataset.folder / ".cache" / f"{stem}.npz"
    pixel_file = index_file.with_suffix(".bin")
    paths = [dataset.image_path(path) for path in rows["path"]]
    index = _read_index(index_file, pixel_file)
    if index is not None and _changed(index, paths, rows["sha256"].tolist()):
        index = None
    if index is None:
        index = _build(pixel_file, paths, rows["sha256"].tolist(), preprocessing, policy, split, progress)
        with atomic_writer(index_file) as stream:
            np.savez(stream, allow_pickle=False, **index)
    good = index["good"]
    place = {label: number for number, label in enumerate(dataset.classes)}
    kept = rows[good]
    reasons = index["reasons"].tolist()
    names = rows["path"].tolist()
    return Pixels(
        file=pixel_file,
        sample_ids=kept["sample_id"].to_numpy(dtype=str),
        paths=kept["path"].tolist(),
        groups=kept["group"].to_numpy(dtype=str),
        y_true=np.array([place[label] for label in kept["label"]], dtype=np.int64),
        shapes=index["shapes"][good],
        offsets=index["offsets"][good],
        skipped=[
            f"{name}: {reason}" for name, reason, fine in zip(names, reasons, good.tolist(), strict=True) if not fine
        ],
    )


def _read_index(index_file: Path, pixel_file: Path) -> dict[str, np.ndarray[Any, Any]] | None:
    """Return a cache's index, or None where cache or index is missing, cut off or damaged."""
    try:
        # Opened here: np.load leaves a damaged archive's file open.
        with index_file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            index = {key: stored[key] for key in stored.files}
        whole = pixel_file.stat().st_size == int(index["bytes"])
    except (OSError, ValueError, KeyError, EOFError):
        return None
    except Exception as error:  # zipfile raises its own kinds for a damaged archive
        if type(error).__module__ in ("zipfile", "zlib"):
            return None
        raise
    return index if whole else None


def _stat(path: Path) -> tuple[int, int]:
    try:
        facts = path.stat()
    except OSError:
        return (-1, -1)
    return (facts.st_size, facts.st_mtime_ns)


def _changed(index: dict[str, np.ndarray[Any, Any]], paths: list[Path], digests: list[str]) -> bool:
    """Return whether a file differs from what was decoded; content is read only where size or time differ."""
    for path, digest, stat, good in zip(paths, digests, index["stats"].tolist(), index["good"], strict=True):
        now = _stat(path)
        if list(now) == stat:
            continue
        try:
            if now[0] < 0 or not good or sha256_file(path) != digest:
                return True
        except OSError:  # say why when it is decoded
            return True
    return False


def _read_image(
    path: Path, digest: str, preprocessing: Preprocessing
) -> tuple[np.ndarray[Any, np.dtype[np.uint8]] | None, str, tuple[int, int]]:
    """Return pixels or None, the reason of a failure, and the file's size and time."""
    stat = _stat(path)
    try:
        data = path.read_bytes()
        if sha256_bytes(data) != digest:
            return None, "changed since the import", stat
        pixels = decode(data, windowing_of(preprocessing))
        return resize(pixels, preprocessing.resize_size, preprocessing.interpolation), "", stat
    except FileNotFoundError:
        return None, "gone", stat
    except OSError as error:
        return None, one_line(error.strerror or error), stat
    except BadImage as error:
        return None, str(error), stat


def _build(
    pixel_file: Path,
    paths: list[Path],
    digests: list[str],
    preprocessing: Preprocessing,
    policy: str,
    split: str,
    progress: ImageProgress | None,
) -> dict[str, np.ndarray[Any, Any]]:
    count = len(paths)
    shapes, offsets = np.zeros((count, 2), np.int32), np.zeros(count, np.int64)
    stats, good, reasons = np.zeros((count, 2), np.int64), np.zeros(count, bool), [""] * count
    end = 0
    with atomic_writer(pixel_file) as stream:
        for number, (pixels, reason, stat) in enumerate(_in_order(paths, digests, preprocessing)):
            stats[number], reasons[number], offsets[number] = stat, reason, end
            if pixels is not None:
                good[number] = True
                shapes[number] = pixels.shape[:2]
                stream.write(np.ascontiguousarray(pixels).data)
                end += pixels.size
            elif policy == "fail":
                raise ZooError(
                    f"image {one_line(paths[number])!r} of split {split!r}: {reason}; mend it, import the data "
                    "again, or leave such images out with --bad-images skip"
                )
            if progress:
                progress(number + 1, count)
    if not good.any():
        first = f" (the first, {one_line(paths[0])!r}: {reasons[0]})" if count else ""
        raise ZooError(f"no image of split {split!r} can be read{first}; import the data again")
    return {
        "shapes": shapes,
        "offsets": offsets,
        "stats": stats,
        "good": good,
        "reasons": np.array(reasons, dtype=str),
        "bytes": np.array(end),
    }


def _in_order(
    paths: list[Path], digests: list[str], preprocessing: Preprocessing
) -> Iterator[tuple[np.ndarray[Any, np.dtype[np.uint8]] | None, str, tuple[int, int]]]:
    """Decode on all cores, in order, with no more than a few dozen images in memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    jobs = zip(paths, digests, strict=True)
    with ThreadPoolExecutor(cores) as pool:
        waiting: deque[Future[Any]] = deque(
            pool.submit(_read_image, path, digest, preprocessing) for path, digest in itertools.islice(jobs, cores * 8)
        )
        try:
            while waiting:
                result = waiting.popleft().result()
                for path, digest in itertools.islice(jobs, 1):
                    waiting.append(pool.submit(_read_image, path, digest, preprocessing))
                yield result
        finally:
            for future in waiting:
                future.cancel()
