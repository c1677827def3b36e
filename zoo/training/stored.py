"""Arrays too dear to compute twice, kept on disk: a .npy file, mapped when it is read, and a record with its digest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from zoo.data.room import cache_limit, make_room, open_in_use, still_in_use
from zoo.errors import ZooError
from zoo.files import atomic_writer, read_json, remove_half_written, sha256_file, write_json

WAIT_S = 0.2


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


def read_stored(file: Path, count: int) -> Stored | None:
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


def _open(file: Path, facts: dict[str, Any], count: int) -> Stored | None:
    """Map an array; the map keeps the file from being removed for want of room (`zoo.data.room`)."""
    stream = open_in_use(file, file.stat().st_size)
    if stream is None:
        return None
    with stream:
        np.lib.format.read_magic(stream)
        shape, _, kind = np.lib.format.read_array_header_1_0(stream)
        # Copied on write: torch wants memory that it may write to, and the file stays as it is.
        array = np.memmap(stream, kind, "c", stream.tell(), shape)
    if len(array) != count:
        return None
    values = torch.from_numpy(array)
    values = values.view(torch.bfloat16) if facts["dtype"] == "bfloat16" else values
    return Stored(values.permute(0, 3, 1, 2) if facts["channels_last"] else values, facts)


def store_once(
    file: Path,
    count: int,
    compute: Callable[[Callable[[torch.Tensor], None]], dict[str, Any]],
    on_wait: Callable[[], None] = lambda: None,
) -> Stored:
    """Return the array of a file, computed by whichever process comes first; the others wait for it.

    compute: hands every batch of rows in turn to the function that it is given, and returns what the record shall say
    besides. on_wait is called a few times a second while another process computes; what it raises ends the wait.
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
            with atomic_writer(file) as stream:
                writer = ArrayWriter(stream, count)
                facts = compute(writer.add)
                writer.end()
                held.enter_context(still_in_use(stream))
            facts = {**facts, **writer.facts}
            write_json(_record(file), facts)
            made = _open(file, facts, count)
            if file.parent.name == ".cache":  # beside the pixels; it stays in any case: it is needed now
                make_room(file, file.stat().st_size, cache_limit())
    assert made is not None
    return made


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
