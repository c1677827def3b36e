"""Many processes write into one home at once, and nothing is lost, doubled or left over."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from zoo.evaluation.ledger import looks_at_test
from zoo.evaluation.metrics import compute_metrics
from zoo.files import home, sha256_file, write_toml
from zoo.recipe import load_recipe
from zoo.runs import list_runs, run_lock
from zoo.training.loop import train
from zoo.training.scoring import predictions_of

PROCESSES, RUNS = 16, 25
SHARED = 10  # runs that two neighbours ask for, at about the same time

# One process imports everything and forks the others, which begin together; a line of JSON for each of them. What
# another process trains just now is refused; whoever is refused leaves that run to it.
WRITERS = f"""
import json, os, sys, traceback
import torch
from zoo.data.manifest import load_dataset
from zoo.errors import ZooError
from zoo.files import home
from zoo.recipe import load_recipe
from zoo.training.loop import train_plan
from zoo.training.plan import make_plan
from zoo.training.scoring import evaluate

torch.set_num_threads(1)
root = home()
recipe, dataset = load_recipe("small", root=root), load_dataset("tiny", root)
make_plan(recipe, dataset, 0, root)


def write(number):
    own = [number * {RUNS} + place for place in range({RUNS})]
    others = [seed - {RUNS} for seed in own[:{SHARED}]] if number % 2 else []
    seeds = [seed for pair in zip(others, own) for seed in pair] + own[len(others):]
    said = {{"asked": len(seeds), "refused": []}}
    for seed in seeds:
        try:
            run = train_plan(make_plan(recipe, dataset, seed, root))
            evaluate(run, "test", root)
        except ZooError as error:
            said["refused"].append(str(error))
    return said


begin, ready = os.pipe()
children = []
for number in range({PROCESSES}):
    child = os.fork()
    if child == 0:
        os.close(ready)
        os.read(begin, 1)  # until the parent closes its end
        try:
            line = json.dumps(write(number))
        except BaseException:
            line = json.dumps({{"broken": traceback.format_exc()}})
        os.write(1, (line + "\\n").encode())
        os._exit(0)
    children.append(child)
os.close(ready)
for child in children:
    os.waitpid(child, 0)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_16_processes_write_400_runs_and_400_are_kept(tiny, tmp_path):
    recipe = {
        "model": {"name": "simple_cnn", "weights": "scratch", "image_size": 16},
        "finetune": {"strategy": "linear-probe", "epochs": 1, "batch_size": 18},
    }
    write_toml(tiny.recipes / "small.toml", recipe)
    shutil.copytree(tiny.root, tmp_path / "alone")
    done = subprocess.run([sys.executable, "-c", WRITERS], capture_output=True, text=True, check=False)
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(said) == PROCESSES and not any("broken" in each for each in said), (said, done.stderr)
    assert sum(each["asked"] for each in said) == PROCESSES * RUNS + PROCESSES // 2 * SHARED
    assert all("is being trained by process" in text for each in said for text in each["refused"]), said

    runs = list_runs(tiny, "tiny")
    assert sorted(run.record.seed for run in runs) == list(range(PROCESSES * RUNS))
    for run in runs:
        assert run.finished and len(run.history()) == 1
        assert all(np.isfinite(value).all() for value in load_file(run.weights_file).values())
        for split in ("val", "test"):
            stored = run.metrics(split)
            found = compute_metrics(predictions_of(run, split), run.record.classes, run.record.negative_class)
            assert found["log_loss"] == pytest.approx(stored["log_loss"], abs=1e-12)
    # What was written in the crowd is what a process alone writes.
    alone = home(tmp_path / "alone")
    by_seed = {run.record.seed: run for run in runs}
    for seed in (0, 25, 199, 399):
        assert sha256_file(train(load_recipe("small", root=alone), "tiny", seed, alone).weights_file) == sha256_file(
            by_seed[seed].weights_file
        )

    lines = tiny.ledger.read_text(encoding="utf-8").splitlines()
    looks = [json.loads(line)["run"] for line in lines]
    assert set(looks) == {run.name for run in runs}
    assert len(looks) <= PROCESSES * RUNS + PROCESSES // 2 * SHARED
    assert looks_at_test(tiny, runs[0].record.split_digest)["scorings"] == len(looks)

    left = {file.name for run in runs for file in run.path.rglob("*")}
    assert left == {
        "history.jsonl",
        "metrics-test.json",
        "metrics-val.json",
        "predictions-test.npz",
        "predictions-val.npz",
        "recipe.toml",
        "run.json",
        "weights.safetensors",
    }
    assert not [file for file in tiny.root.rglob(".*.????????") if file.is_file()]
    assert not list(tiny.locks.glob("*.json"))
    for run in runs:
        with run_lock(tiny, run.name):
            pass
