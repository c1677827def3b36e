"""Predicting from a bundle where torch and all that comes with it is not there: by a guard on imports, and for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

from zoo.data.manifest import load_dataset
from zoo.deployment.bundle import list_bundles

ROOT = Path(__file__).parents[2]
FORBIDDEN = (
    "torch", "torchvision", "timm", "scipy", "sklearn", "pandas", "albumentations", "matplotlib", "cv2", "safetensors",
    "huggingface_hub", "imagehash", "threadpoolctl", "jinja2", "filelock", "onnx", "onnxscript", "openvino", "nncf",
)  # fmt: skip
GUARD = f"""
import sys

FORBIDDEN = {FORBIDDEN!r} + tuple(sys.argv[1].split())


class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in FORBIDDEN:
            raise ImportError(f"{{name}} is not installed")


sys.meta_path.insert(0, Guard())
sys.argv[:] = ["zoo", *sys.argv[2:]]
"""


def guarded(code: str, *arguments: str, without: str = "") -> subprocess.CompletedProcess[str]:
    """Run code in a process where none of FORBIDDEN, nor what `without` names, can be imported."""
    return subprocess.run(
        [sys.executable, "-c", GUARD + code, without, *arguments], capture_output=True, text=True, check=False
    )


@pytest.fixture
def asked(bundled):
    """The words of `zoo predict` for a bundle and a few images, and how many these are."""
    (name,) = list_bundles(bundled)
    folder = load_dataset("tiny", bundled).root
    return ["predict", name, str(folder / "normal"), "--json"], len(list((folder / "normal").iterdir()))


MAIN = "\nfrom zoo.cli import main\nmain()\n"


def test_the_guard_guards():
    done = guarded("\nimport scipy\n")
    assert done.returncode == 1 and "scipy is not installed" in done.stderr
    assert guarded("\nimport zoo.training.loop\n").returncode == 1


def test_the_predictor_imports_nothing_heavy():
    done = guarded(
        "\nimport zoo.deployment.predictor\nprint(*sorted({each.partition('.')[0] for each in sys.modules}))\n"
    )
    assert (done.returncode, done.stderr) == (0, "")
    loaded = set(done.stdout.split())
    assert "zoo" in loaded
    assert loaded.isdisjoint({*FORBIDDEN, "onnxruntime", "pydicom", "rich", "fastapi", "multiprocessing", "asyncio"})


def test_a_bundle_predicts_shows_and_lists_without_torch(asked, tmp_path):
    words, count = asked
    done = guarded(MAIN, *words)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == count and all(row["label"] and row["error"] is None for row in rows)
    pictures = guarded(MAIN, *words[:-1], "--explain", str(tmp_path / "maps"), "--threads", "1")
    assert pictures.returncode == 0 and "not a medical device" not in pictures.stdout, pictures.stderr
    assert len(list((tmp_path / "maps").iterdir())) == count
    for verb in (["list", "bundles"], ["show", words[1]]):
        shown = guarded(MAIN, *verb, "--json")
        assert (shown.returncode, shown.stderr) == (0, ""), verb
        assert words[1] in shown.stdout


def test_a_missing_runtime_is_said_with_what_installs_it(asked):
    done = guarded(MAIN, *asked[0], without="onnxruntime")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: onnxruntime is not installed; install it with: pip install 'zoo[runtime]'\n"


def test_a_missing_dicom_reader_is_a_row(asked, tmp_path):
    (tmp_path / "a.dcm").write_bytes(bytes(128) + b"DICM" + bytes(200))
    assert "pydicom" not in guarded("\nimport zoo.data.dicom, sys\nprint(*sys.modules)\n").stdout.split()
    done = guarded(MAIN, "predict", asked[0][1], str(tmp_path / "a.dcm"), "--json", without="pydicom")
    row = json.loads(done.stdout)
    assert done.returncode == 1 and row["refer"] and row["error"] == "DICOM; install zoo[dicom] to read it"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_extra_runtime_is_all_that_predicting_needs(asked, tmp_path):
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = table["optional-dependencies"]["runtime"]
    assert not any(line.startswith(("torch", "timm", "scipy", "opencv")) for line in wanted)
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(python), *words],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**environment, **more},
            check=False,
        )

    constraints = str(ROOT / "constraints.txt")
    for words in (["-c", constraints, *wanted], ["--no-deps", str(ROOT)]):
        done = run("-m", "pip", "install", "-q", *words)
        if done.returncode:
            pytest.fail(
                f"pip could not install {words[-1]!r}; is a package registry within reach? {done.stderr[-2000:]}"
            )
    for name in FORBIDDEN:
        assert run("-c", f"import {name}").returncode == 1, name
    words, count = asked
    done = run("-m", "zoo", *words, ZOO_HOME=os.environ["ZOO_HOME"])
    assert (done.returncode, done.stderr) == (0, "")
    here = subprocess.run([sys.executable, "-m", "zoo", *words], capture_output=True, text=True, check=True)
    rows, expected = ([json.loads(line) for line in each.stdout.splitlines()] for each in (done, here))
    assert len(rows) == count
    for row, other in zip(rows, expected, strict=True):
        assert row.pop("scores") == pytest.approx(other.pop("scores"), abs=1e-6)
        assert row.pop("refer_reason") and other.pop("refer_reason") and row == other
    where = run("-c", "import zoo, os; print(os.path.dirname(zoo.__file__))").stdout
    assert str(tmp_path / "venv") in where  # and not the sources beside it
