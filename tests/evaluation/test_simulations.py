"""Simulations with a known truth, fixed seeds: what intervals cover, and how often equal models are told apart."""

import numpy as np
import pytest

from zoo.evaluation.exact_tests import delong_p_value, mcnemar_midp
from zoo.evaluation.metrics import compute_metrics
from zoo.evaluation.predictions import Predictions
from zoo.evaluation.proportions import wilson_interval
from zoo.evaluation.statistics import metric_intervals, paired_comparisons

pytestmark = pytest.mark.slow
CLASSES = 3
SHARE = (0.5, 0.3, 0.2)
METRICS = ["top1", "balanced_accuracy", "macro_f1", "auroc", "sensitivity", "log_loss", "brier"]


def drawn(rng, n, groups=0, models=1, alike=0.5, shared=0.7):
    """Models of the same truth whose errors go together within groups (`alike`) and between models (`shared`)."""
    size = n // groups if groups else 1
    y_true = np.repeat(rng.choice(CLASSES, groups or n, p=SHARE), size)
    names = np.repeat([f"g{i}" for i in range(groups)], size) if groups else np.full(n, "")

    def noise():
        own = rng.normal(size=(n, CLASSES))
        if not groups:
            return own
        return np.sqrt(1 - alike) * own + np.sqrt(alike) * np.repeat(rng.normal(size=(groups, CLASSES)), size, axis=0)

    common = noise()
    signal = 1.2 * np.eye(CLASSES)[y_true]
    ids = np.array([f"s{i:06}" for i in range(n)])
    mixed = (np.sqrt(shared) * common + np.sqrt(1 - shared) * noise() for _ in range(models))
    return [Predictions(ids, names, y_true, 1.3 * (each + signal)) for each in mixed]


@pytest.fixture(scope="module")
def truth():
    (large,) = drawn(np.random.default_rng(99), 400_000)
    return compute_metrics(large, ["a", "b", "c"], "a")


@pytest.mark.parametrize(("n", "groups"), [(200, 0), (1000, 100)])
def test_intervals_cover_what_they_say(truth, n, groups):
    hits = dict.fromkeys(METRICS, 0)
    naive = 0
    for number in range(600):
        (run,) = drawn(np.random.default_rng(number + 7), n, groups)
        found = metric_intervals({"a": [run]}, METRICS, negative=0, replicates=800)
        for metric in METRICS:
            interval = found[metric]["a"]
            hits[metric] += interval.low <= truth[metric] <= interval.high
        low, high = wilson_interval((run.y_pred == run.y_true).sum(), n)
        naive += low <= truth["top1"] <= high
    # 93 to 97 %, and one standard error of 600 simulations, 0.9 points; longer runs stand in docs/statistics.md.
    assert all(0.921 <= count / 600 <= 0.979 for count in hits.values()), hits
    if groups:
        assert naive / 600 < 0.8  # Wilson's interval, which takes every image for itself


@pytest.mark.parametrize("rare", [1, 2, 3, 5])
def test_a_class_of_few_images_makes_no_interval_too_sure(rare):
    # Every class is recognised in 80 %, so that is the true balanced accuracy.
    counts, hits = (100, 50, rare), 0
    y_true = np.repeat(np.arange(3), counts)
    ids = np.array([f"s{i:05}" for i in range(len(y_true))])
    for number in range(300):
        rng = np.random.default_rng(number)
        y_pred = np.where(rng.random(len(y_true)) < 0.8, y_true, (y_true + 1) % 3)
        run = Predictions(ids, np.full(len(y_true), ""), y_true, 3.0 * np.eye(3)[y_pred])
        interval = metric_intervals({"a": [run]}, ["balanced_accuracy"], replicates=400)["balanced_accuracy"]["a"]
        hits += interval.low <= 0.8 <= interval.high
    assert hits / 300 >= 0.93


@pytest.mark.parametrize(("n", "groups"), [(200, 0), (400, 40)])
def test_equal_models_are_seldom_told_apart(n, groups):
    metrics = ("top1", "macro_f1", "auroc", "ece")
    false = dict.fromkeys((*metrics, "mcnemar", "delong"), 0)
    for number in range(400):
        one, two = drawn(np.random.default_rng(number), n, groups, models=2)
        for metric in metrics:
            (pair,) = paired_comparisons({"a": [one], "b": [two]}, metric, replicates=400)
            false[metric] += pair.different
        right = [run.y_pred == run.y_true for run in (one, two)]
        false["mcnemar"] += mcnemar_midp((right[0] & ~right[1]).sum(), (right[1] & ~right[0]).sum()) < 0.05
        inside = one.y_true[:, None] == np.arange(CLASSES)
        units = one.group_codes if groups else None
        false["delong"] += delong_p_value(inside, one.y_score, two.y_score, units) < 0.05
    naive = false.pop("mcnemar") / 400
    assert all(count / 400 <= 0.06 for count in false.values()), false
    assert naive > 0.15 if groups else naive <= 0.06  # McNemar's test knows nothing of groups


@pytest.mark.parametrize("groups", [0, 60])
def test_equivalence_is_seldom_claimed_where_the_difference_is_the_margin(groups):
    # The second model's errors: the first's, and 6 points more; the margin is those 6 points.
    claimed = sure = 0
    for number in range(300):
        rng = np.random.default_rng(number)
        n = 600
        units = np.arange(n) if not groups else np.repeat(np.arange(groups), n // groups)
        lucky = rng.random(units.max() + 1)[units] if groups else rng.random(n)
        names = np.array([f"g{unit}" for unit in units]) if groups else np.full(n, "")
        one = lucky > 0.2
        two = one & ~(rng.random(n) < 0.075)
        ids = np.array([f"s{i:05}" for i in range(n)])
        runs = {
            name: [Predictions(ids, names, np.zeros(n, int), np.stack([right, ~right], 1) * 1.0)]
            for name, right in (("one", one), ("two", two))
        }
        claimed += paired_comparisons(runs, margin=0.06, replicates=400)[0].equivalent
        sure += paired_comparisons(runs, margin=0.12, replicates=400)[0].equivalent
    assert claimed / 300 <= 0.08
    assert sure / 300 > 0.9  # and where the margin is twice the difference it is found
