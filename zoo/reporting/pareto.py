"""The figure of a choice: the score on val over what each candidate costs, and who is beaten by nobody in both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from zoo.evaluation.metrics import METRIC_SIGN
from zoo.reporting.pick import COSTS, Limit
from zoo.reporting.picked import short_name
from zoo.reporting.plots import (
    BLUE,
    GREEN,
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

_FRONT = "#b8b8b8"
_NAMED = 12  # labels in one figure; the rest are dots


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the places of the pairs (cost, score) that no other beats, by cost.

    Of equals the first stands for all.

    >>> pareto_front([(1.0, 0.5), (2.0, 0.4), (3.0, 0.9)])
    [0, 2]
    """
    front: list[int] = []
    for place in sorted(range(len(points)), key=lambda each: (points[each][0], -points[each][1], each)):
        if not front or points[place][1] > points[front[-1]][1]:
            front.append(place)
    return front


def plot_pareto(document: Mapping[str, Any], limits: Sequence[Limit] = ()) -> Figure:
    """Return the figure of a choice's document: val metric with 95 % intervals over the cost, limits and floor beside.

    document: `candidates`, `metric`, `cost`, `floors` and `dataset` of a choice.
    """
    metric, cost = document["metric"], document["cost"]
    column = f"{cost}_{COSTS[cost].lower()}"
    measured = [row for row in document["candidates"] if row["reason"] is None and row[column] is not None]
    rows = [row for row in measured if row[f"val_{metric}"] is not None]
    title = f"{document['dataset']}: what to deploy, by val {metric} and {cost}"
    if not rows:
        return empty_figure(f"{metric} is not defined on val" if measured else "no candidate could be measured", title)
    sign = METRIC_SIGN[metric]
    points = [(row[column], sign * row[f"val_{metric}"]) for row in rows]
    front = pareto_front(points)
    figure = new_figure(WIDTH, 4.4)
    axes = figure.subplots()
    axes.set_xscale("log")
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    axes.set_xlim(low / 1.5, high * 2.2)
    axes.step(
        [points[each][0] for each in front] + [high * 2.2],
        [sign * points[each][1] for each in (*front, front[-1])],
        where="post",
        color=_FRONT,
        lw=2,
        zorder=0,
    )
    for row in rows:
        _draw(axes, row, row[column], metric)
    _label(axes, rows, column, metric, front)
    handles = [
        line_handle(ORANGE, "chosen", "", "*"),
        line_handle(BLUE, "keeps the limits", "", "o"),
        line_handle(GREY, "breaks one", "", "x"),
        line_handle(_FRONT, "beaten by nobody", "-"),
        *_draw_bounds(axes, document, limits, metric, cost),
    ]
    axes.set_xlabel(f"{document['percentile']} {cost}, ms" if cost == "latency" else f"{cost}, {COSTS[cost]}")
    axes.set_ylabel(f"val {metric}" + ("" if sign > 0 else " (less is better)"))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    plain_axes(axes)
    axes.tick_params(axis="x", which="minor", labelsize=SIZE - 1.5)
    axes.xaxis.label.set_fontsize(SIZE)
    axes.yaxis.label.set_fontsize(SIZE)
    legend_below(figure, handles)
    return titled(figure, title)


def _draw(axes: Axes, row: Mapping[str, Any], x: float, metric: str) -> None:
    chosen = row["role"] == "chosen"
    colour = ORANGE if chosen else BLUE if row["fits"] else GREY
    interval = row[f"val_{metric}_ci"]
    if interval:
        axes.plot([x, x], interval, color=colour, lw=0.9, alpha=0.6)
    marker, size = ("*", 13) if chosen else ("o", 5.5) if row["fits"] else ("x", 6)
    axes.plot([x], [row[f"val_{metric}"]], marker, color=colour, ms=size, zorder=3 if chosen else 2)


def _label(axes: Axes, rows: Sequence[Mapping[str, Any]], column: str, metric: str, front: Sequence[int]) -> None:
    """Number the dots and list their names beside the plot, the best on val first, so that no name lies on another.

    The chosen, the runner-up and the front have a number in any case, the rest as far as there is room.
    """
    order = sorted(range(len(rows)), key=lambda each: (rows[each]["role"] is None, each not in front, each))
    named = sorted(order[:_NAMED], key=lambda each: -METRIC_SIGN[metric] * rows[each][f"val_{metric}"])
    for number, place in enumerate(named, 1):
        row = rows[place]
        colour = ORANGE if row["role"] == "chosen" else GREY
        axes.annotate(
            str(number),
            (row[column], row[f"val_{metric}"]),
            xytext=(5, 3 if number % 2 else -9),
            textcoords="offset points",
            fontsize=SIZE - 1,
            color=colour,
        )
        name = literal(cut_middle(short_name(row["name"]), 44))
        axes.text(
            1.02,
            1 - (number - 0.5) / max(_NAMED, len(named)),
            f"{number:>2}  {name}",
            transform=axes.transAxes,
            fontsize=SIZE - 1,
            va="center",
            color=colour,
        )


def _draw_bounds(axes: Axes, document: Mapping[str, Any], limits: Sequence[Limit], metric: str, cost: str) -> list[Any]:
    """Draw limits of what the axes show, and the strongest floor; return their handles."""
    handles = []
    for limit in limits:
        if limit.key == cost:
            left, right = axes.get_xlim()
            axes.set_xlim(min(left, limit.bound / 1.2), max(right, limit.bound * 1.2))
            axes.axvline(limit.bound, color=GREY, lw=0.9, ls=":")
        elif limit.key == metric:
            axes.axhline(limit.bound, color=GREY, lw=0.9, ls=":")
        else:
            continue
        handles = [line_handle(GREY, "limit", ":")]
    floors = [floor[f"val_{metric}"] for floor in document["floors"] if floor.get(f"val_{metric}") is not None]
    if floors:
        axes.axhline(max(floors), color=GREEN, lw=0.9, ls="--")
        handles.append(line_handle(GREEN, "strongest floor", "--"))
    return handles
