from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest

from zoo.errors import ZooError
from zoo.evaluation.metrics import compute_metrics
from zoo.evaluation.predictions import Predictions, write_predictions
from zoo.files import to_json, write_json
from zoo.reporting.tables import cells, make_comparison, title, to_csv, to_markdown
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
KEYS = {
    "recipe", "model", "weights", "seeds", "status", "reason", "params", "val_top1", "test_top1",
    "test_top1_ci", "letters", "train_s",
}  # fmt: skip


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
    run = Run(root.runs / f"tiny--{recipe}--s{seed}--0")
    run.path.mkdir(parents=True)
    draw = np.random.default_rng([seed, len(recipe), int(right * 100)])
    y_true = np.arange(n) % 3
    y_pred = np.where(draw.random(n) < right, y_true, (y_true + 1) % 3)
    ids = np.array([f"id{each:03}" for each in range(n)])
    groups = np.array([f"g{each // 2}" for each in range(n)])
    predictions = Predictions(ids, groups, y_true, np.eye(3)[y_pred] * 3 + draw.normal(size=(n, 3)) * 0.1)
    for split in splits:
        write_predictions(run.predictions_file(split), predictions)
        write_json(run.metrics_file(split), compute_metrics(predictions, CLASSES))
    run.write_record(record(recipe, seed, run=run.name, **changes))
    return run


def test_seeds_are_one_row_with_mean_deviation_and_interval(root):
    runs = [make_run(root, seed=seed) for seed in (1, 0, 2)]
    comparison = make_comparison(runs, floors=FLOORS, images={"test": 60})
    (row,) = comparison.rows
    scores = [run.metrics("test")["top1"] for run in runs]
    assert row["test_top1"] == pytest.approx(np.mean(scores))
    assert row["test_top1_sd"] == pytest.approx(np.std(scores, ddof=1))
    assert row["test_top1_ci"][0] < row["test_top1"] < row["test_top1_ci"][1]
    assert (row["seeds"], row["seed_list"], row["status"], row["letters"]) == (3, [0, 1, 2], "finished", "a")
    assert (row["test_images"], row["test_groups"], row["params"]) == (60, 30, 1000)
    assert set(row) >= KEYS
    assert title(comparison) == "tiny, split abababab, 60 test images of 30 groups"


def test_floors_come_first_and_failures_last_whatever_it_is_sorted_by(root):
    runs = [make_run(root, "weak", right=0.3), make_run(root, "strong", right=0.99)]
    failed = record("awful", status="failed", reason="the loss was not finite")
    by_top1 = make_comparison([failed, *runs], floors=FLOORS)
    assert [row["recipe"] for row in by_top1.rows] == ["strong", "weak", "awful"]
    assert [row["letters"] for row in by_top1.rows] == ["a", "b", None]
    assert [row["beats_floors"] for row in by_top1.rows] == [True, False, None]
    for by in by_top1.rows[0]:
        assert make_comparison([failed, *runs], by=by).rows[-1]["recipe"] == "awful", by
    lines = [line for line in to_markdown(by_top1).splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines] == [
        "| recipe", "| *floor: majority class*", "| strong", "| weak", "| awful",
    ]  # fmt: skip
    assert lines[-1].endswith("failed: the loss was not finite |")
    assert len({line.count(" |") for line in lines}) == 1
    assert "- Note: not above every floor with its interval: weak" in to_markdown(by_top1)
    with pytest.raises(ZooError, match=r"a table can be sorted by one of recipe, .* Got 'top'"):
        make_comparison(runs, by="top")


def test_a_seed_that_failed_before_it_had_an_identity_joins_its_recipe(root):
    failed = record(seed=1, recipe_digest="other", status="failed", reason="no weights")
    (row,) = make_comparison([make_run(root), failed]).rows
    assert (row["status"], row["reason"], row["seeds"]) == ("partly failed", "no weights", 1)
    assert cells(row)["status"] == "partly failed: no weights"


def test_only_failures_make_a_table_too():
    comparison = make_comparison([record(status="failed", reason="no weights", params=None, train_s=None)])
    assert comparison.rows[0]["test_top1"] is None
    assert "failed: no weights" in to_markdown(comparison) and "no weights" in to_csv(comparison)
    with pytest.raises(ZooError, match="there is no run to compare"):
        make_comparison([])


HOSTILE = ["=HYPERLINK(1)", "a|b", "<img src=x>", "+1", "-1", "@x", "a\nb", "a\\|b", "\t=1", "&lt;"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_stays_in_its_cell(root, name):
    runs = [make_run(root), record(name, status="failed", reason=name, model=name)]
    comparison = make_comparison(runs, floors=FLOORS)
    lines = [line for line in to_markdown(comparison).splitlines() if line.startswith("|")]
    bars = [line.replace("\\\\", "").replace("\\|", "").count("|") for line in lines]
    assert len(lines) == 5 and len(set(bars)) == 1
    assert "<img" not in to_markdown(comparison)
    rows = list(csv.DictReader(io.StringIO(to_csv(comparison))))
    assert len(rows) == 2
    for key in ("recipe", "model", "reason"):
        assert rows[1][key].lstrip("'") == name and not rows[1][key].startswith(("=", "+", "-", "@", "\t"))
    assert json.loads(to_json(comparison.document()))["rows"][1]["recipe"] == name


def test_negative_numbers_stay_numbers(root):
    run = make_run(root)
    metrics = run.metrics("test") | {"log_loss": -0.5}
    write_json(run.metrics_file("test"), metrics)
    (row,) = csv.DictReader(io.StringIO(to_csv(make_comparison([run]))))
    assert float(row["test_log_loss"]) == -0.5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"split_digest": "cd" * 32},
            "different splits cannot .*'tiny--cnn--s0--0' has abababababab, 'tiny--b--s0--0' has cdcd",
        ),
        ({"dataset": "other"}, "different datasets cannot .* has tiny, .* has other"),
        ({"classes": ["a", "b"]}, "different class lists"),
    ],
)
def test_what_cannot_be_compared_is_refused_naming_both(root, changes, said):
    with pytest.raises(ZooError, match=said):
        make_comparison([make_run(root), make_run(root, "b", **changes)])


def test_other_test_images_are_refused(root):
    with pytest.raises(ZooError, match=r"'cnn' and 'b' were scored on different test images \(60 and 57\)"):
        make_comparison([make_run(root), make_run(root, "b", n=57)])


def test_two_recipes_of_one_name_are_told_apart(root):
    runs = [make_run(root), make_run(root, seed=1, recipe_digest="feedbeef")]
    assert sorted(row["recipe"] for row in make_comparison(runs).rows) == ["cnn@cnn", "cnn@feedbe"]


def test_the_same_runs_give_the_same_bytes_in_any_order(root):
    runs = [
        make_run(root, name, seed, right) for name, right in (("a", 0.7), ("b", 0.75), ("c", 0.9)) for seed in (0, 1)
    ]
    one, two = make_comparison(runs, floors=FLOORS), make_comparison(runs, floors=FLOORS)
    assert to_markdown(one) == to_markdown(two) and to_csv(one) == to_csv(two)
    assert to_json(one.document()) == to_json(two.document())
    turned = make_comparison(runs[::-1], floors=FLOORS)
    assert [row["letters"] for row in turned.rows] == [row["letters"] for row in one.rows]
    assert [row["test_top1_ci"] for row in turned.rows] == [row["test_top1_ci"] for row in one.rows]


def test_a_document_and_a_frame_hold_what_scripts_rely_on(root):
    comparison = make_comparison([make_run(root), make_run(root, "b", splits=("val",))], floors=FLOORS)
    document = json.loads(to_json(comparison.document()))
    assert {"dataset", "split_digest", "leaks_accepted", "floors", "rows"} <= set(document)
    assert set(document["rows"][0]) >= KEYS and document["rows"][1]["test_top1"] is None
    frame = comparison.frame()
    assert frame["recipe"].tolist() == ["cnn", "b"]
    assert frame.attrs["split_digest"] == comparison.split_digest
