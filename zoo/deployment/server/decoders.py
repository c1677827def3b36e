"""Processes that check and decode what strangers send: one that crashes, hangs or grows takes no server with it."""

from __future__ import annotations

import contextlib
import struct
import time
from typing import IO, Any

import numpy as np

from zoo.data.apart import Child, at_most, streams
from zoo.data.decode import MAX_ASPECT, BadImage
from zoo.deployment.predictor import prepare
from zoo.deployment.server.limits import HEAVY_PIXELS, Refused, check_image, refused_image
from zoo.runs import Preprocessing

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

_ASKED = struct.Struct("!?IIQ")  # whether a heavy image may be decoded; most pixels; bytes of preprocessing and image
# P: height and width, those of the header, then each colour; E: status and bytes of the reason; H: heavy
_TOLD = struct.Struct("!c4I")
_MOST_REASON = 1000
_MOST_SECONDS = 60  # of an image whose server has died; a living one gives up long before
_BYTES_A_PIXEL = 32  # float64 values on their way through a window, and copies


class Heavy(Exception):
    """An image of many pixels, which is decoded alone."""


class Decoder:
    """One decoding process, started when it is first needed and anew when it has died; used by one thread."""

    def __init__(self, max_pixels: int, seconds: float) -> None:
        self.max_pixels, self.seconds = max_pixels, seconds
        self.child = Child(__name__, max_pixels * _BYTES_A_PIXEL)
        self._ended = False

    def start(self) -> None:
        """Start the process, unless it runs."""
        self.child.start()
        if self._ended:  # by `kill`, which may have come before there was a process
            self.child.kill()

    def stop(self) -> None:
        """End the process."""
        self.child.stop()

    def kill(self) -> None:
        """Have the process die, now and whenever it is started; for any thread, and `stop` is then still due."""
        self._ended = True
        self.child.kill()

    def prepare(self, data: bytes, preprocessing: Preprocessing, heavy: bool = False) -> tuple[Pixels, tuple[int, int]]:
        """Return an image's pixels, resized: uint8 (H, W, 3); and the sides that its header gives, in either order.

        Raises Refused 413, 415 or 422 for what is no image to be taken, and for one that kills the decoder or keeps
        it for longer than `seconds`; Heavy where it has many pixels and `heavy` is not set.
        """
        self.start()
        facts = preprocessing.model_dump_json().encode()
        end = time.monotonic() + self.seconds
        try:
            self.child.write(_ASKED.pack(heavy, self.max_pixels, len(facts), len(data)), facts, data, end=end)
            kind, first, second, *sides = _TOLD.unpack(self.child.read(_TOLD.size, end))
            if kind == b"H":
                raise Heavy
            if kind == b"E" and second <= _MOST_REASON:
                raise Refused(first, self.child.read(second, end).decode())
            if kind != b"P" or first * second > MAX_ASPECT * (preprocessing.resize_size + 1) ** 2:
                raise EOFError
            pixels = np.frombuffer(self.child.read(first * second * 3, end), np.uint8)
            return pixels.reshape(3, first, second).transpose(1, 2, 0), (sides[0], sides[1])
        except TimeoutError:
            self.stop()
            raise Refused(422, "it takes too long to decode") from None
        except (EOFError, OSError, ValueError):
            self.stop()
            raise Refused(422, "unreadable: its decoder gave up") from None


# In the process itself ------------------------------------------------------------------------------------------


def work(most_bytes: int) -> None:
    """Answer one image after the other until standard input ends."""
    with contextlib.suppress(ImportError):
        import pydicom.pixels  # noqa: F401  # before the first image comes
    with streams(most_bytes) as (taken, given):
        while head := taken.read(_ASKED.size):
            heavy, max_pixels, facts, length = _ASKED.unpack(head)
            preprocessing = Preprocessing.model_validate_json(taken.read(facts))
            data = taken.read(length)
            with at_most(_MOST_SECONDS):
                _answer(given, data, preprocessing, max_pixels, heavy)
            given.flush()


def _answer(given: IO[bytes], data: bytes, preprocessing: Preprocessing, max_pixels: int, heavy: bool) -> None:
    try:
        sides = check_image(data, max_pixels)
        if sides[0] * sides[1] > HEAVY_PIXELS and not heavy:
            given.write(_TOLD.pack(b"H", 0, 0, 0, 0))
            return
        pixels = prepare(data, preprocessing, max_pixels)
    except Refused as refused:
        told = refused
    except BadImage as bad:
        told = refused_image(bad)
    except MemoryError:
        told = Refused(413, "too large")
    else:
        given.write(_TOLD.pack(b"P", *pixels.shape[:2], *sides))
        given.write(np.ascontiguousarray(pixels.transpose(2, 0, 1)).data)
        return
    reason = told.reason.encode()[:_MOST_REASON]
    given.write(_TOLD.pack(b"E", told.status, len(reason), 0, 0) + reason)
