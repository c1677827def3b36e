"""The choice of what is deployed: what there is of a dataset's runs, exported, measured, and chosen from on val."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.benchmark.offers import OF_SCORES, Offer, best_seeds, gather, score_test, set_apart, without_run
from zoo.data.manifest import Dataset, load_dataset
from zoo.deployment.bundle import Bundle
from zoo.deployment.latency import check_threads, latencies
from zoo.deployment.speed import Latency
from zoo.errors import Interrupted, ZooError, nearest, one_line
from zoo.evaluation.floors import FLOOR_METRICS, dataset_floors
from zoo.evaluation.ledger import looks_at_test
from zoo.evaluation.metrics import negative_index
from zoo.evaluation.resampling import METRICS
from zoo.evaluation.statistics import metric_intervals
from zoo.files import Home, home
from zoo.reporting.changes import what_would_change
from zoo.reporting.comparison import refuse_different
from zoo.reporting.pick import (
    COSTS,
    PERCENTILES,
    Candidate,
    Choice,
    Choosing,
    Limit,
    check_defined,
    largest_margin,
    make_limits,
    nearest_misses,
)
from zoo.reporting.picked import candidate_rows, change_words, limit_words, miss_words, notes_of, reason_of
from zoo.runs import LEAKED_SOURCE, Run, find_run, runs_on_split

if TYPE_CHECKING:
    import pandas as pd

MARGIN = 0.01  # one point
_MB, _MIB = 1e6, 1 << 20
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Pick:
    """What was chosen: a run and its bundle, in words why, and everything it was held against.

    `export(pick)` gives the run's bundle. document: what `zoo pick --json` prints.
    """

    run: Run
    bundle: Bundle
    reason: str
    document: Mapping[str, Any] = field(repr=False)

    @property
    def test(self) -> Mapping[str, Any] | None:
        """Return the artefact's scores on test with their intervals; None where test was not to be looked at."""
        found: Mapping[str, Any] | None = self.document["test"]
        return found


@dataclass(frozen=True)
class Wish:
    """What is asked of the choice.

    metric: ranks on val. cost: `latency`, `size` or `memory`, what is made small. margin: of non-inferiority, in the
    metric's unit. percentile: of the latency that is limited and ranked by, `p50`, `p95` or `p99`. minimums: metric on
    val, or `recall:CLASS` and such, to its least value.
    """

    max_latency_ms: float | None = None
    max_size_mb: float | None = None
    max_memory_mb: float | None = None
    minimums: Mapping[str, float] = field(default_factory=dict)
    margin: float = MARGIN
    metric: str = "top1"
    cost: str = "latency"
    percentile: str = "p50"

    def limits(self, classes: list[str], negative_class: str | None = None) -> list[Limit]:
        """Return the limits; raises ZooError for what is out of range or is not defined on these classes."""
        for what, value, known in (
            ("--metric", self.metric, METRICS),
            ("--cost", self.cost, COSTS),
            ("--percentile", self.percentile, PERCENTILES),
        ):
            if value not in known:
                raise ZooError(
                    f"{what} must be one of {', '.join(known)}. Got {one_line(value, 80)!r}{nearest(value, known)}"
                )
        most = largest_margin(self.metric)
        if not (0 <= self.margin <= most and self.margin < math.inf):
            raise ZooError(
                f"the margin must be {'in [0, 1]' if most == 1 else '0 or more'} of {self.metric}; 0.01 is one point. "
                f"Got {self.margin:g}"
            )
        check_defined(self.metric, classes, negative_class)
        return make_limits(
            max_latency_ms=self.max_latency_ms,
            max_size_mb=self.max_size_mb,
            max_memory_mb=self.max_memory_mb,
            minimums=self.minimums,
            percentile=self.percentile,
            classes=classes,
            negative_class=negative_class,
        )


def pick(
    source: pd.DataFrame | Iterable[Run | str] | str,
    root: Home | None = None,
    *,
    max_latency_ms: float | None = None,
    max_size_mb: float | None = None,
    max_memory_mb: float | None = None,
    minimums: Mapping[str, float] | None = None,
    margin: float = MARGIN,
    metric: str = "top1",
    cost: str = "latency",
    percentile: str = "p50",
    threads: int | None = None,
    again: bool = False,
    test: bool = True,
    progress: Progress | None = None,
) -> Pick:
    """Return what to deploy: of all that keeps the limits, the cheapest that is not worse than the best on val.

    source: a table of `compare`, runs or their names, or a dataset's name for all runs on its present split. Of each
    recipe the seed that is best on val stands for it; it is exported as ONNX in float32 where it has no such bundle,
    and its other bundles are candidates too. Their latencies are measured on this machine (`threads`, `again` as
    `latencies` takes them), limits and ranking as `Wish` says. "Not worse": the lower end of the paired 95 % interval
    by groups of candidate minus best is above minus `margin`. test: score what was chosen on test, once, noted in the
    ledger before. progress: called with a step's name, what is done and in all.

    Raises ZooError, with the nearest misses, where nothing keeps the limits; and for runs that are of different
    splits or not of the dataset's present one, or none of which has its present classes in order.
    """
    wish = Wish(max_latency_ms, max_size_mb, max_memory_mb, minimums or {}, margin, metric, cost, percentile)
    found = outcome(source, wish, root, threads=threads, again=again, test=test, progress=progress)
    if found.pick is None:
        raise ZooError(found.failure())
    return found.pick


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a choice came to: `pick` None where nothing fits; the document and figure are there in any case."""

    pick: Pick | None
    document: dict[str, Any]
    limits: list[Limit]

    def failure(self, misses: int = 3) -> str:
        """Return in one line that nothing fits, and what is nearest to it."""
        rows = self.document["nearest_misses"][:misses]
        nearest_ones = " | ".join(miss_words(row) for row in rows)
        return f"{self.document['reason']}; nearest: {nearest_ones}" if rows else str(self.document["reason"])

    def save_figure(self, file: Path) -> None:
        """Write the figure of scores over costs, PNG; raises ZooError where it cannot be written."""
        from zoo.reporting.pareto import plot_pareto
        from zoo.reporting.plots import save_figure

        save_figure(plot_pareto(self.document, self.limits), file)


def outcome(
    source: pd.DataFrame | Iterable[Run | str] | str,
    wish: Wish,
    root: Home | None = None,
    *,
    threads: int | None = None,
    again: bool = False,
    test: bool = True,
    progress: Progress | None = None,
) -> Outcome:
    """Return what `pick` returns, and what came of it where nothing fits."""
    root, shown = root or home(), progress or (lambda *_: None)
    dataset, runs, failed = _runs(source, root)
    limits = wish.limits(dataset.classes, dataset.negative_class)
    check_threads(threads)
    runs, apart = set_apart(runs, dataset)
    chosen_runs, broken, notes = best_seeds(runs, wish.metric, dataset)
    offers, more = gather(chosen_runs, runs, dataset, root, shown)
    offers += apart + broken + without_run(failed, {each.run.record.recipe for each in offers})
    ready = [each for each in offers if each.bundle is not None]
    speeds = latencies(
        [each.bundle for each in ready if each.bundle is not None],
        root,
        eager=list({each.run.name: each.run for each in ready}.values()),
        threads=threads,
        again=again,
        progress=lambda done, total: shown("measuring latencies", done, total),
    )
    candidates = [_candidate(each, speeds.get(each.name), wish.percentile) for each in offers]
    negative = negative_index(dataset.classes, dataset.negative_class)
    choosing = Choosing(candidates, wish.metric, wish.cost, negative)
    choice = choosing.choose(limits, wish.margin)
    floors = dataset_floors(dataset, _policy(runs), "val")
    document = _document(choosing, choice, limits, wish, floors)
    document |= {"dataset": dataset.name, "split_digest": dataset.split_digest, "floors": floors}
    document |= _measured(speeds)
    document["notes"] += [*_of_answers(wish.metric, dataset.classes), *notes, *more, *_leaks(runs)]
    offer = next((each for each in offers if choice.chosen and each.name == choice.chosen.name), None)
    document |= {"run": offer.run.name if offer else None, "bundle": offer.name if offer else None, "test": None}
    if offer is None or offer.bundle is None:
        return Outcome(None, document, limits)
    if test:
        try:
            document["test"] = score_test(offer, dataset, root, lambda done, of: shown("scoring test", done, of))
        except Interrupted:
            raise
        except ZooError as error:  # the choice, made on val, stands
            document["notes"].append(f"test could not be scored: {one_line(error)}")
    document["test_looks"] = looks_at_test(root, dataset.split_digest)
    return Outcome(Pick(offer.run, offer.bundle, document["reason"], document), document, limits)


def _runs(source: Any, root: Home) -> tuple[Dataset, list[Run], list[Run]]:
    """Return the dataset and the runs that are meant, finished and failed, all on its present split."""
    if isinstance(source, str):
        dataset = load_dataset(source, root, make_builtin=False)
        known = runs_on_split(dataset.name, dataset.split_digest, root)
        runs = [run for run in known if run.finished]
        if not runs:
            raise ZooError(f"there is no finished run on the present split of {source!r}; train one with `zoo train`")
        return dataset, runs, [run for run in known if not run.finished]
    if hasattr(source, "columns"):
        if "runs" not in source.columns:
            raise ZooError("the table has no column `runs`; give one of `compare`, or runs, or a dataset's name")
        source = [name for names in source["runs"] for name in names]
    if not isinstance(source, Iterable):
        raise ZooError(f"pick from a table of compare, runs, or a dataset's name. Got {type(source).__name__}")
    named = [find_run(each, root) if isinstance(each, str) else each for each in source]
    if strange := [type(each).__name__ for each in named if not isinstance(each, Run)]:
        raise ZooError(f"pick takes runs or their names. Got {strange[0]}")
    runs = [run for run in named if run.finished]
    if not runs:
        raise ZooError(f"there is no finished run to pick from. Got {len(named)} runs; train one with `zoo train`")
    records = [run.record for run in runs]
    refuse_different(records)
    dataset = load_dataset(records[0].dataset, root, make_builtin=False)
    if dataset.split_digest != records[0].split_digest:
        raise ZooError(
            f"the runs were trained on another split of {dataset.name!r} ({records[0].split_digest[:8]}, now "
            f"{dataset.split_digest[:8]}); train them again"
        )
    return dataset, runs, [run for run in named if not run.finished]


def _policy(runs: list[Run]) -> str | None:
    """Return the policy for bad images that the floors go by: as the runs did."""
    return "skip" if any(run.record.bad_images == "skip" for run in runs) else None


def _of_answers(metric: str, classes: list[str]) -> list[str]:
    if metric not in OF_SCORES or (metric in ("auroc", "auprc") and len(classes) == 2):
        return []  # no temperature changes it
    return [
        f"{metric} is of the answers, softmax(logits / temperature); the temperature of each candidate was fitted on "
        "the same val by which it is ranked"
    ]


def _leaks(runs: list[Run]) -> list[str]:
    of_runs = {f"{run.name}: {note}" for run in runs for note in run.record.notes if note.startswith(LEAKED_SOURCE)}
    if any(run.record.leaks_accepted for run in runs):
        return ["train, val and test of this dataset leak, which was accepted: its scores cannot be believed", *of_runs]
    return sorted(of_runs)


def _candidate(offer: Offer, speed: Latency | None, percentile: str) -> Candidate:
    """Return an offer with its costs."""
    facts: dict[str, Any] = {"run": offer.run.name, **offer.facts}
    if offer.reason is not None or offer.bundle is None or speed is None:
        return Candidate(offer.name, offer.name, reason=offer.reason or "it was not measured", facts=facts)
    kept = ("latency_p50_ms", "latency_p95_ms", "latency_p99_ms", "images_per_s", "best_batch", "peak_mib")
    facts |= {key: getattr(speed, key) for key in (*kept, "decode_ms", "open_ms", "threads", "rounds_p50_ms")}
    facts["size_mib"] = speed.size_mib
    facts["eager"] = None
    if speed.eager is not None:
        facts["eager"] = {key: getattr(speed.eager, key) for key in (*kept, "size_mib", "runtime", "reason")}
    if speed.reason is not None:
        return Candidate(offer.name, offer.name, reason=f"it could not be measured: {speed.reason}", facts=facts)
    costs = {"latency": getattr(speed, f"latency_{percentile}_ms"), "size": offer.bundle.size_bytes / _MB}
    if speed.peak_mib is not None:
        costs["memory"] = speed.peak_mib * _MIB / _MB
    return Candidate(offer.name, offer.network, offer.predictions, offer.val, costs, None, facts)


def _document(
    choosing: Choosing, choice: Choice, limits: list[Limit], wish: Wish, floors: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the choice in words and rows."""
    rows = candidate_rows(choosing, choice, choosing.intervals())
    floor = _mark_floors(rows, floors, wish.metric)
    notes = notes_of(choosing, choice, limits, _limit_intervals(choosing, limits))
    if choice.chosen is not None and rows and rows[0].get("beats_floor") is False:
        notes.insert(0, f"what was chosen does not beat the floor on val: {floor}; do not deploy it")
    changes = what_would_change(choosing, limits, wish.margin, choice)
    return {
        "reason": reason_of(choosing, choice, limits, wish.margin),
        "candidates": rows,
        "runner_up": choice.runner_up.name if choice.runner_up else None,
        "best_on_val": choice.best.name if choice.best else None,
        "would_change": [
            {
                "text": change_words(choosing, each, limits, wish.margin),
                "what": each.limit.name if each.limit else "margin",
                "to": each.to,
                "bundle": each.pick.name if each.pick else None,
            }
            for each in changes
        ],
        "nearest_misses": nearest_misses(choosing, choice),
        "limits": [limit_words(each) for each in limits],
        **{key: getattr(wish, key) for key in ("margin", "metric", "cost", "percentile")},
        "notes": notes,
    }


def _limit_intervals(choosing: Choosing, limits: list[Limit]) -> dict[str, Any]:
    """Return metric to name to its interval on val, of the metrics that have a least value."""
    wanted = [each.key for each in limits if each.key in METRICS]
    runs = {each.name: [each.predictions] for each in choosing.ready if each.predictions is not None}
    return {**metric_intervals(runs, wanted, negative=choosing.negative)} if wanted and runs else {}


def _mark_floors(rows: list[dict[str, Any]], floors: list[dict[str, Any]], metric: str) -> str:
    """Say in each row whether it beats the strongest floor on val, and return that floor in words."""
    own = metric if metric in FLOOR_METRICS else "top1"  # a floor has labels, no scores
    strongest = max(floors, key=lambda floor: floor[f"val_{own}"])
    bound = strongest[f"val_{own}"]
    for row in rows:
        value = row[f"val_{own}"] if own == metric else row.get("val", {}).get(own)
        row["beats_floor"] = None if value is None else value > bound
    return f"{strongest['name']} has {own} {bound:.3f}"


def _measured(speeds: Mapping[str, Latency]) -> dict[str, Any]:
    """Return when, where and with how many threads it was measured."""
    one = next(iter(speeds.values()), None)
    if one is None:
        return {"environment": {}, "measured_at": None}
    return {
        "environment": {**one.environment, "threads": one.threads, "warm_up": one.warm_up},
        "measured_at": one.measured_at,
    }
