from __future__ import annotations

import json
import select
import selectors
import socket
import threading
import time
from pathlib import Path

import pytest
from live_server import answer_in, heard, status_from

pytestmark = pytest.mark.slow  # processes and servers of their own

HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
QUICK = {"header_s": 2, "body_s": 2, "idle_s": 2, "bytes_per_s": 1000, "write_s": 2, "body_longest_s": 6}


def until_closed(sockets, seconds):
    """Return those of the sockets that the other side closes within so many seconds; what they say is read."""
    chosen, closed = selectors.DefaultSelector(), set()
    for each in sockets:
        each.setblocking(False)
        chosen.register(each, selectors.EVENT_READ)
    end = time.monotonic() + seconds
    while len(closed) < len(sockets) and time.monotonic() < end:
        for key, _ in chosen.select(0.1):
            try:
                said = key.fileobj.recv(65536)
            except ConnectionError:
                said = b""
            if not said:
                closed.add(key.fileobj)
                chosen.unregister(key.fileobj)
    chosen.close()
    return closed


class Dribbler(threading.Thread):
    """Sends a byte to each of many sockets twice a second, until it is told to end."""

    def __init__(self, sockets):
        super().__init__(daemon=True)
        self.sockets, self.over = sockets, threading.Event()

    def run(self):
        while not self.over.wait(0.5):
            for each in self.sockets:
                try:
                    each.send(b"x")
                except OSError:
                    continue


def test_600_slow_clients_are_closed_and_keep_nobody_waiting(odd, picture):
    server = odd(limits=QUICK)
    silent = [server.connect() for _ in range(300)]
    slow_heads = [server.connect() for _ in range(150)]
    slow_bodies = [server.connect() for _ in range(150)]
    for each in slow_heads:
        each.sendall(b"GET /model HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
    for each in slow_bodies:
        each.sendall(HEAD + b"Content-Length: 100000\r\n\r\nbegun")
    dribbler = Dribbler(slow_heads + slow_bodies)
    dribbler.start()
    assert server.predict(picture())[0] == 200  # beside all of them
    assert len(until_closed(silent, 30)) == 300
    assert len(until_closed(slow_heads, 30)) == 150
    assert len(until_closed(slow_bodies, 30)) == 150
    dribbler.over.set()
    dribbler.join()
    assert server.predict(picture())[0] == 200
    text = server.ask("GET", "/metrics")[2]
    assert 'zoo_connections_closed_total{why="idle"} 300.0' in text
    assert 'zoo_connections_closed_total{why="head"} 150.0' in text
    assert 'zoo_connections_closed_total{why="body"} 150.0' in text
    for each in silent + slow_heads + slow_bodies:
        each.close()


def test_a_slow_head_and_a_slow_body_are_told_408(odd):
    server = odd(limits=QUICK)
    for sent in (
        b"GET / HT",
        HEAD,
        HEAD + b"Content-Length: 50\r\n\r\nabc",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab",
    ):
        answer = server.say(sent)
        assert answer.startswith(b"HTTP/1.1 408 "), (sent, answer)
        assert json.loads(answer.rpartition(b"\r\n\r\n")[2]) == {"error": "too slow; the connection is closed"}


PATIENT = {"body_s": 600, "body_longest_s": 600, "silent_s": 600}


def send_all_but_a_byte(server, size):
    sock = server.connect()
    sock.sendall(HEAD + f"Content-Length: {size}\r\n\r\n".encode() + bytes(size - 1))
    return sock


def until_read(server):
    """Wait until the server has taken all that was sent to it from the system."""
    port, end = f":{server.port:04X}", time.monotonic() + 60
    while time.monotonic() < end:
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        if {row[4] for row in rows if row[1].endswith(port) or row[2].endswith(port)} == {"00000000:00000000"}:
            assert server.ask("GET", "/health")[0] == 200  # behind what it does with these bytes
            return
        time.sleep(0.02)
    raise AssertionError("it does not read")


def test_a_body_that_falls_silent_is_told_408_however_fast_it_came(odd):
    server = odd(limits={**PATIENT, "silent_s": 1})
    with send_all_but_a_byte(server, 4 << 20) as sock:
        assert status_from(sock) == 408
        assert sock.recv(1) == b""
    assert 'zoo_connections_closed_total{why="body"} 1.0' in server.ask("GET", "/metrics")[2]


def test_where_silent_bodies_fill_the_memory_one_of_them_has_to_go(odd, picture):
    server = odd(limits={**PATIENT, "body_bytes": 1 << 20, "held_bytes": 3 << 20})
    silent = [send_all_but_a_byte(server, 1 << 20) for _ in range(3)]
    until_read(server)
    end = time.monotonic() + 30
    while (status := server.predict(picture())[0]) == 503 and time.monotonic() < end:  # not stalled for long enough yet
        time.sleep(0.1)
    assert status == 200
    told = [each for each in silent if select.select([each], [], [], 0.2)[0]]
    assert [status_from(each) for each in told] == [408]
    assert told[0].recv(1) == b""
    for each in silent:
        each.close()


def test_an_honest_slow_body_is_answered(odd, picture):
    server, data = odd(limits=QUICK), picture(size=(60, 40))
    assert len(data) > 6000
    with server.connect() as sock:
        sock.sendall(HEAD + f"Content-Length: {len(data)}\r\n\r\n".encode())
        for start in range(0, len(data), 1500):  # three times as fast as must be, and slower than `body_s` in all
            sock.sendall(data[start : start + 1500])
            time.sleep(0.5)
        assert heard(sock).startswith(b"HTTP/1.1 200 ")


def test_a_kept_connection_serves_again_and_is_closed_when_idle(odd, picture):
    server, data = odd(limits=QUICK), picture()
    with server.connect() as sock:
        for _ in range(3):
            sock.sendall(HEAD + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
            assert status_from(sock) == 200
            time.sleep(1)
        sock.settimeout(20)
        assert sock.recv(1) == b""


def test_a_long_answer_is_not_cut_off_by_the_deadlines_of_reading(odd, picture):
    server = odd(limits=QUICK, seconds_an_image=5)
    assert server.predict(picture())[0] == 200


def test_a_client_that_does_not_read_is_closed(odd):
    server = odd(limits={**QUICK, "idle_s": 60, "header_s": 60})
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect((server.host, server.port))
    sock.setblocking(False)
    one = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
    sent = 0
    for _ in range(4000):  # some 20 kB are answered to each
        try:
            sent += sock.send(one)
        except BlockingIOError:
            break
    end = time.monotonic() + 40
    while 'why="answer"' not in server.ask("GET", "/metrics")[2]:
        assert time.monotonic() < end, sent
        time.sleep(0.5)
    sock.close()


def test_the_rest_of_a_body_that_was_refused_is_not_waited_for(odd):
    server = odd()
    with server.connect() as sock:
        sock.sendall(HEAD + b"Content-Length: 99999999\r\n\r\n")
        assert status_from(sock) == 413
        sock.settimeout(30)
        with pytest.raises(ConnectionError):
            for _ in range(100):
                sock.sendall(b"x")
                time.sleep(0.3)
            raise AssertionError("the connection is still open")


def test_in_a_crowd_the_oldest_silent_connection_has_to_go(odd, picture):
    server = odd(limits={"connections": 20})
    silent = [server.connect() for _ in range(40)]
    assert server.predict(picture())[0] == 200
    assert len(until_closed(silent, 5)) >= 20
    for each in silent:
        each.close()


def test_what_is_no_http_is_refused_without_repeating_it(odd):
    server = odd(limits=QUICK)
    for sent in (b"\x16\x03\x01SECRET\r\n\r\n", b"GET / HTTP/1.1\r\nSECRET\r\n\r\n", b"A" * 70000 + b"\r\n\r\n"):
        answer = server.say(sent)
        assert answer.startswith(b"HTTP/1.1 400 ") and b"SECRET" not in answer
    answer = server.say(HEAD + b"Transfer-Encoding: chunked\r\n\r\nSECRET\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ") and b"SECRET" not in answer
    twice = server.say(HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello")
    assert twice.startswith(b"HTTP/1.1 400 ")
    smuggled = (
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /model HTTP/1.1\r\nHost: x\r\n\r\n"
    )
    assert server.say(smuggled).count(b"HTTP/1.1 200") == 0
    assert server.ask("GET", "/health")[0] == 200
    assert "SECRET" not in server.log and "Traceback" not in server.log


def test_500_clients_hear_200_or_when_to_come_again(odd, picture):
    server, data = odd(seconds_an_image=0.005), picture()
    request = HEAD + f"Content-Length: {len(data)}\r\n\r\n".encode() + data
    chosen, answers, got = selectors.DefaultSelector(), [], {}
    for _ in range(500):
        sock = server.connect()
        sock.sendall(request)
        chosen.register(sock, selectors.EVENT_READ)
        got[sock] = b""
    end = time.monotonic() + 10
    while got and time.monotonic() < end + 20:
        for key, _ in chosen.select(0.2):
            sock = key.fileobj
            said = sock.recv(65536)
            assert said, "a connection was closed"
            got[sock] += said
            if (answer := answer_in(got[sock])) is None:
                continue
            answers.append(answer)
            got[sock] = b""
            if time.monotonic() < end:
                sock.sendall(request)  # at once: none of them has any patience
            else:
                chosen.unregister(sock)
                sock.close()
                del got[sock]
    chosen.close()
    assert not got
    statuses = {status for status, _ in answers}
    assert 200 in statuses and statuses <= {200, 503}
    assert all(b"retry-after: " in head for status, head in answers if status == 503)
    assert server.predict(data)[0] == 200
