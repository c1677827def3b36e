"""A real `zoo serve` in a process of its own, and clients of it over real sockets; loopback alone."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

LOCAL = "127.0.0.1"

# The same server with limits of seconds, and a network that takes its time: what no flag can ask for.
ODD_SERVER = """
import sys, json, time
from zoo.deployment.server.app import create_app
from zoo.deployment.server.limits import Limits
from zoo.deployment.server.process import bind, serve, url_of
from zoo.deployment.server.served import facts_of
from zoo.deployment.predictor import Predictor
told = json.loads(sys.argv[1])
limits = Limits(**told.get("limits", {})).fitting()
class Slow(Predictor):
    def logits(self, images):
        time.sleep(told.get("seconds_an_image", 0) * (len(images) if images[0].any() else 0))  # warming up is not slow
        if told.get("fails") and images[0].any():
            raise ValueError("PATIENT^NAME " + repr(images))
        return super().logits(images)
model = Slow.load(told["bundle"])
sock = bind("127.0.0.1", 0)
app = create_app({"m": model}, {"m": facts_of("m", model.bundle)}, limits=limits)
sys.exit(serve(app, sock, limits, lambda: print(json.dumps({"url": url_of(sock)}), flush=True)))
"""


class Live:
    """A running server: where it listens, what it says, how it ends."""

    def __init__(self, command: list[str], folder: Path, env: dict[str, str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log_file = folder / "log.txt"
        self.log_stream = self.log_file.open("wb")
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.log_stream, env={**os.environ, **(env or {})}, cwd=folder
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait(60)
            raise AssertionError(f"no server: {self.log}")
        self.told = json.loads(line)
        self.host, self.port = str(urlsplit(self.told["url"]).hostname), int(urlsplit(self.told["url"]).port or 0)
        self.url = self.told["url"]

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8")

    def until_ready(self) -> Live:
        end = time.monotonic() + 60
        while self.ask("GET", "/ready")[0] != 200:
            assert time.monotonic() < end, self.log
            time.sleep(0.05)
        return self

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """Return status, headers (names in lower case) and JSON, or text where it is none."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        found = {name.lower(): value for name, value in answer.getheaders()}
        if found.get("content-type") == "application/json" and method != "HEAD":
            return answer.status, found, json.loads(text)
        return answer.status, found, text.decode()

    def predict(self, data: bytes, media_type: str = "application/octet-stream", query: str = "", **more: str):
        headers = {"Content-Type": media_type, **{name.replace("_", "-"): value for name, value in more.items()}}
        return self.ask("POST", f"/predict{query}", data, headers)

    def predict_form(self, images: list[bytes], query: str = "", field: str = "files", name: str = "x.png"):
        body, media_type = form([(field, name, each) for each in images])
        return self.predict(body, media_type, query)

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=60)

    def say(self, data: bytes) -> bytes:
        """Send bytes as they are; return all that comes until the server closes, or a second passes in silence."""
        with self.connect() as sock:
            sock.sendall(data)
            return heard(sock)

    def rss_mib(self) -> float:
        """The resident memory of the server and its decoders."""
        import psutil

        tree = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        return sum(each.memory_info().rss for each in tree) / (1 << 20)

    def peak_mib(self) -> float:
        """The most that any one of them ever had, summed."""
        import psutil

        tree = [self.process.pid, *(each.pid for each in psutil.Process(self.process.pid).children(recursive=True))]
        return sum(_status(each, "VmHWM") for each in tree)

    def stop(self, how: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(how)
        code = self.process.wait(90)
        self.log_stream.close()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


def _status(process: int, key: str) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def heard(sock: socket.socket, seconds: float = 1.0) -> bytes:
    """Return what comes until the other side closes, or is silent for so long after it said something."""
    found = b""
    try:
        while piece := sock.recv(65536):
            found += piece
            sock.settimeout(seconds)
    except (TimeoutError, ConnectionResetError):
        pass
    return found


def answer_in(data: bytes) -> tuple[int, bytes] | None:
    """Return the status and the head of an answer that has come whole, None of one that has not."""
    head, found, body = data.partition(b"\r\n\r\n")
    if not found:
        return None
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return (int(head[9:12]), head) if len(body) >= length else None


def status_from(sock: socket.socket) -> int:
    """Wait for a whole answer and return its status; 0 where the connection closes before."""
    found = b""
    while (answer := answer_in(found)) is None:
        piece = sock.recv(65536)
        if not piece:
            return 0
        found += piece
    return answer[0]


def form(parts: list[tuple[str, str, bytes]], boundary: str = "xxBOUNDARYxx") -> tuple[bytes, str]:
    """Return body and Content-Type of a form of files: field, name, bytes of each."""
    body = b""
    for field, name, data in parts:
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n'
        body += head.encode() + b"Content-Type: image/png\r\n\r\n" + data + b"\r\n"
    return body + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


def serve_command(*words: str) -> list[str]:
    return [sys.executable, "-m", "zoo", "serve", *words, "--port", "0", "--json"]


def odd_command(bundle: Path, **told: Any) -> list[str]:
    return [sys.executable, "-c", ODD_SERVER, json.dumps({"bundle": str(bundle), **told})]
