"""A study's figures and its table: the history of trials, their parameters side by side, and what mattered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from zoo.reporting.plots import (
    BLUE,
    FAINT,
    GREY,
    ORANGE,
    SIZE,
    WIDTH,
    cut_middle,
    legend_below,
    line_handle,
    literal,
    new_figure,
    plain_axes,
    titled,
)

TOP = 10  # trials that a terminal shows
_TICKS = 5  # of an axis, about
_NEAR = 0.07  # of an axis; nearer, two labels would touch


def figures(document: Mapping[str, Any]) -> dict[str, Figure]:
    """Return the figures of a study by file name: `history`, `parallel-coordinate`, and `importance` if there is any.

    document: as `study.json` has it.
    """
    found = {
        "history": plot_history(document),
        "parallel-coordinate": plot_parallel_coordinate(document),
    }
    if document["importance"]:
        found["importance"] = plot_importance(document)
    return found


def plot_history(document: Mapping[str, Any]) -> Figure:
    """Return the value of each trial in the order of their numbers, and the best up to each."""
    rows, metric, sign = document["trials"], document["metric"], document["sign"]
    figure = new_figure(WIDTH, 3.4)
    axes = figure.subplots()
    complete = [row for row in rows if row["state"] == "complete"]
    pruned = [row for row in rows if row["state"] == "pruned" and row["value"] is not None]
    handles = []
    if document["default"]["value"] is not None:
        axes.axhline(document["default"]["value"], color=GREY, lw=1, ls="--", zorder=1)
        handles.append(line_handle(GREY, "the recipe as it is", "--"))
    for each, colour, marker, label in (
        (pruned, GREY, "x", "pruned, at its last epoch"),
        (complete, BLUE, "o", "complete"),
    ):
        if each:
            axes.plot([r["number"] for r in each], [r["value"] for r in each], marker, color=colour, ms=4, zorder=3)
            handles.append(line_handle(colour, label, "", marker))
    bests: list[float] = []
    for row in complete:
        bests.append(row["value"] if not bests else sign * max(sign * bests[-1], sign * row["value"]))
    ends = [row["number"] for row in complete] + [max(row["number"] for row in rows)]
    axes.step(ends, [*bests, bests[-1]], where="post", color=ORANGE, lw=1.4, zorder=2)
    handles.insert(0, line_handle(ORANGE, "best complete so far", "-"))
    without = [row["number"] for row in rows if row["value"] is None and row["state"] in ("failed", "pruned")]
    if without:
        bottom = axes.get_xaxis_transform()
        axes.plot(without, [0.03] * len(without), "v", color=ORANGE, ms=5, transform=bottom, zorder=3)
        handles.append(line_handle(ORANGE, "failed, or refused", "", "v"))
    axes.set_xlim(-0.5, ends[-1] + 0.5)
    axes.margins(y=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.set_xlabel("trial", fontsize=SIZE)
    axes.set_ylabel(_metric(metric, sign), fontsize=SIZE)
    plain_axes(axes)
    legend_below(figure, handles)
    return titled(figure, _title(document, "value of each trial"))


def plot_parallel_coordinate(document: Mapping[str, Any]) -> Figure:
    """Return every trial as a line over its parameters, coloured by its value; the best and the default stand out."""
    metric, sign, spaces = document["metric"], document["sign"], document["space"]
    keys = list(spaces)
    shown = [row for row in document["trials"] if row["params"].keys() >= spaces.keys()]
    complete = [row for row in shown if row["state"] == "complete"]
    figure = new_figure(WIDTH, 3.9)
    axes = figure.subplots()
    values = [row["value"] for row in complete] or [0.0, 1.0]
    low, high = min(values), max(values)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    scales = [*(_Scale(spaces[key]) for key in keys), _Scale({"low": low, "high": high})]
    reach = high - low  # the palest part of the colours cannot be seen on white
    ends = (low - reach / 2, high) if sign > 0 else (low, high + reach / 2)
    colour = ScalarMappable(Normalize(*ends), "Blues" if sign > 0 else "Blues_r")
    for row in sorted(complete, key=lambda row: sign * row["value"]):
        places = _places(row, keys, scales)
        axes.plot(range(len(places)), places, color=colour.to_rgba(row["value"]), lw=1, alpha=0.8, zorder=2)
    pruned = [row for row in shown if row["state"] == "pruned"]
    for row in pruned:
        axes.plot(range(len(keys)), _places(row, keys, scales)[:-1], color=FAINT, lw=0.8, zorder=1)
    handles = [line_handle(BLUE, "complete, the darker the better", "-")]
    handles += [line_handle(FAINT, "pruned", "-")] if pruned else []
    for name, key, style, tint in (("the recipe as it is", "default", "--", GREY), ("best", "best", "-", ORANGE)):
        if document[key] in complete:
            places = _places(document[key], keys, scales)
            axes.plot(range(len(places)), places, style, color=tint, lw=2, zorder=4)
            handles.append(line_handle(tint, name, style))
    for place, scale in enumerate(scales):
        _draw_scale(axes, place, scale, last=place == len(keys))
    names = [*(key.replace(".", ".\n", 1) for key in keys), _metric(metric, sign).replace(" ", "\n", 1)]
    axes.set_xticks(range(len(names)), [literal(name) for name in names], fontsize=SIZE)
    axes.tick_params(length=0, pad=6)
    axes.set_yticks([])
    axes.set_xlim(-0.45, len(keys) + 0.35)
    axes.set_ylim(-0.04, 1.04)
    for side in axes.spines.values():
        side.set_visible(False)
    legend_below(figure, handles)
    return titled(figure, _title(document, "parameters of each trial"))


class _Scale:
    """Where a value stands between 0 and 1 on its axis, and what is written along it."""

    def __init__(self, space: Mapping[str, Any]) -> None:
        self.choices = [str(value) for value in space["choices"]] if "choices" in space else None
        self.log = bool(space.get("log"))
        self.low, self.high = (0.0, 1.0) if self.choices else (self._of(space["low"]), self._of(space["high"]))
        self.whole = self.choices is None and all(isinstance(space[end], int) for end in ("low", "high"))

    def _of(self, value: float) -> float:
        return math.log(value) if self.log else float(value)

    def place(self, value: Any) -> float:
        """Return the place of a value."""
        if self.choices is not None:
            return self.choices.index(str(value)) / max(1, len(self.choices) - 1)
        return (self._of(value) - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        """Return places and what stands there: round numbers, and the ends where none is near."""
        if self.choices is not None:
            return [(self.place(choice), cut_middle(choice, 18)) for choice in self.choices]
        ends = [math.exp(end) if self.log else end for end in (self.low, self.high)]
        if self.log:
            powers = range(math.ceil(math.log10(ends[0]) - 1e-9), math.floor(math.log10(ends[1]) + 1e-9) + 1)
            values = [10.0**power for power in powers]
        else:
            values = [float(v) for v in MaxNLocator(_TICKS, integer=self.whole).tick_values(*ends)]
            values = [value for value in values if ends[0] <= value <= ends[1]]
        near = [self.place(value) for value in values]
        values += [end for end in ends if all(abs(self.place(end) - each) > _NEAR for each in near)]
        return [(self.place(value), f"{value:.3g}") for value in values]


def _places(row: Mapping[str, Any], keys: Sequence[str], scales: Sequence[_Scale]) -> list[float]:
    values = [*(row["params"][key] for key in keys), row["value"]]
    return [scale.place(value) if value is not None else 0.0 for scale, value in zip(scales, values, strict=True)]


def _draw_scale(axes: Axes, place: int, scale: _Scale, last: bool) -> None:
    axes.plot([place, place], [0, 1], color=GREY, lw=0.9, zorder=3)
    side, align = (0.03, "left") if last else (-0.03, "right")
    for height, text in scale.ticks():
        axes.plot([place - 0.015, place + 0.015], [height, height], color=GREY, lw=0.9, zorder=3)
        label = axes.text(place + side, height, literal(text), fontsize=SIZE - 1, ha=align, va="center", zorder=5)
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6})


def plot_importance(document: Mapping[str, Any]) -> Figure:
    """Return a bar for each key: the part of the variance of val that it explains alone."""
    importance: Mapping[str, float] = document["importance"]
    names = list(importance)[::-1]
    figure = new_figure(WIDTH, 0.9 + 0.32 * len(names))
    axes = figure.subplots()
    axes.barh(range(len(names)), [importance[name] for name in names], color=BLUE, height=0.62)
    for place, name in enumerate(names):
        axes.text(importance[name] + 0.008, place, f"{importance[name]:.2f}", va="center", fontsize=SIZE)
    axes.set_yticks(range(len(names)), [literal(name) for name in names], fontsize=SIZE)
    axes.set_xlim(0, max(0.2, 1.12 * max(importance.values())))
    axes.set_xlabel(f"part of the variance of val {document['metric']} that it explains alone (fANOVA)", fontsize=SIZE)
    plain_axes(axes)
    axes.grid(visible=False, axis="y")
    count = document["counts"]["complete"]
    return titled(figure, _title(document, f"importance, {count} complete trials"))


def _metric(metric: str, sign: int) -> str:
    return f"val {metric}" + ("" if sign > 0 else " (lower is better)")


def _title(document: Mapping[str, Any], what: str) -> str:
    return f"{document['recipe']} on {document['dataset']}: {what}"


# The table ------------------------------------------------------------------------------------------------------------


def table(document: Mapping[str, Any], width: int) -> tuple[list[str], list[list[str]]]:
    """Return heads and cells of the best trials, and the default; parameters share a column where there is no room."""
    rows = sorted(document["trials"], key=lambda row: _rank(row, document["sign"]))
    shown = rows[:TOP]
    shown += [row for row in rows[TOP:] if row["number"] == 0]
    keys = list(document["space"])
    names = _short_names(keys)
    heads = ["trial", "val", *names, "state", "epochs", "s"]
    wide = [[*_head(row), *(_cell(row["params"].get(key)) for key in keys), *_tail(row)] for row in shown]
    if sum(max(len(line[place]) for line in [heads, *wide]) + 3 for place in range(len(heads))) <= width + 3:
        return heads, wide
    texts = [
        ", ".join(f"{name} {_cell(row['params'].get(key))}" for key, name in zip(keys, names, strict=True))
        for row in shown
    ]
    cells = [[*_head(row), text, *_tail(row)[:-1]] for row, text in zip(shown, texts, strict=True)]
    return ["trial", "val", "parameters", "state", "epochs"], cells


def _rank(row: Mapping[str, Any], sign: int) -> tuple[int, float, int]:
    order = {"complete": 0, "pruned": 1}.get(row["state"], 2)
    return order, -sign * row["value"] if row["value"] is not None else math.inf, row["number"]


def _head(row: Mapping[str, Any]) -> list[str]:
    name = "0 default" if row["number"] == 0 else str(row["number"])
    return [name, "–" if row["value"] is None else f"{row['value']:.4f}"]


def _tail(row: Mapping[str, Any]) -> list[str]:
    seconds = row["seconds"]
    return [
        row["state"],
        str(row["epochs"] or "–"),
        "–" if seconds is None else f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.1f}",
    ]


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _short_names(keys: Sequence[str]) -> list[str]:
    lasts = [key.rpartition(".")[2] for key in keys]
    return [last if lasts.count(last) == 1 else key for key, last in zip(keys, lasts, strict=True)]


def comparison_text(document: Mapping[str, Any]) -> str:
    """Return tuned against default on val in a sentence, or why it cannot be said."""
    found = document["comparison"]
    if found is None:
        return f"the recipe as it is failed ({document['default']['reason']}), so there is nothing to compare with"
    low, high = found["ci"]
    unit = f"{found['images']} images" + (f" of {found['groups']} groups" if found["groups"] < found["images"] else "")
    return (
        f"val {found['metric']}, {unit}: tuned {_with_interval(found, 'tuned')}, default "
        f"{_with_interval(found, 'default')}; tuned − default {found['difference']:+.4f} "
        f"(95% CI {low:+.4f} to {high:+.4f})"
    )


def _with_interval(found: Mapping[str, Any], name: str) -> str:
    interval = found[f"{name}_ci"]
    return f"{found[name]:.4f}" + (f" ({interval[0]:.3f}–{interval[1]:.3f})" if interval else "")


def importance_text(document: Mapping[str, Any]) -> str:
    """Return the importances in a line; empty where there are none."""
    found = document["importance"] or {}
    return ", ".join(f"{key} {value:.2f}" for key, value in found.items())
