"""A small fake hub on loopback, and an environment in which nothing else is found."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """A model hub for tests: `files[path]` is served; `fault` says how it misbehaves."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.fault = ""
        self.requests: list[str] = []
        self.connections = 0
        hub = self

        class Server(ThreadingHTTPServer):
            def get_request(self) -> Any:
                hub.connections += 1
                return super().get_request()

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def add(self, repo: str, file: str, content: bytes) -> None:
        """Serve a file as the hub serves one of a model's main branch."""
        self.files[f"/{repo}/resolve/main/{file}"] = content

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        """Answer as the hub does: digest and commit as headers, or the error's name."""
        self.requests.append(f"{request.command} {request.path}")
        content = self.files.get(request.path)
        if self.fault == "busy" or content is None:
            known = any(path.split("/resolve/")[0] == request.path.split("/resolve/")[0] for path in self.files)
            request.send_response(503 if self.fault == "busy" else 404)
            request.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        request.send_response(200)
        request.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if body:
            sent = {"broken": content[: len(content) // 2], "wrong": content[::-1]}.get(self.fault, content)
            request.wfile.write(sent)

    def stop(self) -> None:
        """Stop answering; the port is closed."""
        if self.thread.is_alive():
            self.server.shutdown()
            self.thread.join()
            self.server.server_close()


@pytest.fixture
def hub(alone: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A fake hub that HF_ENDPOINT names."""
    fake = FakeHub()
    monkeypatch.setenv("HF_ENDPOINT", fake.url)
    yield fake
    fake.stop()


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Empty caches, no ZOO_WEIGHTS, no plugins, no proxy; a closed port in place of the real hub."""
    from huggingface_hub import close_session, constants

    from zoo.models import spec

    for name in ("ZOO_WEIGHTS", "ZOO_PLUGINS", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    own = dict(spec.own_models)
    yield tmp_path
    spec.own_models.clear()
    spec.own_models.update(own)
    close_session()
