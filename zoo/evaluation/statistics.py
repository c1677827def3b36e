"""Intervals and paired tests over groups and seeds: what may be claimed from one test split.

Groups are resampled together with the seeds: the pigeonhole bootstrap (Owen 2007, doi 10.1214/07-AOAS122), by
`zoo.evaluation.resampling`. All of it needs predictions alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from statistics import NormalDist
from typing import Any

import numpy as np

from zoo.errors import ZooError
from zoo.evaluation.calibration_error import ece_interval
from zoo.evaluation.exact_tests import delong_p_value, equivalence_p_value, holm, mcnemar_midp
from zoo.evaluation.letters import compact_letters
from zoo.evaluation.metrics import METRIC_SIGN
from zoo.evaluation.predictions import Predictions
from zoo.evaluation.proportions import NO_VARIANCE, degrees_of_freedom, score_interval, t_quantile, wilson_interval
from zoo.evaluation.resampling import METRICS, OVER_CLASSES, RARE, Aligned, Array

REPLICATES = 2000
MARGIN = 0.02  # of equivalence: two points
_AFFORDABLE = 5e10  # sums
_PROPORTIONS = ("top1", "sensitivity", "specificity")
_UNBOUNDED = {"log_loss": math.inf, "brier": 2.0}


@dataclass(frozen=True)
class Interval:
    """A recipe's metric, the mean over its seeds, and what is not known of it.

    value, low, high: in the metric's own unit. seed_sd: spread of single seeds (None for one seed). test_se: standard
    error that the test samples alone would give; seed_se: that the seeds alone would give, seed_sd / sqrt(seeds).
    n: samples; n_groups: groups; seeds: how many.
    """

    value: float
    low: float
    high: float
    seed_sd: float | None
    test_se: float
    seed_se: float
    n: int
    n_groups: int
    seeds: int

    def document(self) -> dict[str, Any]:
        """Return the interval as JSON has it."""
        return asdict(self)


@dataclass(frozen=True)
class Pair:
    """Two recipes on the same samples: one minus two, its interval, and the tests.

    p: paired bootstrap of equal `metric`; p_holm: adjusted over all pairs. equivalence_p: of a difference of `margin`
    or more, adjusted likewise. mcnemar_p (top1; exact, mid-p; none with groups, of which it knows nothing) and
    delong_p (auroc): one for each seed, where both recipes have as many; neither is adjusted.
    """

    one: str
    two: str
    metric: str
    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    different: bool
    margin: float
    equivalence_p: float
    equivalent: bool
    mcnemar_p: list[float]
    delong_p: list[float]

    def document(self) -> dict[str, Any]:
        """Return the pair as JSON has it."""
        return asdict(self)


def top1_interval(
    runs: Sequence[Predictions], *, confidence: float = 0.95, replicates: int = REPLICATES, seed: int = 0
) -> tuple[float, float]:
    """Return the interval of a recipe's top1, the mean over its runs (one run for each seed), in [0, 1].

    As `metric_intervals` has it. In simulations with 40 groups or more it covers 0.91 to 0.99 where 0.95 is asked;
    with 11 strongly correlated groups, 0.85 to 0.97. Raises ZooError as that does.
    """
    found = metric_intervals({"": runs}, ["top1"], confidence=confidence, replicates=replicates, seed=seed)
    interval = found["top1"][""]
    assert interval is not None
    return interval.low, interval.high


def affordable_metrics(n: int, n_classes: int, n_runs: int, replicates: int = REPLICATES) -> list[str]:
    """Return the metrics whose intervals take minutes at most: ranks over very many classes and samples do not."""
    members = n_classes if n_classes > 2 else 1
    cheap = n * members * n_runs * replicates <= _AFFORDABLE
    return [metric for metric in METRICS if cheap or metric not in ("auroc", "auprc")]


def metric_intervals(
    runs_by_recipe: Mapping[str, Sequence[Predictions]],
    metrics: Sequence[str],
    *,
    negative: int | None = None,
    confidence: float = 0.95,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> dict[str, dict[str, Interval | None]]:
    """Return metric to recipe to its interval; None where the metric is not defined on the samples.

    Proportions (top1, sensitivity, specificity): Wilson's interval for as many independent samples as would have
    the bootstrap's variance (effective sample size: Franco et al. 2019, doi 10.1093/jssam/smy019); one run without
    groups: Wilson's as it is. ECE, which is biased upwards: `ece_interval`, which may end below the value. Others:
    BCa (Efron 1987, doi 10.1080/01621459.1987.10478410). All with Student's t for few groups or seeds (for BCa as
    in Hesterberg 2015, doi 10.1080/00031305.2015.1089789). Where no replicate differs (all right, or one group): as
    many samples as groups.
    negative: index of the class that is no disease. Raises ZooError where there is no run or sample, the runs
    are of different samples, or a metric is unknown.
    """
    table = Aligned(runs_by_recipe, negative)
    values = {metric: table.values(metric) for metric in metrics}
    defined = [m for m in metrics if any(np.isfinite(each).all() for each in values[m].values())]
    drawn = table.replicates(defined, replicates, seed)
    by_blocks = [m for m in defined if m not in _PROPORTIONS and m != "ece"]
    jackknife = table.jackknife(by_blocks) if table.samples.n_units > 1 else {}
    found: dict[str, dict[str, Interval | None]] = {metric: {} for metric in metrics}
    for metric in metrics:
        for name, points in values[metric].items():
            if metric not in drawn or not np.isfinite(points).all():
                found[metric][name] = None
                continue
            if metric == "ece":
                ends: tuple[float, float] | None = ece_interval(
                    runs_by_recipe[name], "ece", replicates, seed, confidence
                )
            else:
                ends = None
            blocks = jackknife[metric][name].mean(axis=1) if metric in jackknife else None
            found[metric][name] = _interval(table, metric, points, drawn[metric][name], blocks, ends, confidence, seed)
    return found


def _interval(
    table: Aligned,
    metric: str,
    points: Array,
    drawn: Array,
    blocks: Array | None,
    ends: tuple[float, float] | None,
    confidence: float,
    seed: int,
) -> Interval:
    """Return the interval of one recipe; drawn: (R, S) replicates, blocks: (B,) leave-one-out, ends: if known."""
    drawn = drawn[np.isfinite(drawn).all(axis=1)]
    value, seeds = float(points.mean()), len(points)
    means = _over_seeds(drawn, seed)
    seed_variance = float(points.var(ddof=1)) / seeds if seeds > 1 else 0.0
    variance = float(means.var()) if len(means) else 0.0
    units = table.samples.n_units
    degrees = degrees_of_freedom(variance, units, [(seed_variance, seeds)])
    if ends is not None:
        low, high = ends
    elif metric in _PROPORTIONS:
        low, high = _proportion(table, metric, value, variance, degrees, seeds, confidence)
    elif variance < NO_VARIANCE:
        low, high = wilson_interval(value * units, units, confidence) if 0 <= value <= 1 else (value, value)
    else:
        t = t_quantile(0.5 + confidence / 2, degrees)
        top = _UNBOUNDED.get(metric, 1.0)
        low, high = _bca(value, means, np.zeros(1) if blocks is None else blocks, t)
        rare = _rare_variance(table, metric, value)
        if rare > 0:
            half = t * math.sqrt(variance + rare)
            low, high = min(low, value - half), max(high, value + half)
        low, high = min(max(0.0, low), value), max(value, min(top, high))
    return Interval(
        value,
        low,
        high,
        float(points.std(ddof=1)) if seeds > 1 else None,
        float(drawn.mean(axis=1).std()) if len(drawn) else 0.0,
        math.sqrt(seed_variance),
        table.samples.n,
        units,
        seeds,
    )


def _proportion(
    table: Aligned, metric: str, p: float, variance: float, degrees: float, seeds: int, confidence: float
) -> tuple[float, float]:
    """Return Wilson's interval of a share of all samples, or of those with or without disease."""
    samples = table.samples
    counted = np.ones(samples.n, dtype=bool)
    if metric != "top1":
        counted = (samples.y_true != samples.negative) == (metric == "sensitivity")
    n = int(counted.sum())
    if seeds == 1 and not samples.grouped:
        return wilson_interval(round(p * n), n, confidence)
    if variance < NO_VARIANCE:
        units = len(np.unique(samples.units[counted]))
        return wilson_interval(min(p, 1.0) * units, units, confidence)
    independent = p * (1 - p) / variance
    # Seeds that agree by chance, or groups that differ less than they should, make no more samples of them.
    independent = min(independent, n) if seeds == 1 else independent
    return score_interval(p, independent, t_quantile(0.5 + confidence / 2, degrees))


def _rare_variance(table: Aligned, metric: str, value: float) -> float:
    """Return what classes of few units add to the variance of a mean over classes.

    A bootstrap of one or two units that are all right says that nothing varies. For each class with fewer than RARE
    units: the variance of a share of so many, drawn towards a half (Agresti and Coull 1998, doi 10.2307/2685469).
    """
    if metric not in OVER_CLASSES or not 0 <= value <= 1:
        return 0.0
    counts = table.samples.class_units
    counts = counts[counts > 0]
    members = 1 if table.samples.positive is not None and metric in ("auroc", "auprc") else len(counts)
    few = counts[counts < RARE]
    shares = (value * few + 2) / (few + 4)
    return float((shares * (1 - shares) / few).sum()) / members**2


def _over_seeds(drawn: Array, seed: int) -> Array:
    """Return replicates of the mean over seeds, one seed fewer drawn than there are: (R, S) to (R,)."""
    count, seeds = drawn.shape
    if seeds == 1:
        return drawn[:, 0]
    rng = np.random.default_rng([seed, seeds])
    picked = rng.integers(seeds, size=(count, seeds - 1))
    return np.asarray(np.take_along_axis(drawn, picked, axis=1).mean(axis=1))


def _basic(value: float, means: Array, t: float) -> tuple[float, float]:
    tail = NormalDist().cdf(-t)
    low, high = np.quantile(means, [tail, 1 - tail])
    return 2 * value - float(high), 2 * value - float(low)


def _bca(value: float, means: Array, blocks: Array, t: float) -> tuple[float, float]:
    normal = NormalDist()
    below = (float((means < value).sum()) + float((means == value).sum()) / 2) / len(means)
    bias = normal.inv_cdf(min(max(below, 1 / len(means)), 1 - 1 / len(means)))
    blocks = blocks[np.isfinite(blocks)]
    parts = blocks.mean() - blocks if len(blocks) else np.zeros(1)
    cubes, squares = float((parts**3).sum()), float((parts**2).sum())
    skew = cubes / (6 * squares**1.5) if squares > NO_VARIANCE else 0.0
    ends = []
    for z in (-t, t):
        shifted = bias + (bias + z) / max(1e-3, 1 - skew * (bias + z))
        ends.append(float(np.quantile(means, normal.cdf(shifted))))
    return min(ends), max(ends)


# Pairs ------------------------------------------------------------------------------------------------------------


def paired_comparisons(
    runs_by_recipe: Mapping[str, Sequence[Predictions]],
    metric: str = "top1",
    *,
    negative: int | None = None,
    alpha: float = 0.05,
    margin: float = MARGIN,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> list[Pair]:
    """Return every pair of recipes, in the order given: difference of a metric, interval, tests.

    Groups are resampled for all recipes at once, hence paired; seeds for each recipe. A pair's p is the larger of
    two: how often a replicate's difference, centred at 0, is as large as the one seen (few discordant samples),
    and Student's t with the bootstrap's standard error (few groups or seeds). `replicates` grows with the pairs,
    so that Holm's smallest step stays within reach. Equivalence: two one-sided t-tests against the margin, Holm's too;
    of top1 with the variance that it would have at the margin.
    A pair in which the metric is undefined has p-values of 1. Raises ZooError where recipes are of different samples.
    """
    pairs = list(combinations(runs_by_recipe, 2))
    if not pairs:
        return []
    table = Aligned(runs_by_recipe, negative)
    count = max(replicates, math.ceil(10 * len(pairs) / alpha))
    values = table.values(metric)
    drawn = table.replicates([metric], count, seed)[metric]
    means = {name: _over_seeds(each, seed + place) for place, (name, each) in enumerate(drawn.items())}
    found = [
        _difference(
            table,
            values[one],
            values[two],
            means[one] - means[two],
            margin,
            _at_margin(table, metric, one, two, margin),
        )
        for one, two in pairs
    ]
    p_holm, equal_holm = holm([each.p for each in found]), holm([each.equivalence_p for each in found])
    exact = [_exact(table, metric, one, two) for one, two in pairs]
    return [
        Pair(
            one,
            two,
            metric,
            each.difference,
            each.low,
            each.high,
            each.p,
            p,
            p < alpha,
            margin,
            equal,
            equal < alpha,
            *e,
        )
        for (one, two), each, p, equal, e in zip(pairs, found, p_holm, equal_holm, exact, strict=True)
    ]


@dataclass(frozen=True)
class _Difference:
    difference: float
    low: float
    high: float
    p: float
    equivalence_p: float


def _at_margin(table: Aligned, metric: str, one: str, two: str, margin: float) -> tuple[float, float] | None:
    """Return the variance of a sample's difference in top1 as it is seen, and as it would be at the margin.

    Models that differ by the margin disagree on as many images at least; where few are seen to disagree, or none, the
    variance that is seen would make the test of equivalence too sure (Tango 1998, Statistics in Medicine 17, 891).
    """
    if metric != "top1" or margin >= 1:
        return None
    y_true = table.samples.y_true
    right = [np.mean([run.predictions.y_pred == y_true for run in table.runs[name]], axis=0) for name in (one, two)]
    apart = right[0] - right[1]
    share = float((apart**2).mean())
    return share - float(apart.mean()) ** 2, max(share, margin) - margin**2


def _error_at_margin(variance: float, units: int, at_margin: tuple[float, float] | None) -> float:
    """Return the standard error of a difference for the test of equivalence."""
    if at_margin is None:
        return math.sqrt(variance)
    seen, least = at_margin
    # Groups inflate both alike; without any difference nothing is known of groups but their number.
    grown = variance * least / seen if seen > NO_VARIANCE and variance > NO_VARIANCE else least / units
    return math.sqrt(max(variance, grown))


def _difference(
    table: Aligned, one: Array, two: Array, drawn: Array, margin: float, at_margin: tuple[float, float] | None
) -> _Difference:
    seen = float(one.mean() - two.mean())
    if not math.isfinite(seen):
        return _Difference(math.nan, math.nan, math.nan, 1.0, 1.0)
    spread = drawn[np.isfinite(drawn)] - seen
    units = table.samples.n_units
    variance = float(spread.var()) if len(spread) else 0.0
    if units == 1:  # one group says nothing of another
        return _Difference(seen, -1.0, 1.0, 1.0, 1.0)
    # The little that is taken off lets replicates that are equal but for rounding count as such.
    as_large = (1 + int((np.abs(spread) >= abs(seen) - 1e-12).sum())) / (1 + len(spread))
    if variance < NO_VARIANCE:
        # Nothing varies, so nothing is known of how much it would: as much as so many units can say.
        at_margin = at_margin or (0.0, margin - margin**2 if margin < 1 else 0.25)
        equal = equivalence_p_value(seen, _error_at_margin(0.0, units, at_margin), margin, units - 1)
        wide = 1 - wilson_interval(units, units)[0]
        p_value = 1.0 if abs(seen) < 1e-12 else max(as_large, 2 * 0.5**units)
        return _Difference(seen, seen - wide, seen + wide, min(1.0, p_value), equal)
    degrees = degrees_of_freedom(variance, units, [_seed_part(one), _seed_part(two)])
    error, t = math.sqrt(variance), t_quantile(0.975, degrees)
    low, high = _basic(0.0, spread, 1.959964)
    p_value = max(as_large, 2 * _t_tail(-abs(seen) / error, degrees))
    equal = equivalence_p_value(seen, _error_at_margin(variance, units, at_margin), margin, degrees)
    return _Difference(seen, seen + min(low, -t * error), seen + max(high, t * error), p_value, equal)


def _seed_part(points: Array) -> tuple[float, int]:
    return (float(points.var(ddof=1)) / len(points) if len(points) > 1 else 0.0, len(points))


def _exact(table: Aligned, metric: str, one: str, two: str) -> tuple[list[float], list[float]]:
    """Return McNemar's and DeLong's p-values of the runs of two recipes, seed by seed, where they can be had."""
    samples = table.samples
    both = [(a.predictions, b.predictions) for a, b in zip(table.runs[one], table.runs[two], strict=False)]
    if len(table.runs[one]) != len(table.runs[two]):
        return [], []
    if metric == "top1" and not samples.grouped:
        right = [(a.y_pred == samples.y_true, b.y_pred == samples.y_true) for a, b in both]
        return [mcnemar_midp(int((a & ~b).sum()), int((b & ~a).sum())) for a, b in right], []
    if metric != "auroc":
        return [], []
    members = list(range(samples.n_classes)) if samples.positive is None else [samples.positive]
    truth = samples.y_true[:, None] == np.array(members)
    units = samples.units if samples.grouped else None
    try:
        return [], [delong_p_value(truth, a.y_score[:, members], b.y_score[:, members], units) for a, b in both]
    except ZooError:
        return [], []


def paired_p_values(
    runs_by_recipe: Mapping[str, Sequence[Predictions]],
    alpha: float = 0.05,
    replicates: int = REPLICATES,
    seed: int = 0,
    metric: str = "top1",
) -> dict[tuple[str, str], float]:
    """Return the Holm-adjusted two-sided p-value of an equal metric for every pair, as `paired_comparisons` has it."""
    found = paired_comparisons(runs_by_recipe, metric, alpha=alpha, replicates=replicates, seed=seed)
    return {(pair.one, pair.two): pair.p_holm for pair in found}


def paired_letters(
    runs_by_recipe: Mapping[str, Sequence[Predictions]],
    alpha: float = 0.05,
    replicates: int = REPLICATES,
    seed: int = 0,
    metric: str = "top1",
) -> dict[str, str]:
    """Return a compact letter display: two recipes share a letter just where no difference of the metric was shown.

    "a" goes with the best mean. Raises ZooError as `paired_comparisons` does.
    """
    if not runs_by_recipe:
        return {}
    values = Aligned(runs_by_recipe).values(metric)
    pairs = paired_comparisons(runs_by_recipe, metric, alpha=alpha, replicates=replicates, seed=seed)
    return letters_of({name: float(each.mean()) for name, each in values.items()}, pairs)


def letters_of(means: Mapping[str, float], pairs: Sequence[Pair]) -> dict[str, str]:
    """Return the letters of recipes by their mean of the pairs' metric, the best first."""
    sign = METRIC_SIGN[pairs[0].metric] if pairs else 1
    worst = math.inf
    order = sorted(means, key=lambda name: (-sign * means[name] if math.isfinite(means[name]) else worst, name))
    return compact_letters(order, [(pair.one, pair.two) for pair in pairs if pair.different])


def _t_tail(t: float, degrees: float) -> float:
    from scipy.special import stdtr

    return float(stdtr(degrees, t))
