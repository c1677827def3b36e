"""The web page: files of this folder, read once; nothing outside of them can be asked for."""

from __future__ import annotations

import hashlib
import mimetypes
from dataclasses import dataclass
from importlib import resources

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_PLACEHOLDER = (
    b"<!doctype html><html lang=en><meta charset=utf-8><title>zoo</title><p>POST an image to /predict.</p></html>"
)


@dataclass(frozen=True)
class PageFile:
    """A file of the page: its bytes, media type, and a tag that changes with them."""

    data: bytes
    media_type: str
    etag: str


def page_files() -> dict[str, PageFile]:
    """Return the page's files by name; `index.html` is among them."""
    found = {}
    for each in resources.files(__name__).iterdir():
        if each.is_file() and not each.name.startswith((".", "_")) and not each.name.endswith((".py", ".pyc")):
            found[each.name] = _page_file(each.name, each.read_bytes())
    return found if "index.html" in found else {"index.html": _page_file("index.html", _PLACEHOLDER), **found}


def _page_file(name: str, data: bytes) -> PageFile:
    suffix = "." + name.rpartition(".")[2]
    media_type = _TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
    return PageFile(data, media_type, f'"{hashlib.sha256(data).hexdigest()[:16]}"')
