"""The comparison: one row per recipe over its seeds, the same from the same run folders, byte for byte."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError, nearest, one_line
from zoo.evaluation.calibration import apply_temperature, fit_temperature
from zoo.evaluation.metrics import METRIC_SIGN, ece_of, log_loss_of
from zoo.evaluation.predictions import Predictions, read_predictions
from zoo.evaluation.resampling import METRICS
from zoo.evaluation.statistics import (
    MARGIN,
    Interval,
    Pair,
    affordable_metrics,
    letters_of,
    metric_intervals,
    paired_comparisons,
)
from zoo.reporting.notes import notes_of_classes, notes_of_rows, notes_of_runs
from zoo.runs import Run, RunRecord

if TYPE_CHECKING:
    import pandas as pd

SCORES = METRICS


@dataclass(frozen=True)
class Comparison:
    """A dataset's comparison: its floors, and a row for each recipe."""

    dataset: str
    split_digest: str
    classes: list[str]
    images: dict[str, int]
    floors: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    environment: dict[str, Any]
    leaks_accepted: bool = False
    notes: list[str] = field(default_factory=list)
    negative_class: str | None = None
    metric: str = "top1"
    relative_to: str | None = None
    pairs: list[dict[str, Any]] = field(default_factory=list)
    looks: dict[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """Return the comparison as `table.json` holds it."""
        return {
            "dataset": self.dataset,
            "split_digest": self.split_digest,
            "leaks_accepted": self.leaks_accepted,
            "classes": self.classes,
            "images": self.images,
            "floors": self.floors,
            "metric": self.metric,
            "relative_to": self.relative_to,
            "rows": self.rows,
            "pairs": self.pairs,
            "test_looks": self.looks,
            "notes": self.notes,
            "environment": self.environment,
        }

    def frame(self) -> pd.DataFrame:
        """Return the rows as a tidy pandas DataFrame; `attrs` holds dataset, split digest and floors."""
        import pandas as pd

        frame = pd.DataFrame(self.rows)
        frame.attrs = {"dataset": self.dataset, "split_digest": self.split_digest, "floors": self.floors}
        frame.attrs |= {"metric": self.metric, "pairs": self.pairs, "test_looks": self.looks}
        return frame


def make_comparison(
    runs: Iterable[Run | RunRecord],
    *,
    floors: list[dict[str, Any]] | None = None,
    images: dict[str, int] | None = None,
    leaks_accepted: bool = False,
    by: str | None = None,
    metric: str = "top1",
    margin: float = MARGIN,
    looks: dict[str, Any] | None = None,
) -> Comparison:
    """Return the comparison of runs on one dataset and split; rows are sorted by a column, failures last.

    metric: what letters, pairs and floors are about. by: the column to sort by, the metric's own where left out.
    margin: of equivalence, in the metric's unit. looks: what the ledger says of the test split. A RunRecord stands for
    a run that failed before it had a folder. Raises ZooError where runs are of different splits, class lists or scored
    images, naming both, or where there is no run at all.
    """
    pairs = [(run, run.record) if isinstance(run, Run) else (None, run) for run in runs]
    if not pairs:
        raise ZooError("there is no run to compare; train one with `zoo train`, or run a benchmark with `zoo bench`")
    first = pairs[0][1]
    refuse_different([record for _, record in pairs])
    groups: dict[tuple[str, str], list[tuple[Run | None, RunRecord]]] = {}
    for run, record in pairs:
        groups.setdefault((record.recipe, record.recipe_digest), []).append((run, record))
    groups = _join_failures(groups)
    labels = _labels(list(groups))
    predictions = {labels[key]: _predictions(group) for key, group in groups.items()}
    _refuse_different_images(predictions)
    negative = first.classes.index(first.negative_class) if first.negative_class in first.classes else None
    found = _compared(predictions, metric, margin, negative)
    rows = [_row(labels[key], group, predictions[labels[key]], found) for key, group in groups.items()]
    _mark_floors(rows, floors or [], metric)
    rows = _sorted(rows, by or f"test_{metric}")
    looks = _counted(looks or {}, rows)
    return Comparison(
        dataset=first.dataset,
        split_digest=first.split_digest,
        classes=first.classes,
        images=images or {},
        floors=floors or [],
        rows=rows,
        environment=_environment([record for _, record in pairs]),
        leaks_accepted=leaks_accepted or any(record.leaks_accepted for _, record in pairs),
        notes=[
            *notes_of_rows(rows, metric, looks),
            *notes_of_classes(predictions, first.classes),
            *notes_of_runs({labels[key]: [record for _, record in group] for key, group in groups.items()}),
        ],
        negative_class=first.negative_class,
        metric=metric,
        relative_to=next(iter(found.letters), None),
        pairs=[pair.document() for pair in found.pairs],
        looks=looks,
    )


def refuse_different(records: list[RunRecord]) -> None:
    """Raise ZooError where runs are of different datasets, splits or class lists, naming two of them."""
    for other in records[1:]:
        _refuse_unlike(records[0], other)


def _refuse_unlike(first: RunRecord, other: RunRecord) -> None:
    facts = (
        ("datasets", first.dataset, other.dataset),
        ("splits", first.split_digest[:12], other.split_digest[:12]),
        ("class lists", first.classes, other.classes),
    )
    for what, one, two in facts:
        if one != two:
            raise ZooError(
                f"runs of different {what} cannot be compared: {first.run!r} has {one}, {other.run!r} has {two}; "
                "train both on the same split"
            )


def _join_failures(groups: dict[Any, list[Any]]) -> dict[Any, list[Any]]:
    """Put seeds that failed before their identity was known into their recipe's row."""
    finished = {key[0]: key for key, group in groups.items() if any(r.status == "finished" for _, r in group)}
    joined: dict[Any, list[Any]] = {}
    for key, group in groups.items():
        # What failed in a folder of its own has an identity, and may be of an older recipe.
        failed = all(record.status == "failed" and run is None for run, record in group)
        joined.setdefault(finished.get(key[0], key) if failed else key, []).extend(group)
    return joined


def _predictions(group: list[tuple[Run | None, RunRecord]]) -> list[Predictions]:
    return [
        read_predictions(run.predictions_file("test"))
        for run, record in sorted(group, key=lambda pair: pair[1].seed)
        if run is not None and record.status == "finished" and run.scored("test")
    ]


def _labels(keys: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Return what each recipe is called: its name, and a part of its digest where two have one name."""
    names = [key[0] for key in keys]
    return {key: key[0] if names.count(key[0]) == 1 else f"{key[0]}@{key[1][:6]}" for key in keys}


def _refuse_different_images(predictions: dict[str, list[Predictions]]) -> None:
    known: tuple[str, list[str]] | None = None
    for recipe, each in predictions.items():
        for found in each:
            ids = found.sample_ids.tolist()
            if known is not None and known[1] != ids:
                raise ZooError(
                    f"recipes {known[0]!r} and {recipe!r} were scored on different test images ({len(known[1])} and "
                    f"{len(ids)}); remove their runs and train both again on the images as they are now"
                )
            known = known or (recipe, ids)


@dataclass(frozen=True)
class _Compared:
    """What the statistics say of all recipes at once."""

    metric: str
    intervals: dict[str, dict[str, Interval | None]]
    pairs: list[Pair]
    letters: dict[str, str]


def check_metric(metric: str) -> None:
    """Raise ZooError, with the nearest name, for what is no metric of a table."""
    if metric not in SCORES:
        raise ZooError(f"metric must be one of {', '.join(SCORES)}. Got {one_line(metric)!r}{nearest(metric, SCORES)}")


def _compared(predictions: dict[str, list[Predictions]], metric: str, margin: float, negative: int | None) -> _Compared:
    check_metric(metric)
    if not 0 < margin < math.inf:
        raise ZooError(f"a margin of equivalence must be above 0, e.g. 0.02 for two points. Got {margin}")
    # The order of the names decides what is drawn for whom, not the order in which runs were given.
    scored = {name: predictions[name] for name in sorted(predictions) if predictions[name]}
    if not scored:
        return _Compared(metric, {}, [], {})
    one = next(iter(scored.values()))[0]
    n_runs = sum(len(each) for each in scored.values())
    wanted = affordable_metrics(len(one.y_true), one.logits.shape[1], n_runs)
    intervals = metric_intervals(scored, list(dict.fromkeys([*wanted, metric])), negative=negative)
    means = {name: each.value for name, each in intervals[metric].items() if each is not None}
    best_first = sorted(means, key=lambda name: (-METRIC_SIGN[metric] * means[name], name))
    defined = {name: scored[name] for name in best_first}
    pairs = paired_comparisons(defined, metric, negative=negative, margin=margin)
    return _Compared(metric, intervals, pairs, letters_of(means, pairs))


def _counted(looks: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the ledger's count; runs that were scored before there was a ledger count too."""
    scored = [row for row in rows if row["test_images"]]
    runs = sum(len(row["test_top1_seeds"]) for row in scored)
    return {
        **looks,
        "scorings": max(looks.get("scorings", 0), runs),
        "recipes": max(looks.get("recipes", 0), len(scored)),
    }


def _row(
    label: str, group: list[tuple[Run | None, RunRecord]], predictions: list[Predictions], found: _Compared
) -> dict[str, Any]:
    finished = [(run, record) for run, record in group if record.status == "finished" and run is not None]
    failed = [record for _, record in group if record.status != "finished"]
    shown = finished[0][1] if finished else group[0][1]
    row: dict[str, Any] = {
        "recipe": label,
        "model": shown.model,
        "weights": shown.weights.get("label", ""),
        "strategy": shown.strategy,
        "seeds": len(finished),
        "seed_list": sorted(record.seed for _, record in finished),
        "status": ("failed" if not finished else "partly failed") if failed else "finished",
        "reason": "; ".join(dict.fromkeys(record.reason or "unknown" for record in failed)) or None,
        "params": shown.params,
        "params_trained": shown.params_trained,
        "epochs": _mean([record.epochs for _, record in finished]),
    }
    scored: list[dict[str, Any]] = []
    for split in ("val", "test"):
        metrics = [_metrics(run, split) for run, _ in finished if run.scored(split)]
        scored += metrics if split == "test" else []
        for score in SCORES:
            values = [each[score] for each in metrics if each.get(score) is not None]
            row[f"{split}_{score}"] = _mean(values)
            row[f"{split}_{score}_sd"] = statistics.stdev(values) if len(values) > 1 else None
    for score in SCORES:
        interval = found.intervals.get(score, {}).get(label)
        row[f"test_{score}_ci"] = [interval.low, interval.high] if interval else None
        row[f"test_{score}_se_test"] = interval.test_se if interval else None
        row[f"test_{score}_se_seeds"] = interval.seed_se if interval and interval.seeds > 1 else None
    row |= _calibrated(finished)
    row["test_top1_seeds"] = [float((each.y_pred == each.y_true).mean()) for each in predictions]
    row["test_images"] = len(predictions[0].y_true) if predictions else None
    row["test_groups"] = int(predictions[0].group_codes.max()) + 1 if predictions else None
    row["letters"] = found.letters.get(label)
    row["train_s"] = _mean([record.train_s for _, record in finished])
    row["images_per_s"] = _mean([record.images_per_s for _, record in finished])
    row["images_skipped"] = sum(len(paths) for paths in shown.images_skipped.values()) + max(
        (len(each.get("images_skipped") or []) for each in scored), default=0
    )
    row["runs"] = [record.run for _, record in group]
    return row


def _calibrated(finished: list[tuple[Run, RunRecord]]) -> dict[str, Any]:
    """Return what a temperature that is fitted on val does on test, the mean over seeds."""
    found: dict[str, list[float]] = {"temperature": [], "test_ece_calibrated": [], "test_log_loss_calibrated": []}
    for run, _ in finished:
        if not (run.predictions_file("val").is_file() and run.predictions_file("test").is_file()):
            continue
        temperature = fit_temperature(read_predictions(run.predictions_file("val")))
        scaled = apply_temperature(read_predictions(run.predictions_file("test")), temperature)
        found["temperature"].append(temperature)
        found["test_ece_calibrated"].append(ece_of(scaled.y_true, scaled.y_score))
        found["test_log_loss_calibrated"].append(log_loss_of(scaled.y_true, scaled.y_score))
    return {key: _mean(values) for key, values in found.items()}


def _metrics(run: Run, split: str) -> dict[str, Any]:
    """Return a run's metrics; raises ZooError where they are not those of its predictions."""
    found = run.metrics(split)
    predictions = read_predictions(run.predictions_file(split))
    top1 = float((predictions.y_pred == predictions.y_true).mean()) if len(predictions.y_true) else math.nan
    if not isinstance(found.get("top1"), (int, float)) or abs(found["top1"] - top1) > 1e-6:
        raise ZooError(
            f"{str(run.metrics_file(split))!r} does not belong to the predictions beside it (top1 {found.get('top1')}, "
            f"of the predictions {top1:.6f}); remove both and score the run again"
        )
    return found


def _mark_floors(rows: list[dict[str, Any]], floors: list[dict[str, Any]], metric: str) -> None:
    """Say of each row whether its interval lies wholly on the good side of every floor's score."""
    sign = METRIC_SIGN[metric]
    known = [sign * floor[f"test_{metric}"] for floor in floors if floor.get(f"test_{metric}") is not None]
    best = max(known, default=None)
    for row in rows:
        interval = row[f"test_{metric}_ci"]
        nearest_end = None if interval is None else sign * interval[0 if sign > 0 else 1]
        row["beats_floors"] = None if best is None or nearest_end is None else bool(nearest_end > best)


def _mean(values: list[Any]) -> float | None:
    known = [value for value in values if value is not None]
    return float(statistics.fmean(known)) if known else None


def _sorted(rows: list[dict[str, Any]], by: str) -> list[dict[str, Any]]:
    by = f"test_{by}" if f"test_{by}" in rows[0] else by
    if any(by not in row for row in rows):
        known = [key for key in rows[0] if not key.endswith(("_sd", "_ci", "_seeds", "_list"))]
        shown = ", ".join(key for key in known if not key.startswith("val_"))
        raise ZooError(
            f"a table can be sorted by one of {shown}, or val_ in place of test_. "
            f"Got {one_line(by)!r}{nearest(by, known)}"
        )
    if any(isinstance(row[by], list) for row in rows):
        raise ZooError(f"a table cannot be sorted by {one_line(by)!r}, which is a list; take another column")
    ascending = by.removesuffix("_calibrated").endswith(
        ("log_loss", "brier", "ece", "train_s", "params", "recipe", "model")
    )

    def order(row: dict[str, Any]) -> tuple[bool, bool, Any, str]:
        value = row[by]
        if not isinstance(value, (int, float)):
            return (not row["seeds"], value is None, str(value), row["recipe"])
        return (not row["seeds"], False, value if ascending else -value, row["recipe"])

    return sorted(rows, key=order)


def _environment(records: list[RunRecord]) -> dict[str, Any]:
    """Return what the numbers were computed with; a list where runs differ."""
    finished = [record for record in records if record.status == "finished"]

    def distinct(values: Iterable[Any]) -> Any:
        found = list(dict.fromkeys(values))
        return found[0] if len(found) == 1 else found

    versions = {
        name: distinct(r.versions.get(name, "") for r in finished)
        for name in (finished[0].versions if finished else {})
    }
    return {
        "device": distinct(record.device for record in finished),
        "precision": distinct(str(record.precision.get("dtype", "")) for record in finished),
        "threads": distinct(record.threads for record in finished),
        "versions": versions,
    }
