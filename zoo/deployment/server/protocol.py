"""HTTP/1.1 with deadlines: uvicorn never closes a silent or a slow connection, and so a few hundred would be enough."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from zoo.deployment.server.limits import TOO_SLOW, Limits
from zoo.deployment.server.metrics import Metrics

HEAD_BYTES = 16 << 10  # of a request
_DRAIN_S = 5.0  # for the rest of a body that nobody wants any more
_WAITING = (h11.IDLE, h11.SEND_RESPONSE)
_FIRST = b"H"  # of every answer, whatever it says
_ECHO_S = 0.05  # in which a near machine says that nobody reads there any more


class _Connection(h11.Connection):
    """h11's connection, of whose next answer the first bytes, `begun`, may be out already."""

    begun = b""

    def send_with_data_passthrough(self, event: h11.Event) -> list[bytes] | None:
        """Return the bytes of an event that are not out yet; `send` joins them."""
        pieces = super().send_with_data_passthrough(event)
        if pieces and self.begun:
            pieces[0], self.begun = pieces[0].removeprefix(self.begun), b""
        return pieces


class TimedProtocol(H11Protocol):
    """A connection that `check`, called about twice a second, closes where its client is too slow.

    Timed are the head of a request, its body by the bytes that came and by its silences, the pause between requests,
    and a client that does not read what it asked for; not the time that the server itself takes.
    """

    def __init__(self, limits: Limits, metrics: Metrics, **words: Any) -> None:
        super().__init__(**words)
        self.conn: _Connection = _Connection(h11.SERVER, HEAD_BYTES)
        self.limits, self.metrics = limits, metrics
        self._since, self._got, self._reading = self.loop.time(), 0, self.conn.their_state
        self._heard = self._since
        self._ended = False
        self._unread_since: float | None = None
        self._closing_since: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection; above the limit, the one that has been waiting for its client longest has to go."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            waiting = [each for each in self.connections if isinstance(each, TimedProtocol) and each.is_waiting]
            victim = min(waiting, key=lambda each: each._since, default=self)
            self.metrics.closed.labels("crowd").inc()
            victim.transport.abort()

    @property
    def is_waiting(self) -> bool:
        """Whether there is nothing to answer yet."""
        return self.conn.their_state is h11.IDLE and not self.transport.is_closing()

    def data_received(self, data: bytes) -> None:
        """Count what came since the request, or its body, began."""
        self._heard = self.loop.time()
        if self._got == 0:
            self._since = self._heard
        self._got += len(data)
        super().data_received(data)
        if self.conn.their_state is not self._reading:
            self._reading, self._since, self._got = self.conn.their_state, self.loop.time(), 1

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep a connection on which an answer is due: many a client ends its side when it has asked.

        One that has gone looks the same until it is sent something, which its machine then answers with a reset. So the
        answer is begun.
        """
        self._ended = self._is_due
        if self._ended and not self.cycle.response_started and not self.conn.begun:
            self.conn.begun = _FIRST
            self.transport.write(_FIRST)
            self.loop.call_later(_ECHO_S, self._leave_if_reset)
        return self._ended

    @property
    def _is_due(self) -> bool:
        """Whether a request has come whole and its answer has not left."""
        whole = self.conn.their_state in (h11.DONE, h11.MUST_CLOSE)
        return whole and self.cycle is not None and not self.cycle.response_complete

    def _leave_if_reset(self) -> None:
        """Close where the client has gone; asyncio reads no more after its end, and so is not told."""
        if self.transport.is_closing():
            return
        if self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request, or for the rest of a body that nobody wants."""
        self._since, self._got = self.loop.time(), 0
        super().on_response_complete()
        self._reading = self.conn.their_state
        if self._ended and not self._is_due:
            self.transport.close()

    def pause_writing(self) -> None:
        """Note that the client does not read."""
        self._unread_since = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        """Note that the client reads."""
        self._unread_since = None
        super().resume_writing()

    def check(self, now: float, stopping_s: float = 0.0) -> None:
        """Close the connection where its time is over.

        now: the loop's time in seconds. stopping_s: for how long the server has been about to end.
        """
        if self._ended:
            self._leave_if_reset()
        if self.transport.is_closing():
            self._closing_since = now if self._closing_since is None else self._closing_since
            if now - self._closing_since > self.limits.write_s:
                self.transport.abort()
            return
        if self._unread_since is not None and now - self._unread_since > self.limits.write_s:
            self._give_up("answer")
            return
        waited, state = now - self._since, self.conn.their_state
        if state is h11.IDLE and self._got == 0:
            first = self.cycle is None
            if waited > (self.limits.header_s if first else self.limits.idle_s):
                self._give_up("idle", close=True)
        elif state is h11.IDLE and waited > self.limits.header_s:
            self._give_up("head", status=408)
        elif state is h11.SEND_BODY and self.conn.our_state is h11.DONE and waited > _DRAIN_S:
            self._give_up("rest")
        elif state is h11.SEND_BODY and (waited > self._body_s() or self._is_silent(now)):
            self._give_up("body", status=408)
        elif state is h11.SEND_BODY and stopping_s > self.limits.last_body_s:
            self._give_up("body", status=503)

    def _body_s(self) -> float:
        return min(self.limits.body_longest_s, self.limits.body_s + self._got / self.limits.bytes_per_s)

    def _is_silent(self, now: float) -> bool:
        """Return whether a body has paused for too long; what came fast before is no credit for that."""
        if self.flow.read_paused:  # by this server
            self._heard = now
        return now - self._heard > self.limits.silent_s

    def _give_up(self, phase: str, status: int = 0, close: bool = False) -> None:
        self.metrics.closed.labels(phase).inc()
        if status:
            self._send_last(status, "stopping" if status == 503 else TOO_SLOW)
        elif close:
            self.transport.close()
        else:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, or no more."""
        self._send_last(400, "this is no valid HTTP request")

    def _send_last(self, status: int, reason: str) -> None:
        """Send an answer, where none was begun, and close."""
        if self.conn.our_state in _WAITING:
            body = json.dumps({"error": reason}).encode()
            headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
            headers += [("Connection", "close"), ("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-store")]
            headers += [("Retry-After", "5")] * (status == 503)
            self.metrics.requests.labels("unread", str(status)).inc()
            for event in (
                h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status]),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: no WebSocket is served, and the request is answered as any other."""
