"""What a reader must know beside a comparison's table: of its rows, of test's classes, and of single runs."""

from __future__ import annotations

from typing import Any

from zoo.errors import one_line
from zoo.evaluation.predictions import Predictions
from zoo.evaluation.resampling import RARE
from zoo.runs import FRESH_HEAD, RunRecord

MOST_OF_RUNS = 12  # notes of single runs; the rest stands in their folders


def notes_of_rows(rows: list[dict[str, Any]], metric: str, looks: dict[str, Any]) -> list[str]:
    """Say what the rows of a comparison cannot: looks at test, floors, few groups, single seeds, skipped images."""
    notes = []
    if looks["scorings"]:
        recipes = f"{looks['recipes']} recipe{'s' if looks['recipes'] != 1 else ''}"
        notes.append(f"this test split was scored {_times(looks['scorings'])}, for {recipes}")
    scratch = [row["recipe"] for row in rows if row["weights"] == "scratch" and row["model"] != "simple_cnn"]
    if scratch:
        notes.append(f"weights from scratch (nothing pretrained): {', '.join(scratch)}")
    below = [row["recipe"] for row in rows if row["beats_floors"] is False]
    if below:
        notes.append(f"not above every floor with its interval of {metric}: {', '.join(below)}")
    groups = min((row["test_groups"] for row in rows if row["test_groups"]), default=None)
    if groups is not None and groups < 20:
        notes.append(f"the test split has only {groups} groups: intervals and ties are rough, and rather too narrow")
    single = [row["recipe"] for row in rows if len(row["test_top1_seeds"]) == 1]
    if single and len(rows) > 1:
        notes.append(f"one seed alone: letters tell these runs apart, not the recipes: {', '.join(single)}")
    skipped = {row["recipe"]: row["images_skipped"] for row in rows if row["images_skipped"]}
    if skipped:
        notes.append(f"images left out as unreadable: {skipped}")
    return notes


def notes_of_classes(predictions: dict[str, list[Predictions]], classes: list[str]) -> list[str]:
    """Say which classes have few groups in test: means over classes, and what is said of these, are rough."""
    one = next((each[0] for each in predictions.values() if each), None)
    if one is None:
        return []
    units = {name: len(set(one.group_codes[one.y_true == place].tolist())) for place, name in enumerate(classes)}
    few = sorted((count, name) for name, count in units.items() if count < RARE)
    if not few:
        return []
    shown = ", ".join(f"{one_line(name, 40)} ({count})" for count, name in few[:6])
    more = f" and {len(few) - 6} more" if len(few) > 6 else ""
    return [f"fewer than {RARE} groups or images of a class in test, so its scores are rough: {shown}{more}"]


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def notes_of_runs(records: dict[str, list[RunRecord]]) -> list[str]:
    """Say what the runs' own records note, each note once; that a classifier is new goes without saying."""
    found: dict[str, dict[str, list[int]]] = {}
    for name, runs in records.items():
        for run in runs:
            for note in run.notes if run.status == "finished" else ():
                if not note.startswith(FRESH_HEAD):
                    found.setdefault(note, {}).setdefault(name, []).append(run.seed)
    notes = []
    for note, of in found.items():
        names = [
            name if len(seeds) == len(records[name]) else f"{name} (seed {', '.join(map(str, seeds))})"
            for name, seeds in of.items()
        ]
        notes.append(f"{', '.join(names)}: {note}")
    hidden = len(notes) - MOST_OF_RUNS
    return notes[:MOST_OF_RUNS] + ([f"{hidden} more notes of runs: `zoo show RUN`"] if hidden > 0 else [])
