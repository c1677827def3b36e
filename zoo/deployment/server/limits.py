"""What a request may cost, checked before anything is decoded: bytes, pixels, images, seconds."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from zoo.data.decode import MAX_PIXELS, BadImage, read_size
from zoo.data.dicom import dicom_size

# What the first bytes must be. GIF and PPM, which training reads too, are not taken from strangers.
_TAKEN = frozenset({"PNG", "JPEG", "WEBP", "TIFF", "BMP", "DICOM"})
TAKEN = "PNG, JPEG, WebP, TIFF, BMP, DICOM"
_TYPES = re.compile(r"image/(png|jpeg|jpg|webp|tiff|bmp|x-ms-bmp)|application/(dicom|octet-stream)")
HEAVY_PIXELS = 8_000_000
LONGEST_WAIT_S = 60  # that a client is asked for: its connection is kept for longer
TOO_SLOW = "too slow; the connection is closed"


@dataclass(frozen=True)
class Limits:
    """Everything that is bounded. Bytes are of bodies, pixels of one image as its header says.

    held_bytes: of all bodies in memory at one time. queue_images: accepted and not answered yet. batch_images: computed
    together. decode_s: of one image. deadline_s: from a read body to its answer. header_s: for a request's head.
    body_s, bytes_per_s, body_longest_s: a body has `body_s` seconds and one more per `bytes_per_s` bytes that came,
    `body_longest_s` at most. silent_s: without any byte of a body. stalled_s: so far behind `bytes_per_s`, a body gives
    way where `held_bytes` are full. idle_s: between requests, longer than any Retry-After. write_s: for a client that
    does not read its answer. grace_s: at the end, for what is in flight; last_body_s: of it, for bodies still coming.
    """

    body_bytes: int = 32 << 20
    held_bytes: int = 256 << 20
    pixels: int = min(50_000_000, MAX_PIXELS)
    images: int = 32
    queue_images: int = 64
    batch_images: int = 8
    connections: int = 1000
    decode_s: float = 15.0
    deadline_s: float = 30.0
    header_s: float = 10.0
    body_s: float = 10.0
    bytes_per_s: int = 16 << 10
    body_longest_s: float = 120.0
    silent_s: float = 10.0
    stalled_s: float = 1.0
    idle_s: float = LONGEST_WAIT_S + 15.0
    write_s: float = 20.0
    grace_s: float = 20.0
    last_body_s: float = 5.0

    def fitting(self) -> Limits:
        """Return the limits with what may be held at least one body, and no request larger than the queue."""
        held = max(self.held_bytes, 2 * self.body_bytes)
        return replace(self, held_bytes=held, images=min(self.images, self.queue_images))


class Refused(Exception):
    """An answer other than 200: its status, one line without anything that the client sent, and its headers."""

    def __init__(self, status: int, reason: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.headers = status, reason, headers or {}


class ClientGone(Exception):
    """The client closed the connection, or was too slow."""


def busy(seconds: float = 1.0, reason: str = "busy; try again") -> Refused:
    """Return 503 with Retry-After, whole seconds from 1 to LONGEST_WAIT_S."""
    return Refused(503, reason, {"Retry-After": str(min(LONGEST_WAIT_S, max(1, round(seconds + 0.5))))})


def content_type_of(value: str | None) -> str:
    """Return the media type of a Content-Type, lower case and without parameters; empty where there is none.

    >>> content_type_of("Image/PNG; charset=x")
    'image/png'
    """
    return (value or "").partition(";")[0].strip().lower()


def is_image_type(media_type: str) -> bool:
    """Return whether a raw body of this media type is taken."""
    return _TYPES.fullmatch(media_type) is not None


class Held:
    """Counts the bytes of all bodies in memory; used in the event loop's thread alone.

    coming: the bodies that are not whole yet.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self.coming: set[Body] = set()

    def take(self, count: int) -> None:
        """Count more bytes; where they are too many, the bodies that have stalled for longest are dropped for them.

        Raises Refused 503 where none has.
        """
        while self.bytes + count > self.limit:
            now = asyncio.get_running_loop().time()
            stalled = (each for each in self.coming if each.held_bytes and each.behind_s(now) > each.limits.stalled_s)
            victim = max(stalled, key=lambda each: each.behind_s(now), default=None)
            if victim is None:
                raise busy(2.0, "busy: too many bytes are waiting; try again")
            victim.drop()
        self.bytes += count

    def give(self, count: int) -> None:
        """Count bytes as gone."""
        self.bytes -= count


class Body:
    """A request's body in memory, counted while it comes; `with` gives its bytes back to what may be held."""

    def __init__(self, limits: Limits, held: Held) -> None:
        self.limits, self.held, self.data, self._taken = limits, held, bytearray(), 0
        self._paced, self._dropped = 0.0, False

    @property
    def held_bytes(self) -> int:
        """Return how many bytes it counts for now."""
        return self._taken

    def __enter__(self) -> Body:
        return self

    def __exit__(self, *_: object) -> None:
        self._give_all()

    def _give_all(self) -> None:
        self.held.give(self._taken)
        self._taken, self.data = 0, bytearray()

    def behind_s(self, now: float) -> float:
        """Return for how many seconds less than `bytes_per_s` has come; what came faster before is no credit."""
        return now - self._paced

    def drop(self) -> None:
        """Give the bytes of a body back that is still coming; whoever reads it hears Refused 408."""
        self._dropped = True
        self.held.coming.discard(self)
        self._give_all()
        self._until.reschedule(asyncio.get_running_loop().time())

    async def read(self, chunks: AsyncIterator[bytes], length: str | None, encoding: str | None) -> None:
        """Read all chunks.

        Raises Refused: 413 above the limit, before reading where the length says so already; 408 where it stalls while
        others have no room.
        """
        most = self.limits.body_bytes
        if (encoding or "identity").strip().lower() not in ("identity", ""):
            raise Refused(415, "compressed bodies are not taken; send the file as it is")
        if length is not None and (not length.isascii() or not length.isdigit() or int(length[:20]) > most):
            raise Refused(413, f"the body may have {most} bytes at the most")
        self._paced = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(None) as self._until:  # it ends when `drop` says so
                self.held.coming.add(self)
                async for chunk in chunks:
                    self._add(chunk)
        except TimeoutError:
            self._dropped = True
        finally:
            self.held.coming.discard(self)
        if self._dropped:
            raise Refused(408, TOO_SLOW, {"Connection": "close"})
        if not self.data:
            raise Refused(400, "the body is empty; send an image")

    def _add(self, chunk: bytes) -> None:
        if self._dropped:  # its last chunk and the news crossed
            raise TimeoutError
        if len(self.data) + len(chunk) > self.limits.body_bytes:
            raise Refused(413, f"the body may have {self.limits.body_bytes} bytes at the most")
        now = asyncio.get_running_loop().time()
        self._paced = min(now, self._paced + len(chunk) / self.limits.bytes_per_s)
        self.held.take(len(chunk))
        self._taken += len(chunk)
        self.data += chunk
        if self._dropped:  # of all that come it was the one that had stalled for longest
            raise TimeoutError


def check_image(data: bytes, max_pixels: int) -> tuple[int, int]:
    """Return an image's height and width as its header says, before any turning, without decoding a pixel.

    0, 0 for a DICOM that does not say, which no decoder takes.

    Raises Refused: 415 for a format that is not taken, 413 for too many pixels, 422 for what is damaged, or holds
    several pictures: which of them was meant, nobody can say.
    """
    try:
        form, width, height, several = read_size(data)
    except BadImage as bad:
        raise refused_image(bad) from None
    if form not in _TAKEN:
        raise Refused(415, f"this format is not taken; send {TAKEN}")
    if form == "DICOM":
        height, width = dicom_size(data)
    if width * height > max_pixels:
        raise Refused(413, f"too large: {width} x {height} pixels, more than {max_pixels}")
    if several:
        raise Refused(422, "several pictures in one file; send each that counts as a file of its own")
    return height, width


def refused_image(bad: BadImage) -> Refused:
    """Return the answer for an image that the decoder refused."""
    reason = str(bad)
    if reason.startswith("too large"):
        return Refused(413, reason)
    if reason.startswith("no image"):
        return Refused(415, f"no image; send {TAKEN}")
    return Refused(422, reason)
