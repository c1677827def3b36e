"""From a body in memory to the bytes of its images; nothing is written to disk, and no name of a file is kept."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

from zoo.deployment.server.limits import Refused, content_type_of, is_image_type

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

FIELDS = ("files", "file")
MULTIPART = "multipart/form-data"
_HEADER_BYTES = 4096
_OTHER_FIELDS = 8  # parts of a form that are no images
_PADDING = 64  # spaces behind a delimiter

# Its warnings hold characters of the body.
logging.getLogger("python_multipart").disabled = True
logging.getLogger("python_multipart.multipart").disabled = True


def check_type(content_type: str | None) -> None:
    """Raise Refused 415 for a Content-Type that holds no image."""
    media_type = content_type_of(content_type)
    if media_type != MULTIPART and not is_image_type(media_type):
        raise Refused(415, "send multipart/form-data with the field files, or one image as image/png, image/jpeg, ...")


def images_of(body: bytearray, content_type: str | None, most: int) -> list[bytes]:
    """Return the images of a body: one of a raw body, all of a form's fields `files` and `file`.

    Raises Refused: 400 for a form that cannot be read or holds no image, 413 for more than `most`.
    """
    check_type(content_type)
    if content_type_of(content_type) != MULTIPART:
        return [bytes(body)]
    found = _parts(body, _boundary(content_type or ""), most)
    if not found:
        raise Refused(400, "the form holds no file; send images in the field files")
    return found


def _boundary(content_type: str) -> bytes:
    found = re.search(r';\s*boundary\s*=\s*(?:"([^"]{1,70})"|([^\s;",]{1,70}))', content_type, re.I)
    boundary = (found[1] or found[2]) if found else ""
    if not boundary or not boundary.isascii():
        raise Refused(400, "the form's Content-Type names no boundary")
    return boundary.encode("ascii")


def _check_delimiters(body: bytearray, boundary: bytes, most: int) -> None:
    """Refuse what the parser would go over byte by byte: very many delimiters, and long padding behind one."""
    delimiter, place = b"\r\n--" + boundary, 0
    for _ in range(most + _OTHER_FIELDS + 2):
        place = body.find(delimiter, place)
        if place < 0:
            return
        place += len(delimiter)
        if len(body[place : place + _PADDING + 1].lstrip(b" \t")) == 0 and len(body) > place + _PADDING:
            raise Refused(400, "the form cannot be read")
    raise Refused(413, f"a request may hold {most} images at the most")


def _parts(body: bytearray, boundary: bytes, most: int) -> list[bytes]:
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import MultipartParser

    _check_delimiters(body, boundary, most)
    gathered = _Parts(most)
    try:
        parser = MultipartParser(boundary, gathered.callbacks(), max_header_count=8, max_header_size=_HEADER_BYTES)
        parser.write(bytes(body))
        parser.finalize()
    except FormParserError:
        raise Refused(400, "the form cannot be read") from None
    if not gathered.ended:
        raise Refused(400, "the form ends too early")
    return gathered.images


class _Parts:
    """Gathers a form's parts; those of other fields are passed over."""

    def __init__(self, most: int) -> None:
        self.most, self.images, self.ended = most, list[bytes](), False
        self._seen = 0
        self._field, self._value, self._data = bytearray(), bytearray(), bytearray()
        self._taken = False

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._seen += 1
        if self._seen > self.most + _OTHER_FIELDS:
            raise Refused(413, f"a request may hold {self.most} images at the most")
        self._taken, self._data = False, bytearray()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._field.strip().lower() == b"content-disposition":
            named = re.search(rb';\s*name\s*=\s*(?:"([^"]*)"|([^\s;"]+))', self._value, re.I)
            name = (named[1] or named[2] or b"") if named else b""
            self._taken = name.decode("latin-1") in FIELDS
        self._field, self._value = bytearray(), bytearray()

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._taken:
            self._data += data[start:end]

    def _part_end(self) -> None:
        if not self._taken:
            return
        if len(self.images) >= self.most:
            raise Refused(413, f"a request may hold {self.most} images at the most")
        self.images.append(bytes(self._data))
        self._data = bytearray()

    def _end(self) -> None:
        self.ended = True
