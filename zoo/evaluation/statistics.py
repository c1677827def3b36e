"""Intervals and paired tests of top1 over groups and seeds: what may be claimed from one test split.

The unit that is resampled is the group (a patient), never its single samples, together with the seeds: the pigeonhole
bootstrap (Owen 2007, doi 10.1214/07-AOAS122). One unit fewer is drawn than there are, which makes its variance
unbiased (Rao and Wu 1988, doi 10.1080/01621459.1988.10478591).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain, combinations
from statistics import NormalDist
from string import ascii_letters

import numpy as np

from zoo.errors import ZooError, one_line
from zoo.evaluation.predictions import Predictions

_CHUNK = 2_000_000  # drawn numbers held at once: 16 MB
_NO_VARIANCE = 1e-18  # nothing but rounding


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
    return _score_interval(correct / n, n, NormalDist().inv_cdf(0.5 + confidence / 2))


def top1_interval(
    runs: Sequence[Predictions], *, confidence: float = 0.95, replicates: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the interval of a recipe's top1, the mean over its runs (one run for each seed), in [0, 1].

    Wilson's interval for as many independent samples as would have the bootstrap's variance (effective sample size:
    Franco et al. 2019, doi 10.1093/jssam/smy019), with Student's t for few groups or seeds. One run without
    groups: Wilson's as it is. Where no replicate differs (all right, or one group): as many samples as groups.
    In simulations with 40 groups or more it covers 0.91 to 0.99 where 0.95 is asked; with 11 strongly correlated
    groups, 0.85 to 0.97. Raises ZooError where there is no run or sample, or the runs are of different samples.
    """
    table = _Correct({"": runs})
    p = table.mean("")
    if len(runs) == 1 and table.n_units == table.n_samples:
        return wilson_interval(float(table.sums[""].sum()), table.n_samples, confidence)
    variance = float(table.replicates(replicates, seed).var())
    if variance < _NO_VARIANCE:
        return wilson_interval(p * table.n_units, table.n_units, confidence)
    degrees = _degrees(variance, table.n_units, [table.seed_variance("")])
    return _score_interval(p, p * (1 - p) / variance, _t_quantile(0.5 + confidence / 2, degrees))


def _score_interval(p: float, n: float, z: float) -> tuple[float, float]:
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((centre + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    # At the ends the formula is exact and rounding is not.
    return (0.0 if p == 0 else max(0.0, low), 1.0 if p == 1 else min(1.0, high))


def paired_letters(
    runs_by_recipe: Mapping[str, Sequence[Predictions]],
    alpha: float = 0.05,
    replicates: int = 2000,
    seed: int = 0,
) -> dict[str, str]:
    """Return a compact letter display of top1: two recipes share a letter just where no difference was shown.

    "a" goes with the best mean. Differences: `paired_p_values` below alpha. Raises ZooError as that does.
    """
    if not runs_by_recipe:
        return {}
    p_values = paired_p_values(runs_by_recipe, alpha=alpha, replicates=replicates, seed=seed)
    table = _Correct(runs_by_recipe)
    order = sorted(runs_by_recipe, key=lambda name: (-table.mean(name), name))
    return compact_letters(order, [pair for pair, p in p_values.items() if p < alpha])


def paired_p_values(
    runs_by_recipe: Mapping[str, Sequence[Predictions]],
    alpha: float = 0.05,
    replicates: int = 2000,
    seed: int = 0,
) -> dict[tuple[str, str], float]:
    """Return the Holm-adjusted two-sided p-value of equal top1 for every pair of recipes.

    Groups are resampled for all recipes at once, hence paired; seeds for each recipe. A pair's p is the larger of
    two: how often a replicate's difference, centred at 0, is as large as the one seen (few discordant samples),
    and Student's t with the bootstrap's standard error (few groups or seeds). `replicates` grows with the pairs,
    so that Holm's smallest step stays within reach. Raises ZooError where recipes are of different samples.
    """
    pairs = list(combinations(runs_by_recipe, 2))
    if not pairs:
        return {}
    table = _Correct(runs_by_recipe)
    means = table.replicates(max(replicates, math.ceil(10 * len(pairs) / alpha)), seed)
    column = {name: index for index, name in enumerate(runs_by_recipe)}
    raw = []
    for one, two in pairs:
        seen = table.mean(one) - table.mean(two)
        spread = means[:, column[one]] - means[:, column[two]] - seen
        seed_variances = [table.seed_variance(one), table.seed_variance(two)]
        raw.append(_p_value(seen, spread, table.n_units, seed_variances))
    return dict(zip(pairs, holm(raw), strict=True))


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


def compact_letters(order: Sequence[str], different: Collection[tuple[str, str]]) -> dict[str, str]:
    """Return letters such that two names share one just where they are not a pair of `different`.

    order: names, best first; "a" goes with the first. Insert and absorb, then sweep (Piepho 2004,
    doi 10.1198/1061860043515).

    >>> compact_letters(["x", "y", "z"], [("x", "z")])
    {'x': 'a', 'y': 'ab', 'z': 'b'}
    """
    rank = {name: index for index, name in enumerate(order)}
    columns = [frozenset(rank.values())] if rank else []
    for one, two in sorted(tuple(sorted((rank[one], rank[two]))) for one, two in different):
        columns = _split(columns, one, two)
    columns = sorted(_sweep(columns), key=sorted)
    letters = list(zip(columns, _letters(), strict=False))
    return {name: "".join(letter for column, letter in letters if rank[name] in column) for name in order}


def _split(columns: list[frozenset[int]], one: int, two: int) -> list[frozenset[int]]:
    """Insert: a column with both becomes two with one each. Absorb: a column within another goes."""
    kept = [column for column in columns if not {one, two} <= column]
    halves = {column - {gone} for column in columns if {one, two} <= column for gone in (one, two)}
    for half in sorted(halves, key=lambda column: (-len(column), sorted(column))):
        if not any(half <= column for column in kept):
            kept.append(half)
    return kept


def _sweep(columns: list[frozenset[int]]) -> list[frozenset[int]]:
    """Leave out columns whose pairs all lie together in other columns."""
    kept = sorted(columns, key=sorted)
    for column in reversed(kept.copy()):
        others = [other for other in kept if other != column]
        pairs = combinations(sorted(column), 2) if len(column) > 1 else [tuple(column) * 2]
        if all(any({one, two} <= other for other in others) for one, two in pairs):
            kept = others
    return kept


def _letters() -> Iterator[str]:
    further = (chr(code) for code in range(0xC0, 0x2FFFF) if chr(code).isalpha())
    return chain(ascii_letters, further)


class _Correct:
    """How many samples of each group every run has right, for recipes that were scored on the same samples."""

    def __init__(self, runs_by_recipe: Mapping[str, Sequence[Predictions]]) -> None:
        for name, runs in runs_by_recipe.items():
            if not runs or not len(runs[0].y_true):
                raise ZooError(f"recipe {one_line(name)!r} has no scored samples to compare; score its runs")
        first = next(iter(runs_by_recipe.values()))[0]
        order = _unique_order(first)
        units = _units(first)[order]
        self.n_samples, self.n_units = len(units), int(units.max()) + 1
        self.sizes = np.bincount(units).astype(np.float64)
        self.sums: dict[str, np.ndarray] = {}
        for name, runs in runs_by_recipe.items():
            rows = [_correct(run, first, order, name) for run in runs]
            self.sums[name] = np.stack([np.bincount(units, weights=row) for row in rows])

    def mean(self, name: str) -> float:
        """Return a recipe's top1, the mean over its runs."""
        return float(self.sums[name].sum() / (self.n_samples * len(self.sums[name])))

    def seed_variance(self, name: str) -> tuple[float, int]:
        """Return how much of the variance of a recipe's mean is due to its seeds, and how many they are."""
        scores = self.sums[name].sum(axis=1) / self.n_samples
        return (float(scores.var(ddof=1)) / len(scores) if len(scores) > 1 else 0.0, len(scores))

    def replicates(self, count: int, seed: int) -> np.ndarray:
        """Return `count` bootstrap replicates of every recipe's mean top1: (count, recipes)."""
        rng = np.random.default_rng(seed)
        seeds = {name: _draws(rng, count, len(sums)) / max(1, len(sums) - 1) for name, sums in self.sums.items()}
        found = np.empty((count, len(self.sums)))
        step = max(1, _CHUNK // self.n_units)
        for start in range(0, count, step):
            part = slice(start, min(count, start + step))
            weights = _draws(rng, part.stop - start, self.n_units)
            drawn = weights @ self.sizes
            for column, (name, sums) in enumerate(self.sums.items()):
                found[part, column] = ((weights @ sums.T) * seeds[name][part]).sum(axis=1) / drawn
        return found


def _unique_order(predictions: Predictions) -> np.ndarray:
    ids, order = np.unique(predictions.sample_ids, return_index=True)
    if len(ids) != len(predictions.sample_ids):
        raise ZooError(
            f"samples must have different ids to be compared. Got {len(ids)} ids for {len(predictions.sample_ids)} "
            "samples; import the dataset again"
        )
    return order


def _units(predictions: Predictions) -> np.ndarray:
    codes = predictions.group_codes
    return codes if int(codes.max()) + 1 < len(codes) else np.arange(len(codes))


def _correct(run: Predictions, first: Predictions, order: np.ndarray, name: str) -> np.ndarray:
    """Return 1.0 where the run is right, in the order of the first run's sorted sample ids."""
    own = _unique_order(run)
    for what, key in (("samples", "sample_ids"), ("true labels", "y_true"), ("groups", "groups")):
        if not np.array_equal(getattr(run, key)[own], getattr(first, key)[order]):
            raise ZooError(
                f"runs of different {what} cannot be compared: recipe {one_line(name)!r} was scored on other {what} "
                "than the first; score every recipe on the same split"
            )
    return np.asarray((run.y_pred == run.y_true)[own], dtype=np.float64)


def _draws(rng: np.random.Generator, count: int, units: int) -> np.ndarray:
    """Return how often each unit is drawn when one fewer than all are, with replacement: (count, units)."""
    if units == 1:
        return np.ones((count, 1))
    chosen = rng.integers(units, size=(count, units - 1)) + units * np.arange(count)[:, None]
    return np.bincount(chosen.ravel(), minlength=count * units).reshape(count, units).astype(np.float64)


def _degrees(variance: float, n_units: int, seed_variances: list[tuple[float, int]]) -> float:
    """Return the degrees of freedom of a variance that comes of groups and seeds (Satterthwaite 1946)."""
    of_units = max(0.0, variance - sum(part for part, _ in seed_variances))
    parts = [(of_units, n_units), *seed_variances]
    below = sum(part**2 / (count - 1) for part, count in parts if count > 1)
    return max(1.0, sum(part for part, _ in parts) ** 2 / below) if below else 1.0


def _t_quantile(probability: float, degrees: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(degrees, probability))


def _p_value(seen: float, spread: np.ndarray, n_units: int, seed_variances: list[tuple[float, int]]) -> float:
    from scipy.special import stdtr

    variance = float(spread.var())
    if n_units == 1 or abs(seen) < 1e-12:
        return 1.0
    # The little that is taken off lets replicates that are equal but for rounding count as such.
    as_large = (1 + int((np.abs(spread) >= abs(seen) - 1e-12).sum())) / (1 + len(spread))
    if variance < _NO_VARIANCE:
        return as_large
    degrees = _degrees(variance, n_units, seed_variances)
    return max(as_large, float(2 * stdtr(degrees, -abs(seen) / math.sqrt(variance))))
