from __future__ import annotations

import os
import subprocess
import sys

import pytest

import zoo

HEAVY = ("torch", "timm", "albumentations", "matplotlib", "sklearn", "pandas", "cv2", "scipy", "numpy", "PIL")
LOOK = f"import sys; print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"


def loaded(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", f"{code}\n{LOOK}"], capture_output=True, text=True, check=True)
    return done.stderr.strip().splitlines()[-1]


def command(words: list[str]) -> str:
    return f"""
import sys
from zoo.cli import main
sys.argv = ['zoo', *{words!r}]
try:
    main()
except SystemExit as end:
    assert end.code == 0
"""


def test_import_zoo_loads_nothing_heavy():
    assert loaded("import zoo") == "[]"
    assert loaded("import torch").startswith("['torch'")  # the look can see


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["train", "--help"], ["data", "import", "--help"]])
def test_help_loads_nothing_heavy(args):
    assert loaded(command(args)) == "[]"


def test_listing_recipes_loads_no_torch(root):
    found = loaded(command(["list", "recipes", "--json"]))
    assert "torch" not in found and "matplotlib" not in found


def test_every_public_name_is_there():
    assert len(zoo.__all__) > 20
    for name in zoo.__all__:
        assert getattr(zoo, name) is not None
    assert set(zoo.__all__) <= set(dir(zoo))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = zoo.nothing


def test_the_module_is_the_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "zoo", "--version"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "ZOO_HOME": str(tmp_path)},
    )
    assert (done.returncode, done.stdout) == (0, f"zoo {zoo.__version__}\n")
