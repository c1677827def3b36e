"""The learning-rate range test for a person: its figure, and what it suggests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from zoo.data.manifest import Dataset
from zoo.files import Home
from zoo.recipe import Recipe
from zoo.reporting.plots import (
    BLUE,
    GREY,
    ORANGE,
    SIZE,
    SKY,
    WIDTH,
    legend_below,
    line_handle,
    new_figure,
    plain_axes,
    save_figure,
    titled,
)
from zoo.training.loop import OnTick
from zoo.training.lr_range import UPDATES, LrRange, lr_range
from zoo.training.parallel import refuse_torchrun
from zoo.training.plan import make_plan


def find_lr(
    recipe: Recipe | str,
    data: Dataset | str,
    seed: int = 0,
    root: Home | None = None,
    *,
    updates: int = UPDATES,
    offline: bool = False,
    bad_images: str | None = None,
    accept_leaks: bool = False,
    on_tick: OnTick | None = None,
) -> tuple[LrRange, Path]:
    """Return a learning-rate range test of a recipe on a dataset, and its figure, `lr-find.png` in the run's folder.

    Nothing else of the run changes. Raises ZooError as `train` and `lr_range` do.
    """
    refuse_torchrun("--lr-find")
    plan = make_plan(recipe, data, seed, root, offline=offline, bad_images=bad_images, accept_leaks=accept_leaks)
    found = lr_range(plan, updates, on_tick)
    file = plan.run.path / "lr-find.png"
    save_figure(plot_lr_range(found, f"{plan.recipe.name} on {plan.dataset.name}: learning-rate range test"), file)
    return found, file


def plot_lr_range(found: LrRange, title: str = "") -> Figure:
    """Return the loss over the growing rate, smoothed and as it was, with the suggestion and the recipe's own rate."""
    figure = new_figure(WIDTH, 3.6)
    axes = figure.subplots()
    axes.semilogx(found.lrs, found.losses, ".", color=SKY, ms=4)
    axes.semilogx(found.lrs, found.smoothed, color=BLUE, lw=1.6)
    handles = [line_handle(SKY, "loss of each update", "", "."), line_handle(BLUE, "smoothed", "-")]
    low, high = min(found.smoothed), max(np.percentile(found.losses, 90), found.smoothed[0])
    margin = 0.12 * max(high - low, 0.05)
    axes.set_ylim(
        max(low - 2 * margin, -margin / 2), high + 2 * margin
    )  # one update that diverged must not flatten the rest
    if found.suggested is not None:
        axes.axvline(found.suggested, color=ORANGE, lw=1.4)
        handles.append(line_handle(ORANGE, f"suggested {found.suggested:.2g}", "-"))
    axes.axvline(found.own, color=GREY, lw=1, ls="--")
    handles.append(line_handle(GREY, f"of the recipe {found.own:.2g}", "--"))
    axes.set_xlabel(found.key, fontsize=SIZE)
    axes.set_ylabel("training loss", fontsize=SIZE)
    plain_axes(axes)
    legend_below(figure, handles)
    return titled(figure, title)


def lr_range_text(found: LrRange) -> str:
    """Return what a range test says, in a sentence or two."""
    updates = f"{len(found.lrs)} update{'s' if len(found.lrs) != 1 else ''}"
    own = f"{found.key} is {found.own:.2g} in the recipe; {updates} from {found.lrs[0]:.0e} up, until "
    if found.suggested is None or found.steepest is None or found.lowest is None:
        return f"{own}{found.stopped}. The loss never fell clearly, so there is nothing to suggest: see the figure"
    return (
        f"{own}{found.stopped}. Suggested: {found.key}={found.suggested:.2g}, the smaller of where the loss falls "
        f"fastest ({found.steepest:.2g}) and a tenth of where it is lowest ({found.lowest:.2g})"
    )
