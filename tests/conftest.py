"""What all tests share: a home of their own, no network, and the real assets where they are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture
def assets() -> Path:
    """The folder of real images and weights; the test is skipped where ZOO_ASSETS does not name it."""
    folder = os.environ.get("ZOO_ASSETS")
    if not folder:
        pytest.skip("ZOO_ASSETS is not set")
    return Path(folder).resolve()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An empty home folder that this test works in."""
    from zoo.files import home

    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("ZOO_HOME", str(folder))
    monkeypatch.delenv("ZOO_WEIGHTS", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return home(folder)
