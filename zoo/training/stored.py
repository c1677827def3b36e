"""Arrays too dear to compute twice, kept on disk: a .npy file, mapped when it is read, and a record with its digest."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from zoo.data.room import cache_limit, make_room, open_in_use, still_in_use
from zoo.errors import ZooError
from zoo.files import atomic_writer, read_json, remove_half_written, sha256_file, write_json

WAIT_S = 0.2
PART_S = 60.0  # of work that a process which is killed may lose
_PART_BYTES = 256 * 2**20  # rows that wait in memory to be kept

Add = Callable[[torch.Tensor, bool], None]


@dataclass(frozen=True)
class Stored:
    """An array of N rows on disk, and what its record says of it. values: of the type and memory format written."""

    values: torch.Tensor
    facts: dict[str, Any]


class ArrayWriter:
    """Takes an array's rows batch by batch, so that it need not fit into memory; sha256: of what was written."""

    def __init__(self, stream: IO[bytes], count: int) -> None:
        self._stream, self._count, self._rows = stream, count, 0
        self._hash = hashlib.sha256()
        self.facts: dict[str, Any] = {}

    def add(self, batch: torch.Tensor) -> None:
        """Write rows of shape (B, ...), all batches of one shape, type and memory format."""
        batch = batch.detach().cpu()
        last = batch.ndim == 4 and not batch.is_contiguous() and batch.is_contiguous(memory_format=torch.channels_last)
        kind = str(batch.dtype).removeprefix("torch.")
        plain = batch.permute(0, 2, 3, 1) if last else batch.contiguous()
        # numpy has no bfloat16; its two bytes travel as an integer's
        array = (plain.view(torch.int16) if batch.dtype == torch.bfloat16 else plain).numpy()
        if not self._rows:
            self.facts = {"dtype": kind, "channels_last": last}
            self._write(_header(array.dtype, (self._count, *array.shape[1:])))
        self._rows += len(array)
        self._write(np.ascontiguousarray(array).data.cast("B"))

    def _write(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        self._stream.write(data)

    def end(self) -> None:
        """Note the digest; raises ValueError where the rows are not as many as were promised."""
        if self._rows != self._count:
            raise ValueError(f"{self._rows} rows were written where {self._count} were promised")
        self.facts["sha256"] = self._hash.hexdigest()


def _header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    import io

    stream = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, described)
    return stream.getvalue()


def read_stored(file: Path, count: int | None = None) -> Stored | None:
    """Return the array of a .npy file, mapped; None where it is missing, of another length, or not what was written."""
    try:
        facts = read_json(_record(file))
        if sha256_file(file) != facts["sha256"]:
            return None
        return _open(file, facts, count)
    except (ZooError, OSError, ValueError, KeyError, EOFError):
        return None


def _record(file: Path) -> Path:
    return file.with_suffix(".json")


def _open(file: Path, facts: dict[str, Any], count: int | None) -> Stored | None:
    """Map an array; the map keeps the file from being removed for want of room (`zoo.data.room`)."""
    stream = open_in_use(file, file.stat().st_size)
    if stream is None:
        return None
    with stream:
        np.lib.format.read_magic(stream)
        shape, _, kind = np.lib.format.read_array_header_1_0(stream)
        # Copied on write: torch wants memory that it may write to, and the file stays as it is.
        array = np.memmap(stream, kind, "c", stream.tell(), shape)
    if len(array) != (len(array) if count is None else count):
        return None
    values = torch.from_numpy(array)
    values = values.view(torch.bfloat16) if facts["dtype"] == "bfloat16" else values
    return Stored(values.permute(0, 3, 1, 2) if facts["channels_last"] else values, facts)


@dataclass
class _Parts:
    """Rows of an array that is not whole yet, in files of their own: a pass that is ended goes on after them.

    Each ends at a multiple of `every` rows, so that what follows has the batches that it would have had.
    """

    file: Path
    every: int
    rows: int = 0
    seconds: float = 0.0
    whole: bool = True
    _number: int = 0
    _since: float = field(default_factory=time.monotonic)
    _waiting: list[torch.Tensor] = field(default_factory=list)

    def read(self) -> Iterator[torch.Tensor]:
        """Yield what earlier passes have kept, as far as it is good, and count it."""
        self._remove(".")  # what a kill has left half written
        while (found := read_stored(self._name(self._number))) is not None and self.rows == found.facts["first"]:
            self._number, self.rows = self._number + 1, self.rows + len(found.values)
            self.seconds, self.whole = self.seconds + found.facts["seconds"], self.whole and found.facts["whole"]
            yield found.values
        self._since = time.monotonic()

    def add(self, batch: torch.Tensor, whole: bool) -> None:
        """Take rows, and keep those that wait where it is time."""
        self.whole = self.whole and whole
        if not self.every:
            return
        self._waiting.append(batch.detach().cpu())
        waits = sum(each.nbytes for each in self._waiting)
        if time.monotonic() - self._since > PART_S or waits > _PART_BYTES:
            self.keep()

    def keep(self) -> None:
        """Write the rows that wait as a file; where there is no room for it they are lost with the process."""
        count = sum(map(len, self._waiting))
        if count and not (self.rows + count) % self.every:
            try:
                self._write(count)
            except ZooError:
                self.every, self._waiting = 0, []  # the pass itself may still find the room that it needs

    def _write(self, count: int) -> None:
        name, seconds = self._name(self._number), time.monotonic() - self._since
        with atomic_writer(name) as stream:
            writer = ArrayWriter(stream, count)
            for each in self._waiting:
                writer.add(each)
            writer.end()
        facts = {"first": self.rows, "seconds": seconds, "whole": self.whole, **writer.facts}
        write_json(_record(name), facts)
        self._number, self.rows, self.seconds = self._number + 1, self.rows + count, self.seconds + seconds
        self._since = time.monotonic()
        self._waiting.clear()

    def remove(self) -> None:
        """Take all parts away: the array is whole."""
        self._remove("")

    def _remove(self, before: str) -> None:
        for each in self.file.parent.glob(f"{before}{self.file.stem}-p[0-9]*"):
            with suppress(OSError):
                each.unlink(missing_ok=True)

    def _name(self, number: int) -> Path:
        return self.file.with_name(f"{self.file.stem}-p{number}.npy")


def store_once(
    file: Path,
    count: int,
    compute: Callable[[Add, int], None],
    on_wait: Callable[[], None] = lambda: None,
    every: int = 0,
) -> Stored:
    """Return the array of a file, computed by whichever process comes first; the others wait for it.

    compute: hands every batch of rows from the given one on to the function that it is given, and whether it is as it
    should be; the record says whether all were (`whole`), and the `seconds` that it took. every: a pass that is ended
    goes on later at a multiple of so many rows, a minute's work from where it was; 0: it begins anew. on_wait is called
    a few times a second while another process computes; what it raises ends the wait.
    Raises ZooError where the folder cannot be written.
    """
    stored = read_stored(file, count)
    if stored is not None:
        return stored
    with _only_one(file, on_wait):
        stored = read_stored(file, count)
        if stored is not None:
            return stored
        with ExitStack() as held:
            parts = _Parts(file, every)
            with atomic_writer(file) as stream:
                writer = ArrayWriter(stream, count)
                _compute(parts, writer, compute)
                held.enter_context(still_in_use(stream))
            facts = {"whole": parts.whole, "seconds": parts.seconds, **writer.facts}
            write_json(_record(file), facts)
            made = _open(file, facts, count)
            parts.remove()
            if file.parent.name == ".cache":  # beside the pixels; it stays in any case: it is needed now
                make_room(file, file.stat().st_size, cache_limit())
    assert made is not None
    return made


def _compute(parts: _Parts, writer: ArrayWriter, compute: Callable[[Add, int], None]) -> None:
    """Write what is kept of an array, then the rest, keeping that too until all is there."""
    for values in parts.read():
        writer.add(values)
    started, before = time.monotonic(), parts.seconds

    def add(batch: torch.Tensor, whole: bool) -> None:
        writer.add(batch)
        parts.add(batch, whole)

    try:
        compute(add, parts.rows)
        writer.end()
    except BaseException:
        parts.keep()
        raise
    parts.seconds = before + time.monotonic() - started


@contextmanager
def _only_one(file: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold a file for this process; the operating system frees it when the process dies."""
    from filelock import FileLock, Timeout

    lock = FileLock(file.parent / f".{file.stem}.lock")
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=WAIT_S)
            for each in (file, _record(file)):
                remove_half_written(file.parent, each.name)  # of a process that was killed
            break
        except Timeout:
            on_wait()
        except (OSError, NotImplementedError):  # a file system without locks: the same work twice, and no harm
            break
    try:
        yield
    finally:
        lock.release()
