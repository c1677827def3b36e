"""The manifest's file read into columns: in one pass, hashed on the way, every repeated text held once."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from zoo.errors import ZooError, one_line

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("sample_id", "path", "label", "group", "split", "sha256", "pixel_sha256")
_PART = 4096  # rows that are held as lists at once


def read_columns(path: Path) -> tuple[list[list[str]], str]:
    """Return a manifest's columns, in the order of COLUMNS, and its SHA-256, out of one pass over the file."""
    try:
        with path.open("rb") as stream:
            hashed = _Hashed(stream)
            columns = _parse_manifest(hashed, path)
    except OSError as error:
        raise ZooError(
            f"cannot read {str(path)!r}: {one_line(error.strerror or error)}; import the dataset again"
        ) from error
    return columns, hashed.digest.hexdigest()


def frame_of(columns: list[list[str]]) -> pd.DataFrame:
    """Return columns as a frame and empty them; its rows, and those of its parts, share one text of each kind."""
    import pandas as pd

    # Not in pyarrow's memory, wherever that is installed: each part of the frame would copy its texts.
    with pd.option_context("mode.string_storage", "python"):
        series = {}
        for name, column in zip(COLUMNS, columns, strict=True):
            series[name] = pd.Series(column, dtype="str")
            column.clear()
        return pd.DataFrame(series, columns=list(COLUMNS), copy=False)


class _Hashed(io.BufferedIOBase):
    """A binary file that is hashed as it is read."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self.digest, self.bytes_read = stream, hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def read1(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.digest.update(data)
        self.bytes_read += len(data)
        return data


def _parse_manifest(stream: _Hashed, path: Path) -> list[list[str]]:
    columns: list[list[str]] = [[] for _ in COLUMNS]
    shared: dict[str, str] = {}
    part: list[list[str]] = []
    try:
        text = io.TextIOWrapper(cast(Any, stream), "utf-8-sig", newline="")
        reader = csv.reader(text, strict=True)
        header = next(reader, [])
        missing = [column for column in COLUMNS if column not in header]
        if missing:
            raise ZooError(f"{one_line(path)!r} has no column {', '.join(missing)}; import the dataset again")
        places = [header.index(column) for column in COLUMNS]
        for cells in reader:
            if len(cells) != len(header):
                raise ZooError(
                    f"{one_line(path)!r} line {reader.line_num}: {len(cells)} fields where the header has {len(header)}"
                )
            part.append(cells)
            if len(part) == _PART:
                _extend(columns, part, places, shared)
                part = []
    except (UnicodeDecodeError, csv.Error) as error:
        reason = _undecodable(error, stream) if isinstance(error, UnicodeDecodeError) else one_line(error)
        raise ZooError(f"{one_line(path)!r} is no valid CSV: {reason}; import the dataset again") from error
    _extend(columns, part, places, shared)
    return columns


def _undecodable(error: UnicodeDecodeError, stream: _Hashed) -> str:
    """Return what the error says, with the place in the file for that in the piece that was read last."""
    before = stream.bytes_read - len(error.object)
    first, last = before + error.start, before + error.end - 1
    what = f"byte 0x{error.object[error.start]:02x} in position {first}"
    if last > first:
        what = f"bytes in position {first}-{last}"
    return f"{error.encoding!r} codec can't decode {what}: {error.reason}"


def _extend(columns: list[list[str]], part: list[list[str]], places: list[int], shared: dict[str, str]) -> None:
    """Append rows to columns; what repeats in label, group and split is held once."""
    if not part:
        return
    cells = list(zip(*part, strict=True))
    ids = cells[places[0]]
    for name, column, place in zip(COLUMNS, columns, places, strict=True):
        values: Sequence[str] = cells[place]
        if name == "group":  # an image without a group has its own, named like the image
            values = [
                own if own == each else shared.setdefault(each, each) for own, each in zip(ids, values, strict=True)
            ]
        elif name in ("label", "split"):
            values = [shared.setdefault(each, each) for each in values]
        column.extend(values)
