"""How far a run's scores may be believed: calibration, sets with a stated coverage, when to refer, where to cut.

Temperature, quantiles and thresholds are chosen on val; test only says how well they hold. Intervals are of 95 % and
heed groups where there are any.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from zoo.errors import ZooError
from zoo.evaluation.calibration_error import adaptive_ece, ece_interval, reliability, top_label
from zoo.evaluation.conformal import METHODS, check_method, nonconformity, prediction_sets
from zoo.evaluation.metrics import (
    brier_of,
    check_logits,
    check_predictions,
    check_scores,
    ece_of,
    log_loss_of,
    negative_index,
    positive_class,
)
from zoo.evaluation.predictions import Predictions
from zoo.evaluation.proportions import proportion_interval

TEMPERATURES = (0.05, 20.0)
_LOGIT_LIMIT = 3e38  # what float32 holds


def calibration_report(
    val: Predictions, test: Predictions, classes: list[str], negative_class: str | None = None
) -> dict[str, Any]:
    """Return what this module says about one run, ready for JSON (None for what is not defined).

    - `temperature`: `fit_temperature` of val. `before` and `after` it, on test: `ece`, `ece_ci`, `adaptive_ece`,
      `adaptive_ece_ci`, `log_loss` (nats), `brier`, `brier_decomposition`; `reliability_before`, `reliability_after`.
    - After it: `conformal`, `refer` (`refer_report`), `operating_points` and, of test, `aurc` and `e_aurc`.

    Raises ZooError for no samples, classes that differ in number between val, test and the list, logits that are
    not finite, and an unknown negative class.
    """
    _check_pair(val, test, classes, negative_class)
    temperature = fit_temperature(val)
    scaled_val, scaled = apply_temperature(val, temperature), apply_temperature(test, temperature)
    positive = positive_class(classes, negative_class)
    curve = risk_coverage(scaled.y_true, scaled.y_score)
    return {
        "temperature": temperature,
        "before": _quality(test, positive),
        "after": _quality(scaled, positive),
        "reliability_before": reliability(test.y_true, test.y_score, groups=test.group_codes),
        "reliability_after": reliability(scaled.y_true, scaled.y_score, groups=scaled.group_codes),
        "conformal": conformal_report(scaled_val, scaled, classes),
        "refer": refer_report(scaled_val, scaled),
        "operating_points": operating_points(scaled_val, scaled, classes, negative_class),
        "aurc": curve["aurc"],
        "e_aurc": curve["e_aurc"],
    }


def _quality(predictions: Predictions, positive: int | None) -> dict[str, Any]:
    y_true, y_score = predictions.y_true, predictions.y_score
    return {
        "ece": ece_of(y_true, y_score),
        "ece_ci": list(ece_interval([predictions], "ece")),
        "adaptive_ece": adaptive_ece(y_true, y_score),
        "adaptive_ece_ci": list(ece_interval([predictions], "adaptive_ece")),
        "log_loss": log_loss_of(y_true, y_score),
        "brier": brier_of(y_true, y_score, positive),
        "brier_decomposition": brier_decomposition(y_true, y_score, positive),
    }


def brier_decomposition(y_true: np.ndarray, y_score: np.ndarray, positive: int | None = None) -> dict[str, float]:
    """Return `brier` = `miscalibration` - `discrimination` + `uncertainty`, none of them negative.

    CORP: the score after isotonic regression, which merges equal and misordered scores, stands between the two
    (Dimitriadis, Gneiting and Jordan 2021, doi 10.1073/pnas.2016191118). Fitted on the same samples, it counts some
    noise as miscalibration. positive: of two classes, the only one that counts, each part in [0, 1]; None sums over
    classes, in [0, 2], as `compute_metrics`' `brier` does. Raises ZooError for no sample and scores that do not fit.

    >>> parts = brier_decomposition(np.array([0, 1, 1, 1]), np.array([[0.5, 0.5]] * 4), positive=1)
    >>> parts["brier"], parts["miscalibration"], parts["discrimination"], parts["uncertainty"]
    (0.25, 0.0625, 0.0, 0.1875)
    """
    from scipy.optimize import isotonic_regression

    check_scores(y_true, y_score)
    brier = recalibrated = uncertainty = 0.0
    for member in range(y_score.shape[1]) if positive is None else [positive]:
        score, hit = y_score[:, member], (y_true == member).astype(np.float64)
        place, counts = np.unique(score, return_inverse=True, return_counts=True)[1:]
        fitted = isotonic_regression(np.bincount(place, weights=hit) / counts, weights=counts).x[place]
        brier += float(np.mean((score - hit) ** 2))
        recalibrated += float(np.mean((fitted - hit) ** 2))
        uncertainty += float(hit.mean() * (1 - hit.mean()))
    return {
        "brier": brier,
        "miscalibration": brier - recalibrated,
        "discrimination": uncertainty - recalibrated,
        "uncertainty": uncertainty,
    }


def fit_temperature(val: Predictions) -> float:
    """Return the temperature in [0.05, 20] that minimises the log loss of logits / temperature on val.

    Guo et al. 2017, arXiv 1706.04599; the loss is convex in 1 / temperature, and the root of its slope is taken. Where
    the true class is highest in every sample, the loss falls for ever as the temperature does and val does not say
    where to stop: 1. Raises ZooError for no sample and logits that are not finite.
    """
    from scipy.optimize import brentq
    from scipy.special import softmax

    check_logits(val)
    logits = val.logits.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    of_true = logits[np.arange(len(logits)), val.y_true]
    if not of_true.any():
        return 1.0

    def slope(inverse: float) -> float:
        return float(((softmax(logits * inverse, axis=1) * logits).sum(axis=1) - of_true).mean())

    low, high = TEMPERATURES
    if slope(1 / high) >= 0:
        return high
    if slope(1 / low) <= 0:
        return low
    return float(1 / brentq(slope, 1 / high, 1 / low, xtol=1e-10))


def apply_temperature(predictions: Predictions, temperature: float) -> Predictions:
    """Return the predictions with logits / temperature: other scores, the same y_pred.

    Raises ZooError unless the temperature is finite and above 0.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ZooError(f"temperature must be finite and above 0. Got {temperature}; fit it on val")
    logits = np.clip(predictions.logits.astype(np.float64) / temperature, -_LOGIT_LIMIT, _LOGIT_LIMIT)
    return Predictions(predictions.sample_ids, predictions.groups, predictions.y_true, logits)


# Conformal sets -------------------------------------------------------------------------------------------------------


def conformal_quantile(val_scores: np.ndarray, y_true: np.ndarray, method: str, coverage: float = 0.9) -> float:
    """Return the quantile at which `prediction_sets` hold the true class of a new sample with the coverage asked.

    val_scores: (N, C) in [0, 1]. It is the ceil((N + 1) coverage)-th smallest nonconformity of val's true classes;
    infinity, hence every class, where N is too small. `lac`: 1 - score (Sadinle, Lei and Wasserman 2019, doi
    10.1080/01621459.2017.1395341): the smallest sets, which may be empty. `aps`: the sum of the scores above the true
    class, equal ones in the order of classes: that of Romano et al. 2020 (arXiv 2006.02544) without its random part.
    The promise is over draws of val and of samples exchangeable with it, not within a class or for test of another
    hospital, and correlated groups hold it less surely. Raises ZooError for an unknown method, coverage outside
    (0, 1), no sample.

    >>> scores = np.stack([np.linspace(0.5, 0.95, 10), np.linspace(0.5, 0.05, 10)], axis=1)
    >>> round(conformal_quantile(scores, np.zeros(10, int), "lac", 0.8), 6)
    0.45
    """
    check_scores(y_true, val_scores)
    check_method(method)
    if not 0 < coverage < 1:
        raise ZooError(f"coverage must lie in (0, 1). Got {coverage}; ask for 0.9, say")
    of_true = np.sort(nonconformity(val_scores, method)[np.arange(len(y_true)), y_true])
    rank = math.ceil((len(y_true) + 1) * coverage - 1e-9)
    return float(of_true[rank - 1]) if rank <= len(y_true) else math.inf


def conformal_report(val: Predictions, test: Predictions, classes: list[str], coverage: float = 0.9) -> dict[str, Any]:
    """Return, for `lac` and `aps`, how sets chosen on val do on test; and `coverage_asked`.

    Each: `quantile` (None: val is too small, every class is in), `coverage`, `coverage_ci`, `mean_set_size`,
    `empty_sets` (a count), `per_class` name to `n`, `coverage`, `mean_set_size` (None without samples). Raises
    ZooError as `calibration_report`, and for coverage outside (0, 1).
    """
    _check_pair(val, test, classes)
    report: dict[str, Any] = {"coverage_asked": coverage}
    for method in METHODS:
        quantile = conformal_quantile(val.y_score, val.y_true, method, coverage)
        sets = prediction_sets(test.y_score, quantile, method)
        held, sizes = sets[np.arange(len(sets)), test.y_true], sets.sum(axis=1)
        of_class = {name: test.y_true == index for index, name in enumerate(classes)}
        report[method] = {
            "quantile": quantile if math.isfinite(quantile) else None,
            "coverage": float(held.mean()),
            "coverage_ci": list(proportion_interval(held, test.group_codes)),
            "mean_set_size": float(sizes.mean()),
            "empty_sets": int((sizes == 0).sum()),
            "per_class": {
                name: {"n": int(of.sum()), "coverage": _mean(held[of]), "mean_set_size": _mean(sizes[of])}
                for name, of in of_class.items()
            },
        }
    return report


# When to refer, where to cut ------------------------------------------------------------------------------------------


def risk_coverage(y_true: np.ndarray, y_score: np.ndarray) -> dict[str, Any]:
    """Return the error among the samples that are answered, as ever less confident ones are.

    `threshold`: (K,) the different confidences, falling; `coverage`: (K,) share of samples at or above it; `risk`: (K,)
    share of errors among them (Geifman and El-Yaniv 2017, arXiv 1705.08500). `aurc`: the mean risk over coverages;
    `e_aurc`: what it lies above that of a perfect order of the same errors (Geifman et al. 2019, arXiv 1805.08206,
    there approximated). Samples of one confidence come together. Raises ZooError for no sample, scores that do not fit.

    >>> curve = risk_coverage(np.array([0, 0, 0, 1]), np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.6, 0.4]]))
    >>> curve["coverage"].tolist(), curve["risk"].tolist(), curve["aurc"], curve["e_aurc"]
    ([0.25, 0.5, 1.0], [0.0, 0.0, 0.25], 0.125, 0.0625)
    """
    check_scores(y_true, y_score)
    confidence, right = top_label(y_true, y_score)
    values, place, counts = np.unique(-confidence, return_inverse=True, return_counts=True)
    answered = np.cumsum(counts)
    risk = np.cumsum(np.bincount(place, weights=~right)) / answered
    n = len(y_true)
    aurc = float(risk @ counts / n)
    ranks = np.arange(1, n + 1)
    perfect = float(np.mean(np.maximum(0, ranks - right.sum()) / ranks))
    return {"coverage": answered / n, "risk": risk, "threshold": -values, "aurc": aurc, "e_aurc": aurc - perfect}


def refer_threshold(val: Predictions, max_error: float = 0.05, least: int = 20) -> float | None:
    """Return the lowest confidence at or above which val's error is at most `max_error`; None where there is none.

    In [0, 1]; at least `least` samples must be answered. The choice favours val, so test may err somewhat more. Raises
    ZooError for max_error outside [0, 1), least < 1, no sample.
    """
    check_logits(val)
    if not (0 <= max_error < 1 and least >= 1):
        raise ZooError(
            f"referring needs max_error in [0, 1) and least of 1 or more. Got {max_error} and {least}; try 0.05 and 20"
        )
    curve = risk_coverage(val.y_true, val.y_score)
    enough = curve["coverage"] * len(val.y_true) >= least - 1e-6
    fits = np.flatnonzero(enough & (curve["risk"] <= max_error + 1e-12))
    return float(curve["threshold"][fits[-1]]) if len(fits) else None


def refer_report(val: Predictions, test: Predictions, max_error: float = 0.05) -> dict[str, Any]:
    """Return how `refer_threshold` of val does on test: the error among what is answered, and how much that is.

    `threshold` (None: everything is referred), `max_error`, `val_coverage`, `test_coverage`, `test_error`,
    `test_error_ci` (None where nothing is answered). Raises ZooError as `refer_threshold`, and for other classes.
    """
    _check_pair(val, test)
    threshold = refer_threshold(val, max_error)
    at_least = math.inf if threshold is None else threshold
    answered = test.y_score.max(axis=1) >= at_least
    error, interval = _rate((test.y_pred != test.y_true)[answered], test.group_codes[answered])
    return {
        "threshold": threshold,
        "max_error": max_error,
        "val_coverage": float(np.mean(val.y_score.max(axis=1) >= at_least)),
        "test_coverage": float(answered.mean()),
        "test_error": error,
        "test_error_ci": interval,
    }


def operating_points(
    val: Predictions, test: Predictions, classes: list[str], negative_class: str | None = None, at: float = 0.95
) -> dict[str, Any] | None:
    """Return sensitivity and specificity on test where val has a specificity, or a sensitivity, of `at` or more.

    A sample is called diseased where 1 - score of the negative class (of two classes, the first unless named) is at
    least the threshold. `sensitivity_at_specificity`: the lowest threshold that keeps val's specificity, hence the
    most sensitive; `specificity_at_sensitivity`: the highest that keeps its sensitivity. Each: `asked`, `threshold`,
    `val_` and `test_sensitivity` and `specificity`, and `_ci` of test's (None where test lacks that side). None where
    there are more classes and no negative one, or val lacks a side. Raises ZooError as `calibration_report`, and for
    `at` outside (0, 1).
    """
    _check_pair(val, test, classes, negative_class)
    found, negative = operating_thresholds(val, classes, negative_class, at), negative_index(classes, negative_class)
    if found is None or negative is None:
        return None
    return {name: {**point, **_on_test(test, negative, point["threshold"])} for name, point in found.items()}


def operating_thresholds(
    val: Predictions, classes: list[str], negative_class: str | None = None, at: float = 0.95
) -> dict[str, Any] | None:
    """Return the thresholds of `operating_points` with what they give on val, without a look at test.

    Each: `asked`, `threshold`, `val_sensitivity`, `val_specificity`. None and ZooError as `operating_points`.
    """
    check_predictions(val, classes, negative_class)
    if not 0 < at < 1:
        raise ZooError(f"the sensitivity or specificity asked must lie in (0, 1). Got {at}; ask for 0.95, say")
    negative = negative_index(classes, negative_class)
    if negative is None or not 0 < np.count_nonzero(val.y_true == negative) < len(val.y_true):
        return None
    score, disease = 1 - val.y_score[:, negative], val.y_true != negative
    # One more threshold above all, at which nobody is called diseased.
    cuts = np.append(np.unique(score), np.nextafter(score.max(), np.inf))
    sick, well = np.sort(score[disease]), np.sort(score[~disease])
    sensitivity = 1 - np.searchsorted(sick, cuts) / len(sick)
    specificity = np.searchsorted(well, cuts) / len(well)
    specific, sensitive = (np.flatnonzero(rate >= at - 1e-12) for rate in (specificity, sensitivity))
    chosen = {"sensitivity_at_specificity": specific[0], "specificity_at_sensitivity": sensitive[-1]}
    return {
        name: {
            "asked": at,
            "threshold": float(cuts[cut]),
            "val_sensitivity": float(sensitivity[cut]),
            "val_specificity": float(specificity[cut]),
        }
        for name, cut in chosen.items()
    }


def _on_test(test: Predictions, negative: int, threshold: float) -> dict[str, Any]:
    called, disease = 1 - test.y_score[:, negative] >= threshold, test.y_true != negative
    row: dict[str, Any] = {}
    for name, hits, side in (("sensitivity", called, disease), ("specificity", ~called, ~disease)):
        row[f"test_{name}"], row[f"test_{name}_ci"] = _rate(hits[side], test.group_codes[side])
    return row


def _rate(hits: np.ndarray, groups: np.ndarray) -> tuple[float | None, list[float] | None]:
    return (float(hits.mean()), list(proportion_interval(hits, groups))) if len(hits) else (None, None)


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


# Checks ---------------------------------------------------------------------------------------------------------------


def _check_pair(
    val: Predictions, test: Predictions, classes: list[str] | None = None, negative_class: str | None = None
) -> None:
    widths = [each.logits.shape[1] for each in (val, test)]
    if widths[0] != widths[1]:
        raise ZooError(
            f"val and test must be scored by one run, with equally many classes. Got {widths[0]} and {widths[1]}; "
            "score the run again on both"
        )
    for each in (val, test):
        check_predictions(each, classes or [str(index) for index in range(widths[0])], negative_class)
