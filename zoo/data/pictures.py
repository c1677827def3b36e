"""Small grey pictures that stay on disk: a million of them would take a gigabyte of memory."""

from __future__ import annotations

import mmap
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np

SMALL_SIDE = 32  # pixels
BLOCK = 1024  # pictures that are in memory at once: 1 MiB, and 8 as 64-bit numbers
_TOUCHED = 256  # scattered pictures that are read at once: around each the system maps 64 KiB


Small: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]] | Pictures | Chosen"


class Pictures:
    """Pictures (N, 32, 32) uint8 in a file, read where they are asked for: by places, a slice or a mask."""

    def __init__(self, stream: IO[bytes], offset: int, count: int) -> None:
        self.shape = (count, SMALL_SIDE, SMALL_SIDE)
        self._bytes = mmap.mmap(stream.fileno(), offset + int(np.prod(self.shape)), access=mmap.ACCESS_READ)
        self._map = np.frombuffer(self._bytes, np.uint8, offset=offset).reshape(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, places: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
        if isinstance(places, slice):
            return self._read(places)
        places = np.arange(len(self))[places]
        found = np.empty((len(places), SMALL_SIDE, SMALL_SIDE), np.uint8)
        for start in range(0, len(places), _TOUCHED):
            found[start : start + _TOUCHED] = self._read(places[start : start + _TOUCHED])
        return found

    def _read(self, places: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
        found = np.array(self._map[places])
        if hasattr(mmap, "MADV_DONTNEED"):  # what was looked at does not stay in this process's memory
            self._bytes.madvise(mmap.MADV_DONTNEED)
        return found


class Chosen:
    """Some of many pictures, by their places, without a copy of them."""

    def __init__(self, small: Small, places: np.ndarray[Any, Any]) -> None:
        self._small, self._places = small, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, places: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return self._small[self._places[places]]


def blocks(small: Small) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Yield pictures as rows of 1024 grey levels, 1024 at once."""
    for start in range(0, len(small), BLOCK):
        block = small[start : start + BLOCK]
        yield block.reshape(len(block), -1)


def write_archive(stream: IO[bytes], columns: Mapping[str, np.ndarray[Any, Any]], small: Small) -> None:
    """Write columns and pictures as an uncompressed .npz, block by block."""
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, column in columns.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, column, allow_pickle=False)
        with archive.open("small.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(small), SMALL_SIDE, SMALL_SIDE)}
            np.lib.format.write_array_header_1_0(member, header)
            for block in blocks(small):
                member.write(block.tobytes())


def read_archive(file: Path) -> tuple[dict[str, np.ndarray[Any, Any]], Pictures]:
    """Return the columns and the pictures that `write_archive` wrote; raises one of many errors for a damaged file."""
    with file.open("rb") as stream:
        with np.load(stream, allow_pickle=False) as stored:
            columns = {name: stored[name] for name in stored.files if name != "small"}
        with zipfile.ZipFile(stream) as archive:
            info = archive.getinfo("small.npy")
            with archive.open(info) as member:
                while member.read(1 << 20):  # to its end, where the checksum is compared
                    pass
        stream.seek(info.header_offset + 26)
        name_bytes, extra_bytes = struct.unpack("<HH", stream.read(4))
        stream.seek(info.header_offset + 30 + name_bytes + extra_bytes)
        np.lib.format.read_magic(stream)
        (count, *side), fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        if side != [SMALL_SIDE, SMALL_SIDE] or fortran or dtype != np.uint8:
            raise ValueError(f"pictures of shape {(count, *side)} and {dtype}")
        return columns, Pictures(stream, stream.tell(), count)
