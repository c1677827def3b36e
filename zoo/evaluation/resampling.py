"""The bootstrap behind every interval and paired test: groups are drawn, for all runs and metrics at once.

The unit that is drawn is the group (a patient), never its single samples; one unit fewer is drawn than there are, which
makes the variance unbiased (Rao and Wu 1988, doi 10.1080/01621459.1988.10478591). Metrics are functions of sums over
units, or of sums in the order of a score, so that thousands of replicates are a few matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from zoo.errors import ZooError, nearest, one_line
from zoo.evaluation.metrics import ECE_BINS
from zoo.evaluation.predictions import Predictions

METRICS = (
    "top1",
    "balanced_accuracy",
    "macro_f1",
    "macro_precision",
    "macro_recall",
    "auroc",
    "auprc",
    "sensitivity",
    "specificity",
    "log_loss",
    "brier",
    "ece",
)
RARE = 10  # units: with fewer of a class, some replicates would have none of it
OVER_CLASSES = METRICS[1:9]  # undefined, or of other classes, where a replicate lacks one
_BY_RANK = ("auroc", "auprc")
CHUNK = 2_000_000  # weights held at once: 16 MB
_DENSE = 256  # rows; more are mostly zeros
_EXACT_FLOAT32 = 2**23  # whole numbers below are added without rounding
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Samples:
    """What all runs share, in the order of sorted sample ids: y_true (N,), units (N,) in [0, U), negative class."""

    ids: Array
    y_true: Array
    groups: Array
    units: Array
    n_classes: int
    negative: int | None

    @property
    def n(self) -> int:
        """Return the number of samples."""
        return len(self.y_true)

    @cached_property
    def n_units(self) -> int:
        """Return the number of groups; a sample without one is a group of its own."""
        return int(self.units.max()) + 1

    @property
    def grouped(self) -> bool:
        """Return whether any group has more than one sample."""
        return self.n_units < self.n

    @property
    def positive(self) -> int | None:
        """Return the positive class of two; None where there are more."""
        return 1 - self.negative if self.n_classes == 2 and self.negative is not None else None

    @cached_property
    def class_units(self) -> Array:
        """Return in how many units each class occurs: (C,) int."""
        pairs = np.unique(np.stack([self.units, self.y_true]), axis=1)
        return np.bincount(pairs[1], minlength=self.n_classes)

    @cached_property
    def strata(self) -> Array:
        """Return a number for each unit: that of its rarest class where a class is rare, else 0: (U,) int."""
        pairs = np.unique(np.stack([self.units, self.y_true]), axis=1)
        counts = self.class_units
        if counts[counts > 0].min() >= RARE:
            return np.zeros(self.n_units, dtype=np.int64)
        rarest_last = np.lexsort((pairs[1], -counts[pairs[1]]))
        found = np.zeros(self.n_units, dtype=np.int64)
        found[pairs[0][rarest_last]] = pairs[1][rarest_last]
        return np.unique(found, return_inverse=True)[1].astype(np.int64)


class Aligned:
    """Recipes and their runs (one for each seed) on the same samples.

    runs_by_recipe: recipe to its runs. negative: the index of the class that is no disease; of two classes the first
    where left out. Raises ZooError where a recipe has no scored sample, or runs are of different samples.
    """

    def __init__(self, runs_by_recipe: Mapping[str, Sequence[Predictions]], negative: int | None = None) -> None:
        for name, runs in runs_by_recipe.items():
            if not runs or not len(runs[0].y_true):
                raise ZooError(f"recipe {one_line(name)!r} has no scored samples to compare; score its runs")
        first = next(iter(runs_by_recipe.values()))[0]
        order = _unique_order(first)
        n_classes = first.logits.shape[1]
        self.samples = Samples(
            first.sample_ids[order],
            first.y_true[order],
            first.groups[order],
            _units(first)[order],
            n_classes,
            0 if negative is None and n_classes == 2 else negative,
        )
        self.runs = {
            name: [_Scored(_ordered(run, first, order, name), self.samples) for run in runs]
            for name, runs in runs_by_recipe.items()
        }

    def values(self, metric: str) -> dict[str, Array]:
        """Return each recipe's metric for each of its seeds: (S,) float, NaN where undefined."""
        _check_metric(metric)
        ones = np.ones((self.samples.n_units, 1))
        return {
            name: np.array([run.replicates([metric], ones)[metric][0] for run in runs])
            for name, runs in self.runs.items()
        }

    def replicates(self, metrics: Sequence[str], count: int, seed: int = 0) -> dict[str, dict[str, Array]]:
        """Return bootstrap replicates: metric to recipe to (count, S) float64, NaN where undefined.

        The same draws for all recipes, hence paired. Metrics over classes are stratified where a class is rare.
        """
        stratified = [metric for metric in metrics if metric in OVER_CLASSES and self.samples.strata.any()]
        found: dict[str, dict[str, Array]] = {}
        for part, strata in (
            ([metric for metric in metrics if metric not in stratified], np.zeros(self.samples.n_units, dtype=int)),
            (stratified, self.samples.strata),
        ):
            if part:
                draws = lambda strata=strata: _weights(strata, self.samples.n, count, seed)  # noqa: E731
                found |= self._collect(part, draws, count)
        return found

    def jackknife(self, metrics: Sequence[str], most: int = 200, seed: int = 0) -> dict[str, dict[str, Array]]:
        """Return each metric without one of at most `most` blocks of units: metric to recipe to (blocks, S)."""
        units = self.samples.n_units
        blocks = min(units, most)
        block = np.random.default_rng(seed).permutation(units) * blocks // units
        weights = (block[:, None] != np.arange(blocks)).astype(np.float64)
        return self._collect(metrics, lambda: iter([weights]), blocks)

    def _collect(
        self, metrics: Sequence[str], draws: Callable[[], Iterator[Array]], count: int
    ) -> dict[str, dict[str, Array]]:
        import os

        flat = [(name, place, run) for name, runs in self.runs.items() for place, run in enumerate(runs)]
        found = {m: {name: np.empty((count, len(runs))) for name, runs in self.runs.items()} for m in metrics}
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # Each thread has a run of its own; BLAS would start as many again in each.
        with threadpool_limits(1, "blas"), ThreadPoolExecutor(min(threads, len(flat))) as pool:
            start = 0
            for weights in draws():
                stop = start + weights.shape[1]
                results = pool.map(lambda each, weights=weights: each[2].replicates(metrics, weights), flat)
                for (name, place, _), values in zip(flat, results, strict=True):
                    for metric in metrics:
                        found[metric][name][start:stop, place] = values[metric]
                start = stop
        return found


def _check_metric(metric: str) -> None:
    if metric not in METRICS:
        raise ZooError(
            f"metric must be one of {', '.join(METRICS)}. Got {one_line(metric)!r}{nearest(metric, METRICS)}"
        )


def _unique_order(predictions: Predictions) -> Array:
    ids, order = np.unique(predictions.sample_ids, return_index=True)
    if len(ids) != len(predictions.sample_ids):
        raise ZooError(
            f"samples must have different ids to be compared. Got {len(ids)} ids for {len(predictions.sample_ids)} "
            "samples; import the dataset again"
        )
    return order


def _units(predictions: Predictions) -> Array:
    codes = predictions.group_codes
    return codes if int(codes.max()) + 1 < len(codes) else np.arange(len(codes))


def _ordered(run: Predictions, first: Predictions, order: Array, name: str) -> Predictions:
    """Return the run in the order of the first run's sorted sample ids."""
    own = _unique_order(run)
    for what, key in (("samples", "sample_ids"), ("true labels", "y_true"), ("groups", "groups")):
        if not np.array_equal(getattr(run, key)[own], getattr(first, key)[order]):
            raise ZooError(
                f"runs of different {what} cannot be compared: recipe {one_line(name)!r} was scored on other {what} "
                "than the first; score every recipe on the same split"
            )
    if run.logits.shape[1] != first.logits.shape[1]:
        raise ZooError(
            f"runs of different classes cannot be compared: recipe {one_line(name)!r} has {run.logits.shape[1]} logits "
            f"for each sample, the first {first.logits.shape[1]}; train both on the same classes"
        )
    return Predictions(run.sample_ids[own], run.groups[own], run.y_true[own], run.logits[own])


def _weights(strata: Array, n_samples: int, count: int, seed: int) -> Iterator[Array]:
    """Yield how often each unit is drawn, a chunk of replicates at a time: (U, chunk) float64."""
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK // n_samples)
    members = [np.flatnonzero(strata == each) for each in range(int(strata.max()) + 1)]
    for start in range(0, count, step):
        width = min(step, count - start)
        weights = np.empty((len(strata), width))
        for each in members:
            # A stratum keeps its weight beside others; where there is one, whole numbers are enough.
            weights[each] = draw_units(rng, width, len(each)) * (1 if len(members) == 1 else _scale(len(each)))
        yield weights


def draw_units(rng: np.random.Generator, count: int, units: int) -> Array:
    """Return how often each unit is drawn when one fewer than all are, with replacement: (units, count)."""
    if units == 1:
        return np.ones((1, count))
    chosen = rng.integers(units, size=(units - 1, count)) * count + np.arange(count)
    return np.bincount(chosen.ravel(), minlength=count * units).reshape(units, count).astype(np.float64)


def _scale(units: int) -> float:
    return units / max(1, units - 1)


class _Scored:
    """One run, made ready so that a metric under any weights of units is a few products."""

    def __init__(self, predictions: Predictions, samples: Samples) -> None:
        self.samples, self.predictions = samples, predictions
        self._stacks: dict[tuple[str, ...], tuple[Any, dict[str, slice]]] = {}

    def replicates(self, metrics: Sequence[str], weights: Array) -> dict[str, Array]:
        """Return metrics under weights (U, R) of the units: metric to (R,), NaN where undefined."""
        found: dict[str, Array] = {}
        wanted = [metric for metric in metrics if metric not in _BY_RANK]
        if wanted:
            sums = self._sums(wanted, weights)
            found = {metric: _METRIC[metric](sums, self.samples) for metric in wanted}
        if any(metric in _BY_RANK for metric in metrics):
            ranked = self._ranked(metrics, weights)
            found |= {metric: ranked[metric] for metric in _BY_RANK if metric in metrics}
        return found

    def _sums(self, metrics: Sequence[str], weights: Array) -> dict[str, Array]:
        """Return weighted sums by name: (1, R), (C, R) for each class or (bins, R)."""
        wanted = {"n"} | {name for metric in metrics for name in _NEEDS[metric]}
        stack, places = self._stack(tuple(sorted(wanted)))
        sums = np.asarray(stack @ weights)
        return {name: sums[rows] for name, rows in places.items()}

    def _stack(self, names: tuple[str, ...]) -> tuple[Any, dict[str, slice]]:
        """Return what is summed over units as one matrix (rows, U), and which rows are whose."""
        if names not in self._stacks:
            from scipy.sparse import vstack

            tables = [self._table(name) for name in names]
            ends = np.cumsum([0, *(table.shape[0] for table in tables)])
            whole = vstack(tables, format="csr")
            places = {name: slice(ends[i], ends[i + 1]) for i, name in enumerate(names)}
            self._stacks[names] = (whole.toarray() if whole.shape[0] <= _DENSE else whole, places)
        return self._stacks[names]

    def _table(self, name: str) -> Any:
        """Return one part of the sums, sparse: (rows, U)."""
        samples, y_pred, y_score = self.samples, self.predictions.y_pred, self.predictions.y_score
        y_true, right = samples.y_true, samples.y_true == y_pred
        per_class, no_row = (samples.n_classes, samples.n_units), np.zeros(samples.n, dtype=np.int64)
        if name in ("true", "pred", "tp"):
            rows = y_pred if name == "pred" else y_true
            return _sparse(rows, samples.units, right * 1.0 if name == "tp" else None, per_class)
        if name == "gaps":
            confidence = y_score.max(axis=1)
            bins = np.clip(np.ceil(confidence * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
            return _sparse(bins, samples.units, right - confidence, (ECE_BINS, samples.n_units))
        truth = y_score[np.arange(samples.n), y_true]
        if name == "log_loss":
            tiny = np.finfo(np.float64).eps  # as scikit-learn does: no score is quite 0
            values = -np.log(np.clip(truth, tiny, 1 - tiny))
        elif name == "brier":
            positive = samples.positive
            values = (y_score**2).sum(axis=1) - 2 * truth + 1
            values = values if positive is None else (y_score[:, positive] - (y_true == positive)) ** 2
        else:
            values = right * 1.0 if name == "right" else np.ones(samples.n)
        return _sparse(no_row, samples.units, values, (1, samples.n_units))

    def _ranked(self, metrics: Sequence[str], weights: Array) -> dict[str, Array]:
        """Return AUROC and average precision, one-vs-rest over the classes that a replicate has in and out."""
        exact = weights.shape[0] * 64 < _EXACT_FLOAT32 and self.samples.n * 8 < _EXACT_FLOAT32
        light = weights.astype(np.float32) if exact else weights
        sums = {metric: np.zeros(weights.shape[1]) for metric in _BY_RANK}
        defined = np.zeros(weights.shape[1])
        for order in self._orders:
            auroc, auprc = _rank_metrics(order, light, "auprc" in metrics)
            known = np.isfinite(auroc)
            defined += known
            sums["auroc"] += np.where(known, auroc, 0)
            sums["auprc"] += np.where(known, auprc, 0)
        with np.errstate(invalid="ignore"):
            return {metric: total / defined for metric, total in sums.items()}

    @cached_property
    def _orders(self) -> list[_Order]:
        positive = self.samples.positive
        members = [positive] if positive is not None else range(self.samples.n_classes)
        return [order for order in map(self._order, members) if order is not None]

    def _order(self, member: int) -> _Order | None:
        """Return the class's samples by rising score; None where all or none are of it."""
        score = self.predictions.y_score[:, member]
        inside = self.samples.y_true == member
        if inside.all() or not inside.any():
            return None
        negatives, positives = np.flatnonzero(~inside), np.flatnonzero(inside)
        positives = positives[np.argsort(score[positives], kind="stable")]
        sorted_negatives = np.sort(score[negatives])
        low = np.searchsorted(sorted_negatives, score[positives], "left")
        high = np.searchsorted(sorted_negatives, score[positives], "right")
        # Only sums between the places where a positive stands are needed: one sparse product instead of all ranks.
        stops = np.unique(np.concatenate([low, high]))
        rank = np.empty(len(negatives), dtype=np.int64)
        rank[np.argsort(score[negatives], kind="stable")] = np.arange(len(negatives))
        part = np.searchsorted(stops, rank, "right")
        between = _sparse(part, self.samples.units[negatives], None, (len(stops) + 1, self.samples.n_units))
        return _Order(
            between.astype(np.float32),
            self.samples.units[positives],
            np.searchsorted(stops, low),
            np.searchsorted(stops, high),
            np.searchsorted(score[positives], score[positives], "left"),
        )


@dataclass(frozen=True, eq=False)
class _Order:
    """A class against the rest: negatives summed between stops (stops + 1, U), and each positive's place by score."""

    between: Any
    positives: Array
    low: Array
    high: Array
    first: Array


def _rank_metrics(order: _Order, weights: Array, precision: bool) -> tuple[Array, Array]:
    """Return weighted AUROC (ties count half) and average precision under weights (U, R): (R,) each."""
    below = np.asarray(order.between.astype(weights.dtype) @ weights)
    np.cumsum(below, axis=0, out=below)
    inside = weights[order.positives]
    all_in, all_out = inside.sum(axis=0, dtype=np.float64), below[-1].astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        pairs = below[order.low]
        pairs += below[order.high]
        pairs *= inside
        auroc = pairs.sum(axis=0, dtype=np.float64) / 2 / (all_in * all_out)
        if not precision:
            return auroc, np.zeros_like(auroc)
        above = np.zeros((len(inside) + 1, weights.shape[1]), dtype=weights.dtype)
        np.cumsum(inside[::-1], axis=0, out=above[1:])
        hits = above[len(inside) - order.first]  # positives with at least this score
        share = hits / (hits + (below[-1] - below[order.low]))
        share[inside == 0] = 0
        auprc = (inside * share).sum(axis=0, dtype=np.float64) / all_in
    return auroc, np.where(np.isfinite(auroc), auprc, np.nan)


def _sparse(rows: Array, columns: Array, values: Array | None, shape: tuple[int, int]) -> Any:
    from scipy.sparse import csr_array

    table = csr_array((np.ones(len(rows)) if values is None else values, (rows, columns)), shape=shape)
    table.sum_duplicates()
    return table


def _share(part: Array, whole: Array) -> Array:
    """Return part / whole, 0 where whole is 0."""
    return np.divide(part, whole, out=np.zeros_like(part, dtype=np.float64), where=whole > 0)


def _mean_over(values: Array, counted: Array) -> Array:
    number = counted.sum(axis=0)
    total = np.where(counted, values, 0.0).sum(axis=0)
    return np.asarray(np.divide(total, number, out=np.full(total.shape, np.nan), where=number > 0))


def _f1(sums: dict[str, Array], _: Samples) -> Array:
    both = sums["true"] + sums["pred"]
    return _mean_over(_share(2 * sums["tp"], both), both > 0)


def _precision(sums: dict[str, Array], _: Samples) -> Array:
    return _mean_over(_share(sums["tp"], sums["pred"]), sums["true"] + sums["pred"] > 0)


def _recall(sums: dict[str, Array], _: Samples) -> Array:
    return _mean_over(_share(sums["tp"], sums["true"]), sums["true"] + sums["pred"] > 0)


def _balanced(sums: dict[str, Array], _: Samples) -> Array:
    return _mean_over(_share(sums["tp"], sums["true"]), sums["true"] > 0)


def _sensitivity(sums: dict[str, Array], samples: Samples) -> Array:
    no, n = samples.negative, sums["n"][0]
    if no is None:
        return np.full(len(n), np.nan)
    # Ill and called ill: all who are called ill, without the healthy among them.
    called_ill = n - sums["pred"][no] - (sums["true"][no] - sums["tp"][no])
    return _ratio(called_ill, n - sums["true"][no])


def _specificity(sums: dict[str, Array], samples: Samples) -> Array:
    no = samples.negative
    return np.full(sums["n"].shape[1], np.nan) if no is None else _ratio(sums["tp"][no], sums["true"][no])


def _ratio(part: Array, whole: Array) -> Array:
    """Return part / whole, NaN where whole is nothing but rounding."""
    return np.asarray(np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 1e-9))


_NEEDS = {
    **dict.fromkeys(OVER_CLASSES, ("tp", "pred", "true")),
    **dict.fromkeys(_BY_RANK, ()),
    "top1": ("right",),
    "log_loss": ("log_loss",),
    "brier": ("brier",),
    "ece": ("gaps",),
}
_METRIC: dict[str, Callable[[dict[str, Array], Samples], Array]] = {
    "top1": lambda sums, _: sums["right"][0] / sums["n"][0],
    "balanced_accuracy": _balanced,
    "macro_f1": _f1,
    "macro_precision": _precision,
    "macro_recall": _recall,
    "sensitivity": _sensitivity,
    "specificity": _specificity,
    "log_loss": lambda sums, _: sums["log_loss"][0] / sums["n"][0],
    "brier": lambda sums, _: sums["brier"][0] / sums["n"][0],
    "ece": lambda sums, _: np.abs(sums["gaps"]).sum(axis=0) / sums["n"][0],
}
