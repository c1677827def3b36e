"""What every request passes before the app sees it, and every answer on its way out."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import re
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zoo.deployment.server.limits import ClientGone, Refused
from zoo.deployment.server.metrics import Metrics
from zoo.errors import ZooError, one_line

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("zoo.serve")

MIN_TOKEN, MAX_TOKEN = 16, 512
_OPEN_PATHS = frozenset({"/", "/health", "/ready", "/favicon.ico"})  # and /static/: they tell nothing of any model
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "font-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_DATA_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_HEADERS: tuple[tuple[bytes, bytes], ...] = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-embedder-policy", b"require-corp"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
)


class Token:
    """A secret that whoever asks must know; only its digest is kept."""

    def __init__(self, text: str) -> None:
        text = text.strip()
        if not MIN_TOKEN <= len(text) <= MAX_TOKEN or re.fullmatch(r"[!-~]+", text) is None:
            raise ZooError(
                f"the token must have {MIN_TOKEN} to {MAX_TOKEN} printable ASCII characters without spaces; make one "
                "with: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
            )
        self._digest = hashlib.sha256(text.encode()).digest()

    def __repr__(self) -> str:
        return "Token(...)"

    def admits(self, authorization: bytes | None) -> bool:
        """Return whether an Authorization header carries the token; the time that it takes tells nothing of it."""
        scheme, _, given = (authorization or b"").partition(b" ")
        same = hmac.compare_digest(hashlib.sha256(given.strip()).digest(), self._digest)
        return same and scheme.lower() == b"bearer"


@dataclass(frozen=True)
class Hosts:
    """Which names a request may call this server by; `any_address`: also every numeric address.

    A page of somebody else that has its own name point here (DNS rebinding) comes under that name.
    """

    names: frozenset[str]
    any_address: bool = False

    @staticmethod
    def of(loopback: bool, extra: Iterable[str] = ()) -> Hosts:
        """Return the hosts of a server that listens on loopback alone, or elsewhere too; `extra` names come on top.

        A port behind such a name does not matter. Raises ZooError for a name that no request could have.
        """
        names = {"localhost", "127.0.0.1", "::1"}
        for given in extra:
            name = _name_of(given.strip()) or _address_of(given.strip())
            if not name:
                raise ZooError(
                    f"--allowed-host must be one name or address, as zoo.example, without scheme, path or pattern. "
                    f"Got {one_line(given, 100)!r}"
                )
            names.add(name)
        return Hosts(frozenset(names), any_address=not loopback)

    def admit(self, host: str) -> bool:
        """Return whether the value of a Host header is one of them; the port does not matter.

        >>> Hosts.of(True).admit("localhost:8000"), Hosts.of(True).admit("localhost.evil.example")
        (True, False)
        """
        name = _name_of(host)
        return name is not None and (name in self.names or (self.any_address and _address_of(name) is not None))


def _name_of(host: str) -> str | None:
    """Return the name or the address of a Host, as names are compared, without its port; None where it is none."""
    found = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9._-]+))(?::[0-9]{1,5})?", host)
    if found is None:
        return None
    if found[1]:
        return _address_of(found[1])
    return found[2].lower().rstrip(".") or None


def _address_of(text: str) -> str | None:
    """Return a numeric address in its one usual form, None for any other text."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return None


class Gate:
    """ASGI middleware: host, origin and token on the way in; headers, log line and numbers on the way out.

    Whatever is raised inside becomes an answer here: neither a traceback nor an error's words reach the client.
    """

    def __init__(self, app: ASGIApp, hosts: Hosts, token: Token | None, metrics: Metrics) -> None:
        self.app, self.hosts, self.token, self.metrics = app, hosts, token, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *_headers_for(message, scope["path"])]
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, receive, answer)
        except Refused as refused:
            await send_refused(refused, answer)
        except ClientGone:
            status = status or 499
        except asyncio.CancelledError:  # the server's grace at the end is over
            if not status:
                await send_refused(Refused(503, "stopping", {"Retry-After": "5", "Connection": "close"}), answer)
        except Exception as error:
            log_broken(error)
            if status:
                raise ClientGone from None  # half an answer is out already: the connection closes
            await send_refused(Refused(500, "something in this server is broken; its log says where"), answer)
        finally:
            self._note(scope, status, time.perf_counter() - started)

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if not host:
            raise Refused(400, "the request names no host")
        if not self.hosts.admit(host):
            raise Refused(421, "this host name is not served; name it with --allowed-host")
        if scope["method"] not in _SAFE_METHODS:
            _check_origin(headers, host)
        path = scope["path"]
        if self.token is None or path in _OPEN_PATHS or path.startswith("/static/"):
            return
        if not self.token.admits(headers.get(b"authorization")):
            raise Refused(
                401, "a token is needed: Authorization: Bearer ...", {"WWW-Authenticate": 'Bearer realm="zoo"'}
            )

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        """Log and count by route: a path, a query or an address may say whose image it is."""
        route = getattr(scope.get("route"), "path", None)
        route = route or ("/openapi.json" if scope["path"] == "/openapi.json" else "unmatched")
        method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST") else "other"
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        log.info("%s %s %d %.1f ms", method, route, status, 1000 * seconds)


def _check_origin(headers: dict[bytes, bytes], host: str) -> None:
    """Raise Refused 403 for a request that a browser sends on behalf of a page of somebody else."""
    site = headers.get(b"sec-fetch-site", b"same-origin")
    origin = headers.get(b"origin")
    foreign = origin is not None and origin.decode("latin-1").partition("://")[2].lower() != host.lower()
    if foreign or site not in (b"same-origin", b"none"):
        raise Refused(403, "requests of other pages are not answered")


def _headers_for(message: Message, path: str) -> list[tuple[bytes, bytes]]:
    present = {name.lower() for name, _ in message.get("headers", ())}
    page = path == "/" or path.startswith("/static/")
    added = [*_HEADERS, (b"content-security-policy", (_PAGE_POLICY if page else _DATA_POLICY).encode())]
    added.append((b"cache-control", b"no-cache" if page else b"no-store"))
    return [pair for pair in added if pair[0] not in present]


async def send_refused(refused: Refused, send: Send) -> None:
    """Send the answer for what was refused."""
    body = json.dumps({"error": refused.reason}).encode()
    headers: list[Any] = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in refused.headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def log_broken(error: BaseException) -> None:
    """Log the kind and the place of a programming error; its words may hold what was sent."""
    last = traceback.extract_tb(error.__traceback__)[-3:]
    where = " < ".join(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.name}" for frame in reversed(last))
    log.error("broken: %s at %s", type(error).__name__, where)
