"""A figure of the loss that is kept up to date while a run trains."""

from __future__ import annotations

import itertools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import one_line
from zoo.evaluation.metrics import METRIC_SIGN
from zoo.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from zoo.training.loop import Tick

_SHARE = 0.02  # of the time that drawing may take
_PER_EPOCH = 40  # points kept of the loss within an epoch
_POINTS = 4000  # points kept of the loss within all epochs; of more every second one


class LiveFigure:
    """Keeps a picture in a run folder up to date: the loss within and over the epochs, and the val metric.

    path: the PNG, in the run folder, whose `history.jsonl` it goes on from. It is replaced whole, so that a viewer
    never sees half of it, and stays when the run ends. It is drawn at most every `every_s` seconds, and so seldom that
    drawing takes 2 % of the time at most. What goes wrong is handed to on_note and kept in `note`, once; it never stops
    the training.
    """

    def __init__(self, path: Path, every_s: float = 10.0, on_note: Callable[[str], None] | None = None) -> None:
        self.path, self.every_s = path, every_s
        self.note: str | None = None
        self._on_note = on_note
        self._rows: dict[int, Mapping[str, Any]] = {}
        self._within: list[tuple[float, float]] = []
        self._now: Tick | None = None
        self._next = -math.inf
        self._stale = False
        self._safely(self._read)

    def tick(self, tick: Tick) -> None:
        """Take a sign of life of the training; those that have no loss, or come in quick succession, cost nothing."""
        if tick.loss is None or not math.isfinite(tick.loss) or tick.total < 1 or tick.epoch < 1:
            return
        place = tick.epoch - 1 + tick.done / tick.total
        while self._within and self._within[-1][0] >= place:  # after a resume, or for a second time
            self._within.pop()
        if not self._within or place - self._within[-1][0] >= 1 / _PER_EPOCH or tick.done == tick.total:
            self._within.append((place, tick.loss))
        if len(self._within) > _POINTS:
            self._within = self._within[::2]
        self._now, self._stale = tick, True
        self._draw_when_due()

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Take the row of a finished epoch; later epochs that were known belong to an attempt before this one."""
        epoch = int(row["epoch"])
        self._rows = {each: old for each, old in self._rows.items() if each < epoch} | {epoch: dict(row)}
        self._within = [point for point in self._within if point[0] <= epoch]
        self._stale = True
        self._draw_when_due()

    def close(self) -> None:
        """Draw what has come since the last time."""
        if self._stale:
            self._safely(self._draw)

    def _read(self) -> None:
        rows = Run(self.path.parent).history()
        self._rows = {int(row["epoch"]): row for row in rows}

    def _draw_when_due(self) -> None:
        started = time.monotonic()
        if started < self._next:
            return
        self._safely(self._draw)
        ended = time.monotonic()
        self._next = ended + max(self.every_s, (ended - started) / _SHARE)

    def _safely(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # a picture is no reason to lose a run, whatever is wrong with it
            if self.note is None:
                self.note = f"the live figure {self.path.name!r} is not up to date: {one_line(error)}"
                if self._on_note is not None:
                    self._on_note(self.note)

    def _draw(self) -> None:
        from zoo.reporting.plots import save_figure

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save_figure(self.figure(), self.path)
        self._stale = False

    def figure(self) -> Figure:
        """Return the figure as things stand."""
        from zoo.reporting.plots import BLUE, ORANGE, WIDTH, legend_below, line_handle, new_figure, titled

        figure = new_figure(WIDTH, 3.3)
        loss, metric = figure.subplots(1, 2)
        self._draw_loss(loss)
        self._draw_metric(metric)
        handles = [line_handle(ORANGE, "training", "--", "o"), line_handle(BLUE, "validation", "-", "o")]
        if self._within:
            within = line_handle(ORANGE, "training, mean of the epoch so far", "-")
            within.set_alpha(0.4)
            handles.insert(0, within)
        legend_below(figure, handles)
        return titled(figure, self._title())

    def _draw_loss(self, axes: Axes) -> None:
        from zoo.reporting.plots import BLUE, ORANGE

        values = [loss for _, loss in self._within]
        for points in _by_epoch(self._within):
            axes.plot(*zip(*points, strict=True), "-", color=ORANGE, lw=0.9, alpha=0.4)
        for key, style, colour in (("train_loss", "--", ORANGE), ("val_loss", "-", BLUE)):
            curve = self._curve(key)
            axes.plot(list(curve), list(curve.values()), style, color=colour, lw=1.5, marker="o", ms=2.5)
            values += curve.values()
        if values:  # a first step that is far off must not flatten what follows
            axes.set_ylim(0, max(1e-3, 1.05 * min(max(values), 10 * statistics.median(values))))
        self._finish(axes, "loss")

    def _draw_metric(self, axes: Axes) -> None:
        from zoo.reporting.plots import BLUE, ORANGE, SIZE

        metric = self._metric()
        for key, style, colour in ((f"train_{metric}", "--", ORANGE), (f"val_{metric}", "-", BLUE)):
            curve = self._curve(key)
            axes.plot(list(curve), list(curve.values()), style, color=colour, lw=1.5, marker="o", ms=2.5)
        curve, sign = self._curve(f"val_{metric}"), METRIC_SIGN.get(metric, 1)
        if curve:
            best = max(curve, key=lambda epoch: sign * curve[epoch])
            axes.plot([best], [curve[best]], "o", mfc="none", mec=BLUE, ms=8)
            axes.set_title(f"best {curve[best]:.3f} in epoch {best}", fontsize=SIZE)
        words = metric.replace("_", " ")
        self._finish(axes, words if sign > 0 else f"{words} (less is better)")

    def _finish(self, axes: Axes, label: str) -> None:
        from matplotlib.ticker import MaxNLocator

        from zoo.reporting.plots import SIZE, plain_axes

        ends = [*self._rows, *(place for place, _ in self._within)]
        # A little beyond what is there: of 100 epochs the first two must not stand in a corner.
        axes.set_xlim(0, max(1.0, 1.03 * max(ends, default=1)))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("epoch", fontsize=SIZE)
        axes.set_ylabel(label, fontsize=SIZE)
        plain_axes(axes)

    def _curve(self, key: str) -> dict[int, float]:
        return {
            epoch: float(row[key])
            for epoch, row in sorted(self._rows.items())
            if isinstance(row.get(key), (int, float)) and math.isfinite(row[key])
        }

    def _metric(self) -> str:
        """Return the metric that the run is selected by: the one that its rows have beside loss and top1."""
        keys = [key.removeprefix("val_") for row in self._rows.values() for key in row if key.startswith("val_")]
        return next((key for key in keys if key not in ("loss", "top1")), "top1")

    def _title(self) -> str:
        now = self._now
        if now is None:
            return self.path.parent.name
        speed = f", {now.images_per_s:.3g} images/s" if now.images_per_s else ""
        return f"{now.run}: {now.phase}, epoch {now.epoch} of {now.epochs}{speed}"


def _by_epoch(points: list[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """Return the points of each epoch; one at an epoch's end belongs to it."""
    return [list(group) for _, group in itertools.groupby(points, key=lambda point: math.ceil(point[0]))]
