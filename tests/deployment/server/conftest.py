"""What tests of the server share: a bundle, and real servers of it."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_server import Live, odd_command, serve_command
from PIL import Image


@pytest.fixture(scope="session")
def bundle_folder(_trained_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a finished tiny run; only read it."""
    from zoo.deployment.export import export
    from zoo.files import home
    from zoo.runs import list_runs

    folder = tmp_path_factory.mktemp("served") / "home"
    shutil.copytree(_trained_template, folder)
    root = home(folder)
    run = next(each for each in list_runs(root) if "tiny--tiny--s0" in each.name)
    return export(run, root).path


@pytest.fixture(scope="module")
def live(bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """One server of one bundle for a whole module."""
    server = Live(serve_command(str(bundle_folder)), tmp_path_factory.mktemp("live"))
    yield server.until_ready()
    assert server.stop() == 0, server.log
    assert "broken" not in server.log


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Live]]:
    """Return `start(words..., env={})`: a server of this test's own; it is ended when the test is."""
    started: list[Live] = []

    def run(*words: str, env: dict[str, str] | None = None) -> Live:
        started.append(Live(serve_command(*words), tmp_path / f"server-{len(started)}", env))
        return started[-1].until_ready()

    yield run
    for each in started:
        each.stop()


@pytest.fixture
def odd(tmp_path: Path, bundle_folder: Path) -> Iterator[Callable[..., Live]]:
    """Return `odd(limits={}, seconds_an_image=0)`: a server with other deadlines, or with a slow network."""
    started: list[Live] = []

    def run(**told: Any) -> Live:
        started.append(Live(odd_command(bundle_folder, **told), tmp_path / f"odd-{len(started)}"))
        return started[-1].until_ready()

    yield run
    for each in started:
        each.stop()


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    """Return `picture(format="PNG", seed=0, size=(44, 40), **save)`: an encoded image."""

    def draw(form: str = "PNG", seed: int = 0, size: tuple[int, int] = (44, 40), mode: str = "RGB", **save: Any):
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(out, form, **save)
        return out.getvalue()

    return draw
