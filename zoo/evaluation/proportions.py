"""Intervals of a proportion, with and without groups, and what few of them cost."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np

from zoo.errors import ZooError

NO_VARIANCE = 1e-18  # nothing but rounding
Array = np.ndarray[Any, np.dtype[Any]]


def wilson_interval(correct: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Return the score interval of a proportion, in [0, 1] (Wilson 1927, doi 10.1080/01621459.1927.10502953).

    correct: 0 to n, the number of successes; a mean over seeds need not be whole. Raises ZooError outside.

    >>> [round(end, 4) for end in wilson_interval(81, 263)]
    [0.2553, 0.3662]
    """
    if not (n > 0 and 0 <= correct <= n and 0 < confidence < 1):
        raise ZooError(
            f"an interval needs 0 <= correct <= n, n > 0 and confidence in (0, 1). Got {correct} of {n} at {confidence}"
        )
    return score_interval(correct / n, n, NormalDist().inv_cdf(0.5 + confidence / 2))


def proportion_interval(hits: Array, groups: Array | None = None) -> tuple[float, float]:
    """Return the 95 % interval of the share of hits (N,) bool, in [0, 1].

    Wilson's; where groups (N,) hold more than one sample, for as many independent samples as would have the variance
    of a mean over groups, at most N, with Student's t for few groups: what `top1_interval` does, by the linearised
    variance of a ratio (Cochran 1977, Sampling Techniques, 6.3) in place of a bootstrap. Where groups do not differ
    at all: as many samples as groups. Raises ZooError for no sample.

    >>> [round(end, 4) for end in proportion_interval(np.arange(20) < 15)]
    [0.5313, 0.8881]
    >>> [round(end, 4) for end in proportion_interval(np.arange(20) < 15, np.arange(20) // 5)]
    [0.1307, 0.9836]
    """
    n, correct = len(hits), float(np.count_nonzero(hits))
    codes = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]
    units = int(codes.max()) + 1 if n else 0
    if units == n:
        return wilson_interval(correct, n)
    p = correct / n
    apart = np.bincount(codes, weights=hits - p)
    variance = float((apart**2).sum()) / n**2 * units / max(1, units - 1)
    if variance < NO_VARIANCE or units == 1:
        return wilson_interval(p * units, units)
    return score_interval(p, min(n, p * (1 - p) / variance), t_quantile(0.975, units - 1))


def score_interval(p: float, n: float, z: float) -> tuple[float, float]:
    """Return Wilson's interval of a share p of n samples, n need not be whole, at z standard errors."""
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((centre + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    # At the ends the formula is exact and rounding is not.
    return (0.0 if p == 0 else max(0.0, low), 1.0 if p == 1 else min(1.0, high))


def degrees_of_freedom(variance: float, n_units: int, seed_variances: list[tuple[float, int]]) -> float:
    """Return the degrees of freedom of a variance that comes of groups and seeds (Satterthwaite 1946)."""
    of_units = max(0.0, variance - sum(part for part, _ in seed_variances))
    parts = [(of_units, n_units), *seed_variances]
    below = sum(part**2 / (count - 1) for part, count in parts if count > 1)
    return max(1.0, sum(part for part, _ in parts) ** 2 / below) if below else 1.0


def t_quantile(probability: float, degrees: float) -> float:
    """Return the quantile of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, probability))
