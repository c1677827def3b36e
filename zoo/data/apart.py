"""Processes of their own in which bytes from elsewhere are decoded: a C library that dies of them takes nobody with it.

GDCM ends the whole process on some damaged DICOMs. Each child is bounded in memory, writes no file, dumps no core, and
answers in plain bytes that nobody unpickles.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

Array = np.ndarray[Any, Any]

_ASKED = struct.Struct("!Q")  # bytes that follow
_TOLD = struct.Struct("!c8s3IQ")  # A: dtype, sides and bytes of an array; E: bytes of the name of an error
_SECONDS = 120
_ROOM = 768 << 20  # for the decoders' own tables
_START = (
    "import json, sys; told = json.loads(sys.argv[1]); sys.path[:] = told['path']; "
    "from {module} import work; work(told['most'])"
)
_inside = False


class Child:
    """One such process, which runs `work(most_bytes)` of a module; started when it is needed; used by one thread.

    most_bytes: what it may hold in memory beside what it has when it starts to work.
    """

    def __init__(self, module: str, most_bytes: int) -> None:
        self.module, self.most_bytes = module, most_bytes
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process, unless it runs."""
        if self._process is not None and self._process.poll() is None:
            return
        self.stop()
        told = {"path": [each or str(Path.cwd()) for each in sys.path], "most": self.most_bytes}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START.format(module=self.module), json.dumps(told)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # libraries print there what they find in a file
            bufsize=0,
        )
        if self._process.stdin is not None:
            os.set_blocking(self._process.stdin.fileno(), False)

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    stream.close()
            self._process = None

    def kill(self) -> None:
        """Have the process die; called from any thread, and `stop` is then still due in the one that uses it."""
        process = self._process
        if process is not None:
            process.kill()

    def write(self, *parts: bytes, end: float) -> None:
        """Send bytes; raises OSError where the process has died, TimeoutError at `end` of `time.monotonic`."""
        assert self._process is not None and self._process.stdin is not None
        stream = self._process.stdin
        with selectors.DefaultSelector() as chosen:
            chosen.register(stream, selectors.EVENT_WRITE)
            for part in parts:
                view = memoryview(part)
                while view:
                    if not chosen.select(max(0.0, end - time.monotonic())):
                        raise TimeoutError
                    with contextlib.suppress(BlockingIOError):
                        view = view[os.write(stream.fileno(), view[: 1 << 20]) :]

    def read(self, count: int, end: float) -> bytearray:
        """Return so many bytes; raises EOFError where the process dies, TimeoutError at `end` of `time.monotonic`."""
        assert self._process is not None and self._process.stdout is not None
        stream = self._process.stdout
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


def is_child() -> bool:
    """Return whether this process is such a child, which need not start another."""
    return _inside


class ChildFault(Exception):
    """What a child could not do: the kind of its error, or that it died or took too long."""


def ask(module: str, data: bytes, most_bytes: int) -> Array:
    """Return the array that `module`'s `work`, an `answer_with`, makes of bytes in a child; may be called in threads.

    A child is kept for the next call. Raises ChildFault.
    """
    with _lock:
        idle = _idle.setdefault((os.getpid(), module, most_bytes), [])  # a fork has its parent's pipes
        child = idle.pop() if idle else Child(module, most_bytes)
    whole = False
    try:
        child.start()
        _busy[threading.get_ident()] = child
        end = time.monotonic() + _SECONDS
        child.write(_ASKED.pack(len(data)), data, end=end)
        kind, dtype, *sides, size = _TOLD.unpack(child.read(_TOLD.size, end))
        body = child.read(size, end)
        whole = True
    except TimeoutError:
        raise ChildFault("it takes too long to decode") from None
    except (EOFError, OSError):
        raise ChildFault("its decoder gave up") from None
    finally:  # whatever interrupts it: half an answer must not be taken for the next one's
        _busy.pop(threading.get_ident(), None)
        if whole:
            with _lock:
                idle.append(child)
        else:
            child.stop()
    if kind == b"E":
        raise ChildFault(body.decode("ascii", "replace"))
    return np.frombuffer(body, dtype.rstrip(b"\0").decode()).reshape([each for each in sides if each])


_lock = threading.Lock()
_idle: dict[tuple[int, str, int], list[Child]] = {}
_busy: dict[int, Child] = {}  # by the thread that waits for its answer


def stop_all(threads: Collection[threading.Thread]) -> None:
    """Return when threads that are to end have ended, whose children are killed and not waited for."""
    for thread in threads:
        while thread.is_alive():  # one may have been about to ask
            for each in threads:
                child = _busy.get(each.ident or 0) if each.is_alive() else None
                if child is not None:
                    child.kill()
            thread.join(0.05)


@atexit.register
def _stop_idle() -> None:
    for (process, _, _), children in _idle.items():
        for child in children if process == os.getpid() else ():
            child.stop()


def answer_with(function: Callable[[bytes], Array], most_bytes: int) -> None:
    """In a child: answer what `ask` sends with the function's array, of 1 to 3 dimensions, until the input ends."""
    with streams(most_bytes) as (taken, given):
        while head := taken.read(_ASKED.size):
            data = taken.read(*_ASKED.unpack(head))
            try:
                with at_most(_SECONDS + 5):
                    array = np.ascontiguousarray(function(data))
            except Exception as error:
                name = type(error).__name__.encode("ascii", "replace")
                given.write(_TOLD.pack(b"E", b"", 0, 0, 0, len(name)) + name)
            else:
                sides = (*array.shape, 0, 0, 0)[:3]
                given.write(_TOLD.pack(b"A", array.dtype.str.encode(), *sides, array.nbytes))
                given.write(array.data)
            given.flush()


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """End this process, a child, where the block takes longer: its parent may have died, which nothing else tells it.

    No signal handler of Python runs while a C library loops, but the signal's own effect needs none.
    """
    if not hasattr(signal, "alarm"):
        yield
        return
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


@contextlib.contextmanager
def streams(most_bytes: int) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Take over standard input and output, and bound this process, which is to be a child; yields both."""
    global _inside  # noqa: PLW0603
    _inside = True
    for each in (signal.SIGINT, signal.SIGTERM):  # sent to all of a group; the end of the parent is the end of input
        signal.signal(each, signal.SIG_IGN)
    taken: IO[bytes] = os.fdopen(os.dup(0), "rb", 1 << 20)
    given: IO[bytes] = os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    _bound(most_bytes)
    yield taken, given


def _bound(most_bytes: int) -> None:
    """Bound this process: memory, no core dump, no file that grows."""
    try:
        import resource
    except ImportError:
        return
    statm = Path("/proc/self/statm")
    pages = int(statm.read_text().split()[0]) if statm.exists() else 0
    room = pages * resource.getpagesize() + most_bytes + _ROOM if pages else resource.RLIM_INFINITY
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    wanted = {resource.RLIMIT_AS: room, resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0}
    for what, most in wanted.items():
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(what, (most, most))
