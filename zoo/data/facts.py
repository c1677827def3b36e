"""One look at every file of a dataset: header, size, brightness, perceptual hash and a small grey picture."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from zoo.data.decode import BadImage, Header, Pixels, decode, pixel_sha256, read_header
from zoo.data.manifest import Dataset, Progress, map_files
from zoo.data.pictures import BLOCK, SMALL_SIDE, Pictures, Small, read_archive, write_archive
from zoo.data.window import Windowing, windowing_of_facts
from zoo.errors import ZooError, one_line
from zoo.files import atomic_writer, digest_of, sha256_bytes, write_error

FACTS_VERSION = 3
_IN_MEMORY = 1 << 16  # pictures: 64 MiB
MAX_FILE_BYTES = 1 << 30
Ints = np.ndarray[Any, np.dtype[np.int64]]
_GOOD_SUFFIXES = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "DICOM": (".dcm", ".dicom", ".ima", ""),
}


@dataclass(frozen=True)
class ImageFacts:
    """What one look at a file gives; where `reason` says why it cannot be used, the rest is empty.

    no_image: it was never to be an image. small: uint8 (32, 32), grey. phash: the 64 bits of imagehash's
    perceptual hash. mean: grey level of the small picture, 0 to 255.
    """

    sha256: str = ""
    pixel_sha256: str = ""
    bytes: int = 0
    header: Header | None = None
    phash: int = 0
    mean: float = 0.0
    small: np.ndarray[Any, np.dtype[np.uint8]] | None = None
    reason: str = ""
    no_image: bool = False


def look_at(data: bytes, windowing: Windowing) -> ImageFacts:
    """Return the facts of a file's bytes; a file that cannot be decoded has a reason and its digest."""
    digest = sha256_bytes(data)
    try:
        header, pixels = read_header(data), decode(data, windowing)
    except BadImage as error:
        return ImageFacts(digest, bytes=len(data), reason=str(error), no_image=error.no_image)
    small = small_grey(pixels)
    if header.format == "DICOM":
        header = Header("DICOM", "DICOM", pixels.shape[1], pixels.shape[0], False, 1, True)
    return ImageFacts(
        digest, pixel_sha256(pixels), len(data), header, perceptual_hash(small), float(small.mean()), small
    )


def look_at_file(path: Path, windowing: Windowing) -> ImageFacts:
    """Return the facts of a file, with a reason where it cannot be read."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            return ImageFacts(bytes=size, reason=f"too large: {size >> 20} MiB")
        if not path.is_file():
            return ImageFacts(reason="no regular file")
        return look_at(path.read_bytes(), windowing)
    except FileNotFoundError:
        return ImageFacts(reason="gone")
    except (OSError, ValueError) as error:
        return ImageFacts(reason=one_line(getattr(error, "strerror", None) or error))


def small_grey(pixels: Pixels) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return an image (H, W, 3) as 32 x 32 grey levels, stretched to a square, antialiased."""
    from PIL import Image

    image = Image.fromarray(pixels)
    # Reduced first by whole blocks: the same to the eye and to the measures, and several times faster.
    image = image.resize((SMALL_SIDE, SMALL_SIDE), Image.Resampling.BILINEAR, reducing_gap=3.0)
    return np.asarray(image.convert("L"))


def perceptual_hash(small: np.ndarray[Any, np.dtype[np.uint8]]) -> int:
    """Return imagehash's 64-bit perceptual hash of a 32 x 32 grey picture.

    >>> perceptual_hash(np.zeros((32, 32), np.uint8))
    0
    """
    import imagehash
    from PIL import Image

    bits = imagehash.phash(Image.fromarray(small)).hash.ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@dataclass(frozen=True)
class Facts:
    """The facts of all images of a manifest, in its order: N rows.

    phash: (N,) uint64; small: (N, 32, 32) uint8, on disk where there are many; size: (N, 2) stored width and height in
    pixels; reasons: (N,) str objects, why an image cannot be used any more, else empty; changed: whether its bytes
    differ from the import's; stats: (N, 2) size and time of each file when it was looked at.
    """

    bytes: np.ndarray[Any, Any]
    formats: np.ndarray[Any, Any]
    modes: np.ndarray[Any, Any]
    size: np.ndarray[Any, Any]
    animated: np.ndarray[Any, Any]
    orientation: np.ndarray[Any, Any]
    opaque: np.ndarray[Any, Any]
    mean: np.ndarray[Any, Any]
    phash: np.ndarray[Any, Any]
    small: Small
    reasons: np.ndarray[Any, Any]
    changed: np.ndarray[Any, Any]
    stats: np.ndarray[Any, Any]

    @property
    def good(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return which images can be used."""
        found: np.ndarray[Any, np.dtype[np.bool_]] = self.reasons == ""
        return found


_NAMES = tuple(each.name for each in fields(Facts) if each.name != "small")


def file_facts(facts: Facts) -> dict[str, np.ndarray[Any, Any]]:
    """Return what is known of each image without looking at what it shows: name to (N,) numbers or texts."""
    width, height = facts.size[:, 0].astype(np.float64), facts.size[:, 1].astype(np.float64)
    return {
        "file size": np.log1p(facts.bytes.astype(np.float64)),
        "image width": np.log1p(width),
        "image height": np.log1p(height),
        "mode and format": np.array([f"{a} {b}" for a, b in zip(facts.formats, facts.modes, strict=True)], str),
        "mean brightness": facts.mean.astype(np.float64),
    }


def dataset_facts(dataset: Dataset, progress: Progress | None = None) -> Facts:
    """Return the facts of a dataset's images; what is remembered of a file counts until its size or time changes.

    They do not hang on splits or groups. progress is called with images done and in all, where any has to be read.
    """
    stored = _read_facts(facts_file(dataset), len(dataset.frame))
    stats = file_stats(dataset)
    digests = dataset.frame["sha256"].tolist()
    again = np.arange(len(digests)) if stored is None else np.flatnonzero((stored.stats != stats).any(axis=1))
    if stored is not None and len(again) == 0:
        return stored
    try:
        facts = _look_again(dataset, again, digests, stats, progress)
        if stored is not None:
            facts = _updated(dataset, stored, facts, again)
    except OSError as error:  # pictures that do not fit into memory have found no room on disk
        raise write_error(facts_file(dataset), error) from error
    write_facts(dataset, facts)
    return facts


def _look_again(dataset: Dataset, places: Ints, digests: list[str], stats: Ints, progress: Progress | None) -> Facts:
    """Return the facts of the images at some places, gathered in parts: a million looks do not stay in memory."""
    windowing, paths = windowing_of_facts(dataset.facts), dataset.frame["path"].tolist()
    spool = _spool(dataset) if len(places) > _IN_MEMORY else None
    parts: list[Facts] = []
    rows: list[ImageFacts] = []
    looks = map_files(lambda place: look_at_file(dataset.image_path(paths[place]), windowing), places.tolist())
    for number, each in enumerate(looks, start=1):
        rows.append(each)
        if len(rows) == BLOCK or number == len(places):
            chosen = places[number - len(rows) : number]
            part = collect(rows, [digests[place] for place in chosen.tolist()], stats[chosen])
            if spool is not None:
                spool.write(part.small[:].tobytes())
                part = replace(part, small=part.small[:0])
            parts.append(part)
            rows = []
        if progress:
            progress(number, len(places))
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _NAMES}
    return Facts(**columns, small=_pictures(spool, len(places)) if spool else np.concatenate([p.small for p in parts]))


def _updated(dataset: Dataset, stored: Facts, seen: Facts, places: Ints) -> Facts:
    """Return stored facts with those seen anew at some places."""
    columns = {}
    for name in _NAMES:
        old, new = getattr(stored, name), getattr(seen, name)
        columns[name] = old.astype(np.promote_types(old.dtype, new.dtype))
        columns[name][places] = new
    if len(stored.small) <= _IN_MEMORY:
        small = stored.small[:].copy()
        small[places] = seen.small[:]
        return Facts(**columns, small=small)
    spool = _spool(dataset)
    for start in range(0, len(stored.small), BLOCK):
        block = stored.small[start : start + BLOCK]
        low, high = np.searchsorted(places, [start, start + len(block)])
        block[places[low:high] - start] = seen.small[low:high]
        spool.write(block.tobytes())
    return Facts(**columns, small=_pictures(spool, len(stored.small)))


def _spool(dataset: Dataset) -> IO[bytes]:
    """Return a file without a name, on the disk of the dataset where that can be written."""
    folder = dataset.folder / ".cache"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=folder)
    return tempfile.TemporaryFile()


def _pictures(spool: IO[bytes], count: int) -> Pictures:
    with spool:  # the map keeps what is in it
        spool.flush()
        return Pictures(spool, 0, count)


def file_stats(dataset: Dataset) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return size and time (ns) of each image's file, -1 where it is gone: (N, 2)."""
    found = np.full((len(dataset.frame), 2), -1, np.int64)
    root = str(dataset.root)
    for place, path in enumerate(dataset.frame["path"]):
        try:  # not through a Path each: that takes five times as long
            facts = os.stat(os.path.join(root, path))  # noqa: PTH116, PTH118
        except (OSError, ValueError):
            continue
        found[place] = facts.st_size, facts.st_mtime_ns
    return found


def facts_file(dataset: Dataset) -> Path:
    """Return where a dataset's facts are remembered: named by the images and the window, not by their split."""
    # The sum of the images' digests: the same in any order, without sorting a million of them.
    total = 0
    for sha256, path in zip(dataset.frame["sha256"], dataset.frame["path"], strict=True):
        total += int.from_bytes(hashlib.sha256(f"{sha256}{path}".encode()).digest(), "big")
    key = digest_of(
        [FACTS_VERSION, f"{total % (1 << 256):064x}", dataset.facts.get("window"), dataset.facts.get("rescale")]
    )
    return dataset.folder / ".cache" / f"facts-{key[:16]}.npz"


def collect(rows: Sequence[ImageFacts], digests: Sequence[str], stats: np.ndarray[Any, Any] | None = None) -> Facts:
    """Return the facts of single images as columns; digests: the SHA-256 that each file should have."""
    empty = Header("", "", 0, 0, False, 1, True)
    headers = [each.header or empty for each in rows]
    blank = np.zeros((SMALL_SIDE, SMALL_SIDE), np.uint8)
    return Facts(
        bytes=np.array([each.bytes for each in rows], np.int64),
        formats=np.array([each.format for each in headers], str),
        modes=np.array([each.mode for each in headers], str),
        size=np.array([(each.width, each.height) for each in headers], np.int32).reshape(-1, 2),
        animated=np.array([each.animated for each in headers], bool),
        orientation=np.array([each.orientation for each in headers], np.int8),
        opaque=np.array([each.opaque for each in headers], bool),
        mean=np.array([each.mean for each in rows], np.float32),
        phash=np.array([each.phash for each in rows], np.uint64),
        small=np.stack([blank if each.small is None else each.small for each in rows]),
        reasons=np.array([each.reason for each in rows], object),
        changed=np.array(
            [bool(each.sha256) and each.sha256 != digest for each, digest in zip(rows, digests, strict=True)], bool
        ),
        stats=np.zeros((len(rows), 2), np.int64) if stats is None else stats,
    )


def write_facts(dataset: Dataset, facts: Facts) -> None:
    """Remember facts; a folder that cannot be written is passed over, for they can be had again."""
    # Once each: one long reason would make the texts of a million images as long.
    texts, codes = np.unique(facts.reasons.astype(object), return_inverse=True)
    columns = {name: getattr(facts, name) for name in _NAMES if name != "reasons"}
    columns |= {"texts": texts.astype(str), "codes": codes.astype(np.int32)}
    try:
        with atomic_writer(facts_file(dataset)) as stream:
            write_archive(stream, columns, facts.small)
    except ZooError:
        return


def _read_facts(file: Path, count: int) -> Facts | None:
    try:
        columns, small = read_archive(file)
        reasons = columns.pop("texts").astype(object)[columns.pop("codes")]
        facts = Facts(**columns, reasons=reasons, small=small if count > _IN_MEMORY else small[:])
    except Exception:  # missing, cut off or damaged: looked at again
        return None
    return facts if all(len(getattr(facts, name)) == count for name in (*_NAMES, "small")) else None


def wrong_suffix(path: str, image_format: str) -> bool:
    """Return whether a file's ending belongs to another format than its content.

    >>> wrong_suffix("a/b.png", "JPEG"), wrong_suffix("a/b.JPG", "JPEG")
    (True, False)
    """
    good = _GOOD_SUFFIXES.get(image_format)
    return good is not None and Path(path).suffix.lower() not in good
