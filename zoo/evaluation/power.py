"""What a test split can show before anything is trained: smallest differences, and how many seeds are worth it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from zoo.errors import ZooError
from zoo.evaluation.proportions import t_quantile

POWER = 0.8
MOST_SEEDS = 20
Array = np.ndarray[Any, np.dtype[Any]]


def detectable_difference(
    disagreement: float,
    n: int,
    *,
    design_effect: float = 1.0,
    units: int | None = None,
    alpha: float = 0.05,
    power: float = POWER,
    seed_variance: float = 0.0,
) -> float | None:
    """Return the smallest true difference of top1 of two models that a paired test shows with the power asked.

    disagreement: share of the images on which one model alone is right, in (0, 1]; a difference d has variance
    (disagreement - d^2) / n (as for McNemar's test, Connor 1987, doi 10.2307/2531961). n: test images; design_effect:
    of groups (`design_effect`); units: groups, for Student's t (n where left out); seed_variance: what the seeds of
    both add. None where even models of which one is never right alone would not be told apart. Raises ZooError for
    numbers outside their ranges.

    >>> round(detectable_difference(0.1, 1000), 4)
    0.0279
    """
    if not (0 < disagreement <= 1 and n >= 1 and design_effect > 0 and 0 < alpha < 1 and 0 < power < 1):
        raise ZooError(
            "power needs a disagreement in (0, 1], an image or more, and alpha and power in (0, 1). Got "
            f"{disagreement}, {n}, {alpha} and {power}"
        )
    degrees = (units or n) - 1
    if degrees < 1:
        return None
    reach = t_quantile(1 - alpha / 2, degrees) + t_quantile(power, degrees)
    size = n / design_effect
    found = reach * math.sqrt((disagreement / size + seed_variance) / (1 + reach**2 / size))
    return found if found <= disagreement else None


def design_effect(group_sizes: Sequence[int], icc: float) -> float:
    """Return by how much groups inflate a variance: 1 + (m - 1) icc, m the mean size by images (Kish 1965, 5.4).

    >>> design_effect([5, 5, 5, 5], 0.5)
    3.0
    """
    sizes = np.asarray(group_sizes, dtype=np.float64)
    mean = float((sizes**2).sum() / sizes.sum())
    return 1 + (mean - 1) * icc


def intraclass_correlation(values: Array, units: Array) -> float:
    """Return how alike values (N,) are within groups, units (N,) int: the ANOVA estimate, cut to [0, 1].

    Donner 1986, doi 10.2307/1403259. 0 where no group has two values, or all are equal.
    """
    sizes = np.bincount(units).astype(np.float64)
    k, n = len(sizes), len(values)
    if k < 2 or n <= k:
        return 0.0
    means = np.bincount(units, weights=values) / sizes
    between = float((sizes * (means - values.mean()) ** 2).sum()) / (k - 1)
    within = float(((values - means[units]) ** 2).sum()) / (n - k)
    size = (n - float((sizes**2).sum()) / n) / (k - 1)
    total = between + (size - 1) * within
    return min(1.0, max(0.0, (between - within) / total)) if total > 0 else 0.0


def seeds_needed(seed_sd: float, se_test: float, share: float = 0.1) -> int:
    """Return how many seeds keep their part of the variance at most `share` of the test images' part; 20 at most.

    seed_sd: spread of single seeds; se_test: standard error by the test images alone, in the same unit.

    >>> seeds_needed(0.01, 0.02), seeds_needed(0.02, 0.02), seeds_needed(0.1, 0.001)
    (3, 10, 20)
    """
    if seed_sd <= 0:
        return 1
    if se_test <= 0:
        return MOST_SEEDS
    return max(1, min(MOST_SEEDS, math.ceil(seed_sd**2 / (share * se_test**2) - 1e-9)))
