"""Reading an ONNX file just far enough to refuse what a bundle must not hold; needs neither onnx nor protobuf."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import BinaryIO

from zoo.errors import ZooError

# Message to field number to the message that stands there, of onnx.proto: all that can lead to a tensor.
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14
_MOST_DEPTH = 64


def check_onnx(graph: bytes | BinaryIO) -> None:
    """Raise ZooError where a graph (its bytes, or its open file) is damaged, or names weights that lie elsewhere.

    A runtime would open such a file wherever it lies.
    """
    try:
        data = graph if isinstance(graph, bytes) else mmap.mmap(graph.fileno(), 0, access=mmap.ACCESS_READ)
        _walk(memoryview(data), "model", 0)  # not closed here: views of it live as long as an error's traceback
    except (IndexError, ValueError):
        raise ZooError("the ONNX file is damaged") from None


def _walk(data: memoryview, kind: str, depth: int) -> None:
    if depth > _MOST_DEPTH:
        raise ValueError("too deep")
    inside = _FIELDS[kind]
    for number, value in _fields(data):
        if kind == "tensor" and (number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value)):
            raise ZooError("the ONNX file names weights in another file, which is never opened")
        if number in inside:
            if not isinstance(value, memoryview):
                raise ValueError("no message")
            _walk(value, inside[number], depth + 1)


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield the fields of one message of protobuf's wire format: number, and a whole number or the bytes."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, place = _varint(data, place)
            yield number, value
            continue
        if wire == 2:
            length, place = _varint(data, place)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError("unknown wire type")
        if place + length > len(data):
            raise ValueError("cut off")
        yield number, data[place : place + length]
        place += length


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("no number")
