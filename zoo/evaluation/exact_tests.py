"""Tests that need no resampling: McNemar, DeLong, Holm, equivalence, and repeated splits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from zoo.errors import ZooError

Array = np.ndarray[Any, np.dtype[Any]]


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted so that any false claim among all has at most the stated chance (Holm 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted = [0.0] * len(p_values)
    worst = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        worst = max(worst, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = worst
    return adjusted


def mcnemar_midp(only_one: int, only_two: int) -> float:
    """Return the two-sided mid-p value of McNemar's exact test (Fagerland et al. 2013, doi 10.1186/1471-2288-13-91).

    only_one, only_two: on how many samples one model alone was right, and the other alone. Samples must be
    independent: it knows nothing of groups. Raises ZooError for a negative number.

    >>> round(mcnemar_midp(1, 7), 4)
    0.0391
    """
    from scipy.stats import binom

    if only_one < 0 or only_two < 0:
        raise ZooError(f"McNemar's test needs counts of 0 or more. Got {only_one} and {only_two}")
    few, n = min(only_one, only_two), only_one + only_two
    if only_one == only_two:
        return 1.0
    return float(min(1.0, 2 * binom.cdf(few, n, 0.5) - binom.pmf(few, n, 0.5)))


def delong(y_true: Array, y_score: Array, units: Array | None = None) -> tuple[Array, Array]:
    """Return AUROCs and their covariance for several scores of the same samples (DeLong et al. 1988).

    y_true: (N,) bool or (N, C) bool for one-vs-rest, whose mean over classes is taken. y_score: (M, N), or
    (M, N, C). units: (N,) int, the group of each sample; with groups the variance is that of Obuchowski 1997
    (doi 10.2307/2533958) with the whole group as the unit. Returns (M,) and (M, M). DeLong: doi 10.2307/2531595.
    Raises ZooError where no class has samples in and out of it, or there are fewer than two of either.
    """
    truth = y_true[:, None] if y_true.ndim == 1 else y_true
    score = y_score[:, :, None] if y_score.ndim == 2 else y_score
    members = [c for c in range(truth.shape[1]) if 0 < truth[:, c].sum() < len(truth)]
    if not members or min(min(truth[:, c].sum(), (~truth[:, c]).sum()) for c in members) < 2:
        raise ZooError("DeLong's test needs two samples in a class and two out of it, or more. Got fewer")
    aucs = np.zeros(len(score))
    influence = np.zeros((len(score), len(truth)))
    for c in members:
        for m, each in enumerate(score[:, :, c]):
            auc, parts = _placements(truth[:, c], each, corrected=units is None)
            aucs[m] += auc / len(members)
            influence[m] += parts / len(members)
    if units is not None:
        count = int(units.max()) + 1
        influence = np.stack([np.bincount(units, weights=row, minlength=count) for row in influence])
        influence *= math.sqrt(count / max(1, count - 1))
    return aucs, influence @ influence.T


def _placements(inside: Array, score: Array, corrected: bool) -> tuple[float, Array]:
    """Return AUROC and what each sample adds to its error; its squares sum to DeLong's variance."""
    low, high = score[~inside], score[inside]
    order_low, order_high = np.sort(low), np.sort(high)
    of_high = (np.searchsorted(order_low, high, "left") + np.searchsorted(order_low, high, "right")) / 2 / len(low)
    below = np.searchsorted(order_high, low, "left") + np.searchsorted(order_high, low, "right")
    of_low = 1 - below / 2 / len(high)
    auc = float(of_high.mean())
    parts = np.empty(len(score))
    for where, values in ((inside, of_high), (~inside, of_low)):
        spread = len(values) * (len(values) - 1 if corrected else len(values))
        parts[where] = (values - auc) / math.sqrt(spread)
    return auc, parts


def delong_p_value(y_true: Array, one: Array, two: Array, units: Array | None = None) -> float:
    """Return the two-sided p-value of equal AUROC of two scores of the same samples, as `delong` has it.

    one, two: (N,), or (N, C) for one-vs-rest. With groups Student's t with one degree fewer than groups.
    """
    from scipy.special import ndtr, stdtr

    aucs, covariance = delong(y_true, np.stack([one, two]), units)
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    difference = float(aucs[0] - aucs[1])
    if variance < 1e-18:
        few = min(int(y_true.sum(axis=0).min()), int((~y_true).sum(axis=0).min()))
        return 1.0 if abs(difference) < 1e-12 else min(1.0, 2 * 0.5**few)
    z = -abs(difference) / math.sqrt(variance)
    return float(2 * (ndtr(z) if units is None else stdtr(max(1, int(units.max())), z)))


def equivalence_p_value(difference: float, standard_error: float, margin: float, degrees: float) -> float:
    """Return the p-value of two one-sided tests that |difference| is at least the margin (Schuirmann 1987).

    Small: the two are equivalent within the margin, which must be stated in advance; doi 10.1007/BF01068419.
    Raises ZooError for a margin that is not above 0.

    >>> round(equivalence_p_value(0.0, 0.01, 0.02, 30), 4)
    0.0273
    """
    from scipy.special import stdtr

    if not margin > 0:
        raise ZooError(f"a margin of equivalence must be above 0, e.g. 0.02 for two points. Got {margin}")
    if standard_error < 1e-9:
        return 0.0 if abs(difference) < margin else 1.0
    return float(stdtr(degrees, (abs(difference) - margin) / standard_error))


def corrected_resampled_t(
    differences: Sequence[float], n_train: float, n_test: float, confidence: float = 0.95
) -> tuple[float, float, float, float]:
    """Return mean difference, ends of its interval and p-value over repeated splits of one dataset.

    differences: one for each split, between two recipes. Training sets of repeated splits overlap, so the plain
    t-test claims too much: the variance is that of Nadeau and Bengio 2003, doi 10.1023/A:1024068626366. n_train,
    n_test: images of a split. Raises ZooError for fewer than two splits.

    >>> [round(each, 4) for each in corrected_resampled_t([0.02, 0.03, 0.04, 0.01, 0.02], 800, 200)]
    [0.024, 0.0028, 0.0452, 0.0349]
    """
    from scipy.special import stdtr, stdtrit

    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 2 or not (n_train > 0 and n_test > 0):
        raise ZooError(
            f"repeated splits need two or more, with images to train and to test on. Got {len(values)} splits of "
            f"{n_train} and {n_test} images; fold the dataset with `zoo data split --folds K`"
        )
    mean = float(values.mean())
    # Scores of a fold come in steps of one image; that they are equal does not make them certain.
    variance = max(float(values.var(ddof=1)), 1 / n_test**2)
    error = math.sqrt((1 / len(values) + n_test / n_train) * variance)
    degrees = len(values) - 1
    half = float(stdtrit(degrees, 0.5 + confidence / 2)) * error
    return mean, mean - half, mean + half, float(2 * stdtr(degrees, -abs(mean) / error))
