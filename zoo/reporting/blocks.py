"""What a report is made of: runs and their predictions, and the kinds of blocks that its page shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from zoo.data.manifest import Dataset
from zoo.evaluation.calibration import apply_temperature, calibration_report
from zoo.evaluation.predictions import Predictions, read_predictions
from zoo.reporting.comparison import Comparison
from zoo.reporting.html import figure
from zoo.runs import Run

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Explain = Callable[[Run, Sequence[str]], Mapping[str, Pixels]]
Block = dict[str, Any]


@dataclass(frozen=True)
class Material:
    """What a report is made of: runs by recipe, scored on test; the first of each stands for it where one must.

    explain: given a run and sample ids, pictures of where the network looked; probes: recipe to `shortcut_probe`.
    """

    comparison: Comparison
    runs: Mapping[str, Sequence[Run]]
    dataset: Dataset | None = None
    explain: Explain | None = None
    probes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    said: Sequence[str] = ()


class Scored:
    """The predictions of every scored run, and what is computed from them once."""

    def __init__(self, material: Material) -> None:
        self.comparison = material.comparison
        self.test: dict[str, list[Predictions]] = {}
        self.calibration: dict[str, dict[str, Any]] = {}
        self.scaled: dict[str, Predictions] = {}
        for name, runs in material.runs.items():
            known = [run for run in runs if run.predictions_file("test").is_file()]
            if not known:
                continue
            self.test[name] = [read_predictions(run.predictions_file("test")) for run in known]
            if known[0].predictions_file("val").is_file():
                val = read_predictions(known[0].predictions_file("val"))
                record = known[0].record
                report = calibration_report(val, self.test[name][0], record.classes, record.negative_class)
                self.calibration[name] = report
                self.scaled[name] = apply_temperature(self.test[name][0], report["temperature"])

    @property
    def best(self) -> str | None:
        """Return the recipe with the best mean, if its predictions are here."""
        best = self.comparison.relative_to
        return best if best in self.test else next(iter(self.test), None)

    @property
    def positive(self) -> int | None:
        """Return the positive class of two."""
        classes, rows = self.comparison.classes, self.comparison
        if len(classes) != 2:
            return None
        return 0 if rows.negative_class == classes[1] else 1


def part(name: str, *blocks: dict[str, Any] | None) -> dict[str, Any]:
    """Return a part of the page under its title; blocks that are None are left out."""
    return {"title": name, "id": name.lower().replace(" ", "-"), "blocks": [block for block in blocks if block]}


def grid(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> dict[str, Any]:
    """Return a table; the first `words` columns are text, the others numbers."""
    return {"kind": "table", "heads": list(heads), "rows": [list(row) for row in rows], "words": words, "folded": False}


def sentence(text: str) -> dict[str, Any]:
    """Return a paragraph."""
    return {"kind": "text", "text": text}


def chart(drawn: Any, alt: str) -> dict[str, Any]:
    """Return a matplotlib figure as a block; alt: what it shows, for those who do not see it."""
    return {"kind": "figure", "image": figure(drawn), "alt": alt}


def with_interval(row: Mapping[str, Any], key: str) -> str:
    """Return a number with its interval, `<key>_ci`, as tables have them; a dash where there is none."""
    if row.get(key) is None:
        return "–"
    interval = row.get(f"{key}_ci")
    return f"{row[key]:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")
