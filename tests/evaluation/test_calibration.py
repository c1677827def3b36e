import json
import math
import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import expit, ndtri
from scipy.stats import binomtest, foldnorm
from scipy.stats import t as student
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import brier_score_loss, log_loss

from zoo.errors import ZooError
from zoo.evaluation.calibration import (
    apply_temperature,
    brier_decomposition,
    calibration_report,
    conformal_quantile,
    conformal_report,
    fit_temperature,
    operating_points,
    prediction_sets,
    refer_report,
    refer_threshold,
    risk_coverage,
)
from zoo.evaluation.calibration_error import adaptive_ece, ece_interval, reliability
from zoo.evaluation.metrics import compute_metrics, ece_of
from zoo.evaluation.predictions import Predictions
from zoo.evaluation.proportions import proportion_interval, wilson_interval
from zoo.evaluation.statistics import top1_interval


def made(y_true, logits, groups=None):
    ids = np.array([f"s{i:06}" for i in range(len(y_true))])
    groups = np.full(len(ids), "") if groups is None else np.asarray(groups)
    return Predictions(ids, groups, np.asarray(y_true, dtype=np.int64), np.asarray(logits, dtype=np.float64))


def draw(n=200, c=3, seed=0, skill=1.5, scale=1.0):
    """Calibrated predictions at scale 1, whose logits are then multiplied by it."""
    rng = np.random.default_rng(seed)
    logits = skill * rng.normal(size=(n, c))
    y_true = (logits + rng.gumbel(size=(n, c))).argmax(axis=1)
    return made(y_true, scale * logits)


def scored(confidence, right):
    """Two classes, the first predicted with each confidence, right where told."""
    confidence = np.asarray(confidence, dtype=np.float64)
    return np.where(right, 0, 1), np.stack([confidence, 1 - confidence], axis=1)


def names(c):
    return [f"class {i}" for i in range(c)]


# A proportion ---------------------------------------------------------------------------------------------------------


def test_a_proportion_of_single_samples_has_wilsons_interval():
    hits = np.arange(40) < 33
    assert proportion_interval(hits) == wilson_interval(33, 40)
    assert proportion_interval(hits, np.arange(40)[::-1]) == wilson_interval(33, 40)
    expected = binomtest(33, 40).proportion_ci(0.95, method="wilson")
    assert proportion_interval(hits) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("seed", range(4))
def test_a_proportion_of_groups_agrees_with_the_bootstrap_of_top1(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 9, 60)
    groups = np.repeat([f"g{i}" for i in range(60)], sizes)
    right = np.repeat(rng.normal(size=60), sizes) + 0.7 * rng.normal(size=len(groups)) < 1
    run = made(np.zeros(len(right)), np.stack([right, ~right], axis=1), groups)
    expected = top1_interval([run], replicates=20_000)
    assert proportion_interval(right, run.group_codes) == pytest.approx(expected, abs=0.01)
    low, high = wilson_interval(right.sum(), len(right))
    assert expected[1] - expected[0] > 1.2 * (high - low)


def test_groups_are_never_surer_than_their_samples():
    # Every group with one miss of four: by chance the groups agree, which must not count as certainty.
    hits, groups = np.tile([True, True, True, False], 10), np.repeat(np.arange(10), 4)
    assert proportion_interval(hits, groups) == wilson_interval(7.5, 10)
    assert proportion_interval(np.ones(40, bool), groups) == wilson_interval(10, 10)
    low, high = proportion_interval(hits, np.zeros(40, int))
    assert high - low > 0.7


def test_a_proportion_of_nothing_is_refused():
    with pytest.raises(ZooError, match="an interval needs 0 <= correct <= n"):
        proportion_interval(np.zeros(0, bool))


# Calibration error ----------------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 10_000))
@settings(max_examples=80, deadline=None)
def test_adaptive_ece_is_that_of_a_direct_loop_whatever_the_order(n, bins, seed):
    rng = np.random.default_rng(seed)
    confidence = np.round(rng.uniform(0.5, 1, n), 2)  # with ties
    right = rng.random(n) < confidence
    left, expected = sorted(zip(confidence, right, strict=True)), 0.0
    for number in range(1, bins + 1):
        edge = sorted(confidence)[max(0, math.ceil(n * number / bins) - 1)]
        inside = [each for each in left if each[0] <= edge]
        left = [each for each in left if each[0] > edge]
        expected += abs(sum(r - c for c, r in inside)) / n
    assert not left
    y_true, y_score = scored(confidence, right)
    assert adaptive_ece(y_true, y_score, bins) == pytest.approx(expected)
    order = rng.permutation(n)
    assert adaptive_ece(y_true[order], y_score[order], bins) == pytest.approx(expected)


def test_without_ties_adaptive_bins_hold_equally_many():
    # 15 bins of 4, each of gap 0.1: no gap may cancel another.
    confidence = np.linspace(0.6, 0.9, 60)
    y_true, y_score = scored(confidence, np.ones(60, bool))
    assert adaptive_ece(y_true, y_score) == pytest.approx(np.mean(1 - confidence))
    alternating = np.repeat(np.arange(15) % 2 == 0, 4)
    y_true, y_score = scored(confidence, alternating)
    assert adaptive_ece(y_true, y_score) == pytest.approx(np.mean(np.abs(alternating - confidence)))
    assert adaptive_ece(y_true, y_score, bins=1) == pytest.approx(abs(np.mean(alternating - confidence)))


def test_the_bars_of_the_diagram_add_up_to_the_ece():
    p = draw(500, 4, scale=2)
    bars = reliability(p.y_true, p.y_score)
    assert sum(bar["n"] for bar in bars) == 500
    gaps = sum(bar["n"] * abs(bar["accuracy"] - bar["confidence"]) for bar in bars) / 500
    assert gaps == pytest.approx(ece_of(p.y_true, p.y_score))
    for bar in bars:
        assert bar["low"] < bar["confidence"] <= bar["high"]
        assert bar["high"] - bar["low"] == pytest.approx(1 / 15)
        assert bar["accuracy_ci"] == list(wilson_interval(round(bar["n"] * bar["accuracy"]), bar["n"]))
    assert all(one["high"] <= two["low"] + 1e-12 for one, two in pairwise(bars))


def test_a_confidence_on_an_edge_belongs_to_the_lower_bar():
    y_true, y_score = scored([0.6, 0.6, 1.0], [True, False, True])
    bars = reliability(y_true, y_score, bins=5)
    assert [(bar["low"], bar["high"], bar["n"]) for bar in bars] == [(0.4, 0.6, 2), (0.8, 1.0, 1)]


def test_bars_of_groups_are_less_sure():
    y_true, y_score = scored(np.full(40, 0.7), np.repeat(np.arange(10) < 7, 4))
    (alone,) = reliability(y_true, y_score)
    (grouped,) = reliability(y_true, y_score, groups=np.repeat(np.arange(10), 4))
    width, wider = (bar["accuracy_ci"][1] - bar["accuracy_ci"][0] for bar in (alone, grouped))
    assert wider > 1.5 * width


# The interval of the calibration error --------------------------------------------------------------------------------


def population(rng, groups, size, temperature, share=0.0):
    """Confidences, true chances of being right and outcomes, whose errors go together within groups by a probit."""
    z = np.abs(rng.normal(1.5, 1, groups * size))
    chance = expit(z)
    latent = np.sqrt(share) * np.repeat(rng.normal(size=groups), size)
    right = latent + np.sqrt(1 - share) * rng.normal(size=groups * size) < ndtri(chance)
    return z * temperature, chance, right


def sample(rng, groups, size, temperature, share=0.0):
    z, _, right = population(rng, groups, size, temperature, share)
    return made(np.where(right, 0, 1), np.stack([z, 0 * z], axis=1), np.repeat([f"g{i}" for i in range(groups)], size))


def true_ece(temperature, kind):
    z, chance, _ = population(np.random.default_rng(99), 400_000, 1, temperature)
    confidence = expit(z)
    edges = np.quantile(confidence, np.arange(1, 15) / 15) if kind == "adaptive_ece" else np.arange(1, 15) / 15
    return np.abs(np.bincount(np.searchsorted(edges, confidence), weights=chance - confidence)).sum() / len(z)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ece", "adaptive_ece"])
@pytest.mark.parametrize(("groups", "size", "share"), [(400, 1, 0.0), (60, 6, 0.4)])
def test_the_interval_covers_the_true_error(kind, groups, size, share):
    found = {}
    for temperature in (0.7, 1.0, 1.15, 1.5, 3.0):  # from not sure enough to much too sure
        truth = true_ece(temperature, kind) if temperature != 1 else 0.0
        drawn = (sample(np.random.default_rng(number), groups, size, temperature, share) for number in range(200))
        intervals = [ece_interval([each], kind, replicates=400) for each in drawn]
        found[temperature] = np.mean([low <= truth <= high for low, high in intervals])
    assert all(each >= 0.9 for each in found.values()), found
    assert 0.93 <= np.mean(list(found.values())) <= 0.99, found


@pytest.mark.parametrize("kind", ["ece", "adaptive_ece"])
def test_calibrated_scores_with_few_errors_are_not_called_miscalibrated(kind):
    # Bins without an error have no variance to resample; 2 % of samples are wrong.
    shown = 0
    for number in range(60):
        rng = np.random.default_rng(number)
        z = np.abs(rng.normal(4.5, 1, 300))
        right = rng.random(300) < expit(z)
        low, _ = ece_interval([made(np.where(right, 0, 1), np.stack([z, 0 * z], axis=1))], kind, replicates=300)
        shown += low > 0
    assert shown <= 4


def test_percentiles_of_a_bootstrap_would_miss_what_the_interval_covers():
    # The sample's ECE of calibrated scores is far from 0; the interval still reaches down to it.
    intervals = [ece_interval([draw(300, seed=seed)], replicates=300) for seed in range(20)]
    assert sum(low == 0 for low, _ in intervals) >= 18
    values = [ece_of(p.y_true, p.y_score) for p in (draw(300, seed=seed) for seed in range(20))]
    assert np.mean(values) > 0.03
    assert np.mean([high for _, high in intervals]) < 2 * np.mean(values)


def test_scores_that_are_plainly_too_sure_are_told_from_calibrated_ones():
    p = draw(600, scale=3)
    low, high = ece_interval([p])
    assert 0.02 < low < ece_of(p.y_true, p.y_score) < high + 0.03
    assert high - low < 0.12


def test_the_interval_is_that_of_a_direct_bootstrap():
    p = draw(120, scale=3, seed=5)
    confidence, right = p.y_score.max(axis=1), p.y_pred == p.y_true

    def gaps(chosen):
        inside = [chosen[(confidence[chosen] > b / 15) & (confidence[chosen] <= (b + 1) / 15)] for b in range(15)]
        return np.array([(right[each] - confidence[each]).sum() / len(chosen) for each in inside])

    rng = np.random.default_rng(1)
    drawn = np.array([gaps(rng.integers(120, size=119)) for _ in range(3000)])
    spread = np.maximum(drawn.std(axis=0), 1e-12)

    def corrected(of):
        return (2 * abs(of) - foldnorm.mean(abs(of) / spread, scale=spread)).sum(axis=-1)

    seen = gaps(np.arange(120))
    half = student.ppf(0.975, 119) * corrected(drawn).std()
    expected = (corrected(seen) - half, corrected(seen) + half)
    assert expected[0] > 0
    assert ece_interval([p], replicates=8000) == pytest.approx(expected, abs=0.006)


def test_seeds_that_differ_widen_the_interval_of_the_error():
    p = draw(400, scale=2)
    runs = [apply_temperature(p, t) for t in (0.5, 1.0, 2.0)]
    width_alike, width_apart = (high - low for low, high in (ece_interval([p] * 3), ece_interval(runs)))
    assert width_apart > 1.5 * width_alike


def test_the_interval_is_reproducible_and_blind_to_the_order():
    p = draw(200, scale=2)
    order = np.random.default_rng(0).permutation(200)
    turned = Predictions(p.sample_ids[order], p.groups[order], p.y_true[order], p.logits[order])
    for kind in ("ece", "adaptive_ece"):
        assert ece_interval([p], kind) == ece_interval([p], kind)
        assert ece_interval([p, turned], kind, 500) == pytest.approx(ece_interval([p, p], kind, 500))
    assert ece_interval([p], seed=1) != ece_interval([p])


def test_copies_of_a_sample_in_its_group_add_no_certainty_to_the_error():
    p = draw(150, scale=2)
    groups = np.repeat([f"g{i:03}" for i in range(150)], 6)
    copied = made(np.repeat(p.y_true, 6), np.repeat(p.logits, 6, axis=0), groups)
    assert ece_interval([copied], replicates=5000) == pytest.approx(ece_interval([p], replicates=5000), abs=0.01)


@pytest.mark.parametrize("right", [True, False])
def test_no_error_at_all_is_not_certainty(right):
    y_true = np.zeros(30) if right else np.ones(30)
    low, high = ece_interval([made(y_true, np.tile([9.0, 0.0], (30, 1)))])
    width = 1 - wilson_interval(30, 30)[0]
    assert high - low >= 0.99 * width
    assert 0 <= low <= high <= 1


def test_one_group_alone_says_nothing_of_the_error():
    p = draw(50)
    assert ece_interval([made(p.y_true, p.logits, ["p"] * 50)]) == (0.0, 1.0)
    assert ece_interval([draw(1)]) == (0.0, 1.0)


def test_the_error_of_runs_of_other_samples_is_refused():
    with pytest.raises(ZooError, match="runs of different true labels cannot be compared"):
        ece_interval([draw(20), draw(20, seed=1)])
    with pytest.raises(ZooError, match=r"needs a run or more. Got none"):
        ece_interval([])
    with pytest.raises(ZooError, match=r"kind of calibration error must be ece or adaptive_ece. Got 'ace'"):
        ece_interval([draw(20)], "ace")


# Brier ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("c", "positive"), [(2, 1), (2, 0), (2, None), (5, None)])
@pytest.mark.parametrize("digits", [1, 8])
def test_brier_is_parted_exactly_as_by_scikit_learns_isotonic_regression(c, positive, digits):
    p = draw(300, c, scale=2)
    y_score = np.round(p.y_score, digits)  # with ties
    parts = brier_decomposition(p.y_true, y_score, positive)
    recalibrated = uncertainty = 0.0
    for k in range(c) if positive is None else [positive]:
        hit = (p.y_true == k).astype(float)
        fitted = IsotonicRegression().fit(y_score[:, k], hit).predict(y_score[:, k])
        recalibrated += np.mean((fitted - hit) ** 2)
        uncertainty += hit.var()
    assert parts["miscalibration"] == pytest.approx(parts["brier"] - recalibrated, abs=1e-9)
    assert parts["uncertainty"] == pytest.approx(uncertainty)
    total = parts["miscalibration"] - parts["discrimination"] + parts["uncertainty"]
    assert total == pytest.approx(parts["brier"], abs=1e-12)


@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(2, 6))
@settings(max_examples=60, deadline=None)
def test_no_part_of_brier_is_negative_and_together_they_are_brier(seed, n, c):
    rng = np.random.default_rng(seed)
    y_true, y_score = rng.integers(0, c, n), rng.dirichlet(np.full(c, 0.3), n).round(rng.integers(1, 9))
    parts = brier_decomposition(y_true, y_score)
    assert min(parts.values()) >= -1e-12
    total = parts["miscalibration"] - parts["discrimination"] + parts["uncertainty"]
    assert abs(total - parts["brier"]) < 1e-12


def test_brier_is_that_of_the_metrics():
    for c in (2, 4):
        p = draw(c=c)
        expected = compute_metrics(p, names(c))["brier"]
        assert brier_decomposition(p.y_true, p.y_score, 1 if c == 2 else None)["brier"] == pytest.approx(expected)
    p = draw(c=2)
    assert brier_decomposition(p.y_true, p.y_score, 1)["brier"] == pytest.approx(
        brier_score_loss(p.y_true, p.y_score[:, 1])
    )


def test_calibrated_scores_have_little_miscalibration_and_useless_ones_no_discrimination():
    p = draw(20_000, 2)
    assert brier_decomposition(p.y_true, p.y_score, 1)["miscalibration"] < 0.002
    constant = brier_decomposition(p.y_true, np.full((20_000, 2), 0.5), 1)
    assert constant["discrimination"] == pytest.approx(0, abs=1e-12)


# Temperature ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.2, 1.0, 3.0])
def test_temperature_is_found_again(scale):
    p = draw(4000, 4, scale=scale)
    assert fit_temperature(p) == pytest.approx(scale, rel=0.08)


@pytest.mark.parametrize("c", [2, 5])
def test_temperature_is_the_minimum_of_the_log_loss(c):
    p = draw(150, c, scale=2.5)

    def loss(t):
        return log_loss(p.y_true, made(p.y_true, p.logits / t).y_score, labels=range(c))

    found = fit_temperature(p)
    best = minimize_scalar(loss, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-9})
    assert found == pytest.approx(best.x, rel=1e-3)
    assert loss(found) <= best.fun + 1e-7


def test_temperature_changes_scores_and_no_prediction():
    p = draw(300, scale=3)
    scaled = apply_temperature(p, fit_temperature(p))
    np.testing.assert_array_equal(scaled.y_pred, p.y_pred)
    np.testing.assert_allclose(scaled.logits, p.logits / fit_temperature(p), rtol=1e-6)
    assert ece_of(p.y_true, scaled.y_score) < ece_of(p.y_true, p.y_score) / 2
    assert np.array_equal(scaled.sample_ids, p.sample_ids)


def test_val_without_an_error_does_not_say_how_sure_to_be():
    assert fit_temperature(made([0, 1, 1], [[3, 0], [0, 5], [1, 2]])) == 1.0
    assert fit_temperature(made([0], [[3, 0]])) == 1.0
    assert fit_temperature(made([0, 1, 2], np.zeros((3, 3)))) == 1.0


def test_temperature_keeps_its_bounds():
    assert fit_temperature(made([1, 1, 0], [[3, 0], [4, 0], [0, 2]])) == 20.0  # sure and wrong
    nearly = np.tile([1e-4, 0.0], (99, 1))
    assert fit_temperature(made(np.r_[np.zeros(98), 1], nearly)) == 0.05
    with np.errstate(all="raise", under="ignore"):
        assert 0.05 <= fit_temperature(made([0, 1, 1], [[1e30, 0], [0, 1e30], [1, 0]])) <= 20
        assert np.isfinite(apply_temperature(made([0], [[3e38, -3e38]]), 0.05).logits).all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_is_none_is_refused(temperature):
    with pytest.raises(ZooError, match=r"temperature must be finite and above 0. Got .*; fit it on val"):
        apply_temperature(draw(5), temperature)


# Conformal sets -------------------------------------------------------------------------------------------------------


def direct_score(row, label, method):
    """Nonconformity by the papers' words, one sample at a time; equal scores in the order of classes."""
    if method == "lac":
        return 1 - row[label]
    total = 0.0
    for k in sorted(range(len(row)), key=lambda k: (-row[k], k)):
        if k == label:
            return total
        total += row[k]
    raise AssertionError


def direct_set(row, quantile, method):
    if method == "lac":
        return {k for k in range(len(row)) if 1 - row[k] <= quantile}
    chosen, total = set(), 0.0
    for k in sorted(range(len(row)), key=lambda k: (-row[k], k)):
        chosen.add(k)
        total += row[k]
        if total > quantile:  # this class crosses: it is in, and the last
            break
    return chosen


@pytest.mark.parametrize("method", ["lac", "aps"])
@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(2, 6), st.sampled_from([0.5, 0.8, 0.9, 0.95]))
@settings(max_examples=60, deadline=None)
def test_conformal_sets_are_those_of_the_direct_way(method, seed, n, c, coverage):
    rng = np.random.default_rng(seed)
    val = rng.dirichlet(np.ones(c), n)
    y_true = rng.integers(0, c, n)
    found = conformal_quantile(val, y_true, method, coverage)
    of_true = sorted(direct_score(row, label, method) for row, label in zip(val, y_true, strict=True))
    # The smallest value at or below which lies a share of coverage, a new sample at infinity counted in.
    enough = (each for each in of_true if sum(o <= each for o in of_true) >= coverage * (n + 1) - 1e-9)
    expected = next(enough, math.inf)
    assert found == pytest.approx(expected)
    new = rng.dirichlet(np.ones(c), 20)
    sets = prediction_sets(new, found, method)
    assert [set(np.flatnonzero(row)) for row in sets] == [direct_set(row, found, method) for row in new]
    if math.isinf(found):
        assert sets.all()
    if method == "aps":
        assert sets.any(axis=1).all()


@pytest.mark.parametrize("method", ["lac", "aps"])
@pytest.mark.parametrize("n", [9, 19, 60])
@pytest.mark.parametrize("decimals", [1, 12])
def test_conformal_sets_hold_the_promise_on_average(method, n, decimals):
    # The promise is on average over draws of val and test: 400 draws of both, badly calibrated scores, ties at 0.1.
    held = []
    for seed in range(400):
        p = draw(n + 40, 4, seed=seed, skill=1, scale=4)
        scores = np.round(p.y_score, decimals)
        quantile = conformal_quantile(scores[:n], p.y_true[:n], method, 0.9)
        sets = prediction_sets(scores[n:], quantile, method)
        held.append(sets[np.arange(40), p.y_true[n:]].mean())
    error = np.std(held) / 20
    assert np.mean(held) >= 0.9 - 3 * error
    if decimals == 12:
        assert np.mean(held) <= 0.9 + 1 / (n + 1) + 3 * error  # no more than the theory allows without ties


def test_too_few_samples_leave_every_class_in():
    p = draw(8)
    assert conformal_quantile(p.y_score, p.y_true, "lac") == math.inf
    report = conformal_report(p, draw(30, seed=1), names(3))
    assert report["lac"]["quantile"] is None
    assert report["aps"]["mean_set_size"] == 3
    assert report["aps"]["coverage"] == 1
    assert math.isfinite(conformal_quantile(draw(9).y_score, draw(9).y_true, "lac"))


def test_a_class_without_a_chance_is_still_in_the_set_that_must_hold_it():
    scores = np.tile([1.0, 0.0], (20, 1))  # too sure: the true class has a score of exactly 0
    y_true = np.ones(20, int)
    for method in ("lac", "aps"):
        assert prediction_sets(scores, conformal_quantile(scores, y_true, method), method).all()


def test_sets_of_a_model_that_is_right_more_often_than_asked_are_conservative_by_aps():
    val, test = draw(500, 3, skill=8), draw(500, 3, seed=1, skill=8)  # top1 0.93
    report = conformal_report(val, test, names(3), 0.8)
    assert report["aps"]["quantile"] == 0
    assert report["aps"]["mean_set_size"] == 1
    assert report["aps"]["coverage"] == np.mean(test.y_pred == test.y_true)
    assert report["lac"]["mean_set_size"] < 1
    assert report["lac"]["empty_sets"] > 0


def test_the_report_of_sets_counts_what_they_hold():
    val, test = draw(100), draw(150, seed=1)
    test = made(np.where(test.y_true == 2, 0, test.y_true), test.logits)  # no sample of class 2
    report = conformal_report(val, test, names(3), 0.8)
    assert report["coverage_asked"] == 0.8
    for method in ("lac", "aps"):
        row = report[method]
        sets = prediction_sets(test.y_score, conformal_quantile(val.y_score, val.y_true, method, 0.8), method)
        assert row["coverage"] == np.mean([sets[i, y] for i, y in enumerate(test.y_true)])
        assert row["empty_sets"] == sum(not each.any() for each in sets)
        assert row["mean_set_size"] == pytest.approx(sets.sum() / 150)
        low, high = row["coverage_ci"]
        assert low < row["coverage"] < high
        assert row["per_class"]["class 2"] == {"n": 0, "coverage": None, "mean_set_size": None}
        assert sum(each["n"] for each in row["per_class"].values()) == 150
    assert report["aps"]["mean_set_size"] > report["lac"]["mean_set_size"]


def test_conformal_arguments_that_make_no_sense_are_refused():
    p = draw(30)
    for coverage in (0.0, 1.0, -1, math.nan):
        with pytest.raises(ZooError, match=r"coverage must lie in \(0, 1\). Got .*; ask for 0.9"):
            conformal_report(p, p, names(3), coverage)
    with pytest.raises(ZooError, match=r"conformal method must be one of lac, aps. Got 'apps'; did you mean 'aps'"):
        conformal_quantile(p.y_score, p.y_true, "apps")
    with pytest.raises(ZooError, match="conformal method must be one of"):
        prediction_sets(p.y_score, 0.5, "raps")


# When to refer --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.integers(1, 40))
@settings(max_examples=80, deadline=None)
def test_risk_and_coverage_are_those_of_counting(seed, n):
    rng = np.random.default_rng(seed)
    confidence = np.round(rng.uniform(0.5, 1, n), 1)
    right = rng.random(n) < 0.7
    y_true, y_score = scored(confidence, right)
    right = y_score.argmax(axis=1) == y_true
    curve = risk_coverage(y_true, y_score)
    assert list(curve["threshold"]) == sorted(set(y_score.max(axis=1)), reverse=True)
    for threshold, coverage, risk in zip(curve["threshold"], curve["coverage"], curve["risk"], strict=True):
        answered = y_score.max(axis=1) >= threshold
        assert coverage == pytest.approx(answered.mean())
        assert risk == pytest.approx(1 - right[answered].mean())
    own = [1 - right[y_score.max(axis=1) >= each].mean() for each in y_score.max(axis=1)]
    assert curve["aurc"] == pytest.approx(np.mean(own))
    assert -1e-12 <= curve["e_aurc"] <= curve["aurc"] + 1e-12
    assert curve["risk"][-1] == pytest.approx(1 - right.mean())


def test_a_perfect_order_has_no_excess_risk():
    y_true, y_score = scored(np.linspace(0.99, 0.6, 10), np.arange(10) < 7)
    assert risk_coverage(y_true, y_score)["e_aurc"] == pytest.approx(0)


@pytest.mark.parametrize("max_error", [0.0, 0.05, 0.2])
def test_the_threshold_answers_as_many_as_the_error_allows(max_error):
    val = draw(400, scale=2)
    found = refer_threshold(val, max_error)
    confidence, wrong = val.y_score.max(axis=1), val.y_pred != val.y_true
    fits = [t for t in confidence if (confidence >= t).sum() >= 20 and wrong[confidence >= t].mean() <= max_error]
    assert found == (min(fits) if fits else None)


def test_too_few_answers_are_no_threshold():
    y_true = np.r_[np.zeros(19, int), np.ones(200, int)]
    val = made(y_true, np.stack([np.r_[np.full(19, 3.0), np.full(200, 1.0)], np.zeros(219)], axis=1))
    assert refer_threshold(val) is None
    assert refer_threshold(val, least=19) == pytest.approx(expit(3))
    report = refer_report(val, val)
    assert report == {
        "threshold": None,
        "max_error": 0.05,
        "val_coverage": 0.0,
        "test_coverage": 0.0,
        "test_error": None,
        "test_error_ci": None,
    }


def test_the_report_of_referring_is_of_test_at_vals_threshold():
    val, test = draw(500), draw(400, seed=1)
    report = refer_report(val, test, 0.1)
    answered = test.y_score.max(axis=1) >= refer_threshold(val, 0.1)
    assert report["test_coverage"] == answered.mean()
    assert report["test_error"] == np.mean(test.y_pred[answered] != test.y_true[answered])
    assert report["test_error_ci"][0] < report["test_error"] < report["test_error_ci"][1]
    assert 0 < report["val_coverage"] < 1


@pytest.mark.parametrize(("max_error", "least"), [(1.0, 20), (-0.1, 20), (math.nan, 20), (0.05, 0)])
def test_referring_refuses_what_is_no_error(max_error, least):
    with pytest.raises(ZooError, match=r"referring needs max_error in \[0, 1\) and least of 1 or more. Got"):
        refer_threshold(draw(30), max_error, least)


# Operating points -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("c", "negative"), [(2, None), (2, "class 1"), (4, "class 2")])
@pytest.mark.parametrize("at", [0.6, 0.95])
def test_operating_points_are_the_best_of_all_thresholds(c, negative, at):
    val, test = draw(200, c), draw(150, c, seed=1)
    index = 0 if negative is None else names(c).index(negative)
    points = operating_points(val, test, names(c), negative, at)

    def rates(p, threshold):
        called, sick = 1 - p.y_score[:, index] >= threshold, p.y_true != index
        return called[sick].mean(), (~called[~sick]).mean()

    every = [rates(val, t) for t in [*np.unique(1 - val.y_score[:, index]), 2.0]]
    best = {
        "sensitivity_at_specificity": max(sens for sens, spec in every if spec >= at - 1e-12),
        "specificity_at_sensitivity": max(spec for sens, spec in every if sens >= at - 1e-12),
    }
    for name, (kept, other) in {
        "sensitivity_at_specificity": ("specificity", "sensitivity"),
        "specificity_at_sensitivity": ("sensitivity", "specificity"),
    }.items():
        point = points[name]
        assert point["asked"] == at
        assert point[f"val_{kept}"] >= at - 1e-12
        assert point[f"val_{other}"] == pytest.approx(best[name])
        on_val, on_test = rates(val, point["threshold"]), rates(test, point["threshold"])
        assert (point["val_sensitivity"], point["val_specificity"]) == pytest.approx(on_val)
        assert (point["test_sensitivity"], point["test_specificity"]) == pytest.approx(on_test)
        for side in ("sensitivity", "specificity"):
            low, high = point[f"test_{side}_ci"]
            assert low <= point[f"test_{side}"] <= high


def test_operating_points_need_a_negative_class_and_both_sides():
    assert operating_points(draw(), draw(), names(3)) is None
    one_sided = made([1, 2, 1], np.eye(3))
    assert operating_points(one_sided, draw(), names(3), "class 0") is None
    points = operating_points(draw(), one_sided, names(3), "class 0")
    assert points["sensitivity_at_specificity"]["test_specificity"] is None
    assert points["sensitivity_at_specificity"]["test_specificity_ci"] is None
    assert points["sensitivity_at_specificity"]["test_sensitivity"] is not None


def test_scores_that_part_nothing_call_nobody():
    constant = made([0, 1] * 20, np.zeros((40, 2)))
    points = operating_points(constant, constant, names(2))
    assert points["sensitivity_at_specificity"]["test_specificity"] == 1
    assert points["sensitivity_at_specificity"]["test_sensitivity"] == 0
    assert math.isfinite(points["sensitivity_at_specificity"]["threshold"])
    assert points["specificity_at_sensitivity"]["test_sensitivity"] == 1


@pytest.mark.parametrize("at", [0, 1, 1.5, math.nan])
def test_an_operating_point_outside_is_refused(at):
    with pytest.raises(ZooError, match=r"must lie in \(0, 1\). Got"):
        operating_points(draw(c=2), draw(c=2), names(2), at=at)


# The report -----------------------------------------------------------------------------------------------------------


def test_the_report_is_json_and_the_same_each_time():
    val, test = draw(200, scale=3), draw(150, seed=1, scale=3)
    report = calibration_report(val, test, names(3), "class 0")
    text = json.dumps(report, allow_nan=False)
    assert text == json.dumps(calibration_report(val, test, names(3), "class 0"))
    assert set(report) >= {
        *("temperature", "before", "after", "reliability_before", "reliability_after"),
        *("conformal", "refer", "operating_points", "aurc"),
    }
    expected = compute_metrics(test, names(3))
    for name in ("ece", "log_loss", "brier"):
        assert report["before"][name] == pytest.approx(expected[name])
        assert report["after"][name] < report["before"][name]
    assert report["before"]["ece_ci"][0] > 0  # three times too sure
    assert report["after"]["ece_ci"][0] == 0
    assert report["before"]["brier_decomposition"]["brier"] == pytest.approx(report["before"]["brier"])


def test_nothing_is_chosen_on_test():
    val, test = draw(200, scale=3), draw(150, seed=1, scale=3)
    one = calibration_report(val, test, names(3), "class 0")
    other = calibration_report(val, draw(150, seed=2), names(3), "class 0")
    assert one["temperature"] == other["temperature"]
    assert one["conformal"]["lac"]["quantile"] == other["conformal"]["lac"]["quantile"]
    assert one["refer"]["threshold"] == other["refer"]["threshold"]
    for name, point in one["operating_points"].items():
        assert point["threshold"] == other["operating_points"][name]["threshold"]


HOSTILE = {
    "a class absent from test": (draw(60), made([0, 1] * 10, np.random.default_rng(0).normal(size=(20, 3)))),
    "one sample": (draw(1), draw(1, seed=2)),
    "one of val": (draw(1), draw(40)),
    "val all right": (made([0, 1, 2] * 10, 5 * np.eye(3)[[0, 1, 2] * 10]), draw(40)),
    "test all right": (draw(40), made([0, 1, 2] * 10, 500 * np.eye(3)[[0, 1, 2] * 10])),
    "all wrong": (made([1, 2, 0] * 10, 500 * np.eye(3)[[0, 1, 2] * 10]),) * 2,
    "constant": (made([0, 1, 2] * 10, np.zeros((30, 3))), made([2, 1, 0] * 10, np.zeros((30, 3)))),
    "one group": (made([0, 1, 2] * 10, np.eye(3)[[0, 1, 0] * 10], ["p"] * 30),) * 2,
    "groups": (draw(60), made(draw(60).y_true, draw(60).logits, np.repeat([f"p{i}" for i in range(12)], 5))),
    "huge logits": (made([0, 1, 2], 1e38 * np.eye(3)[[0, 1, 1]]), made([0, 1, 2], 1e38 * np.eye(3))),
}


@pytest.mark.parametrize("negative", [None, "class 1"])
@pytest.mark.parametrize("case", HOSTILE)
def test_no_data_break_the_report(case, negative):
    val, test = HOSTILE[case]
    report = json.loads(json.dumps(calibration_report(val, test, names(3), negative), allow_nan=False))
    for when in ("before", "after"):
        for name in ("ece_ci", "adaptive_ece_ci"):
            low, high = report[when][name]
            assert 0 <= low <= high <= 1
    assert all(0 <= report["conformal"][method]["coverage"] <= 1 for method in ("lac", "aps"))
    assert (report["operating_points"] is None) >= (negative is None)


def test_a_thousand_classes_are_no_trouble():
    val, test = draw(300, 1000, skill=3), draw(300, 1000, seed=1, skill=3)
    started = time.perf_counter()
    report = calibration_report(val, test, names(1000))
    assert time.perf_counter() - started < 20
    assert 0.8 < report["conformal"]["aps"]["coverage"] <= 1
    assert report["operating_points"] is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: calibration_report(draw(c=3), draw(c=4), names(3)), "equally many classes. Got 3 and 4"),
        (lambda: calibration_report(draw(c=3), draw(c=3), names(2)), "Got 2 classes and 3 logits"),
        (lambda: calibration_report(draw(), draw(), names(3), "clas 1"), "negative_class must be one of"),
        (lambda: calibration_report(made([], np.zeros((0, 3))), draw(), names(3)), "at least one sample. Got none"),
        (lambda: calibration_report(draw(), made([], np.zeros((0, 3))), names(3)), "at least one sample. Got none"),
        (lambda: refer_report(draw(c=3), draw(c=4)), "equally many classes. Got 3 and 4"),
        (lambda: fit_temperature(made([], np.zeros((0, 3)))), "at least one sample. Got none"),
        (lambda: fit_temperature(made([0], [[np.nan, 1]])), "logits must be finite"),
        (lambda: refer_threshold(made([], np.zeros((0, 3)))), "at least one sample. Got none"),
        (lambda: ece_interval([made([], np.zeros((0, 3)))]), "at least one sample. Got none"),
        (lambda: adaptive_ece(np.zeros(0, int), np.zeros((0, 2))), r"\(N, C\) and y_true \(N,\), with a sample"),
        (lambda: adaptive_ece(np.zeros(3, int), np.zeros((2, 2))), r"Got \(2, 2\) and \(3,\)"),
        (lambda: adaptive_ece(np.zeros(2, int), np.full((2, 2), np.nan)), "scores must be finite"),
        (lambda: risk_coverage(np.full(2, 7), np.full((2, 2), 0.5)), r"y_true in \[0, 2\). Got y_true of 7 to 7"),
        (lambda: reliability(np.zeros(2, int), np.full((2, 2), 0.5), 0), "bins must be 1 or more. Got 0"),
        (lambda: brier_decomposition(np.zeros(2, int), np.zeros(2)), r"Got \(2,\) and \(2,\)"),
    ],
)
def test_what_cannot_be_judged_is_refused_in_one_line(call, message):
    with pytest.raises(ZooError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
