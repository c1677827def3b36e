"""The model hub and its caches: is a host there, fetch a file, verify it, never keep a bad one."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import sys
import threading
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from zoo.errors import Hindered, one_line
from zoo.files import atomic_writer, sha256_file, user_path

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
PROBE_S = 3.0
READ_S = 10.0
# PyTorch's convention: name-<first digits of the sha256>.pth; eight digits that are a date promise nothing.
_PROMISE = re.compile(r"-(?!(?:19|20)\d{6}\.)([0-9a-f]{8,64})\.(?:safetensors|pth|pt|bin)(?:\.tar)?$")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DEFAULT_PORTS = {"https": 443, "socks5": 1080, "socks5h": 1080}


class HubError(Exception):
    """Why the hub gave nothing; the caller says what can be done about it."""


def hub_cache() -> Path:
    """Return the folder of the hub's cache, as the environment names it now."""
    from huggingface_hub import constants

    if os.environ.get("HF_HUB_CACHE"):
        return user_path(os.environ["HF_HUB_CACHE"])
    if os.environ.get("HF_HOME"):
        return user_path(os.environ["HF_HOME"]) / "hub"
    return Path(constants.HF_HUB_CACHE)


def url_cache() -> Path:
    """Return the folder where torch keeps what it fetched from a plain URL."""
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints"


def url_name(url: str) -> str:
    """Return the file name at the end of a URL."""
    return Path(urlsplit(url).path).name


def cached_repos() -> frozenset[str]:
    """Return the ids of the hub's models whose weights lie in its cache."""
    found = (path for name in HUB_FILES for path in hub_cache().glob(f"models--*/snapshots/*/{name}"))
    return frozenset(path.parents[2].name.removeprefix("models--").replace("--", "/") for path in found)


def cached_urls() -> frozenset[str]:
    """Return the names of the files in torch's cache."""
    return frozenset(path.name for path in url_cache().glob("*.*"))


def is_offline(offline: bool = False) -> bool:
    """Return whether no connection may be opened: `--offline`, or HF_HUB_OFFLINE in the environment."""
    from huggingface_hub import constants

    said = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return offline or said or bool(constants.HF_HUB_OFFLINE)


def checked_sha256(path: Path, digest: str | None = None) -> str:
    """Return a file's sha256; raises Hindered where it is not `digest`, or not what the file's name promises.

    A name like `resnet18-5c106cde.pth` promises the first digits.
    """
    try:
        sha256 = sha256_file(path)
    except OSError as error:
        raise Hindered(f"cannot read {str(path)!r}: {one_line(error.strerror or error)}") from error
    _check(path.name, sha256, digest)
    return sha256


def _check(name: str, sha256: str, digest: str | None = None) -> None:
    promise = _PROMISE.search(name)
    expected = digest or (promise.group(1) if promise else "")
    if not sha256.startswith(expected):
        raise Hindered(
            f"{one_line(name)!r} is damaged or another file: its sha256 must begin with {expected[:16]}. "
            f"Got {sha256[:16]}; fetch it again"
        )


def find_cached(repo: str, url: str) -> tuple[Path, str, str] | None:
    """Return path, sha256 and location of a model's weights in the hub's cache, else in torch's; else None.

    repo: hub id, perhaps with `@revision`. Raises Hindered where the file is damaged.
    """
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = repo.partition("@")
    for file in HUB_FILES if name else ():
        path = try_to_load_from_cache(name, file, cache_dir=hub_cache(), revision=revision or None)
        if isinstance(path, str):
            return _checked_blob(Path(path), name)
    path = url_cache() / url_name(url) if url else None
    if path is not None and path.is_file():
        return path, checked_sha256(path), path.name
    return None


def _checked_blob(path: Path, repo: str) -> tuple[Path, str, str]:
    """Return a file of the hub's cache; one that has not the hub's digest is removed and refused."""
    # One step only: the link's target is named by the etag, and may itself be a link into a shared store.
    blob = path.parent / path.readlink() if path.is_symlink() else path
    digest = blob.name if _SHA256.fullmatch(blob.name) else None
    location = f"{repo}@{path.parent.name}/{path.name}"
    try:
        return path, checked_sha256(path, digest), location
    except Hindered:
        store = blob.resolve()
        try:
            for each in (path, blob, store):
                each.unlink(missing_ok=True)
        except OSError as error:
            raise Hindered(f"the cached {location} is damaged; remove it: {str(blob)!r}") from error
        raise Hindered(
            f"the hub's file {location} is damaged: its sha256 is not the hub's. It was removed from the "
            "cache; run the same command again to fetch it anew"
        ) from None


def fetch(repo: str, url: str) -> tuple[Path, str, str]:
    """Fetch a model's weights from the hub, or from its URL where no hub has it.

    Returns path, sha256 and location, as `find_cached` does. Raises HubError,
    within seconds, where that cannot be done, and Hindered where the file is damaged.
    """
    endpoint = _endpoint() if repo else url
    _probe(endpoint)
    return _fetch_repo(repo, endpoint) if repo else _fetch_url(url)


def _endpoint() -> str:
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def _probe(url: str) -> None:
    """Raise HubError where the host of a URL, or the proxy that the environment sets for it, does not answer.

    The libraries would try again for minutes; here it is known after 3 seconds, name look-up included.
    """
    target = urlsplit(url)
    proxies = urllib.request.getproxies_environment()
    proxy = proxies.get(target.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass_environment(target.hostname or ""):  # type: ignore[attr-defined]
        target = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    try:
        host, port = target.hostname or "", target.port or _DEFAULT_PORTS.get(target.scheme, 80)
    except ValueError:
        raise HubError(f"{one_line(url, 80)!r} has no valid port") from None
    outcome: list[str] = []

    def connect() -> None:
        try:
            with socket.create_connection((host, port), timeout=PROBE_S):
                outcome.append("")
        except (OSError, UnicodeError) as error:
            outcome.append(f" ({one_line(error, 80)})")

    # A thread, since looking up a name heeds no timeout.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(PROBE_S + 0.5)
    if not outcome or outcome[0]:
        raise HubError(f"{one_line(host, 80)}:{port} does not answer{''.join(outcome)}")


def _fetch_repo(repo: str, endpoint: str) -> tuple[Path, str, str]:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    name, _, revision = repo.partition("@")
    for file in HUB_FILES:
        url = hf_hub_url(name, file, revision=revision or None, endpoint=endpoint)
        try:
            # Asked first and once: `hf_hub_download` would ask a failing server for minutes.
            get_hf_file_metadata(url, timeout=READ_S)
            path = hf_hub_download(
                name,
                file,
                revision=revision or None,
                cache_dir=hub_cache(),
                endpoint=endpoint,
                etag_timeout=READ_S,
                tqdm_class=_progress_bar(),
            )
        except Exception as error:  # its kinds differ between versions of the library and of its HTTP client
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                continue
            raise HubError(f"fetching {name}/{file} failed ({_reason(error)})") from error
        return _checked_blob(Path(path), name)
    raise HubError(f"the hub's {name} has neither {' nor '.join(HUB_FILES)}")


def _reason(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return f"HTTP status {status}" if status else one_line(error, 160) or type(error).__name__


def _progress_bar() -> type:
    """Return the hub's progress bar, hidden where nobody looks, that ends a download gone astray.

    A server that breaks off again and again, always from the start, would be asked for ever.
    """
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.received = 0
            hidden = kwargs.get("disable") or not sys.stderr.isatty()
            super().__init__(*args, **{**kwargs, "disable": hidden})

        def update(self, n: float | None = 1) -> bool | None:
            self.received += max(0, int(n or 0))
            if self.total and self.received > 2 * self.total:
                raise OSError("the connection broke off again and again")
            return super().update(n)  # type: ignore[no-any-return]

    return Bar


def _fetch_url(url: str) -> tuple[Path, str, str]:
    """Fetch a file into torch's cache; it comes to lie there only whole and with the promised digest."""
    name = url_name(url)
    path = url_cache() / name
    digest, received = hashlib.sha256(), 0
    try:
        with urllib.request.urlopen(url, timeout=READ_S) as answer, atomic_writer(path) as stream:
            expected = int(answer.headers.get("Content-Length") or -1)
            for block in _blocks(answer, name):
                stream.write(block)
                digest.update(block)
                received += len(block)
            if expected not in (-1, received):
                raise HubError(f"{name} broke off after {received} of {expected} bytes")
            _check(name, digest.hexdigest())
    except (OSError, HTTPException, ValueError) as error:
        raise HubError(f"fetching {name} failed ({one_line(error, 160)})") from error
    return path, digest.hexdigest(), name


def _blocks(answer: HTTPResponse, name: str) -> Iterator[bytes]:
    """Yield a body block by block; a broken connection must not look like a failure to write."""
    try:
        while block := answer.read(1 << 20):
            yield block
    except (OSError, HTTPException) as error:
        raise HubError(f"fetching {name} failed ({one_line(error, 160)})") from error
