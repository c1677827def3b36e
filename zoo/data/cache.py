"""Decoded pixels, kept once per dataset, split and size on disk, memory-mapped, and shared by all recipes.

What the room for caches cannot hold (`zoo.data.room`) is decoded whenever it is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from zoo.data.decode import MAX_ASPECT, BadImage, decode, read_header, resize
from zoo.data.manifest import Dataset, map_files
from zoo.data.room import building, cache_limit, make_room, open_in_use
from zoo.data.window import windowing_of
from zoo.errors import Hindered, ZooError, one_line
from zoo.files import atomic_writer, digest_of, sha256_bytes, sha256_file
from zoo.runs import Preprocessing

CACHE_VERSION = 3
ImageProgress = Callable[[int, int], None]
_SAMPLE = 64  # images whose headers tell how large a cache will be
_PART = 4096  # rows that are held as Python's numbers at once


@dataclass(frozen=True)
class Source:
    """Where the images of a split come from, and how they are seen.

    paths: relative to root, one per image; digests: the SHA-256 that each file should have.
    """

    root: str
    split: str
    paths: list[str]
    digests: list[str]
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return len(self.paths)

    def file(self, index: int) -> str:
        """Return where an image lies."""
        return os.path.join(self.root, self.paths[index])  # noqa: PTH118 (a million Paths take a gigabyte)

    def fault(self, index: int, reason: str) -> Hindered:
        """Return the error that names an image which cannot be used."""
        return Hindered(
            f"image {one_line(Path(self.file(index)))!r} of split {self.split!r}: {reason}; mend it, import the data "
            "again, or leave such images out with --bad-images skip"
        )


@dataclass(frozen=True)
class Pixels:
    """The readable images of one split: uint8 RGB, the shorter side resized, the aspect kept.

    `pixels[i]` is a read-only array of shape (height, width, 3); where the cache has no room for the split it is
    decoded at that moment, and Hindered names an image that is gone or changed by then. sample_ids, groups: (N,) str
    objects. y_true: (N,) int64 places in the dataset's classes. shapes: (N, 2) int32 height and width in pixels.
    offsets: (N,) int64 bytes, and (0,) where nothing is cached. size_bytes: of all pixels. skipped: path and reason of
    every image left out by the policy `skip`.
    """

    file: Path
    source: Source
    sample_ids: np.ndarray[Any, np.dtype[np.object_]]
    groups: np.ndarray[Any, np.dtype[np.object_]]
    y_true: np.ndarray[Any, np.dtype[np.int64]]
    shapes: np.ndarray[Any, np.dtype[np.int32]]
    offsets: np.ndarray[Any, np.dtype[np.int64]]
    size_bytes: int
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        height, width = (int(side) for side in self.shapes[index])
        if not self.cached:
            return self._decoded(index)
        start = int(self.offsets[index])
        return self._buffer[start : start + height * width * 3].reshape(height, width, 3)

    @property
    def paths(self) -> list[str]:
        """Return the manifest's path of each image."""
        return self.source.paths

    @property
    def cached(self) -> bool:
        """Return whether the pixels lie decoded on disk."""
        return len(self.offsets) > 0

    def _decoded(self, index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        source = self.source
        pixels, reason, _ = _read_image(source.file(index), source.digests[index], source.preprocessing)
        if pixels is None:
            raise source.fault(index, reason)
        pixels.flags.writeable = False
        return pixels

    @property
    def _buffer(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        # Opened again in each process: a pickled memory map would travel as a copy of the whole file.
        buffer: np.ndarray[Any, np.dtype[np.uint8]] | None = self.__dict__.get("_map")
        if buffer is None:
            stream = open_in_use(self.file, self.size_bytes)
            if stream is None:
                raise Hindered(
                    f"the pixel cache {str(self.file)!r} was removed or changed; give the same command again"
                )
            buffer = self._use(stream)
        return buffer

    def _use(self, stream: IO[bytes]) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Map the cache; the map, not this object, keeps it from being removed for want of room."""
        with stream:
            buffer = np.memmap(stream, np.uint8, "r")
        self.__dict__["_map"] = buffer
        return buffer

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_map"}


@dataclass
class _Index:
    """What one look at all images of a split has found: N rows.

    shapes: (N, 2) height and width, 0 where an image is bad; stats: (N, 2) size and time of the file; reasons: why an
    image is bad, by its place.
    """

    shapes: np.ndarray[Any, np.dtype[np.int32]]
    stats: np.ndarray[Any, np.dtype[np.int64]]
    reasons: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, count: int) -> _Index:
        """Return the index of that many images before any is looked at."""
        return cls(np.zeros((count, 2), np.int32), np.zeros((count, 2), np.int64))

    @property
    def good(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        found: np.ndarray[Any, np.dtype[np.bool_]] = self.shapes[:, 0] > 0
        return found

    @property
    def ends(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return where the pixels of each image end in the cache, in bytes."""
        return np.cumsum(self.shapes.prod(axis=1, dtype=np.int64) * 3)

    @property
    def bytes(self) -> int:
        return int(self.ends[-1]) if len(self.shapes) else 0

    def write(self, file: Path) -> None:
        places = np.array(list(self.reasons), np.int64)
        texts, codes = np.unique(np.array(list(self.reasons.values()), dtype=str), return_inverse=True)
        with atomic_writer(file) as stream:
            np.savez(
                stream, allow_pickle=False, shapes=self.shapes, stats=self.stats, bad=places, texts=texts, codes=codes
            )


def open_pixels(
    dataset: Dataset,
    split: str,
    preprocessing: Preprocessing,
    bad_images: str | None = None,
    progress: ImageProgress | None = None,
) -> Pixels:
    """Return a split's pixels, decoding them where the cache has none for this split and size.

    bad_images: `fail` or `skip`; left out, the dataset's own. progress is called with images done and in all. The
    cache stays within `ZOO_CACHE_GB` gigabytes (`zoo.data.room`): a split that does not fit is looked through once,
    and decoded again as it is used. Raises Hindered that names the first image that is gone, changed since the import,
    or cannot be decoded (policy `fail`), or where no image of the split can be read.
    """
    limit = cache_limit()
    rows = dataset.of_split(split)
    policy = bad_images or dataset.bad_images
    source = Source(str(dataset.root), split, rows["path"].tolist(), rows["sha256"].tolist(), preprocessing)
    pixel_file = dataset.folder / ".cache" / f"{_stem(dataset, split, preprocessing, policy)}.bin"
    index, stream = _at_hand(pixel_file, source)
    if index is None or stream is None:
        index, stream = _made(pixel_file, source, policy, index, limit, progress)
    good = index.good
    kept_rows = rows if good.all() else rows[good]
    place = {label: number for number, label in enumerate(dataset.classes)}
    shapes = index.shapes[good]
    pixels = Pixels(
        file=pixel_file,
        source=Source(source.root, split, kept_rows["path"].tolist(), kept_rows["sha256"].tolist(), preprocessing),
        sample_ids=kept_rows["sample_id"].to_numpy(dtype=object),
        groups=kept_rows["group"].to_numpy(dtype=object),
        y_true=np.fromiter((place[label] for label in kept_rows["label"]), np.int64, len(kept_rows)),
        shapes=shapes,
        offsets=np.concatenate([[0], index.ends[good][:-1]]) if stream else np.zeros(0, np.int64),
        size_bytes=index.bytes,
        skipped=[f"{source.paths[number]}: {reason}" for number, reason in index.reasons.items()],
    )
    if stream is not None:
        pixels._use(stream)
    return pixels


def _stem(dataset: Dataset, split: str, preprocessing: Preprocessing, policy: str) -> str:
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
    return f"pixels-{split}-{preprocessing.resize_size}-{preprocessing.interpolation}-{key[:12]}"


def _at_hand(pixel_file: Path, source: Source) -> tuple[_Index | None, IO[bytes] | None]:
    """Return what is known of a split's images, if they are still the same, and the open cache, if it is there."""
    index = _read_index(pixel_file.with_suffix(".npz"), len(source))
    if index is None or _changed(index, source):
        return None, None
    return index, open_in_use(pixel_file, index.bytes)


def _read_index(index_file: Path, count: int) -> _Index | None:
    try:
        # Opened here: np.load leaves a damaged archive's file open.
        with index_file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            texts = stored["texts"].tolist()
            reasons = {
                place: texts[code] for place, code in zip(stored["bad"].tolist(), stored["codes"].tolist(), strict=True)
            }
            index = _Index(stored["shapes"], stored["stats"], reasons)
    except Exception:  # missing, cut off or damaged in whatever way: looked at again
        return None
    whole = index.shapes.shape == index.stats.shape == (count, 2)
    return index if whole and len(reasons) == count - np.count_nonzero(index.good) else None


def _changed(index: _Index, source: Source) -> bool:
    """Return whether a file differs from what was decoded; content is read only where size or time differ."""
    for start in range(0, len(source), _PART):
        for place, stat in enumerate(index.stats[start : start + _PART].tolist(), start):
            file = source.file(place)
            now = _stat(file)
            if list(now) == stat:
                continue
            try:
                if now[0] < 0 or place in index.reasons or sha256_file(Path(file)) != source.digests[place]:
                    return True
            except OSError:  # say why when it is decoded
                return True
    return False


def _stat(file: str) -> tuple[int, int]:
    try:
        facts = os.stat(file)  # noqa: PTH116
    except OSError:
        return (-1, -1)
    return (facts.st_size, facts.st_mtime_ns)


def _read_image(
    file: str, digest: str, preprocessing: Preprocessing
) -> tuple[np.ndarray[Any, np.dtype[np.uint8]] | None, str, tuple[int, int]]:
    """Return pixels or None, the reason of a failure, and the file's size and time."""
    stat = _stat(file)
    try:
        data = Path(file).read_bytes()
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


class _NoRoomError(Exception):
    """A cache that is being written has outgrown its room."""


def _made(
    pixel_file: Path, source: Source, policy: str, index: _Index | None, limit: float, progress: ImageProgress | None
) -> tuple[_Index, IO[bytes] | None]:
    """Build the cache where there is room for it; else only look at each image once, unless that was done before."""
    needed = _estimate(source) if index is None else index.bytes
    if not make_room(pixel_file, needed, limit):
        if index is None:
            index = _Index.of(len(source))
            for _ in _looked(source, index, policy, progress):
                pass
            with suppress(ZooError):  # a folder that cannot be written: looked at again the next time
                index.write(pixel_file.with_suffix(".npz"))
        return index, None
    with building(pixel_file):
        index, stream = _at_hand(pixel_file, source)  # another process may have built it meanwhile
        if index is None or (stream is None and make_room(pixel_file, index.bytes, limit)):
            needed = needed if index is None else index.bytes
            index, kept = _build(pixel_file, source, policy, needed, limit, progress)
            index.write(pixel_file.with_suffix(".npz"))
            stream = open_in_use(pixel_file, index.bytes) if kept else None
    return index, stream


def _estimate(source: Source) -> int:
    """Return about how many bytes a split's pixels will take, from the headers of at most 64 of its images."""
    size, found = source.preprocessing.resize_size, []
    for place in np.unique(np.linspace(0, len(source) - 1, min(_SAMPLE, len(source))).astype(int)).tolist():
        try:
            header = read_header(Path(source.file(place)).read_bytes())
        except (OSError, BadImage):
            continue
        short, long = sorted((max(1, header.width), max(1, header.height)))
        found.append(3 * size * int(size * min(MAX_ASPECT, long / short)))
    return int(np.mean(found) * len(source)) if found else 0


def _build(
    pixel_file: Path, source: Source, policy: str, granted: int, limit: float, progress: ImageProgress | None
) -> tuple[_Index, bool]:
    """Look at all images and keep their pixels; return whether they are kept, which ends when the room does."""
    index, kept = _Index.of(len(source)), True
    with suppress(OSError):  # so that an index never stands beside the pixels of another build
        pixel_file.with_suffix(".npz").unlink()
    with closing(_looked(source, index, policy, progress)) as images:
        try:
            with atomic_writer(pixel_file) as stream:
                _keep(images, stream, pixel_file, granted, limit)
        except _NoRoomError:
            kept = False
            pixel_file.unlink(missing_ok=True)
        for _ in images:  # the rest, without keeping it
            pass
    return index, kept


def _keep(
    images: Iterator[np.ndarray[Any, np.dtype[np.uint8]]],
    stream: IO[bytes],
    pixel_file: Path,
    granted: int,
    limit: float,
) -> None:
    """Write images one after the other; raise _NoRoomError where they take more room than there is."""
    end = 0
    stream.truncate(granted)  # a hole of the size that it will have: others that ask for room count it
    for pixels in images:
        end += pixels.size
        if end > granted:
            granted = next(
                (wanted for wanted in (end + end // 10, end) if make_room(pixel_file, wanted, limit)),
                0,
            )
            if not granted:
                raise _NoRoomError
            stream.truncate(granted)
        stream.write(np.ascontiguousarray(pixels).data)
    stream.truncate(end)


def _looked(
    source: Source, index: _Index, policy: str, progress: ImageProgress | None
) -> Generator[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Yield the pixels of every readable image, in order, and note in the index what is found."""

    def read(place: int) -> tuple[np.ndarray[Any, np.dtype[np.uint8]] | None, str, tuple[int, int]]:
        return _read_image(source.file(place), source.digests[place], source.preprocessing)

    for number, (pixels, reason, stat) in enumerate(map_files(read, range(len(source)))):
        index.stats[number] = stat
        if pixels is not None:
            index.shapes[number] = pixels.shape[:2]
            yield pixels
        elif policy == "fail":
            raise source.fault(number, reason)
        else:
            index.reasons[number] = reason
        if progress:
            progress(number + 1, len(source))
    if not index.good.any():
        first = f" (the first, {one_line(Path(source.file(0)))!r}: {index.reasons[0]})" if len(source) else ""
        raise Hindered(f"no image of split {source.split!r} can be read{first}; import the data again")
