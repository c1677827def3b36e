"""What all tests share: a home of their own, no network, tiny data, and the real assets where they are."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from scenes import draw_scene

if TYPE_CHECKING:
    from zoo.files import Home
    from zoo.recipe import Recipe

# Whoever runs the tests in the background has them ignore Ctrl-C, and so would the processes that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny networks; more threads only get in each other's way

CLASSES = ("benign", "malignant", "normal")
FULL: dict[str, Any] = {
    "model": {"name": "simple_cnn", "weights": "scratch", "image_size": 32},
    "finetune": {"strategy": "full", "epochs": 2, "batch_size": 6},
    "augment": {"policy": "light"},
    "optimizer": {"lr": 3e-3},
    "schedule": {"name": "cosine"},
}
PROBE: dict[str, Any] = {
    "model": FULL["model"],
    "finetune": {"strategy": "linear-probe", "epochs": 4, "batch_size": 6},
}
WILD: dict[str, Any] = {**FULL, "augment": {"policy": "none"}, "optimizer": {"lr": 1e30}}
STRANGER: dict[str, Any] = {**FULL, "model": {**FULL["model"], "name": "resnet81"}}


@pytest.fixture
def assets() -> Path:
    """The folder of real images and weights; the test is skipped where ZOO_ASSETS does not name it."""
    folder = os.environ.get("ZOO_ASSETS")
    if not folder:
        pytest.skip("ZOO_ASSETS is not set")
    return Path(folder).resolve()


def _enter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    from zoo.files import home

    monkeypatch.setenv("ZOO_HOME", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "machine"))  # where precision plans are kept
    monkeypatch.delenv("ZOO_WEIGHTS", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return home(folder)


@pytest.fixture
def full_disk(tmp_path: Path):
    """Mount a disk of 1 MiB, empty; the test is skipped where mounting is not allowed."""
    import subprocess

    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    if os.name != "posix" or os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this container cannot mount")
    yield small
    subprocess.run(["umount", str(small)], check=True)


@pytest.fixture
def as_nobody():
    """Run Python code in a folder as a user who owns nothing; relative paths, for the folders above are root's alone.

    imports: what is done before, while the package can be read. Returns what the code printed.
    """
    import subprocess
    import sys

    if os.name != "posix" or os.geteuid() != 0:
        pytest.skip("only root may become somebody else")

    def run(imports: str, code: str, folder: Path) -> str:
        become = "import os; os.setgroups([]); os.setgid(65534); os.setuid(65534)"
        command = [sys.executable, "-c", "\n".join((imports, become, code))]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """An empty home folder that this test works in."""
    folder = tmp_path / "home"
    folder.mkdir()
    return _enter(folder, monkeypatch)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 noisy pictures, 44 x 40 pixels, in a folder per class; a colour tells the classes apart. Only read it."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for place, name in enumerate(CLASSES):
        (folder / name).mkdir()
        for number in range(12):
            pixels = draw.integers(0, 150, (40, 44, 3))
            pixels[8:32, 8:32, place] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"case {number:02}.png")
    return folder


@pytest.fixture(scope="session")
def _template(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the dataset `tiny` (18, 9 and 9 images) and the recipes tiny, tiny-lp, wild and stranger."""
    from zoo.data.sources import import_dataset
    from zoo.files import home, write_toml

    folder = tmp_path_factory.mktemp("template")
    import_dataset(image_folder, "tiny", home(folder), copy=True, ratios=(0.5, 0.25, 0.25))
    for name, table in {"tiny": FULL, "tiny-lp": PROBE, "wild": WILD, "stranger": STRANGER}.items():
        write_toml(folder / "recipes" / f"{name}.toml", table)
    return folder


@pytest.fixture(scope="session")
def _trained_template(_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The template with finished runs, scored on test: tiny with seeds 0 and 1, tiny-lp with seed 0."""
    from zoo.files import home
    from zoo.training.loop import train
    from zoo.training.scoring import evaluate

    folder = tmp_path_factory.mktemp("trained") / "home"
    shutil.copytree(_template, folder)
    os.environ["HF_HUB_OFFLINE"] = "1"
    for recipe, seed in (("tiny", 0), ("tiny", 1), ("tiny-lp", 0)):
        evaluate(train(_recipe(recipe, folder), "tiny", seed, home(folder)), "test", home(folder))
    return folder


def _recipe(name: str, folder: Path) -> Recipe:
    from zoo.files import home
    from zoo.recipe import load_recipe

    return load_recipe(name, root=home(folder))


@pytest.fixture
def tiny(_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home of this test's own with the dataset `tiny` and a few recipes; nothing is trained."""
    shutil.copytree(_template, tmp_path / "home")
    return _enter(tmp_path / "home", monkeypatch)


@pytest.fixture
def trained(_trained_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """As `tiny`, with three finished runs: tiny s0, tiny s1 and tiny-lp s0."""
    shutil.copytree(_trained_template, tmp_path / "home")
    return _enter(tmp_path / "home", monkeypatch)


@pytest.fixture(scope="session")
def _bundled_template(_trained_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained template with a bundle of tiny s0: ONNX, float32."""
    from zoo.deployment.export import export
    from zoo.files import home
    from zoo.runs import list_runs

    folder = tmp_path_factory.mktemp("bundled") / "home"
    shutil.copytree(_trained_template, folder)
    export(next(run.name for run in list_runs(home(folder)) if "--tiny--s0" in run.name), home(folder))
    return folder


@pytest.fixture
def bundled(_bundled_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """As `trained`, with one bundle: tiny s0 as ONNX in float32."""
    shutil.copytree(_bundled_template, tmp_path / "home")
    return _enter(tmp_path / "home", monkeypatch)


@pytest.fixture
def make_recipe() -> Callable[..., Recipe]:
    """Return `make_recipe(name="tiny", **overrides)`: the recipe `tiny`, keys changed as `--set` does."""
    from zoo.recipe import parse_recipe

    def make(name: str = "tiny", **overrides: Any) -> Recipe:
        return parse_recipe(FULL, name, {key.replace("__", "."): value for key, value in overrides.items()})

    return make


@pytest.fixture
def write_scenes() -> Callable[..., Path]:
    """Return `write_scenes(folder, {"train/a": range(10), ...})`: different pictures, numbered, as PNG files."""
    from PIL import Image

    def write(folder: Path, seeds: dict[str, Any]) -> Path:
        for name, numbers in seeds.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            for number in numbers:
                Image.fromarray(draw_scene(number)).save(folder / name / f"{number:05}.png")
        return folder

    return write
