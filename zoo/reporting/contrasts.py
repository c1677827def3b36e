"""Differences over several datasets that were asked for in advance: as Markdown, as CSV, and as a forest plot."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from zoo.reporting.plots import (
    BLUE,
    FAINT,
    GREY,
    ORANGE,
    SIZE,
    WIDTH,
    cut_middle,
    empty_figure,
    legend_below,
    line_handle,
    literal,
    new_figure,
    plain_axes,
    titled,
)
from zoo.reporting.tables import csv_cell, markdown_row, markdown_text, p_value_text

Row = Mapping[str, Any]
HEADS = ("dataset", "one", "two", "score of one", "of two", "one − two", "95% CI", "p (Holm)", "shown")
LEGEND = (
    "Means over seeds on the same test images. 95% CI: paired bootstrap of test images by group, and of seeds. "
    "p (Holm): adjusted over all rows of this table, which were chosen before test was scored. Shown: better "
    "or worse where p is below .05, else not told apart, which is no proof of being equal."
)


def contrast_cells(row: Row) -> dict[str, str]:
    """Return a contrast's cells as people read them."""
    known = row["difference"] is not None
    return {
        "dataset": row["dataset"],
        "one": row["one"],
        "two": row["two"],
        "score of one": _score(row["score_one"]),
        "of two": _score(row["score_two"]),
        "one − two": f"{row['difference']:+.3f}" if known else "–",
        "95% CI": f"{row['low']:+.3f} to {row['high']:+.3f}" if known else "–",
        "p (Holm)": p_value_text(row["p_holm"]) if known else "–",
        "shown": verdict(row),
    }


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def verdict(row: Row) -> str:
    """Return what a contrast shows: better, worse, not told apart, or not run."""
    if row["difference"] is None:
        return "not run"
    if row["p_holm"] >= 0.05:
        return "not told apart"
    return "better" if row["difference"] > 0 else "worse"


def contrasts_markdown(name: str, rows: Sequence[Row], missing: Mapping[str, str]) -> str:
    """Return the contrasts as a Markdown page; missing: why a dataset is not in it."""
    lines = [f"# {markdown_text(name)}: test {rows[0]['metric']}, one recipe against another", ""]
    lines += [contrasts_table(rows), "", LEGEND, ""]
    images = {row["dataset"]: (row["train_images"], row["test_images"], row["seeds"]) for row in rows}
    for dataset, (train, test, seeds) in images.items():
        lines.append(f"- {markdown_text(dataset)}: {train} training images, {test} test images, {seeds} seeds")
    lines += [f"- Left out: {markdown_text(dataset)} ({markdown_text(reason)})" for dataset, reason in missing.items()]
    return "\n".join([*lines, ""])


def contrasts_table(rows: Sequence[Row]) -> str:
    """Return the table alone, as the README shows it."""
    lines = ["| " + " | ".join(HEADS) + " |", "|" + "---|" * len(HEADS)]
    return "\n".join([*lines, *(markdown_row(contrast_cells(row), HEADS) for row in rows)])


def contrasts_csv(rows: Sequence[Row]) -> str:
    """Return the contrasts as CSV, numbers in full."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: csv_cell(value) for key, value in row.items()} for row in rows)
    return stream.getvalue()


def plot_contrasts(rows: Sequence[Row], title: str = "") -> Figure:
    """Return a forest plot: each difference with its interval, the datasets below one another."""
    known = [row for row in rows if row["difference"] is not None]
    if not known:
        return empty_figure("no pair could be compared", title)
    datasets = list(dict.fromkeys(row["dataset"] for row in known))
    heights = [sum(row["dataset"] == name for row in known) for name in datasets]
    figure = new_figure(WIDTH, 0.9 + sum(0.36 + 0.19 * height for height in heights))
    panels = figure.subplots(len(datasets), 1, squeeze=False, sharex=True, height_ratios=[0.9 + h for h in heights])
    for axes, name in zip(panels[:, 0], datasets, strict=True):
        shown = [row for row in known if row["dataset"] == name]
        for place, row in enumerate(shown):
            told = row["p_holm"] < 0.05
            colour = GREY if not told else BLUE if row["difference"] > 0 else ORANGE
            axes.plot([row["low"], row["high"]], [place, place], "-", color=colour, lw=1.6, solid_capstyle="butt")
            axes.plot(row["difference"], place, "o", color=colour, ms=5, mfc=colour if told else "white")
            text = f"{row['difference']:+.3f}"
            axes.text(1.015, place, text, transform=axes.get_yaxis_transform(), va="center", fontsize=SIZE)
        axes.axvline(0, color=GREY, lw=1, ls="--", zorder=1)
        labels = [f"{cut_middle(row['one'], 27)} − {cut_middle(row['two'], 34)}" for row in shown]
        axes.set_yticks(range(len(shown)), [literal(label) for label in labels], fontsize=SIZE - 0.5)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        plain_axes(axes)
        axes.grid(axis="y", color=FAINT, lw=0.6)
        axes.set_title(literal(name), fontsize=SIZE, loc="left", fontweight="bold", pad=3)
    panels[-1, 0].set_xlabel(f"difference of test {known[0]['metric']}, with 95% interval", fontsize=SIZE)
    handles = [
        line_handle(BLUE, "better (p < .05, Holm)", "-", "o"),
        line_handle(ORANGE, "worse", "-", "o"),
        line_handle(GREY, "not told apart", "-", "o"),
    ]
    handles[-1].set_markerfacecolor("white")
    legend_below(figure, handles)
    return titled(figure, title)
