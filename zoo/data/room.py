"""The room that the caches of a home may take together, and which of them leaves first when it is short.

They are of pixels, and of what networks made of them: features, and activations of frozen stages.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from zoo.errors import ZooError, one_line
from zoo.files import write_error

if sys.platform != "win32":
    import fcntl

DEFAULT_GB = 50.0
GB = 1_000_000_000
_PATTERNS = ("pixels-*.bin", ".pixels-*", "features-*.npy", ".features-*", "boundary-*.npy", ".boundary-*")
_ABANDONED = 3600  # seconds after which nobody writes to a temporary file any more


def cache_limit() -> float:
    """Return how many bytes all caches of a home may take together, by `ZOO_CACHE_GB` (50 if it is not set).

    0: nothing is kept; `inf`: no limit. Raises ZooError for anything but a number of at least 0.
    """
    text = os.environ.get("ZOO_CACHE_GB", "").strip()
    try:
        limit = float(text) if text else DEFAULT_GB
    except ValueError:
        limit = math.nan
    if not limit >= 0:
        raise ZooError(
            "ZOO_CACHE_GB must be how many gigabytes of decoded pixels are kept: a number above 0, 0 for none, or inf. "
            f"Got {one_line(text)!r}; correct or unset it"
        )
    return limit * GB


def caches_of(data: Path) -> dict[Path, os.stat_result]:
    """Return the caches below the folder of the datasets, those being written too, with size and times."""
    found = {}
    for pattern in _PATTERNS:
        for file in data.glob(f"*/.cache/{pattern}"):
            if file.suffix != ".lock":
                with suppress(OSError):
                    found[file] = file.stat()
    return found


def make_room(own: Path, needed: int, limit: float) -> bool:
    """Return whether a cache of `needed` bytes may stand at `own`, whose own bytes do not count.

    Of the other caches of this home, the least recently used leave until it fits: never one that a living process has
    open, and none at all where that would not be enough.
    """
    data = own.parent.parent.parent
    mine = f".{own.name[:40]}."
    others = {file: facts for file, facts in caches_of(data).items() if file != own and not _is_of(file, own, mine)}
    over = sum(facts.st_size for facts in others.values()) + needed - limit
    if over <= 0 or needed > limit:
        return over <= 0
    with ExitStack() as held:
        leaving = []
        for file, facts in sorted(others.items(), key=lambda item: item[1].st_atime_ns):
            if over > 0 and not file.name.startswith(".") and (stream := _unused(file)) is not None:
                held.enter_context(stream)
                leaving.append(file)
                over -= facts.st_size
        if over > 0:
            return False
        for file in leaving:
            try:
                file.unlink(missing_ok=True)
                if file.suffix == ".npy":
                    file.with_suffix(".json").unlink(missing_ok=True)  # the record of what it was
            except OSError:  # another user's, or open where open files cannot be removed
                return False
    return True


def _is_of(file: Path, own: Path, temporary: str) -> bool:
    return file.parent == own.parent and file.name.startswith(temporary)


def _unused(file: Path) -> IO[bytes] | None:
    """Return a cache opened and locked, so that nobody begins to use it; None where a living process has it open."""
    try:
        stream = file.open("r+b")
    except OSError:
        return None
    try:
        if sys.platform != "win32":  # there an open file cannot be removed
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.close()
        return None
    return stream


def open_in_use(file: Path, size: int) -> IO[bytes] | None:
    """Return a cache of that many bytes, open and safe from removal until it is closed; None where there is none.

    A map of it, and every process that inherits it, keeps it safe as well: the lock is of the open file.
    """
    try:
        stream = file.open("rb")
    except OSError:
        return None
    try:
        if sys.platform != "win32":
            with suppress(OSError):  # a disk without locks: an open file keeps its content all the same
                fcntl.flock(stream, fcntl.LOCK_SH)
        here, now = os.fstat(stream.fileno()), file.stat()
        if (here.st_ino, here.st_dev) == (now.st_ino, now.st_dev) and here.st_size == size:
            with suppress(OSError):  # the time of use; that of writing stays
                os.utime(file, ns=(time.time_ns(), here.st_mtime_ns))
            return stream
    except OSError:  # removed since it was opened
        pass
    stream.close()
    return None


@contextmanager
def still_in_use(stream: IO[bytes]) -> Iterator[None]:
    """Keep a cache that was just written safe from removal, after its stream is closed too, until the block ends."""
    if sys.platform == "win32":  # there an open file could not be put in its place
        yield
        return
    with os.fdopen(os.dup(stream.fileno()), "rb") as other:
        with suppress(OSError):
            fcntl.flock(other, fcntl.LOCK_SH)
        yield


@contextmanager
def building(own: Path) -> Iterator[None]:
    """Hold the right to build the cache at `own`; another process that wants the same waits.

    What builds that were killed have left behind is removed. Raises ZooError where the folder cannot be written.
    """
    from filelock import FileLock

    lock = FileLock(own.with_name(f".build-{own.stem}.lock"))
    try:
        own.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise write_error(own, error) from error
    try:
        mine = f".{own.name[:40]}."
        for file, facts in caches_of(own.parent.parent.parent).items():
            abandoned = file.name.startswith(".") and time.time() - facts.st_mtime > _ABANDONED
            if abandoned or _is_of(file, own, mine):
                with suppress(OSError):
                    file.unlink()
        yield
    finally:
        lock.release()
