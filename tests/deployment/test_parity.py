from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.deployment.parity import FLOAT32_DIFFERENCE, TIE, judge
from zoo.errors import ZooError
from zoo.evaluation.predictions import Predictions

CLASSES = ["a", "b", "c"]


def predictions(logits, y_true, groups=None):
    count = len(y_true)
    names = np.array([f"i{place:04}" for place in range(count)], dtype=object)
    groups = names if groups is None else np.array(groups, dtype=object)
    return Predictions(names, groups, np.asarray(y_true, dtype=np.int64), np.asarray(logits, dtype=np.float32))


def drawn(seed, count, classes=3):
    draw = np.random.default_rng(seed)
    return draw.normal(size=(count, classes)).astype(np.float32), draw.integers(0, classes, count), draw


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(5, 60), st.floats(0, 1))
def test_differences_and_flips_are_those_of_a_direct_count(seed, count, noise):
    logits, y_true, draw = drawn(seed, count)
    other = logits + noise * draw.normal(size=logits.shape).astype(np.float32)
    found = judge(predictions(logits, y_true), predictions(other, y_true), "int8", classes=CLASSES)
    flips, ties = {"harmful": 0, "beneficial": 0, "neutral": 0}, 0
    for was, now, truth in zip(logits, other, y_true, strict=True):
        one, two = int(was.argmax()), int(now.argmax())
        if one == two:
            continue
        if was[one] - was[two] <= TIE * np.abs(was).max():
            ties += 1
        else:
            flips["harmful" if one == truth else "beneficial" if two == truth else "neutral"] += 1
    assert found["flips"] == flips and found["ties"] == ties and found["images"] == found["groups"] == count
    assert found["top1_agreement"] == pytest.approx(1 - sum(flips.values()) / count)
    apart = np.abs(other.astype(float) - logits).max()
    assert found["max_abs_difference"] == pytest.approx(apart)
    assert found["max_relative_difference"] == pytest.approx(apart / np.abs(logits).max())
    right = [float(np.mean(each.argmax(1) == y_true)) for each in (logits, other)]
    assert [found["reference"], found["artefact"]] == pytest.approx(right)
    assert found["change"] == pytest.approx(right[1] - right[0])
    low, high = found["change_ci"]
    assert low <= found["change"] + 1e-9 and found["change"] <= high + 1e-9
    assert found["passed"] == (low >= -found["margin"]) and (found["reason"] is None) == found["passed"]


def flipped(count, harmful, beneficial):
    """Return a reference that is right but in the last `beneficial`, and an artefact with that many flips."""
    y_true = np.zeros(count, dtype=int)
    reference = np.tile([2.0, 0.0, -1.0], (count, 1))
    artefact = reference.copy()
    artefact[:harmful] = [0.0, 2.0, -1.0]
    if beneficial:
        reference[-beneficial:] = [0.0, 2.0, -1.0]
        artefact[-beneficial:] = [2.0, 0.0, -1.0]
    return predictions(reference, y_true), predictions(artefact, y_true)


@pytest.mark.parametrize(
    ("harmful", "beneficial", "margin", "passed"),
    [(2, 0, 0.01, True), (20, 0, 0.01, False), (20, 0, 0.05, True), (0, 200, 0.01, True), (60, 0, 0.03, False)],
)
def test_the_margin_decides_over_the_worse_end_of_the_interval(harmful, beneficial, margin, passed):
    found = judge(*flipped(1000, harmful, beneficial), "int8", margin=margin, classes=CLASSES)
    assert found["flips"] == {"harmful": harmful, "beneficial": beneficial, "neutral": 0}
    assert found["passed"] is passed
    if not passed:
        assert f"{found['change']:+.4f}" in found["reason"] and f"{harmful} harmful" in found["reason"]
        assert f"margin of {margin:g}" in found["reason"] and "1000 val images" in found["reason"]


def test_flips_within_few_groups_bound_less_than_in_many():
    one, two = flipped(400, 4, 0)
    groups = np.repeat([f"g{number}" for number in range(20)], 20)
    narrow = judge(one, two, "int8", margin=0.05, classes=CLASSES)
    wide = judge(*(predictions(each.logits, each.y_true, groups) for each in (one, two)), "int8", classes=CLASSES)
    assert wide["groups"] == 20 and narrow["groups"] == 400
    assert wide["change_ci"][0] < narrow["change_ci"][0] < 0


def test_a_metric_whose_less_is_better_is_judged_at_its_upper_end():
    logits, y_true, _ = drawn(0, 400)
    one, two = predictions(logits, y_true), predictions(logits * 4, y_true)
    found = judge(one, two, "int8", metric="log_loss", margin=0.05, classes=CLASSES)
    assert found["change"] > 0.05 and not found["passed"] and "log_loss changes by +" in found["reason"]
    better = judge(two, one, "int8", metric="log_loss", margin=0.0, classes=CLASSES)
    assert better["passed"]


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_fails(precision, value):
    logits, y_true, _ = drawn(0, 30)
    wrong = logits.copy()
    wrong[[3, 7], 1] = value
    found = judge(predictions(logits, y_true), predictions(wrong, y_true), precision, margin=1.0, classes=CLASSES)
    assert not found["passed"] and "2 of 30 val images are not finite" in found["reason"]


def test_float32_allows_no_flip_whatever_the_margin():
    found = judge(*flipped(1000, 0, 1), "float32", margin=1.0, classes=CLASSES)
    assert not found["passed"] and "1 of 1000 val images get another label" in found["reason"]


@pytest.mark.parametrize(("part", "passed"), [(0.5, True), (2.0, False)])
def test_float32_allows_rounding_only(part, passed):
    reference, _ = flipped(50, 0, 0)
    other = reference.logits.copy()
    other[7, 2] += part * FLOAT32_DIFFERENCE * 2.0  # 2 is the greatest logit
    found = judge(reference, predictions(other, reference.y_true), "float32", classes=CLASSES)
    assert found["passed"] is passed and found["top1_agreement"] == 1.0
    assert passed or "float32 at most 0.001 is rounding" in found["reason"]


def test_a_tie_of_the_reference_may_fall_either_way():
    reference = np.tile([1.0, 1.0, 0.0], (40, 1))
    other = reference.copy()
    other[:, 1] += 1e-6
    found = judge(predictions(reference, np.zeros(40)), predictions(other, np.zeros(40)), "float32", classes=CLASSES)
    assert found["ties"] == 40 and found["passed"] and found["top1_agreement"] == 1.0


def test_a_flip_between_two_wrong_labels_costs_top1_nothing():
    reference = np.eye(3)[np.zeros(300, int)]
    reference[7] = (0, 1, 0)  # says b, and a is true
    other = reference.copy()
    other[7] = (0, 0, 1)
    both = predictions(reference, np.zeros(300)), predictions(other, np.zeros(300))
    found = judge(*both, "int8", classes=CLASSES)
    assert found["flips"]["neutral"] == 1 and found["change_ci"] == [0, 0] and found["passed"]
    assert found["unseen_flips"] is None
    assert judge(*both, "int8", metric="macro_precision", margin=1.0, classes=CLASSES)["change_ci"] != [0, 0]


def test_labels_that_do_not_differ_prove_nothing_of_a_metric_that_is_not_defined():
    logits, y_true, _ = drawn(0, 60)
    one = predictions(logits, y_true)
    found = judge(one, one, "int8", metric="sensitivity", margin=1.0, classes=CLASSES)  # which class is healthy?
    assert not found["passed"] and "sensitivity is not defined" in found["reason"]
    assert judge(one, one, "int8", metric="sensitivity", classes=CLASSES, negative_class="b")["passed"]


def test_a_metric_that_val_does_not_define_bounds_nothing():
    logits, _, _ = drawn(0, 20)
    one = predictions(logits, np.zeros(20))
    found = judge(one, one, "int8", metric="auroc", margin=1.0, classes=CLASSES)
    assert not found["passed"] and "auroc is not defined on val" in found["reason"]


@pytest.mark.parametrize("words", [{"metric": "f1"}, {"margin": 1.5}, {"margin": -1e-9}, {"margin": float("nan")}])
def test_an_unknown_metric_or_margin_is_refused(words):
    one, two = flipped(10, 0, 0)
    with pytest.raises(ZooError, match="must"):
        judge(one, two, "int8", classes=CLASSES, **words)
