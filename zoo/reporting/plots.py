"""Figures of a benchmark: learning curves, test scores, confusion matrices, sample predictions.

Every function returns a `matplotlib.figure.Figure` that no global state knows of; `save_figure` writes it. Names are
shown as they are, never read as mathematics. Colours: Okabe and Ito (2008), told apart by colour-blind eyes.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from zoo.errors import one_line
from zoo.evaluation.metrics import METRIC_SIGN
from zoo.evaluation.predictions import Predictions

DPI = 130  # a figure of WIDTH inches then fits a README page without being scaled
WIDTH = 7.8  # inches
BLUE, ORANGE, GREEN, SKY = "#0072B2", "#D55E00", "#009E73", "#56B4E9"
GREY, FAINT = "#555555", "#dddddd"
SIZE = 7.5  # points
_LEAST_CELL_TEXT = 4.5  # points; smaller counts are left out of a matrix


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically; the same figure gives the same bytes.

    Raises ZooError where the file cannot be written.
    """
    from zoo.files import atomic_writer

    with atomic_writer(path) as stream, warnings.catch_warnings():
        # A letter that the font lacks becomes a box; that is no reason to fail.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        figure.savefig(stream, format="png", dpi=DPI, metadata={"Software": None})


def plot_learning_curves(histories: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], title: str = "") -> Figure:
    """Return loss and top1 of training and validation over the epochs, two panels for each recipe.

    histories: recipe to one history for each seed; a history is a list of epochs with `epoch`, `phase`,
    `train_loss`, `val_loss`, `train_top1`, `val_top1`, of which any may be missing. Seeds are faint, their mean
    is strong, a dotted line says where a new phase begins. Panels of one kind share their scale.
    """
    names = list(histories)
    if not names:
        return empty_figure("no learning curves: no run has a history", title)
    across = len(names) if len(names) <= 3 else 3 if len(names) <= 6 else 4
    down = math.ceil(len(names) / across)
    figure = new_figure(WIDTH if across > 1 else 4.2, 0.75 + 2.5 * down)
    grid = figure.subplots(2 * down, across, squeeze=False, sharex=False)
    loss_top, top1_bottom = _loss_top(histories), _top1_bottom(histories)
    for place in range(down * across):
        row, column = divmod(place, across)
        pair = (grid[2 * row][column], grid[2 * row + 1][column])
        if place >= len(names):
            for axes in pair:
                axes.set_axis_off()
            continue
        for axes, key in zip(pair, ("loss", "top1"), strict=True):
            _draw_curves(axes, histories[names[place]], key)
            if column == 0:
                axes.set_ylabel(key, fontsize=SIZE)
        pair[0].set_ylim(0, loss_top)
        pair[1].set_ylim(top1_bottom, 1.01)
        pair[0].tick_params(labelbottom=False)
        pair[0].set_title(two_lines(names[place], 90 // across), fontsize=SIZE, fontweight="bold")
        if place + across >= len(names):
            pair[1].set_xlabel("epoch", fontsize=SIZE)
    handles = [line_handle(ORANGE, "training", "--"), line_handle(BLUE, "validation", "-")]
    if any(_phase_starts(seeds) for seeds in histories.values()):
        handles.append(line_handle(GREY, "next phase", ":"))
    legend_below(figure, handles)
    return titled(figure, title)


def _draw_curves(axes: Axes, seeds: Sequence[Sequence[Mapping[str, Any]]], key: str) -> None:
    for part, colour, style in (("train", ORANGE, "--"), ("val", BLUE, "-")):
        curves = [_curve(history, f"{part}_{key}") for history in seeds]
        if len(seeds) > 1:
            for curve in curves:
                axes.plot(list(curve), list(curve.values()), style, color=colour, lw=0.7, alpha=0.35)
        epochs = sorted(set().union(*curves))
        means = [statistics.fmean(curve[epoch] for curve in curves if epoch in curve) for epoch in epochs]
        marker = "o" if len(epochs) < 3 else ""
        axes.plot(epochs, means, style, color=colour, lw=1.5, marker=marker, ms=3)
    for epoch in _phase_starts(seeds):
        axes.axvline(epoch - 0.5, color=GREY, lw=0.9, ls=":")
    last = max((epoch for history in seeds for epoch in _epochs(history)), default=1)
    axes.set_xlim(0.5, last + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    plain_axes(axes)


def _epochs(history: Sequence[Mapping[str, Any]]) -> list[int]:
    return [int(row.get("epoch") or place) for place, row in enumerate(history, start=1)]


def _curve(history: Sequence[Mapping[str, Any]], key: str) -> dict[int, float]:
    rows = zip(_epochs(history), history, strict=True)
    return {epoch: float(row[key]) for epoch, row in rows if _finite(row.get(key))}


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _phase_starts(seeds: Sequence[Sequence[Mapping[str, Any]]]) -> list[int]:
    """Return the epochs that begin another phase than the epoch before, in any seed."""
    starts = set()
    for history in seeds:
        epochs = _epochs(history)
        for place in range(1, len(history)):
            if history[place].get("phase") != history[place - 1].get("phase"):
                starts.add(epochs[place])
    return sorted(starts)


def _values(histories: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], key: str) -> list[list[float]]:
    """Return every finite value of `train_<key>` and `val_<key>`, a list for each recipe that has some."""
    found = [
        [value for history in seeds for part in ("train", "val") for value in _curve(history, f"{part}_{key}").values()]
        for seeds in histories.values()
    ]
    return [values for values in found if values]


def _loss_top(histories: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> float:
    """Return the top of the shared scale: one recipe that diverged must not flatten all others."""
    peaks = [max(values) for values in _values(histories, "loss")] or [1.0]
    return max(1e-3, 1.05 * min(max(peaks), 3 * statistics.median(peaks)))


def _top1_bottom(histories: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> float:
    lowest = min((min(values) for values in _values(histories, "top1")), default=0.0)
    return max(0.0, math.floor(lowest * 10 - 0.2) / 10)


def plot_test_scores(
    rows: Sequence[Mapping[str, Any]],
    metric: str = "test_top1",
    floors: Sequence[Mapping[str, Any]] = (),
    title: str = "",
) -> Figure:
    """Return a dot plot of one metric: for each recipe the mean, its interval and its seeds, best first.

    rows: `recipe`, `status`, `reason`, `letters`, the metric's mean, and where known `<metric>_ci` [low, high],
    `<metric>_sd` (drawn where there is no interval) and `<metric>_seeds`. A row without a mean is shown as failed.
    floors: `name` and the metric; each a dashed line.
    """
    sign = METRIC_SIGN.get(metric.split("_", 1)[-1], 1)
    scored = sorted((row for row in rows if _finite(row.get(metric))), key=lambda row: -sign * row[metric])
    failed = [row for row in rows if not _finite(row.get(metric))]
    floors = sorted((floor for floor in floors if _finite(floor.get(metric))), key=lambda floor: floor[metric])
    count = max(1, len(rows))
    figure = new_figure(WIDTH, 1.0 + 0.25 * count + 0.17 * len(floors))
    axes = figure.subplots()
    low, high = _score_limits(scored, floors, metric)
    axes.set_xlim(low, high)
    axes.set_ylim(count - 0.4, -0.6)
    for place, row in enumerate(scored):
        _draw_score(axes, place, row, metric)
    for place, row in enumerate(failed, start=len(scored)):
        reason = one_line(row.get("reason") or row.get("status") or "no score", 70)
        said = axes.text(low + 0.01 * (high - low), place, f"failed: {literal(reason)}", va="center", fontsize=SIZE)
        said.set(color=ORANGE, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    names = [literal(cut_middle(str(row.get("recipe", "?")), 38)) for row in (*scored, *failed)]
    axes.set_yticks(range(len(names)), names, fontsize=SIZE)
    axes.grid(axis="y", color=FAINT, lw=0.6)
    _draw_floors(axes, floors, metric)
    axes.set_xlabel(_metric_label(metric, sign), fontsize=SIZE)
    plain_axes(axes)
    if scored:
        legend_below(figure, _score_handles(scored, metric))
    return titled(figure, title)


def _score_handles(scored: Sequence[Mapping[str, Any]], metric: str) -> list[Line2D]:
    mean = line_handle(BLUE, "mean", "", "o")
    if any(row.get(f"{metric}_ci") for row in scored):
        mean = line_handle(BLUE, "mean, 95% interval", "-", "o")
    elif any(_finite(row.get(f"{metric}_sd")) for row in scored):
        mean = line_handle(BLUE, "mean ± sd over seeds", "-", "o")
    handles = [mean]
    if any(len(row.get(f"{metric}_seeds") or ()) > 1 for row in scored):
        handles.append(Line2D([], [], ls="", marker="o", ms=4, mfc="none", mec=SKY, label="one seed"))
    if any(row.get("letters") for row in scored):
        handles.append(Line2D([], [], ls="", label="same letter: no difference shown"))
    return handles


def _draw_score(axes: Axes, place: int, row: Mapping[str, Any], metric: str) -> None:
    interval = _interval(row, metric)
    if interval:
        axes.plot(interval, [place, place], "-", color=BLUE, lw=1.6, solid_capstyle="butt")
    seeds = row.get(f"{metric}_seeds") or ()
    if len(seeds) > 1:
        axes.plot(seeds, [place] * len(seeds), "o", mfc="none", mec=SKY, ms=4.5, mew=1.0, zorder=3)
    axes.plot(row[metric], place, "o", color=BLUE, ms=5, zorder=4)
    beside = axes.get_yaxis_transform()
    partly = " (partly failed)" if row.get("status") == "partly failed" else ""
    text = f"{row[metric]:.3f}  {row.get('letters') or ''}{partly}"
    axes.text(1.015, place, literal(text), transform=beside, va="center", fontsize=SIZE)


def _interval(row: Mapping[str, Any], metric: str) -> list[float] | None:
    if row.get(f"{metric}_ci"):
        return list(row[f"{metric}_ci"])
    spread = row.get(f"{metric}_sd")
    return [row[metric] - spread, row[metric] + spread] if spread is not None and _finite(spread) else None


def _score_limits(
    scored: Sequence[Mapping[str, Any]], floors: Sequence[Mapping[str, Any]], metric: str
) -> tuple[float, float]:
    ends = [row[metric] for row in (*scored, *floors)]
    for row in scored:
        ends += [*(_interval(row, metric) or ()), *(row.get(f"{metric}_seeds") or ())]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    pad = 0.04 * (high - low) or 0.05
    # The interval of a fraction ends at 1, but the dot at 1 must not be cut.
    return max(low - pad, -0.01), high + pad if high > 1 else min(high + pad, 1.01)


def _draw_floors(axes: Axes, floors: Sequence[Mapping[str, Any]], metric: str) -> None:
    """Draw each floor as a line that ends at its own height above the plot, so that no two names meet."""
    low, high = axes.get_xlim()
    transform = axes.get_xaxis_transform()
    for place, floor in enumerate(floors):
        value, right = floor[metric], floor[metric] - low < 0.6 * (high - low)
        line: dict[str, Any] = {"ls": "--", "color": GREY, "lw": 1, "zorder": 1}
        axes.plot([value, value], [0, 1], transform=transform, clip_on=False, **line)
        text = f"{literal(one_line(floor['name'], 60))} {value:.3f}"
        axes.annotate(
            f" {text}" if right else f"{text} ",
            (value, 1),
            # In points, not parts of the height: the layout of a low plot would shrink it to nothing.
            xytext=(0, 72 * 0.17 * (len(floors) - place - 0.5)),
            textcoords="offset points",
            xycoords=transform,
            ha="left" if right else "right",
            va="center",
            fontsize=SIZE,
            color=GREY,
            annotation_clip=False,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            arrowprops={"arrowstyle": "-", "relpos": (0 if right else 1, 0.5), "shrinkA": 0, "shrinkB": 0, **line},
        )


def _metric_label(metric: str, sign: int) -> str:
    split, _, name = metric.partition("_")
    words = f"{split} {name.replace('_', ' ')}" if split in ("test", "val", "train") else metric.replace("_", " ")
    return words if sign > 0 else f"{words} (less is better)"


def plot_confusion_matrices(matrices: Mapping[str, Sequence[Any]], classes: Sequence[str], title: str = "") -> Figure:
    """Return a confusion matrix for each recipe: counts summed over seeds, colour by share of the true class.

    matrices: recipe to one (C, C) matrix of counts for each seed, rows true, columns predicted.
    """
    names = list(matrices)
    if not names:
        return empty_figure("no confusion matrices: no run is scored", title)
    c = len(classes)
    across = min(len(names), 4 if c <= 4 else 3 if c <= 10 else 2 if c <= 20 else 1)
    down = math.ceil(len(names) / across)
    labels = [literal(one_line(name, 18)) for name in classes]
    margin = 0.2 + 0.065 * min(18, max(len(one_line(name)) for name in classes))  # inches of the class names
    side = min(4.8, (WIDTH - margin - 0.9) / across, max(1.7, 0.5 * c))
    labelled = 1 if len(names) % across == 0 else min(down, 2)  # rows with class names below them
    height = 0.5 + margin * labelled + (side + 0.3) * down
    figure = new_figure(max(3.6, margin + 0.9 + side * across), height, "compressed")
    grid = figure.subplots(down, across, squeeze=False)
    points = 72 * (side - 0.1) / c  # of one cell
    image: Any = None
    for place, axes in enumerate(grid.flat):
        if place >= len(names):
            axes.set_axis_off()
            continue
        counts = np.sum([np.asarray(matrix) for matrix in matrices[names[place]]], axis=0).reshape(c, c)
        image = _draw_matrix(axes, counts, points)
        axes.set_title(two_lines(names[place], int(side * 13)), fontsize=SIZE, fontweight="bold")
        _label_classes(axes, labels, points, place % across == 0, place + across >= len(names))
    figure.supxlabel("predicted", fontsize=SIZE)
    figure.supylabel("true", fontsize=SIZE)
    bar = figure.colorbar(image, ax=grid, fraction=0.03, pad=0.01, aspect=30)
    bar.set_label("share of the true class", fontsize=SIZE)
    bar.ax.tick_params(labelsize=SIZE - 0.5)
    return titled(figure, title)


def _draw_matrix(axes: Axes, counts: np.ndarray, points: float) -> Any:
    totals = counts.sum(axis=1, keepdims=True)
    share = counts / np.maximum(totals, 1)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    digits = len(str(int(counts.max())))
    size = min(SIZE, points / (0.68 * max(digits, 2)))
    if size >= _LEAST_CELL_TEXT:
        for row, column in np.ndindex(*counts.shape):
            colour = "white" if share[row, column] > 0.55 else "black"
            text = str(int(counts[row, column]))
            cell = axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)
            cell.set_in_layout(False)  # hundreds of them, none of which moves anything
    return image


def _label_classes(axes: Axes, labels: list[str], points: float, left: bool, bottom: bool) -> None:
    size = max(4.0, min(SIZE, 0.9 * points))
    ticks = range(0, len(labels), math.ceil(size / points))  # of many classes every second, third, ... is named
    shown = [labels[tick] for tick in ticks]
    turned = 90 if max(map(len, labels)) > 3 else 0
    axes.set_xticks(ticks, shown if bottom else [], fontsize=size, rotation=turned)
    axes.set_yticks(ticks, shown if left else [], fontsize=size)
    axes.tick_params(length=0, pad=2)
    for spine in axes.spines.values():
        spine.set_color(FAINT)


def choose_samples(predictions: Predictions, count: int = 16, seed: int = 0) -> np.ndarray:
    """Return indices of at most `count` samples: up to half of them wrong, then right ones, spread over the classes.

    The same predictions and seed give the same samples.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(predictions.y_true))
    right = (predictions.y_pred == predictions.y_true)[order]
    wrong = _spread(order[~right], predictions.y_true)
    sure = _spread(order[right], predictions.y_true)
    n_wrong = min(len(wrong), max(count // 2, count - len(sure)))
    return np.concatenate([wrong[:n_wrong], sure[: count - n_wrong]]).astype(np.int64)


def _spread(indices: np.ndarray, y_true: np.ndarray) -> np.ndarray:
    """Return the indices so that the classes take turns."""
    turn = np.zeros(len(indices), dtype=np.int64)
    for label in np.unique(y_true[indices]):
        own = y_true[indices] == label
        turn[own] = np.arange(own.sum())
    return indices[np.lexsort((y_true[indices], turn))]


def plot_samples(
    images: Sequence[np.ndarray], predictions: Predictions, classes: Sequence[str], title: str = ""
) -> Figure:
    """Return a page of images with true label, predicted label, its score and the sample id.

    images: uint8, (H, W, 3), (H, W) or (H, W, 1), one for each sample of `predictions`. Right ones have a green
    frame and a tick, wrong ones a vermilion frame and a cross.
    """
    count = len(images)
    if not count:
        return empty_figure("no sample predictions: no run is scored", title)
    across = min(count, 4 if count % 5 and not count % 4 else 5)
    down = math.ceil(count / across)
    side = WIDTH / 5
    figure = new_figure(max(3.2, side * across), 0.3 + (side + 0.48) * down, "compressed")
    grid = figure.subplots(down, across, squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place >= count:
            axes.set_axis_off()
            continue
        _draw_sample(axes, images[place])
        label, guess = int(predictions.y_true[place]), int(predictions.y_pred[place])
        _caption(
            axes,
            right=label == guess,
            lines=(
                f"{one_line(classes[guess], 14)} {predictions.y_score[place, guess]:.2f}",
                f"true: {one_line(classes[label], 18)}",
                cut_middle(str(predictions.sample_ids[place]), 26),
            ),
        )
    return titled(figure, title)


def _draw_sample(axes: Axes, image: np.ndarray) -> None:
    grey = image.ndim == 2 or image.shape[-1] == 1
    shown = image.reshape(image.shape[:2]) if grey else image
    axes.imshow(shown, cmap="gray" if grey else None, vmin=0, vmax=255)
    axes.set_xticks([])
    axes.set_yticks([])


def _caption(axes: Axes, right: bool, lines: tuple[str, str, str]) -> None:
    colour = GREEN if right else ORANGE
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=2.5)
    said, true, sample = (literal(line) for line in lines)
    axes.set_title(f"{'✓' if right else '✗'} {said}", fontsize=SIZE, color=colour, fontweight="bold", pad=4)
    axes.set_xlabel(f"{true}\n{sample}", fontsize=SIZE - 1, labelpad=3)


# What all figures share -----------------------------------------------------------------------------------------------


def new_figure(width: float, height: float, layout: Literal["constrained", "compressed"] = "constrained") -> Figure:
    """Return a white figure of so many inches that lays its parts out by itself."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout, facecolor="white")
    engine: Any = figure.get_layout_engine()
    engine.set(w_pad=0.04, h_pad=0.06, wspace=0.02, hspace=0.02)
    return figure


def titled(figure: Figure, title: str) -> Figure:
    """Return the figure with a title, broken into lines that fit."""
    if title:
        figure.suptitle(_wrapped(title, int(figure.get_figwidth() * 12)), fontsize=SIZE + 1.5, fontweight="bold")
    return figure


def empty_figure(text: str, title: str) -> Figure:
    """Return a figure that says in words why there is nothing to draw."""
    figure = new_figure(WIDTH, 1.2)
    figure.text(0.5, 0.45, text, ha="center", va="center", fontsize=SIZE + 1, color=GREY)
    return titled(figure, title)


def legend_below(figure: Figure, handles: list[Line2D], columns: int | None = None) -> None:
    """Put a legend below all panels, in one line or in so many columns."""
    across = columns or len(handles)
    figure.legend(handles=handles, loc="outside lower center", ncols=across, fontsize=SIZE, frameon=False)


def line_handle(colour: str, label: str, style: str, marker: str = "") -> Line2D:
    """Return an entry of a legend."""
    return Line2D([], [], color=colour, label=label, ls=style, marker=marker, ms=5, lw=1.5)


def plain_axes(axes: Axes) -> None:
    """Take what is not needed off the axes."""
    axes.tick_params(labelsize=SIZE - 0.5, length=2.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=FAINT, lw=0.5)
    axes.set_axisbelow(True)


def literal(text: str) -> str:
    """Return text that matplotlib does not read as mathematics."""
    return text.replace("$", r"\$")


def cut_middle(text: str, limit: int) -> str:
    """Return text of at most `limit` characters, cut in the middle: the ends of recipe names tell them apart."""
    line = one_line(text, 10_000)
    if len(line) <= limit:
        return line
    tail = (limit - 1) // 2
    return f"{line[: limit - 1 - tail]}…{line[-tail:]}"


def two_lines(name: str, width: int) -> str:
    """Return a name in at most two lines of about `width` characters, broken after a separator where there is one."""
    line = cut_middle(name, 2 * width - 2)
    if len(line) <= width:
        return literal(line)
    breaks = [place + 1 for place in range(len(line) - width - 1, width) if line[place] in "-_. "]
    middle = (len(line) + 1) // 2
    at = min(breaks, key=lambda place: abs(place - middle), default=middle)
    return literal(f"{line[:at]}\n{line[at:]}")


def _wrapped(text: str, width: int) -> str:
    import textwrap

    return literal("\n".join(textwrap.wrap(one_line(text, 400), width)))
