import json
import math
import time

import numpy as np
import pytest
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.errors import ZooError
from zoo.evaluation.metrics import METRIC_SIGN, compute_metrics, ece_of, score, selection_score
from zoo.evaluation.predictions import Predictions


def made(y_true, logits, groups=None):
    ids = np.array([f"s{i}" for i in range(len(y_true))])
    return Predictions(ids, ids if groups is None else np.array(groups), np.array(y_true), np.array(logits))


def draw(n=200, c=4, seed=0, skill=1.5):
    rng = np.random.default_rng(seed)
    y_true = rng.integers(0, c, n)
    logits = rng.normal(size=(n, c))
    logits[np.arange(n), y_true] += skill
    return made(y_true, logits)


def names(c):
    return [f"class {i}" for i in range(c)]


@pytest.mark.parametrize("c", [3, 4, 9])
def test_many_classes_agree_with_scikit_learn(c):
    p = draw(c=c)
    found = compute_metrics(p, names(c))
    y, guess, s = p.y_true, p.y_pred, p.y_score
    onehot = np.eye(c)[y]
    expected = {
        "n": 200,
        "n_groups": 200,
        "top1": sk.accuracy_score(y, guess),
        "balanced_accuracy": sk.balanced_accuracy_score(y, guess),
        "macro_precision": sk.precision_score(y, guess, average="macro"),
        "macro_recall": sk.recall_score(y, guess, average="macro"),
        "macro_f1": sk.f1_score(y, guess, average="macro"),
        "auroc": sk.roc_auc_score(y, s, multi_class="ovr", average="macro"),
        "auprc": sk.average_precision_score(onehot, s, average="macro"),
        "log_loss": sk.log_loss(y, s),
        "brier": ((s - onehot) ** 2).sum(axis=1).mean(),
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    assert found["confusion_matrix"] == sk.confusion_matrix(y, guess).tolist()
    assert found["sensitivity"] is None
    assert found["specificity"] is None
    report = sk.classification_report(y, guess, output_dict=True)
    for index, name in enumerate(names(c)):
        row = report[str(index)]
        assert found["per_class"][name] == pytest.approx(
            {"precision": row["precision"], "recall": row["recall"], "f1": row["f1-score"], "support": row["support"]}
        )


def test_two_classes_agree_with_scikit_learn():
    p = draw(c=2)
    found = compute_metrics(p, ["normal", "disease"])
    y, guess, s = p.y_true, p.y_pred, p.y_score[:, 1]
    expected = {
        "auroc": sk.roc_auc_score(y, s),
        "auprc": sk.average_precision_score(y, s),
        "brier": sk.brier_score_loss(y, s),
        "log_loss": sk.log_loss(y, s),
        "sensitivity": sk.recall_score(y, guess),
        "specificity": sk.recall_score(y, guess, pos_label=0),
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected)


def test_the_negative_class_of_two_decides_which_is_positive():
    p = draw(c=2)
    first, second = compute_metrics(p, ["a", "b"], "a"), compute_metrics(p, ["a", "b"], "b")
    assert first == compute_metrics(p, ["a", "b"])
    assert first["sensitivity"] == second["specificity"] != second["sensitivity"]
    assert second["auprc"] == pytest.approx(sk.average_precision_score(p.y_true == 0, p.y_score[:, 0]))
    assert second["auprc"] != first["auprc"]
    assert second["brier"] == pytest.approx(first["brier"])


def test_disease_against_normal_by_hand():
    # true: normal, normal, benign, benign, malignant; the fourth is missed, the second a false alarm.
    logits = np.eye(3)[[0, 1, 2, 0, 1]] * 9
    found = compute_metrics(made([0, 0, 1, 1, 2], logits), ["normal", "benign", "malignant"], "normal")
    assert found["sensitivity"] == pytest.approx(2 / 3)
    assert found["specificity"] == pytest.approx(1 / 2)
    assert found["top1"] == pytest.approx(1 / 5)
    assert found["confusion_matrix"] == [[1, 1, 0], [1, 0, 1], [0, 1, 0]]


def test_brier_log_loss_and_ece_by_hand():
    logits = np.log([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    found = compute_metrics(made([0, 2], logits), names(3))
    assert found["brier"] == pytest.approx((0.25 + 0.0625 * 2 + 0.01 + 0.64 + 0.81) / 2)
    assert found["log_loss"] == pytest.approx(-(math.log(0.5) + math.log(0.1)) / 2)
    # Bins of 0.5 and of 0.8: one right at 0.5, one wrong at 0.8.
    assert found["ece"] == pytest.approx((0.5 + 0.8) / 2)


def test_ece_bins_are_open_below_and_closed_above():
    # 0.6 is the upper end of the bin (8/15, 9/15]; 0.601 lies in the next.
    y_score = np.array([[0.6, 0.4], [0.6, 0.4], [0.601, 0.399]])
    found = ece_of(np.array([0, 0, 1]), y_score)
    assert found == pytest.approx((2 * 0.4 + 0.601) / 3)


def test_ece_of_calibrated_scores_is_small_and_of_boasts_is_large():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.5, 1, 20_000)
    y_true = (rng.random(20_000) > p).astype(int)
    assert ece_of(y_true, np.stack([p, 1 - p], 1)) < 0.02
    assert ece_of(y_true, np.stack([np.ones_like(p), np.zeros_like(p)], 1)) == pytest.approx(0.25, abs=0.02)


def test_perfect_predictions():
    y_true = [0, 1, 2, 0, 1, 2]
    found = compute_metrics(made(y_true, np.eye(3)[y_true] * 200), names(3), "class 0")
    best = {key for key, sign in METRIC_SIGN.items() if sign > 0}
    assert {key: found[key] for key in best} == pytest.approx(dict.fromkeys(best, 1.0))
    assert {key: found[key] for key in ("log_loss", "brier", "ece")} == pytest.approx(
        {"log_loss": 0, "brier": 0, "ece": 0}
    )


def test_one_class_in_y_true():
    logits = np.eye(3)[[1, 1, 2]] * 2
    found = compute_metrics(made([1, 1, 1], logits), names(3), "class 1")
    assert found["auroc"] is None
    assert found["auprc"] is None
    assert found["balanced_accuracy"] == found["top1"] == pytest.approx(2 / 3)
    assert found["macro_recall"] == pytest.approx((2 / 3 + 0) / 2)  # class 2 was predicted, never true
    assert found["sensitivity"] is None
    assert found["specificity"] == pytest.approx(2 / 3)
    assert found["per_class"]["class 0"] == {"precision": None, "recall": None, "f1": None, "support": 0}
    assert found["per_class"]["class 2"] == {"precision": 0.0, "recall": None, "f1": 0.0, "support": 0}
    assert found["confusion_matrix"] == [[0, 0, 0], [0, 2, 1], [0, 0, 0]]


def test_auroc_is_of_the_classes_that_are_there():
    p = draw(c=4)
    kept = p.y_true != 3
    some = made(p.y_true[kept], p.logits[kept])
    by_class = [sk.roc_auc_score(some.y_true == i, some.y_score[:, i]) for i in range(3)]
    assert compute_metrics(some, names(4))["auroc"] == pytest.approx(np.mean(by_class))


@pytest.mark.parametrize("label", [0, 1])
def test_one_sample(label):
    found = compute_metrics(made([label], [[3.0, 1.0]]), ["a", "b"])
    assert (found["n"], found["n_groups"], found["top1"]) == (1, 1, float(label == 0))
    assert found["auroc"] is None
    assert (found["sensitivity"], found["specificity"]) == ((None, 1.0) if label == 0 else (0.0, None))


def test_groups_are_counted():
    p = made([0, 1, 0, 1], np.zeros((4, 2)), ["a", "a", "", ""])
    assert compute_metrics(p, ["a", "b"])["n_groups"] == 3


@pytest.mark.slow
@given(st.integers(1, 12), st.integers(2, 5), st.integers(0, 10_000), st.booleans(), st.sampled_from([1, 1e3, 1e30]))
@settings(max_examples=60, deadline=None)
def test_every_number_is_finite_and_fractions_stay_in_bounds(n, c, seed, negative, scale):
    rng = np.random.default_rng(seed)
    p = made(rng.integers(0, c, n), rng.normal(size=(n, c)) * scale)
    found = compute_metrics(p, names(c), "class 0" if negative else None)
    json.dumps(found, allow_nan=False)
    assert set(METRIC_SIGN) <= set(found)
    for name in METRIC_SIGN:
        top = math.inf if name == "log_loss" else 2 if name == "brier" else 1
        assert found[name] is None or -1e-12 <= found[name] <= top + 1e-12, name
    assert np.sum(found["confusion_matrix"]) == n


def test_the_selection_score_is_the_metric():
    for c in (2, 3):
        p = draw(c=c)
        found = compute_metrics(p, names(c))
        for name in ("top1", "balanced_accuracy", "macro_f1", "auroc", "log_loss"):
            assert selection_score(name, p.logits, p.y_true) == found[name]


def test_every_metric_that_a_recipe_may_select_by_is_one():
    from zoo.recipe import METRICS

    assert len(METRICS) >= 5
    p = draw(n=20)
    assert all(name in METRIC_SIGN and math.isfinite(selection_score(name, p.logits, p.y_true)) for name in METRICS)


def test_what_selects_is_scikit_learns_number_to_the_last_bit():
    draw = np.random.default_rng(3)
    for _ in range(300):
        n, classes = int(draw.integers(1, 200)), int(draw.integers(2, 9))
        y_true, logits = draw.integers(0, classes, n), draw.normal(size=(n, classes))
        guess = logits.argmax(1)
        recall = sk.recall_score(y_true, guess, labels=np.unique(y_true), average="macro", zero_division=0)
        assert selection_score("balanced_accuracy", logits, y_true) == recall
        assert selection_score("top1", logits, y_true) == sk.accuracy_score(y_true, guess)


def test_an_undefined_selection_score_is_nan_and_beats_nothing():
    value = selection_score("auroc", np.zeros((2, 3)), np.array([1, 1]))
    assert math.isnan(value)


def test_scores_turn_so_that_more_is_better():
    p, worse = draw(), draw(skill=0)
    good, bad = compute_metrics(p, names(4)), compute_metrics(worse, names(4))
    for name in METRIC_SIGN:
        if name not in ("sensitivity", "specificity"):
            assert score(name, good) > score(name, bad), name
    assert score("auroc", {}) == -math.inf


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused_and_named(bad):
    logits = np.zeros((4, 2))
    logits[2, 1] = bad
    with pytest.raises(ZooError, match=r"logits must be finite. Got 1 of 4 samples that are not, first 's2'"):
        compute_metrics(made([0, 1, 0, 1], logits), ["a", "b"])


def test_what_cannot_be_scored_is_refused():
    p = draw(c=3)
    with pytest.raises(ZooError, match="at least one sample"):
        compute_metrics(made([], np.empty((0, 3))), names(3))
    with pytest.raises(ZooError, match="Got 4 classes and 3 logits"):
        compute_metrics(p, names(4))
    with pytest.raises(ZooError, match="two classes or more"):
        compute_metrics(made([0], [[1.0]]), ["only"])
    with pytest.raises(ZooError, match=r"negative_class must be one of .* Got 'norml'; did you mean 'normal'\?"):
        compute_metrics(p, ["normal", "b", "c"], "norml")
    with pytest.raises(ZooError, match=r"metric must be one of top1, .* Got 'top2'; did you mean 'top1'\?"):
        score("top2", {})
    with pytest.raises(ZooError, match=r"a metric to select by must be one of .* Got 'ece'"):
        selection_score("ece", p.logits, p.y_true)


def test_ten_thousand_samples_take_less_than_a_second():
    p = draw(n=10_000, c=10)
    compute_metrics(p, names(10))  # the first call imports
    began = time.process_time()
    compute_metrics(draw(n=10_000, c=10, seed=1), names(10))
    assert time.process_time() - began < 1
