"""A real browser and a real server for the tests of the served page."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-sync",
    "--no-first-run",
]

# Noted before any script of the page runs: what the policy stopped, what moved, and which addresses of blobs are held.
WATCH = """
window.noted = { stopped: [], moved: 0, blobs: new Set(), sent: [] };
document.addEventListener("securitypolicyviolation", (event) => {
  noted.stopped.push(`${event.violatedDirective} ${event.blockedURI}`);
});
new PerformanceObserver((list) => list.getEntries().forEach((each) => { noted.moved += each.value; }))
  .observe({ type: "layout-shift", buffered: true });
const fetched = window.fetch;
window.fetch = (address, how) => {
  for (const [field, value] of how?.body?.entries?.() ?? []) noted.sent.push([field, value.name, value.size]);
  return fetched(address, how);
};
const make = URL.createObjectURL, drop = URL.revokeObjectURL;
URL.createObjectURL = (blob) => { const made = make.call(URL, blob); noted.blobs.add(made); return made; };
URL.revokeObjectURL = (address) => { noted.blobs.delete(address); drop.call(URL, address); };
"""


def chromium_path() -> str:
    """Return the system's Chromium; without one the test is skipped, and fails where CI is set."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is not None:
        return found
    said = "no Chromium here; install it with: apt-get install --no-install-recommends chromium"
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(said)
    pytest.skip(said)


@contextlib.contextmanager
def serving(home: Path, *words: str, **environment: str) -> Iterator[str]:
    """Run `zoo serve` with these words at a free port; yield its address, and stop it by SIGTERM."""
    command = [sys.executable, "-m", "zoo", "serve", *words, "--port", "0", "--json", "--home", str(home)]
    with listening(command, {**os.environ, **environment}) as url:
        yield url


@contextlib.contextmanager
def listening(command: list[str], environment: dict[str, str]) -> Iterator[str]:
    """Run a command that says its address as JSON; yield that, and stop it by SIGTERM."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        try:
            yield _address(process, log)
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)


def _address(process: subprocess.Popen[str], log: IO[str]) -> str:
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        with contextlib.suppress(json.JSONDecodeError):
            return str(json.loads(said)["url"]).rstrip("/")
    log.seek(0)
    raise AssertionError(f"the server did not start: {log.read()}")
