"""How long the group bootstrap takes: 10,000 replicates of accuracy, macro-F1, AUROC and ECE for 20 runs.

Prints a table and, as its last line, one JSON object. Predictions are drawn. `ratio` is ours over the reference in
the same run: how many times faster than scikit-learn's own functions in a loop, timed on a few replicates, scaled. Each
size is measured in a process of its own, so that its memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

# This file has the name of a module of Python's own, which nobody must find here instead.
sys.path = [each for each in sys.path if Path(each).resolve() != Path(__file__).resolve().parent]

from zoo.evaluation.metrics import ece_of  # noqa: E402
from zoo.evaluation.predictions import Predictions  # noqa: E402
from zoo.evaluation.resampling import Aligned  # noqa: E402

METRICS = ("top1", "macro_f1", "auroc", "ece")
REFERENCE = 8  # replicates of scikit-learn


def draw(seed: int, y_true: np.ndarray, classes: int, groups: int) -> Predictions:
    """Return predictions with a signal, of samples in so many groups (0: each for itself)."""
    rng = np.random.default_rng(seed)
    n = len(y_true)
    logits = rng.normal(size=(n, classes)) + 1.5 * np.eye(classes)[y_true]
    names = np.array([f"g{i % groups}" for i in range(n)]) if groups else np.full(n, "")
    return Predictions(np.array([f"s{i:06}" for i in range(n)]), names, y_true, logits)


def reference_s(run: Predictions, replicates: int, runs: int) -> float:
    """Return the seconds that scikit-learn would take, from a few replicates of one run."""
    from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

    rng = np.random.default_rng(0)
    classes = run.logits.shape[1]
    started = time.perf_counter()
    for _ in range(REFERENCE):
        place = rng.integers(len(run.y_true), size=len(run.y_true))
        y_true, y_score = run.y_true[place], run.y_score[place]
        y_pred = y_score.argmax(axis=1)
        accuracy_score(y_true, y_pred)
        f1_score(y_true, y_pred, average="macro")
        roc_auc_score(y_true, y_score[:, 1] if classes == 2 else y_score, multi_class="ovr")
        ece_of(y_true, y_score)
    return (time.perf_counter() - started) / REFERENCE * replicates * runs


def measure(classes: int, groups: int, runs: int, samples: int, replicates: int) -> dict[str, float]:
    """Return a row: seconds, peak memory and the reference."""
    y_true = np.random.default_rng(99).integers(0, classes, samples)
    drawn = {f"run{seed:02}": [draw(seed, y_true, classes, groups)] for seed in range(runs)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    started = time.perf_counter()
    Aligned(drawn).replicates(METRICS, replicates)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    reference = reference_s(drawn["run00"][0], replicates, runs)
    return {
        "classes": classes,
        "groups": groups or samples,
        "runs": runs,
        "samples": samples,
        "replicates": replicates,
        "seconds": round(seconds, 2),
        "before_mib": round(before),
        "peak_mib": round(peak),
        "reference_s": round(reference, 1),
        "ratio": round(reference / seconds, 1),
    }


def main() -> None:
    """Measure each size in its own process, print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--replicates", type=int, default=10_000)
    parser.add_argument(
        "--sizes", default="2:0,3:0,3:500,10:0", help="classes:groups, 0 groups: each sample for itself"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        classes, groups = map(int, options.one.split(":"))
        print(json.dumps(measure(classes, groups, options.runs, options.samples, options.replicates)))
        return
    rows = []
    for size in options.sizes.split(","):
        sizes = [f"--{name}={getattr(options, name)}" for name in ("runs", "samples", "replicates")]
        done = subprocess.run(
            [sys.executable, __file__, *sizes, "--one", size], check=True, capture_output=True, text=True
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        if len(rows) == 1:
            print("  ".join(f"{key:>11}" for key in rows[0]))
        print("  ".join(f"{value:>11}" for value in rows[-1].values()), flush=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    environment = {
        "cores": cores,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    print(json.dumps({"rows": rows, "environment": environment}))


if __name__ == "__main__":
    main()
