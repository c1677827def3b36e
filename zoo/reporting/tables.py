"""Comparison tables: one row per recipe over its seeds, the same from the same run folders, byte for byte."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError, nearest, one_line
from zoo.evaluation.predictions import Predictions, read_predictions
from zoo.evaluation.statistics import paired_letters, top1_interval
from zoo.runs import Run, RunRecord

if TYPE_CHECKING:
    import pandas as pd

SCORES = (
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
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


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

    def document(self) -> dict[str, Any]:
        """Return the comparison as `table.json` holds it."""
        return {
            "dataset": self.dataset,
            "split_digest": self.split_digest,
            "leaks_accepted": self.leaks_accepted,
            "classes": self.classes,
            "images": self.images,
            "floors": self.floors,
            "rows": self.rows,
            "notes": self.notes,
            "environment": self.environment,
        }

    def frame(self) -> pd.DataFrame:
        """Return the rows as a tidy pandas DataFrame; `attrs` holds dataset, split digest and floors."""
        import pandas as pd

        frame = pd.DataFrame(self.rows)
        frame.attrs = {"dataset": self.dataset, "split_digest": self.split_digest, "floors": self.floors}
        return frame


def make_comparison(
    runs: Iterable[Run | RunRecord],
    *,
    floors: list[dict[str, Any]] | None = None,
    images: dict[str, int] | None = None,
    leaks_accepted: bool = False,
    by: str = "test_top1",
) -> Comparison:
    """Return the comparison of runs on one dataset and split; rows are sorted by a column, failures last.

    A RunRecord stands for a run that failed before it had a folder. Raises ZooError where runs are of different
    splits, class lists or scored images, naming both, or where there is no run at all.
    """
    pairs = [(run, run.record) if isinstance(run, Run) else (None, run) for run in runs]
    if not pairs:
        raise ZooError("there is no run to compare; train one with `zoo train`, or run a benchmark with `zoo bench`")
    first = pairs[0][1]
    for _, record in pairs:
        _refuse_different(first, record)
    groups: dict[tuple[str, str], list[tuple[Run | None, RunRecord]]] = {}
    for run, record in pairs:
        groups.setdefault((record.recipe, record.recipe_digest), []).append((run, record))
    groups = _join_failures(groups)
    predictions = {key: _predictions(group) for key, group in groups.items()}
    _refuse_different_images(predictions)
    letters = _letters(predictions)
    names = [key[0] for key in groups]
    rows = []
    for key, group in groups.items():
        label = key[0] if names.count(key[0]) == 1 else f"{key[0]}@{key[1][:6]}"
        rows.append(_row(label, group, predictions[key], letters.get(key)))
    _mark_floors(rows, floors or [])
    return Comparison(
        dataset=first.dataset,
        split_digest=first.split_digest,
        classes=first.classes,
        images=images or {},
        floors=floors or [],
        rows=_sorted(rows, by),
        environment=_environment([record for _, record in pairs]),
        leaks_accepted=leaks_accepted or any(record.leaks_accepted for _, record in pairs),
        notes=_notes(rows),
    )


def _refuse_different(first: RunRecord, other: RunRecord) -> None:
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
        failed = all(record.status == "failed" for _, record in group)
        joined.setdefault(finished.get(key[0], key) if failed else key, []).extend(group)
    return joined


def _predictions(group: list[tuple[Run | None, RunRecord]]) -> list[Predictions]:
    return [
        read_predictions(run.predictions_file("test"))
        for run, record in sorted(group, key=lambda pair: pair[1].seed)
        if run is not None and record.status == "finished" and run.predictions_file("test").is_file()
    ]


def _refuse_different_images(predictions: dict[Any, list[Predictions]]) -> None:
    known: tuple[str, list[str]] | None = None
    for (recipe, _), each in predictions.items():
        for found in each:
            ids = found.sample_ids.tolist()
            if known is not None and known[1] != ids:
                raise ZooError(
                    f"recipes {known[0]!r} and {recipe!r} were scored on different test images ({len(known[1])} and "
                    f"{len(ids)}); remove their runs and train both again on the images as they are now"
                )
            known = known or (recipe, ids)


def _letters(predictions: dict[Any, list[Predictions]]) -> dict[Any, str]:
    scored = {key: each for key, each in predictions.items() if each}
    if len(scored) < 2:
        return dict.fromkeys(scored, "a")
    by_name = {f"{key[0]}\0{key[1]}": key for key in scored}
    found = paired_letters({name: scored[key] for name, key in by_name.items()})
    return {by_name[name]: letters for name, letters in found.items()}


def _row(
    label: str, group: list[tuple[Run | None, RunRecord]], predictions: list[Predictions], letters: str | None
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
        metrics = [run.metrics(split) for run, _ in finished if run.metrics_file(split).is_file()]
        scored += metrics if split == "test" else []
        for score in SCORES:
            values = [each[score] for each in metrics if each.get(score) is not None]
            row[f"{split}_{score}"] = _mean(values)
            row[f"{split}_{score}_sd"] = statistics.stdev(values) if len(values) > 1 else None
    row["test_top1_ci"] = list(top1_interval(predictions)) if predictions else None
    row["test_top1_seeds"] = [float((each.y_pred == each.y_true).mean()) for each in predictions]
    row["test_images"] = len(predictions[0].y_true) if predictions else None
    row["test_groups"] = len(set(predictions[0].groups.tolist())) if predictions else None
    row["letters"] = letters
    row["train_s"] = _mean([record.train_s for _, record in finished])
    row["images_per_s"] = _mean([record.images_per_s for _, record in finished])
    row["images_skipped"] = sum(len(paths) for paths in shown.images_skipped.values()) + max(
        (len(each.get("images_skipped") or []) for each in scored), default=0
    )
    row["runs"] = [record.run for _, record in group]
    return row


def _mark_floors(rows: list[dict[str, Any]], floors: list[dict[str, Any]]) -> None:
    """Say of each row whether the lower end of its interval is above every floor's score."""
    best = max((floor["test_top1"] for floor in floors), default=None)
    for row in rows:
        interval = row["test_top1_ci"]
        row["beats_floors"] = None if best is None or interval is None else bool(interval[0] > best)


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
    ascending = by.endswith(("log_loss", "brier", "ece", "train_s", "params", "recipe", "model"))

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


def _notes(rows: list[dict[str, Any]]) -> list[str]:
    notes = []
    scratch = [row["recipe"] for row in rows if row["weights"] == "scratch" and row["model"] != "simple_cnn"]
    if scratch:
        notes.append(f"weights from scratch (nothing pretrained): {', '.join(scratch)}")
    below = [row["recipe"] for row in rows if row["beats_floors"] is False]
    if below:
        notes.append(f"not above every floor with its interval: {', '.join(below)}")
    groups = min((row["test_groups"] for row in rows if row["test_groups"]), default=None)
    if groups is not None and groups < 20:
        notes.append(f"the test split has only {groups} groups: intervals and ties are rough, and rather too narrow")
    skipped = {row["recipe"]: row["images_skipped"] for row in rows if row["images_skipped"]}
    if skipped:
        notes.append(f"images left out as unreadable: {skipped}")
    return notes


# Columns as people read them: head, key, and how the value is written ----------------------------------------------


def cells(row: dict[str, Any]) -> dict[str, str]:
    """Return a row's cells as people read them; missing values are a dash."""

    def score(key: str) -> str:
        mean, sd = row.get(key), row.get(f"{key}_sd")
        return "–" if mean is None else f"{mean:.3f}" + (f" ±{sd:.3f}" if sd is not None else "")

    interval = row["test_top1_ci"]
    return {
        "recipe": row["recipe"],
        "model": row["model"],
        "weights": row["weights"],
        "params": f"{row['params'] / 1e6:.2f}M" if row["params"] else "–",
        "seeds": str(row["seeds"]),
        "epochs": f"{row['epochs']:.0f}" if row["epochs"] is not None else "–",
        "val top1": score("val_top1"),
        "test top1": score("test_top1") + (" †" if row.get("beats_floors") is False else ""),
        "95% CI": f"{interval[0]:.3f}–{interval[1]:.3f}" if interval else "–",
        "ties": row["letters"] or "–",
        "balanced acc.": score("test_balanced_accuracy"),
        "macro F1": score("test_macro_f1"),
        "AUROC": score("test_auroc"),
        "ECE": score("test_ece"),
        "train s": f"{row['train_s']:.1f}" if row["train_s"] is not None else "–",
        "images/s": f"{row['images_per_s']:.0f}" if row["images_per_s"] is not None else "–",
        "status": row["status"] if not row["reason"] else f"{row['status']}: {one_line(row['reason'], 160)}",
    }


def floor_cells(floor: dict[str, Any]) -> dict[str, str]:
    """Return a floor's cells as people read them, under the heads of `cells`."""
    low, high = floor["test_top1_ci"]
    return {
        "recipe": f"floor: {floor['name']}",
        "test top1": f"{floor['test_top1']:.3f}",
        "95% CI": f"{low:.3f}–{high:.3f}",
        "balanced acc.": f"{floor['test_balanced_accuracy']:.3f}",
        "macro F1": f"{floor['test_macro_f1']:.3f}",
    }


def title(comparison: Comparison) -> str:
    """Return a table's title in one line."""
    scored = next((row for row in comparison.rows if row["test_images"]), None)
    test = ""
    if scored:
        test = f", {scored['test_images']} test images"
        if scored["test_groups"] != scored["test_images"]:
            test += f" of {scored['test_groups']} groups"
    leaks = " — LEAKS ACCEPTED" if comparison.leaks_accepted else ""
    return f"{comparison.dataset}, split {comparison.split_digest[:8]}{test}{leaks}"


LEGEND = (
    "Mean ±sd over seeds. 95% CI: bootstrap of test images by group, and of seeds. Ties: recipes that share a letter "
    "are not told apart at 5 % (paired bootstrap, Holm). †: the interval does not lie above every floor."
)


def to_markdown(comparison: Comparison) -> str:
    """Return the comparison as a Markdown page: floors, rows, notes and environment."""
    lines = [f"# {_plain(title(comparison))}", ""]
    rows = [cells(row) for row in comparison.rows]
    heads = list(rows[0])
    floors = [_markdown_row(_emphasised(floor), heads) for floor in comparison.floors]
    lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads), *floors]
    lines += [_markdown_row(row, heads) for row in rows]
    lines += ["", LEGEND, ""] + [f"- Note: {_plain(note)}" for note in comparison.notes]
    facts = comparison.environment
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    lines += [f"- Computed on {_plain(facts['device'])}; precision {_plain(facts['precision'])}; {versions}", ""]
    return "\n".join(lines)


HEADLINE = ("recipe", "weights", "params", "val top1", "test top1", "95% CI", "ties", "train s")


def headline_markdown(document: dict[str, Any]) -> str:
    """Return the few columns that a README shows, out of a `table.json`."""
    lines = ["| " + " | ".join(HEADLINE) + " |", "|" + "---|" * len(HEADLINE)]
    lines += [_markdown_row(_emphasised(floor), HEADLINE) for floor in document["floors"]]
    lines += [_markdown_row(cells(row), HEADLINE) for row in document["rows"]]
    return "\n".join(lines)


def _emphasised(floor: dict[str, Any]) -> dict[str, str]:
    shown = floor_cells(floor)
    return shown | {"recipe": f"*{shown['recipe']}*"}


def _markdown_row(row: dict[str, str], heads: Iterable[str]) -> str:
    return "| " + " | ".join(_plain(row.get(head, "")) for head in heads) + " |"


def _plain(text: object) -> str:
    r"""Return text that stays within one Markdown table cell and means nothing to HTML.

    >>> _plain("a|b <img>")
    'a\\|b &lt;img&gt;'
    """
    return (
        one_line(text, 1000)
        .replace("\\", "\\\\")
        .replace("&", "&amp;")
        .replace("<", "&lt;")
        .replace(">", "&gt;")
        .replace("|", "\\|")
    )


def to_csv(comparison: Comparison) -> str:
    """Return the rows as CSV with every number in full; cells that a spreadsheet would compute are defused."""
    columns = [key for key in comparison.rows[0] if key not in ("runs", "seed_list", "test_top1_seeds")]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    for row in comparison.rows:
        writer.writerow([_csv_cell(row[key]) for key in columns])
    return stream.getvalue()


def _csv_cell(value: Any) -> Any:
    if isinstance(value, list):
        return " ".join(f"{each:.6f}" if isinstance(each, float) else str(each) for each in value)
    if isinstance(value, float):
        return f"{value:.6f}"
    if isinstance(value, str) and value.startswith(_FORMULA):
        return f"'{value}"
    return "" if value is None else value
