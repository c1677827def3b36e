"""Runs as they lie on disk, drawn without training: predictions, metrics and record."""

from __future__ import annotations

import numpy as np

from zoo.evaluation.metrics import compute_metrics
from zoo.evaluation.predictions import Predictions, write_predictions
from zoo.files import write_json
from zoo.runs import Run, RunRecord

CLASSES = ["benign", "malignant", "normal"]
FLOORS = [
    {
        "name": "majority class",
        "test_top1": 0.4,
        "test_balanced_accuracy": 1 / 3,
        "test_macro_f1": 0.2,
        "test_top1_ci": [0.3, 0.5],
    }
]


def record(recipe="cnn", seed=0, **changes) -> RunRecord:
    facts = {
        "run": f"tiny--{recipe}--s{seed}--0",
        "status": "finished",
        "dataset": "tiny",
        "recipe": recipe,
        "recipe_digest": recipe,
        "seed": seed,
        "split_digest": "ab" * 32,
        "classes": CLASSES,
        "model": "simple_cnn",
        "weights": {"label": "scratch"},
        "params": 1000,
        "train_s": 1.5,
        "versions": {"torch": "2"},
        "device": "cpu",
        "threads": 1,
        "precision": {"dtype": "float32"},
    }
    return RunRecord.model_validate({**facts, **changes})


def make_run(root, recipe="cnn", seed=0, right=0.8, n=60, splits=("val", "test"), **changes) -> Run:
    classes = changes.get("classes", CLASSES)
    c = len(classes)
    run = Run(root.runs / f"tiny--{recipe}--s{seed}--0")
    run.path.mkdir(parents=True)
    draw = np.random.default_rng([seed, len(recipe), int(right * 100)])
    y_true = np.arange(n) % c
    y_pred = np.where(draw.random(n) < right, y_true, (y_true + 1) % c)
    ids = np.array([f"id{each:03}" for each in range(n)])
    groups = np.array([f"g{each // 2}" for each in range(n)])
    predictions = Predictions(ids, groups, y_true, np.eye(c)[y_pred] * 3 + draw.normal(size=(n, c)) * 0.1)
    for split in splits:
        write_predictions(run.predictions_file(split), predictions)
        write_json(run.metrics_file(split), compute_metrics(predictions, classes, changes.get("negative_class")))
    run.write_record(record(recipe, seed, run=run.name, **changes))
    return run
