"""Processes that check and decode what strangers send: a decoder that crashes, hangs or grows takes no server with it.

GDCM ends the whole process on some damaged DICOMs. Each process is bounded in memory, writes no file, dumps no core,
and answers in plain bytes that nobody unpickles.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from zoo.data.decode import MAX_ASPECT, BadImage
from zoo.deployment.predictor import prepare
from zoo.deployment.server.limits import HEAVY_PIXELS, Refused, check_image, refused_image
from zoo.runs import Preprocessing

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

_ASKED = struct.Struct("!?II")  # whether a heavy image may be decoded; bytes of preprocessing and of the image
_TOLD = struct.Struct("!cII")  # P: height and width, pixels follow; E: status and bytes of the reason; H: heavy
_MOST_REASON = 1000
_BYTES_A_PIXEL = 32  # float64 values on their way through a window, and copies
_ROOM = 768 << 20  # for the decoders' own tables
_START = (
    "import json, sys; told = json.loads(sys.argv[1]); sys.path[:] = told['path']; "
    "from zoo.deployment.server.decoders import work; work(told['pixels'])"
)


class Heavy(Exception):
    """An image of many pixels, which is decoded alone."""


class Decoder:
    """One decoding process, started when it is first needed and anew when it has died; used by one thread."""

    def __init__(self, max_pixels: int, seconds: float) -> None:
        self.max_pixels, self.seconds = max_pixels, seconds
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process, unless it runs."""
        if self._process is not None and self._process.poll() is None:
            return
        self.stop()
        told = {"path": [each or str(Path.cwd()) for each in sys.path], "pixels": self.max_pixels}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, json.dumps(told)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # libraries print there what they find in a file
            bufsize=0,
        )

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    stream.close()
            self._process = None

    def prepare(self, data: bytes, preprocessing: Preprocessing, heavy: bool = False) -> Pixels:
        """Return an image's pixels, resized: uint8 (H, W, 3).

        Raises Refused 413, 415 or 422 for what is no image to be taken, and for one that kills the decoder or keeps
        it for longer than `seconds`; Heavy where it has many pixels and `heavy` is not set.
        """
        self.start()
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        facts = preprocessing.model_dump_json().encode()
        end = time.monotonic() + self.seconds
        try:
            _write(self._process.stdin, _ASKED.pack(heavy, len(facts), len(data)) + facts)
            _write(self._process.stdin, data)
            kind, first, second = _TOLD.unpack(_read(self._process.stdout, _TOLD.size, end))
            if kind == b"H":
                raise Heavy
            if kind == b"E" and second <= _MOST_REASON:
                raise Refused(first, _read(self._process.stdout, second, end).decode())
            if kind != b"P" or first * second > MAX_ASPECT * (preprocessing.resize_size + 1) ** 2:
                raise EOFError
            pixels = np.frombuffer(_read(self._process.stdout, first * second * 3, end), np.uint8)
            return pixels.reshape(first, second, 3)
        except TimeoutError:
            self.stop()
            raise Refused(422, "it takes too long to decode") from None
        except (EOFError, OSError, ValueError):
            self.stop()
            raise Refused(422, "unreadable: its decoder gave up") from None


def _write(stream: Any, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(stream.fileno(), view[: 1 << 20]) :]


def _read(stream: Any, count: int, end: float) -> bytearray:
    """Return so many bytes; raises EOFError where they end before, TimeoutError where they do not come in time."""
    found, place = bytearray(count), 0
    with selectors.DefaultSelector() as chosen:
        chosen.register(stream, selectors.EVENT_READ)
        while place < count:
            if not chosen.select(max(0.0, end - time.monotonic())):
                raise TimeoutError
            got = os.readv(stream.fileno(), [memoryview(found)[place:]])
            if got == 0:
                raise EOFError
            place += got
    return found


# In the process itself ------------------------------------------------------------------------------------------


def work(max_pixels: int) -> None:
    """Answer one image after the other until standard input ends."""
    for each in (signal.SIGINT, signal.SIGTERM):  # sent to all of a group; the end of the server is the end of input
        signal.signal(each, signal.SIG_IGN)
    taken, given = os.fdopen(os.dup(0), "rb", 1 << 20), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    with contextlib.suppress(ImportError):
        import pydicom.pixels  # noqa: F401  # before the first image comes
    _bound(max_pixels)
    while head := taken.read(_ASKED.size):
        heavy, facts, length = _ASKED.unpack(head)
        preprocessing = Preprocessing.model_validate_json(taken.read(facts))
        _answer(given, taken.read(length), preprocessing, max_pixels, heavy)
        given.flush()


def _answer(given: BinaryIO, data: bytes, preprocessing: Preprocessing, max_pixels: int, heavy: bool) -> None:
    try:
        if check_image(data, max_pixels) > HEAVY_PIXELS and not heavy:
            given.write(_TOLD.pack(b"H", 0, 0))
            return
        pixels = prepare(data, preprocessing, max_pixels)
    except Refused as refused:
        told = refused
    except BadImage as bad:
        told = refused_image(bad)
    except MemoryError:
        told = Refused(413, "too large")
    else:
        given.write(_TOLD.pack(b"P", *pixels.shape[:2]))
        given.write(np.ascontiguousarray(pixels).data)
        return
    reason = told.reason.encode()[:_MOST_REASON]
    given.write(_TOLD.pack(b"E", told.status, len(reason)) + reason)


def _bound(max_pixels: int) -> None:
    """Bound this process: memory for one image of `max_pixels`, no core dump, no file that grows."""
    try:
        import resource
    except ImportError:
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    room = pages * resource.getpagesize() + max_pixels * _BYTES_A_PIXEL + _ROOM if pages else resource.RLIM_INFINITY
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    wanted = {resource.RLIMIT_AS: room, resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0}
    for what, most in wanted.items():
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(what, (most, most))
