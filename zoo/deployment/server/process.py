"""The process that serves: its socket, its log, its signals. Whoever asked before it was stopped is answered."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Generator
from functools import partial
from types import FrameType
from typing import Any

import uvicorn

from zoo.deployment.server.app import State
from zoo.deployment.server.limits import Limits
from zoo.deployment.server.protocol import HEAD_BYTES, TimedProtocol
from zoo.errors import ZooError, one_line

_BACKLOG = 1024


def bind(host: str, port: int) -> socket.socket:
    """Return a bound socket, to which nobody can connect before `listen`.

    Raises ZooError for a host that is none of this machine's, or a port that is taken.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
    except (OSError, UnicodeError):
        raise ZooError(
            f"--host {one_line(host, 100)!r} is no address; take 127.0.0.1, or one of this machine's"
        ) from None
    sock = socket.socket(family, kind)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise _cannot_listen(host, port, error) from None
    return sock


def listen(sock: socket.socket) -> None:
    """Let clients connect; raises ZooError where another server that was bound to the port too came first."""
    host, port = sock.getsockname()[:2]
    try:
        sock.listen(_BACKLOG)
    except OSError as error:
        raise _cannot_listen(host, port, error) from None


def _cannot_listen(host: str, port: int, error: OSError) -> ZooError:
    why = one_line(error.strerror or error)
    return ZooError(f"cannot listen at {one_line(host, 100)} port {port}: {why}; --port 0 takes a free one")


def is_loopback(sock: socket.socket) -> bool:
    """Return whether a socket can be reached from this machine alone."""
    return ipaddress.ip_address(sock.getsockname()[0]).is_loopback


def url_of(sock: socket.socket) -> str:
    """Return where a socket listens, for a browser."""
    host, port = sock.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve(app: Any, sock: socket.socket, limits: Limits, started: Callable[[], None]) -> int:
    """Serve until SIGTERM or SIGINT, then answer what is in flight; return how many requests stayed unanswered.

    sock: bound; it listens from here on. `started` is called once connections are accepted. A second signal ends at
    once. Raises ZooError where the port was taken meanwhile, or a model fails its first batch.
    """
    listen(sock)
    _set_limits(limits.connections)
    set_up_log()
    state: State = app.state.zoo
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        loop="auto",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=round(limits.idle_s),
        h11_max_incomplete_event_size=HEAD_BYTES,
    )
    server = _Server(config, state, limits, started)
    server.run(sockets=[sock])
    if state.broken is not None:
        raise ZooError(f"a model fails on a blank image ({state.broken}); export it again")
    return state.unanswered


class _Server(uvicorn.Server):
    """uvicorn's server with timed connections, and with an end that loses nobody."""

    def __init__(self, config: uvicorn.Config, state: State, limits: Limits, started: Callable[[], None]) -> None:
        super().__init__(config)
        self.state, self.limits, self.tell = state, limits, started
        state.metrics.connections.set_function(lambda: len(self.server_state.connections))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections."""
        config = self.config
        config.http_protocol_class = partial(TimedProtocol, self.limits, self.state.metrics)  # type: ignore[assignment]
        await super().startup(sockets)
        self.tell()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: look after slow clients, and whether to end."""
        if counter % 5 == 0:
            self._check_connections()
        return await super().on_tick(counter) or self.state.broken is not None

    def _check_connections(self, stopping_s: float = 0.0) -> None:
        now = asyncio.get_running_loop().time()
        for each in list(self.server_state.connections):
            if isinstance(each, TimedProtocol):
                each.check(now, stopping_s)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Be not ready, take no work, answer what is in flight or soon comes whole; then close."""
        self.state.stopping = True
        told = time.monotonic()
        end = told + self.limits.grace_s
        while self.state.in_flight and time.monotonic() < end and not self.force_exit:
            self._check_connections(time.monotonic() - told)
            await asyncio.sleep(0.05)
        self.config.timeout_graceful_shutdown = max(1, round(end - time.monotonic())) if not self.force_exit else 0
        await super().shutdown(sockets)
        self.state.end()  # where it is forced, the app is not told of the end, and its threads would be waited for

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Have both signals end the server in good order; uvicorn would raise them anew when all is done."""
        before = {each: signal.signal(each, self.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ask for the end; asked twice, it waits for nobody."""
        self.force_exit = self.should_exit
        self.should_exit = True
        # What is cut off then is no news; uvicorn would tell it with a traceback.
        logging.getLogger("uvicorn.error").disabled = self.force_exit


class _Spare(logging.Formatter):
    """A log line without an error's words: they may hold what a client sent."""

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """Return the kind of an error alone."""
        return ei[0].__name__ if ei and ei[0] else ""

    def formatStack(self, stack_info: str) -> str:  # noqa: N802
        """Return nothing."""
        return ""


def set_up_log() -> None:
    """Log requests and faults on standard error; keep decoders, whose words hold values of a header, out of it."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Spare("%(asctime)s %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.ERROR)
    logging.getLogger("zoo.serve").setLevel(logging.INFO)
    for name in ("PIL", "pydicom", "python_multipart"):
        logging.getLogger(name).propagate = False
    warnings.simplefilter("ignore")


def _set_limits(connections: int) -> None:
    """Allow as many open files as connections need, and no core dump: images would be in it."""
    try:
        import resource
    except ImportError:
        return
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 256
    if soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
