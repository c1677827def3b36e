"""Bytes to pixels: the one path for import, training, prediction and serving."""

from __future__ import annotations

import hashlib
import io
import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from zoo.data.dicom import DicomFault, dicom_pixels, is_dicom
from zoo.data.window import PLAIN, Windowing
from zoo.errors import ZooError, one_line

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

MAX_PIXELS = 64_000_000
MAX_ASPECT = 4
FORMATS = "PNG, JPEG, BMP, TIFF, WEBP, GIF, PPM, DICOM"

# A file's first bytes name its reader; Pillow's own search would also try formats that run other programs.
_READERS: tuple[tuple[re.Pattern[bytes], type[ImageFile.ImageFile]], ...] = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    (re.compile(rb"\xff\xd8\xff"), JpegImagePlugin.JpegImageFile),
    (re.compile(rb"BM"), BmpImagePlugin.BmpImageFile),
    (re.compile(rb"(II|MM)(\*\0|\0\*|\+\0|\0\+)"), TiffImagePlugin.TiffImageFile),
    (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), WebPImagePlugin.WebPImageFile),
    (re.compile(rb"GIF8[79]a"), GifImagePlugin.GifImageFile),
    (re.compile(rb"P[1-6fF]\s"), PpmImagePlugin.PpmImageFile),
)
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_CUT_OFF = re.compile(
    r"truncated|requires a buffer|not enough|unexpected end|buffer overrun|incomplete|end of file|broken data|no "
    "more data",
    re.I,
)
# What Pillow says, less what it adds in brackets, that holds nothing of a file.
_SAID = frozenset(
    (
        "not a JPEG file",
        "not a PNG file",
        "no marker found",
        "bad quantization table marker",
        "broken PNG file",
        "Unsupported BMP header type",
        "Unsupported BMP pixel depth",
        "Unsupported BMP bitfields layout",
        "Unsupported BMP compression",
        "unrecognized data stream contents when reading image file",
    )
)
_TIFF_TILE = (322, 323, 278)  # TileWidth, TileLength, RowsPerStrip

# Without any handler Python prints Pillow's complaints about odd TIFFs on standard error.
logging.getLogger("PIL").addHandler(logging.NullHandler())


class BadImage(ZooError):
    """An image that cannot be used; the message is the reason in a few words, without the file's name.

    no_image: whether it was never to be one, as a DICOM of a report.
    """

    no_image = False


@dataclass(frozen=True)
class Header:
    """What a file's header says of its image: stored size in pixels, before any turning.

    mode: Pillow's name, such as `L`, `RGB`, `P`, `CMYK`, `I;16`. orientation: EXIF's 1 to 8.
    """

    format: str
    mode: str
    width: int
    height: int
    animated: bool
    orientation: int
    opaque: bool


def decode(data: bytes, windowing: Windowing = PLAIN, *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Return an encoded image as uint8 RGB pixels of shape (height, width, 3).

    The same bytes give the same pixels for every caller. EXIF orientation is applied; of an animation the
    first frame counts; transparency is laid over white, and an alpha channel that is opaque changes nothing.
    Grey of more than 8 bits goes through the window that `windowing` names, as a DICOM's does (`dicom_pixels`).
    Without one, 16 bits, or 32-bit integers within 0 to 65535, are scaled linearly from [0, 65535] to [0, 255];
    nothing is stretched or clipped. The header's size is checked before any pixel is decoded.

    Raises BadImage, and nothing else, for whatever is no whole image of PNG, JPEG, BMP, TIFF, WEBP, GIF, PPM or
    DICOM, has more than `max_pixels` pixels or, without a window, floating-point pixels or values above 65535.
    """
    reader = _reader(data)
    if reader is None:
        try:
            return dicom_pixels(data, windowing, max_pixels)
        except DicomFault as fault:
            bad = BadImage(str(fault))
            bad.no_image = fault.no_image
            raise bad from None
    try:
        with _quiet_pillow(), reader(io.BytesIO(data)) as image:
            _check_header(image, data, max_pixels, windowing)
            image.load()
            return _upright(_to_rgb(image, windowing), image)
    except BadImage:
        raise
    except Exception as error:  # Pillow's readers raise a dozen kinds, AssertionError and struct.error among them
        raise BadImage(_reason(error)) from error


def read_header(data: bytes) -> Header:
    """Return what a file's header says; raises BadImage where it cannot be read, or names more than MAX_PIXELS pixels.

    No pixels are decoded, but a PNG's, behind which its orientation may stand. opaque is False where there is an alpha
    channel or a transparent colour, whatever stands in it.
    """
    reader = _reader(data)
    if reader is None:
        return Header("DICOM", "DICOM", 0, 0, False, 1, True)
    try:
        with _quiet_pillow(), reader(io.BytesIO(data)) as image:
            _check_size(*image.size, MAX_PIXELS)
            animated = bool(getattr(image, "is_animated", False))
            if animated and not isinstance(image, GifImagePlugin.GifImageFile):
                animated = image.format != "TIFF" or _pages(image) > 1
            return Header(
                str(image.format),
                image.mode,
                *image.size,
                animated,
                _orientation(image),
                not image.has_transparency_data,
            )
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(_reason(error)) from error


def read_size(data: bytes) -> tuple[str, int, int, bool]:
    """Return format, width and height in pixels, and whether there are several pictures, decoding nothing at all.

    `read_header` tells more, and loads a whole PNG for it. A GIF's frames are not looked for. Of a DICOM width and
    height are 0. Raises BadImage.
    """
    reader = _reader(data)
    if reader is None:
        return "DICOM", 0, 0, False
    try:
        with _quiet_pillow(), reader(io.BytesIO(data)) as image:
            animated = image.format != "GIF" and bool(getattr(image, "is_animated", False))
            several = _pages(image) > 1 if image.format == "TIFF" else animated
            return str(image.format), *image.size, several
    except Exception as error:
        raise BadImage(_reason(error)) from error


def _pages(image: ImageFile.ImageFile) -> int:
    """Return how many whole images a TIFF holds; thumbnails and masks (NewSubfileType) do not count."""
    count = 0
    for page in range(min(getattr(image, "n_frames", 1), 100)):
        image.seek(page)
        count += not int(getattr(image, "tag_v2", {}).get(254, 0) or 0) & 1
    return count


def _reader(data: bytes) -> type[ImageFile.ImageFile] | None:
    """Return Pillow's reader for a file's first bytes, None for DICOM; raises BadImage for neither."""
    if not data:
        raise BadImage("zero bytes")
    if data[128:132] == b"DICM":
        return None
    reader = next((reader for magic, reader in _READERS if magic.match(data)), None)
    if reader is None and not is_dicom(data):
        raise BadImage(f"no image ({FORMATS})")
    return reader


def resize(pixels: Pixels, size: int, interpolation: str) -> Pixels:
    """Return the image with its shorter side of exactly `size` pixels, the aspect kept, antialiased.

    pixels: uint8 (height, width, 3). The long side is int(size * long / short), torchvision's rule. An image
    longer than 4:1 is first centre-cropped to 4:1, which bounds the memory. interpolation: `nearest`,
    `bilinear`, `bicubic` or `lanczos`. An image that has the size already is copied.

    >>> resize(np.zeros((100, 150, 3), np.uint8), 50, "bilinear").shape
    (50, 75, 3)
    >>> resize(np.zeros((1, 999, 3), np.uint8), 8, "bicubic").shape
    (8, 32, 3)
    """
    height, width = pixels.shape[:2]
    longest = MAX_ASPECT * min(height, width)
    top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
    pixels = pixels[top : top + longest, left : left + longest]
    height, width = pixels.shape[:2]
    short = min(height, width)
    if short == size:
        return pixels.copy()
    new_height = size if height == short else int(size * height / short)
    new_width = size if width == short else int(size * width / short)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.array(image.resize((new_width, new_height), _RESAMPLING[interpolation]))


def pixel_sha256(pixels: Pixels) -> str:
    """Return the SHA-256 over an image's shape and pixels: equal for images that decode to the same.

    >>> pixel_sha256(np.zeros((2, 3, 3), np.uint8)) == pixel_sha256(np.zeros((3, 2, 3), np.uint8))
    False
    """
    digest = hashlib.sha256(repr(tuple(int(side) for side in pixels.shape)).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def _check_header(image: ImageFile.ImageFile, data: bytes, max_pixels: int, windowing: Windowing) -> None:
    """Raise BadImage for what would cost too much memory or time, before any pixel is decoded."""
    width, height = image.size
    _check_size(width, height, max_pixels)
    if image.mode == "F" and not windowing.windows:
        raise BadImage("floating-point pixels; name a window, or save it with 8 or 16 bits")
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tile_width, tile_height, rows = (image.tag_v2.get(tag) or 1 for tag in _TIFF_TILE)
        if tile_width * tile_height > max_pixels or min(rows, height) * width > max_pixels:
            raise BadImage("too large: tiles of more pixels than an image may have")
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        # Each scan of a progressive file goes over the whole image: a few kB can cost minutes.
        scans = data.count(b"\xff\xda")
        if scans > 16 and scans * width * height > 16 * max_pixels:
            raise BadImage(f"too large: {scans} scans of {width} x {height} pixels")


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise BadImage(f"unreadable: {width} x {height} pixels")
    if width * height > max_pixels:
        raise BadImage(f"too large: {width} x {height} pixels, more than {max_pixels}")


def _to_rgb(image: Image.Image, windowing: Windowing) -> Pixels:
    if image.mode.startswith(("I", "F")) and windowing.windows:
        return windowing.grey(np.asarray(image).astype(np.float64) * windowing.slope + windowing.intercept)
    if image.mode.startswith("I"):
        grey = _scale_16_bits(np.asarray(image))
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        if alpha.getextrema() != (255, 255):
            white = Image.new("RGB", image.size, (255, 255, 255))
            white.paste(image.convert("RGB"), mask=alpha)
            return np.array(white)
    return np.array(image.convert("RGB"))


def _scale_16_bits(values: np.ndarray[Any, Any]) -> Pixels:
    """Return [0, 65535] as [0, 255], rounded; 65535 is 257 times 255, so eight-bit values come back."""
    if values.dtype.itemsize > 2:
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise BadImage(f"32-bit values from {low} to {high}; they must lie within 0 to 65535")
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _upright(pixels: Pixels, image: Image.Image) -> Pixels:
    """Turn the pixels as EXIF says (tag 0x0112, values 2 to 8); an unreadable EXIF block turns nothing.

    Asked after loading: some PNGs carry the tag behind the pixels, and Pillow turns TIFFs by itself.
    """
    orientation = _orientation(image)
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(0x0112)
    except Exception:
        return 1
    return orientation if isinstance(orientation, int) and 2 <= orientation <= 8 else 1


def _reason(error: Exception) -> str:
    """Return why an image cannot be read, with no text of its own: Pillow's errors repeat tags and names of chunks."""
    text = one_line(error, 120)
    if isinstance(error, EOFError) or _CUT_OFF.search(text):
        return "truncated"
    if isinstance(error, (Image.DecompressionBombError, MemoryError)):
        return "too large"
    plain = text.split(" (")[0]
    return f"unreadable: {plain}" if plain in _SAID else "unreadable: damaged, or of a kind that is not supported"


_quiet_lock = threading.Lock()
_quiet_depth = 0
_quiet_filter: Any = None


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings about odd files, in whatever thread, and no other warnings.

    `warnings.catch_warnings` swaps the filters of the whole process and is not safe in threads; here one
    filter for Pillow's modules stands at the front as long as any thread decodes.
    """
    global _quiet_depth, _quiet_filter  # noqa: PLW0603
    _quiet_libtiff()
    filters: Any = warnings.filters
    with _quiet_lock:
        _quiet_depth += 1
        filters = warnings.filters
        if not filters or filters[0] is not _quiet_filter:
            warnings.filterwarnings("ignore", module=r"PIL\.")
            _quiet_filter = warnings.filters[0]
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_depth -= 1
            filters = warnings.filters
            if _quiet_depth == 0 and _quiet_filter in filters:
                filters.remove(_quiet_filter)


@cache
def _quiet_libtiff() -> None:
    """Silence the C library of Pillow's wheels, which prints up to hundreds of lines about one odd TIFF.

    Its own function for that (TIFFSetWarningHandler of libtiff's manual); where the library is another, it goes on.
    """
    import ctypes

    import PIL

    for file in (Path(PIL.__file__).parent.parent / "pillow.libs").glob("libtiff*"):
        with suppress(OSError, AttributeError):
            library = ctypes.CDLL(str(file))
            for name in ("TIFFSetWarningHandler", "TIFFSetErrorHandler"):
                handler = getattr(library, name)
                handler.argtypes, handler.restype = [ctypes.c_void_p], ctypes.c_void_p
                handler(None)
