"""The choice of what is deployed: limits first, then not worse than the best on val, then the cheapest.

A pure function of candidates: it measures nothing and opens no file. What is "not worse" is a non-inferiority test on
the paired interval by groups (`zoo.evaluation.statistics`): the lower end of candidate minus best may not lie below
minus the margin, at 97.5 % one-sided.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from zoo.errors import ZooError, nearest, one_line
from zoo.evaluation.metrics import METRIC_SIGN
from zoo.evaluation.predictions import Predictions
from zoo.evaluation.resampling import METRICS
from zoo.evaluation.statistics import Interval, metric_intervals, paired_comparisons

COSTS = {"latency": "ms", "size": "MB", "memory": "MB"}  # what may be limited, or made small, and its unit
PERCENTILES = ("p50", "p95", "p99")
OF_A_CLASS = ("recall", "precision", "f1")
_ROUNDING = 1e-12


@dataclass(frozen=True, eq=False)
class Candidate:
    """Something that could be deployed, or why it cannot.

    network: the same for candidates that are one network to within rounding, such as a run's float32 in two formats.
    predictions: of the artefact on val; val: its metrics, as `compute_metrics` gives them. costs: `latency` in ms,
    `size` and `memory` in MB (10^6 bytes). reason: why there is no choosing it, where there is none. facts: whatever
    else a table may want.
    """

    name: str
    network: str
    predictions: Predictions | None = None
    val: Mapping[str, Any] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=dict)
    reason: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def value(self, key: str) -> float:
        """Return a cost, a metric on val, or that of a class (`recall:CLASS`); NaN where it is not known."""
        found: Any = self.costs.get(key)
        if key in METRICS:
            found = self.val.get(key)
        elif ":" in key:
            name, _, label = key.partition(":")
            found = self.val.get("per_class", {}).get(label, {}).get(name)
        return math.nan if found is None else float(found)


@dataclass(frozen=True)
class Limit:
    """What a candidate must keep: a value `at most` or `at least` a bound.

    key: as `Candidate.value` takes it. name: what it is called in a sentence.
    """

    key: str
    sense: Literal["at most", "at least"]
    bound: float
    name: str

    def keeps(self, value: float) -> bool:
        """Return whether a value is inside; one that is not known is not."""
        return value <= self.bound if self.sense == "at most" else value >= self.bound

    def excess(self, value: float) -> float:
        """Return how far outside a value is, as a part of the bound; infinity where it is not known."""
        if not math.isfinite(value):
            return math.inf
        return abs(value - self.bound) / max(abs(self.bound), _ROUNDING)


@dataclass(frozen=True)
class Difference:
    """Candidate minus best, turned so that more is better, with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Choice:
    """What was chosen under limits and a margin, and what it was held against.

    chosen, best, runner_up: None where nothing fits (or nothing is left). fitting: names that keep every limit; misses:
    name to the limits that are not kept. differences: of each that fits, against the best.
    """

    chosen: Candidate | None
    best: Candidate | None
    runner_up: Candidate | None
    fitting: tuple[str, ...]
    misses: Mapping[str, tuple[Limit, ...]]
    differences: Mapping[str, Difference]
    not_worse: tuple[str, ...]


def make_limits(
    *,
    max_latency_ms: float | None = None,
    max_size_mb: float | None = None,
    max_memory_mb: float | None = None,
    minimums: Mapping[str, float] | None = None,
    percentile: str = "p50",
    classes: Sequence[str] = (),
    negative_class: str | None = None,
) -> list[Limit]:
    """Return the limits of a choice.

    minimums: metric on val, or `recall:CLASS`, `precision:CLASS`, `f1:CLASS`, to its least value in [0, 1]. Raises
    ZooError for what is no metric, is not defined on these classes, or is out of range.
    """
    limits = []
    for key, bound in (("latency", max_latency_ms), ("size", max_size_mb), ("memory", max_memory_mb)):
        if bound is None:
            continue
        if not 0 < bound < math.inf:
            raise ZooError(f"the most {key} must be a number of {COSTS[key]} above 0. Got {bound}")
        limits.append(Limit(key, "at most", float(bound), f"{percentile} latency" if key == "latency" else key))
    for key, least in (minimums or {}).items():
        _check_minimum(key, least, classes, negative_class)
        name, _, label = key.partition(":")
        limits.append(Limit(key, "at least", float(least), f"{name} of {one_line(label, 40)}" if label else key))
    return limits


def parse_minimum(text: str) -> tuple[str, float]:
    """Return the metric and the value of `METRIC=V`; raises ZooError where it is none.

    >>> parse_minimum("recall:malignant=0.9")
    ('recall:malignant', 0.9)
    """
    key, sign, value = text.rpartition("=")
    try:
        if not sign or not key.strip():
            raise ValueError
        return key.strip(), float(value)
    except ValueError:
        hint = "; write a percentage as a fraction, 0.95" if value.strip().endswith("%") else ""
        raise ZooError(f"--min must be METRIC=V, e.g. sensitivity=0.95. Got {one_line(text, 80)!r}{hint}") from None


def parse_minimums(texts: Iterable[str]) -> dict[str, float]:
    """Return metric to value of several `METRIC=V`; raises ZooError where one is none, or a metric comes twice."""
    found: dict[str, float] = {}
    for key, value in map(parse_minimum, texts):
        if key in found:
            raise ZooError(f"--min {one_line(key, 80)} is given twice, as {found[key]:g} and {value:g}; give it once")
        found[key] = value
    return found


def _check_minimum(key: str, least: float, classes: Sequence[str], negative_class: str | None) -> None:
    name, colon, label = key.partition(":")
    allowed = [metric for metric in METRICS if METRIC_SIGN[metric] > 0]
    if name in METRICS and METRIC_SIGN[name] < 0:
        raise ZooError(f"of {name} less is better, so it has no least value; --metric {name} ranks by it")
    if colon and name in OF_A_CLASS:
        if label not in classes:
            shown = ", ".join(one_line(each, 40) for each in classes)
            raise ZooError(f"{name} must be of one of {shown}. Got {one_line(label, 80)!r}{nearest(label, classes)}")
    elif colon or name not in allowed:
        known = [*allowed, *(f"{each}:CLASS" for each in OF_A_CLASS)]
        near = nearest(name, allowed)
        raise ZooError(f"a least value must be of one of {', '.join(known)}. Got {one_line(key, 80)!r}{near}")
    check_defined(name, classes, negative_class)
    if not 0 <= least <= 1:
        fix = f"; write {least / 100:g}" if 2 <= least <= 100 else ""
        raise ZooError(f"the least {one_line(key, 80)} must be in [0, 1]. Got {least:g}{fix}")


def largest_margin(metric: str) -> float:
    """Return the most that may be asked of a margin: 1 of a metric in [0, 1] of which more is better, else no end."""
    return 1.0 if METRIC_SIGN[metric] > 0 else math.inf


def check_defined(metric: str, classes: Sequence[str], negative_class: str | None) -> None:
    """Raise ZooError where a metric needs a class of the healthy, and these classes have none."""
    if metric in ("sensitivity", "specificity") and len(classes) > 2 and negative_class is None:
        raise ZooError(
            f"{metric} is not defined: of {len(classes)} classes none is said to be healthy; set negative_class in "
            "dataset.toml, or take the recall of a class, recall:CLASS=V with --min"
        )


class Choosing:
    """Candidates, a metric and a cost: chooses under any limits and margin; intervals are computed once.

    metric: what is ranked on val. cost: `latency`, `size` or `memory`, what is made small. negative: the index of the
    class that is no disease. Raises ZooError for names that do not exist, candidates of one name, or of different
    samples.
    """

    def __init__(
        self, candidates: Sequence[Candidate], metric: str = "top1", cost: str = "latency", negative: int | None = None
    ) -> None:
        _check_name("metric", metric, METRICS)
        _check_name("cost", cost, COSTS)
        names = [each.name for each in candidates]
        if len(set(names)) < len(names):
            raise ZooError(f"candidates must have different names. Got {', '.join(sorted(names))}")
        self.metric, self.cost, self.sign = metric, cost, METRIC_SIGN[metric]
        self.negative = negative
        self.candidates = {each.name: each for each in sorted(candidates, key=lambda each: each.name)}
        self.ready = [each for each in self.candidates.values() if each.reason is None]
        self._pairs: dict[tuple[str, str], Difference] = {}

    def intervals(self) -> dict[str, Interval | None]:
        """Return name to the metric's interval on val."""
        runs = {each.name: [each.predictions] for each in self.ready if each.predictions is not None}
        if not runs:
            return {}
        return metric_intervals(runs, [self.metric], negative=self.negative)[self.metric]

    def choose(self, limits: Sequence[Limit], margin: float, without: Iterable[str] = ()) -> Choice:
        """Return the choice; without: names that are left out. Raises ZooError for a margin below 0."""
        if not 0 <= margin < math.inf:
            raise ZooError(f"the margin must be 0 or more, e.g. 0.01 for one point. Got {margin}")
        chosen, best, fitting, misses, differences, not_worse = self._choose(limits, margin, frozenset(without))
        second = None
        if chosen is not None:
            second = self._choose(limits, margin, frozenset({*without, chosen.name}))[0]
        names = tuple(each.name for each in fitting)
        return Choice(chosen, best, second, names, misses, differences, tuple(each.name for each in not_worse))

    def _choose(self, limits: Sequence[Limit], margin: float, without: frozenset[str]) -> Any:
        ranked = [each for each in self.ready if each.name not in without]
        misses = {
            each.name: tuple(limit for limit in limits if not limit.keeps(each.value(limit.key))) for each in ranked
        }
        fitting = [each for each in ranked if not misses[each.name] and math.isfinite(each.value(self.metric))]
        if not fitting:
            return None, None, [], misses, {}, []
        best = min(fitting, key=lambda each: (-self.sign * each.value(self.metric), *self._dearness(each)))
        differences = {each.name: self.against(each, best) for each in fitting}
        not_worse = [each for each in fitting if differences[each.name].low >= -margin - _ROUNDING]
        return min(not_worse, key=self._dearness), best, fitting, misses, differences, not_worse

    def _dearness(self, candidate: Candidate) -> tuple[Any, ...]:
        """Return what candidates are sorted by, the cheapest first; of equals the better, then the rest."""
        rest = [candidate.value(each) for each in COSTS if each != self.cost]
        own = [candidate.value(self.cost), -self.sign * candidate.value(self.metric), *rest]
        return (*(math.inf if math.isnan(each) else each for each in own), candidate.name)

    def cheaper(self, one: Candidate, two: Candidate) -> bool:
        """Return whether one costs less than the other."""
        return one.value(self.cost) < two.value(self.cost)

    def against(self, candidate: Candidate, best: Candidate) -> Difference:
        """Return candidate minus best on val with its paired interval, turned so that more is better.

        One network in two formats is no worse than itself: its labels were found to be the same when it was exported.
        """
        if candidate.network == best.network:
            return Difference(0.0, 0.0, 0.0)
        key = (candidate.name, best.name)
        if key not in self._pairs:
            assert candidate.predictions is not None and best.predictions is not None
            runs = {"one": [candidate.predictions], "two": [best.predictions]}
            pair = paired_comparisons(runs, self.metric, negative=self.negative)[0]
            ends = sorted((self.sign * pair.low, self.sign * pair.high))
            self._pairs[key] = Difference(self.sign * pair.difference, *ends)
        return self._pairs[key]


def _check_name(what: str, name: str, allowed: Iterable[str]) -> None:
    if name not in (known := tuple(allowed)):
        near = nearest(name, known)
        raise ZooError(f"{what} must be one of {', '.join(known)}. Got {one_line(name, 80)!r}{near}")


def nearest_misses(choosing: Choosing, choice: Choice) -> list[dict[str, Any]]:
    """Return the candidates that break a limit, those that break few by little first, with by how much each fails."""
    found = []
    for name, limits in choice.misses.items():
        if not limits:
            continue
        candidate = choosing.candidates[name]
        broken = []
        for limit in limits:
            value = candidate.value(limit.key)
            known = math.isfinite(value)
            broken.append(
                {
                    "limit": f"{limit.name} {limit.sense}",
                    "bound": limit.bound,
                    "value": value if known else None,
                    "by": abs(value - limit.bound) if known else None,
                    "unit": COSTS.get(limit.key, ""),
                }
            )
        excess = [limit.excess(candidate.value(limit.key)) for limit in limits]
        found.append(((len(limits), sum(excess), name), {"name": name, "breaks": broken}))
    return [row for _, row in sorted(found, key=lambda pair: pair[0])]
