"""The report: one self-contained HTML page that says what a comparison is worth, out of run folders alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoo.data.leaks import find_leaks
from zoo.data.manifest import Dataset, split_summary
from zoo.errors import ZooError, one_line
from zoo.evaluation.metrics import METRIC_SIGN
from zoo.files import write_text
from zoo.reporting import curves, plots
from zoo.reporting.blocks import Material, Scored, chart, grid, part, sentence, with_interval
from zoo.reporting.calibration_parts import calibration_part, decision_part
from zoo.reporting.comparison import Comparison
from zoo.reporting.findings import findings
from zoo.reporting.html import render
from zoo.reporting.sample_parts import classes_part, errors_part, ranking_part
from zoo.reporting.tables import cells, fact_text, floor_cells, legend, pair_cells, pairs_legend, title


def write_report(file: Path, material: Material) -> Path:
    """Write the report to a file and return it; no script, nothing from outside, everything escaped.

    Raises ZooError where predictions are damaged or the file cannot be written. Images that are gone leave gaps.
    """
    write_text(file, report_page(material))
    return file


def report_page(material: Material) -> str:
    """Return the report as HTML."""
    comparison = material.comparison
    scored = Scored(material)
    parts = [
        _table_part(comparison),
        _pairs_part(comparison),
        _split_part(material),
        _cost_part(comparison),
        _curves_part(material),
        classes_part(material, scored),
        ranking_part(scored, comparison),
        calibration_part(scored),
        decision_part(scored),
        errors_part(scored, material),
        _probe_part(material),
        _runs_part(material),
    ]
    return render(
        "report.html",
        title=title(comparison),
        findings=findings(comparison),
        leaks=comparison.leaks_accepted,
        parts=[part for part in parts if part is not None],
        facts=_facts(material),
        said=list(material.said),
    )


# What is known of all recipes ---------------------------------------------------------------------------------------


def _table_part(comparison: Comparison) -> dict[str, Any]:
    metric = comparison.metric
    rows = [cells(row, metric) for row in comparison.rows]
    # The score stands first, where a phone shows it.
    names = [head for head in rows[0] if head.startswith(("test ", "val "))]
    first = ["recipe", names[1], "95% CI", "ties", names[0]]
    left_out = ("model", "images/s", "status", "epochs", "weights")
    heads = [*first, *(head for head in rows[0] if head not in (*first, *left_out)), "weights"]
    floors = [floor_cells(floor, metric) for floor in comparison.floors]
    table = grid(heads, [[row.get(head, "") for head in heads] for row in [*floors, *rows]])
    failed = [row for row in comparison.rows if row["reason"]]
    reasons = [sentence(f"{row['status']}: {row['recipe']}: {row['reason']}") for row in failed]
    forest = plots.plot_test_scores(comparison.rows, f"test_{metric}", comparison.floors)
    notes = [sentence(f"Note: {note}.") for note in comparison.notes]
    alt = f"test {metric} of every recipe with its interval, and the floors"
    return part("Table", table, sentence(legend(comparison)), *reasons, *notes, chart(forest, alt))


def _pairs_part(comparison: Comparison) -> dict[str, Any] | None:
    if not comparison.pairs or comparison.relative_to is None:
        return None
    reference = comparison.relative_to
    pairs = [pair_cells(pair) for pair in comparison.pairs]
    heads = [head for head in pairs[0] if any(pair[head] != "–" for pair in pairs)]
    table = grid(heads, [[pair[head] for head in heads] for pair in pairs], words=2)
    drawn = curves.plot_differences(comparison.pairs, reference)
    alt = f"difference of every recipe to {reference}, with intervals"
    return part("Pairs", chart(drawn, alt), {**table, "folded": len(pairs) > 15}, sentence(pairs_legend(comparison)))


def _split_part(material: Material) -> dict[str, Any]:
    comparison, dataset = material.comparison, material.dataset
    blocks: list[dict[str, Any] | None] = []
    if dataset is not None and dataset.split_digest == comparison.split_digest:
        summary = split_summary(dataset)["splits"]
        rows = [
            [name, *(str(each["classes"].get(name, 0)) for each in summary.values())] for name in comparison.classes
        ]
        rows.append(["images", *(str(each["images"]) for each in summary.values())])
        rows.append(["groups", *(str(each["groups"]) for each in summary.values())])
        blocks.append(grid(["class", *summary], rows))
        blocks += [sentence(each) for each in _audit(dataset)]
    else:
        blocks.append(
            sentence("The dataset is not here, or has another split now: what is known of it is in the runs.")
        )
    looks = comparison.looks
    if looks.get("scorings"):
        since = f", first {looks['first']}, last {looks['last']} (UTC)" if looks.get("first") else ""
        blocks.append(
            sentence(
                f"This test split was scored {looks['scorings']} times, for {looks['recipes']} recipes{since}. The "
                "more often a test split is looked at, the more the best of its scores owes to luck."
            )
        )
    return part("Split", *blocks)


def _audit(dataset: Dataset) -> list[str]:
    try:
        leaks = find_leaks(dataset)
    except ZooError as error:
        return [f"Audit: not possible here ({one_line(error, 160)})."]
    if leaks.ok:
        return ["Audit: no copy, near-copy or group lies across train, val and test, and no picture has two labels."]
    return ["Audit: this split leaks.", *(f"{sentence[0].upper()}{sentence[1:]}." for sentence in leaks.sentences())]


def _cost_part(comparison: Comparison) -> dict[str, Any]:
    metric = comparison.metric
    drawn = curves.plot_pareto(comparison.rows, metric, METRIC_SIGN[metric])
    return part("Score against cost", chart(drawn, f"test {metric} against parameters and seconds of training"))


def _curves_part(material: Material) -> dict[str, Any] | None:
    histories = {name: [run.history() for run in runs] for name, runs in material.runs.items() if runs}
    if not histories:
        return None
    alt = "loss and top1 of training and validation by epoch"
    return part("Learning curves", chart(plots.plot_learning_curves(histories), alt))


# Runs and environment -----------------------------------------------------------------------------------------------


def _probe_part(material: Material) -> dict[str, Any] | None:
    if not material.probes:
        return None
    heads = ["recipe", "whole image", "centre masked", "border masked"]
    keys = ("whole", "centre_masked", "border_masked")
    rows = [[name, *(with_interval(probe, key) for key in keys)] for name, probe in material.probes.items()]
    said = (
        "top1 on val of each recipe's first seed, with the middle half of the image, or all around it, painted over. A "
        "network that keeps its score without the centre does not look where the thing is: suspect a shortcut."
    )
    return part("Shortcut probe", sentence(said), grid(heads, rows))


def _runs_part(material: Material) -> dict[str, Any]:
    comparison = material.comparison
    rows, recipes = [], []
    for row in comparison.rows:
        key = f"test_{comparison.metric}"
        parts = [
            f"{row[f'{key}_{part}']:.3f}" if row[f"{key}_{part}"] is not None else "–" for part in ("sd", "se_seeds")
        ]
        from_test = f"{row[f'{key}_se_test']:.3f}" if row[f"{key}_se_test"] is not None else "–"
        seeds = ", ".join(f"{value:.3f}" for value in row["test_top1_seeds"]) or "–"
        rows.append([row["recipe"], ", ".join(map(str, row["seed_list"])) or "–", seeds, parts[0], parts[1], from_test])
    for name, runs in material.runs.items():
        file = runs[0].path / "recipe.toml" if runs else None
        if file is not None and file.is_file():
            recipes.append({"name": name, "text": file.read_text(encoding="utf-8", errors="replace")})
    heads = ["recipe", "seeds", "top1 of each", "sd of seeds", "error by seeds", "error by test images"]
    said = (
        f"Two sources of error of test {comparison.metric}: which seeds were drawn (sd / √seeds), and which test "
        "images; of several seeds the interval holds both. Scores are means over seeds, never the best of them."
    )
    return part("Seeds and recipes", sentence(said), grid(heads, rows), {"kind": "recipes", "recipes": recipes})


def _facts(material: Material) -> list[tuple[str, str]]:
    comparison = material.comparison
    environment = comparison.environment
    known = [
        ("dataset", comparison.dataset),
        ("split digest", comparison.split_digest),
        ("classes", ", ".join(comparison.classes)),
        ("device", fact_text(environment["device"])),
        ("precision", fact_text(environment["precision"])),
        ("threads", fact_text(environment["threads"])),
    ]
    return known + [(name, fact_text(version)) for name, version in environment["versions"].items()]
