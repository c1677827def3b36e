"""The scripts of `benchmarks/perf` run, at sizes that measure nothing, and end with their JSON line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PERF = Path(__file__).parent.parent / "benchmarks" / "perf"
SCRIPTS = {
    "audit": ("--images", "20,40", "--hashes", "200,400"),
    "statistics": ("--runs", "2", "--samples", "60", "--replicates", "200", "--sizes", "2:0,3:10"),
    "throughput": ("--models", "test_resnet", "--size", "64", "--images", "60", "--batch", "8", "--rounds", "1"),
    "leaderboard": ("--models", "test_resnet,test_vit", "--images", "30", "--seeds", "2", "--epochs", "2"),
    "memory": ("--rows", "3000"),
    "inference": (
        *("--models", "test_resnet", "--variants", "openvino-bf16", "--batches", "2,4", "--size", "64"),
        *("--rounds", "2", "--turn-s", "0.02", "--images", "60", "--epochs", "4"),
    ),
    "serving": (
        *("--models", "test_resnet", "--busy", "2", "--turns", "1", "--turn-seconds", "0.5"),
        *("--clients", "8", "--seconds", "1"),
    ),
}


def test_every_script_is_run_here() -> None:
    assert {*SCRIPTS, "on_cuda"} == {each.stem for each in PERF.glob("*.py")}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_ends_with_its_json_line(name: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("ZOO_HOME", "ZOO_WEIGHTS")}
    environment |= {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, str(PERF / f"{name}.py"), *SCRIPTS[name]]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.get("rows", found)
    left = [each.name for each in tmp_path.iterdir() if not each.name.startswith((".", "torchinductor_"))]
    assert left == [], "a script takes its data away with it"
