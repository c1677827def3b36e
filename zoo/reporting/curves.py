"""Figures of a report: differences, score against cost, reliability, ROC and PR with bands, referral, shared errors.

As in `zoo.reporting.plots`: every function returns a `matplotlib.figure.Figure`, names are never read as mathematics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from zoo.evaluation.calibration import risk_coverage
from zoo.evaluation.predictions import Predictions
from zoo.reporting.plots import (
    BLUE,
    FAINT,
    GREEN,
    GREY,
    ORANGE,
    SIZE,
    SKY,
    WIDTH,
    cut_middle,
    empty_figure,
    legend_below,
    line_handle,
    literal,
    new_figure,
    plain_axes,
    titled,
    two_lines,
)

BAND_REPLICATES = 300
_GRID = np.linspace(0, 1, 101)
# Okabe and Ito without yellow, then the same with dashes: at most 14 lines are told apart.
_COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", SKY, "#000000")


def plot_differences(pairs: Sequence[Mapping[str, Any]], reference: str, title: str = "") -> Figure:
    """Return a forest plot of the difference of each recipe to the reference, with its interval and the margin.

    pairs: as `Comparison.pairs` has them. A filled dot: told apart; a ring: not; a square: equivalent.
    """
    rows = []
    for pair in pairs:
        if reference in (pair["one"], pair["two"]) and _finite(pair["difference"]):
            turn = pair["two"] == reference
            sign = 1 if turn else -1
            ends = sorted((sign * pair["low"], sign * pair["high"]))
            rows.append((pair["one" if turn else "two"], sign * pair["difference"], ends, pair))
    if not rows:
        return empty_figure("no pair to compare: only one recipe is scored", title)
    rows.sort(key=lambda row: -row[1])
    figure = new_figure(WIDTH, 0.95 + 0.25 * len(rows))
    axes = figure.subplots()
    margin = rows[0][3]["margin"]
    axes.axvspan(-margin, margin, color=FAINT, alpha=0.6, lw=0)
    axes.axvline(0, color=GREY, lw=1)
    for place, (_, seen, ends, pair) in enumerate(rows):
        colour = ORANGE if pair["different"] else BLUE
        axes.plot(ends, [place, place], "-", color=colour, lw=1.6, solid_capstyle="butt")
        marker = "s" if pair["equivalent"] else "o"
        axes.plot(seen, place, marker, color=colour, mfc=colour if pair["different"] else "white", ms=5.5)
        p_value = f"p {pair['p_holm']:.3f}" if pair["p_holm"] >= 0.001 else "p <.001"
        text = f"{seen:+.3f}  {p_value}".replace("-", "−")
        axes.text(1.015, place, text, transform=axes.get_yaxis_transform(), va="center", fontsize=SIZE)
    axes.set_yticks(range(len(rows)), [literal(cut_middle(row[0], 38)) for row in rows], fontsize=SIZE)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(literal(f"difference of test {rows[0][3]['metric']} to {cut_middle(reference, 60)}"), fontsize=SIZE)
    plain_axes(axes)
    handles = [line_handle(ORANGE, "told apart", "-", "o"), line_handle(BLUE, "not told apart", "-", "o")]
    handles[1].set_markerfacecolor("white")
    handles.append(line_handle(FAINT, f"margin ±{margin:g}", "-"))
    handles[2].set_linewidth(6)
    handles.append(line_handle(FAINT, "p: Holm, over all pairs", ""))
    legend_below(figure, handles)
    return titled(figure, title)


def plot_pareto(rows: Sequence[Mapping[str, Any]], metric: str, sign: int = 1, title: str = "") -> Figure:
    """Return score against cost (parameters, seconds of training) with intervals; a line joins what nothing dominates.

    rows: `recipe`, `params`, `train_s`, `test_<metric>` and its `_ci`. sign: 1 where more of the metric is better.
    """
    key = f"test_{metric}"
    shown = [row for row in rows if _finite(row.get(key))]
    if not shown:
        return empty_figure("no score against cost: no recipe is scored", title)
    figure = new_figure(WIDTH, 3.1 + 0.16 * math.ceil(len(shown) / 3))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, cost, label in zip(panels, ("params", "train_s"), ("parameters", "training, s"), strict=True):
        known = [row for row in shown if row.get(cost)]
        for place, row in enumerate(shown):
            if row in known:
                _draw_cost(axes, row, key, cost, _COLOURS[place % len(_COLOURS)], "os^D"[place // len(_COLOURS) % 4])
        front = _front([(row[cost], sign * row[key]) for row in known])
        axes.plot([x for x, _ in front], [sign * y for _, y in front], "-", color=GREY, lw=0.9, zorder=1)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _round_number(value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(label, fontsize=SIZE)
        plain_axes(axes)
    panels[0].set_ylabel(key.replace("_", " ", 1), fontsize=SIZE)
    handles = [
        line_handle(_COLOURS[place % len(_COLOURS)], literal(cut_middle(row["recipe"], 34)), "", "os^D"[place // 7 % 4])
        for place, row in enumerate(shown)
    ]
    legend_below(figure, [*handles, line_handle(GREY, "nothing cheaper is better", "-")], columns=3)
    return titled(figure, title)


def _round_number(value: float) -> str:
    """Return a number as an axis names it.

    >>> _round_number(200000), _round_number(2.5e7), _round_number(0.5), _round_number(50)
    ('0.2M', '25M', '0.5', '50')
    """
    return f"{value / 1e6:g}M" if value >= 1e5 else f"{value:g}"


def _draw_cost(axes: Axes, row: Mapping[str, Any], key: str, cost: str, colour: str, marker: str) -> None:
    if row.get(f"{key}_ci"):
        axes.plot([row[cost]] * 2, row[f"{key}_ci"], "-", color=colour, lw=1, alpha=0.6)
    axes.plot(row[cost], row[key], marker, color=colour, ms=5.5)


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no cheaper point equals or beats, by rising cost."""
    front: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or score > front[-1][1]:
            front.append((cost, score))
    return front


def plot_reliability(reports: Mapping[str, Mapping[str, Any]], title: str = "") -> Figure:
    """Return a reliability diagram for each recipe: accuracy by confidence, before and after temperature scaling.

    reports: recipe to `calibration_report` of one of its runs. Bars of interval where a bin has them.
    """
    if not reports:
        return empty_figure("no reliability diagram: no run has predictions on val and test", title)
    figure, panels = _panels(list(reports), 2.05)
    for axes, (name, report) in zip(panels, reports.items(), strict=False):
        axes.plot([0, 1], [0, 1], ":", color=GREY, lw=1)
        for part, colour, shift in (("before", ORANGE, -0.004), ("after", BLUE, 0.004)):
            bins = report[f"reliability_{part}"]
            x = np.array([each["confidence"] for each in bins]) + shift
            y = np.array([each["accuracy"] for each in bins])
            for place, each in zip(x, bins, strict=True):
                axes.plot([place, place], each["accuracy_ci"], "-", color=colour, lw=0.8, alpha=0.5)
            sizes = np.array([each["n"] for each in bins], dtype=float)
            axes.scatter(x, y, s=6 + 40 * sizes / sizes.sum(), color=colour, zorder=3)
            axes.plot(x, y, "-", color=colour, lw=1)
        axes.set(xlim=(0, 1.02), ylim=(-0.02, 1.02))
        before, after = report["before"]["ece"], report["after"]["ece"]
        text = f"ECE {before:.3f} → {after:.3f}\nT = {report['temperature']:.2f}"
        axes.text(0.04, 0.96, text, transform=axes.transAxes, va="top", fontsize=SIZE - 0.5)
        _named(axes, name)
    _label_edges(panels, len(reports), "confidence", "share that is right")
    handles = [line_handle(ORANGE, "as trained", "-", "o"), line_handle(BLUE, "temperature fitted on val", "-", "o")]
    legend_below(figure, handles)
    return titled(figure, title)


def plot_roc_pr(
    runs_by_recipe: Mapping[str, Sequence[Predictions]], positive: int | None, kind: str, title: str = ""
) -> Figure:
    """Return ROC (kind `roc`) or precision-recall (`pr`) curves, a panel for each recipe, with a pointwise 95 % band.

    positive: of two classes; None takes the mean of one-vs-rest curves. Curves are means over seeds; the band is a
    bootstrap of groups, percentiles at each abscissa.
    """
    curves = {name: _band(list(runs), positive, kind) for name, runs in runs_by_recipe.items() if runs}
    curves = {name: found for name, found in curves.items() if found is not None}
    if not curves:
        return empty_figure("no curve: no class has test images in and out of it", title)
    figure, panels = _panels(list(curves), 2.05)
    for axes, (name, found) in zip(panels, curves.items(), strict=False):
        assert found is not None
        mean, low, high, base = found
        axes.fill_between(_GRID, low, high, color=SKY, alpha=0.4, lw=0)
        axes.plot(_GRID, mean, "-", color=BLUE, lw=1.5)
        axes.plot([0, 1], [0, 1] if kind == "roc" else [base, base], ":", color=GREY, lw=1)
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02))
        _named(axes, name)
    names = ("1 − specificity", "sensitivity") if kind == "roc" else ("recall", "precision")
    _label_edges(panels, len(curves), *names)
    handles = [line_handle(BLUE, "mean over seeds" + ("" if positive is not None else " and classes"), "-")]
    handles += [line_handle(SKY, "95% band", "-"), line_handle(GREY, "chance", ":")]
    handles[1].set_linewidth(6)
    legend_below(figure, handles)
    return titled(figure, title)


def _band(
    runs: list[Predictions], positive: int | None, kind: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float] | None:
    """Return a curve over the grid, its band, and what chance gives for precision."""
    first = runs[0]
    members = [positive] if positive is not None else list(range(first.logits.shape[1]))
    members = [each for each in members if 0 < (first.y_true == each).sum() < len(first.y_true)]
    if not members or len(members) * len(first.y_true) * len(runs) > 3_000_000:  # minutes, for a line of a pixel
        return None
    rng = np.random.default_rng(0)
    units = first.group_codes
    n_units = int(units.max()) + 1
    ones = np.ones(len(units))
    mean = np.mean([_curve(run, members, ones, kind) for run in runs], axis=0)
    drawn = []
    for _ in range(BAND_REPLICATES if n_units > 1 else 0):
        weights = np.bincount(rng.integers(n_units, size=max(1, n_units - 1)), minlength=n_units)[units]
        run = runs[rng.integers(len(runs))]
        if all(0 < weights[run.y_true == each].sum() < weights.sum() for each in members):
            drawn.append(_curve(run, members, weights, kind))
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0) if drawn else (np.zeros(len(_GRID)), np.ones(len(_GRID)))
    base = float(np.mean([(first.y_true == each).mean() for each in members]))
    return mean, low, high, base


def _curve(run: Predictions, members: Sequence[int], weights: np.ndarray, kind: str) -> np.ndarray:
    """Return sensitivity over 1 - specificity, or precision over recall, on the grid; a mean over the classes."""
    found = []
    for member in members:
        order = np.argsort(-run.y_score[:, member], kind="stable")
        score, inside = run.y_score[order, member], (run.y_true[order] == member) * weights[order]
        ends = np.flatnonzero(np.append(np.diff(score) != 0, True))  # equal scores are one step
        hits, false = np.cumsum(inside)[ends], np.cumsum(weights[order] - inside)[ends]
        if kind == "roc":
            found.append(np.interp(_GRID, np.append(0, false / false[-1]), np.append(0, hits / hits[-1])))
            continue
        precision, recall = hits / np.maximum(hits + false, 1e-12), hits / hits[-1]
        # At each recall the precision of the first threshold that reaches it: a step, not a slope.
        found.append(precision[np.searchsorted(recall, np.minimum(_GRID, recall[-1]), "left")])
    return np.asarray(np.mean(found, axis=0))


def plot_risk_coverage(runs: Mapping[str, Predictions], refer: Mapping[str, Any], title: str = "") -> Figure:
    """Return the error among what is answered by the share that is answered, most confident first.

    runs: recipe to the test predictions of one run. refer: recipe to its `refer_report`; where it has a threshold, a
    ring says where it falls on test.
    """
    if not runs:
        return empty_figure("no risk-coverage curve: no run is scored", title)
    figure = new_figure(WIDTH, 2.9 + 0.16 * math.ceil(len(runs) / 3))
    axes = figure.subplots()
    handles = []
    for place, (name, run) in enumerate(runs.items()):
        curve = risk_coverage(run.y_true, run.y_score)
        colour, style = _COLOURS[place % len(_COLOURS)], ("-", "--", ":")[place // len(_COLOURS) % 3]
        axes.plot(curve["coverage"], curve["risk"], style, color=colour, lw=1.3)
        report = refer.get(name) or {}
        if report.get("threshold") is not None and report.get("test_error") is not None:
            axes.plot(report["test_coverage"], report["test_error"], "o", mfc="white", mec=colour, ms=6)
        handles.append(line_handle(colour, literal(cut_middle(name, 34)), style))
    axes.set(xlim=(0, 1.02), ylim=(0, None))
    axes.set_xlabel("share of the test images that is answered; ring: threshold chosen on val", fontsize=SIZE)
    axes.set_ylabel("error among them", fontsize=SIZE)
    plain_axes(axes)
    legend_below(figure, handles, columns=3)
    return titled(figure, title)


def plot_error_overlap(missed: Mapping[str, np.ndarray], title: str = "") -> Figure:
    """Return how far recipes miss the same images: for each pair those that both miss over those that either misses.

    missed: recipe to (N,) bool.
    """
    names = list(missed)
    if len(names) < 2:
        return empty_figure("no overlap of errors: only one recipe is scored", title)
    shares = np.ones((len(names), len(names)))
    for row, one in enumerate(names):
        for column, two in enumerate(names):
            either = (missed[one] | missed[two]).sum()
            shares[row, column] = (missed[one] & missed[two]).sum() / either if either else 1.0
    side = min(0.36, 4.6 / len(names))
    figure = new_figure(WIDTH, 1.4 + side * len(names))
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if side * 72 > 16:
        for row, column in np.ndindex(*shares.shape):
            colour = "white" if shares[row, column] > 0.55 else "black"
            text = f"{shares[row, column]:.2f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=SIZE - 0.5, color=colour)
    labels = [literal(cut_middle(name, 34)) for name in names]
    axes.set_yticks(range(len(names)), labels, fontsize=SIZE)
    axes.set_xticks(range(len(names)), [str(place + 1) for place in range(len(names))], fontsize=SIZE)
    axes.set_yticklabels([f"{label}  {place + 1}" for place, label in enumerate(labels)])
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05)
    bar.set_label("missed by both / by either", fontsize=SIZE)
    bar.ax.tick_params(labelsize=SIZE - 0.5)
    return titled(figure, title)


def _panels(names: Sequence[str], height: float) -> tuple[Figure, list[Axes]]:
    across = min(4, max(2, len(names)))
    down = math.ceil(len(names) / across)
    figure = new_figure(WIDTH, 0.75 + height * down)
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    flat = list(grid.flat)
    for axes in flat[len(names) :]:
        axes.set_axis_off()
    for axes in flat:
        plain_axes(axes)
    return figure, flat


def _label_edges(panels: Sequence[Axes], count: int, below: str, left: str) -> None:
    """Label the lowest panel of each column and the first of each row; a label of the whole would meet the legend."""
    across = min(4, max(2, count))
    for place, axes in enumerate(panels[:count]):
        if place + across >= count:
            axes.set_xlabel(below, fontsize=SIZE)
            axes.tick_params(labelbottom=True)
        if place % across == 0:
            axes.set_ylabel(left, fontsize=SIZE)


def _named(axes: Axes, name: str) -> None:
    axes.set_title(two_lines(name, 24), fontsize=SIZE, fontweight="bold")


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
