"""`zoo plan`: what a dataset's test split can show, how many seeds that takes, and how long, before any training."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from zoo.data.leaks import find_leaks
from zoo.data.manifest import Dataset, load_dataset, split_summary
from zoo.errors import ZooError, one_line
from zoo.evaluation.power import (
    MOST_SEEDS,
    design_effect,
    detectable_difference,
    intraclass_correlation,
    seeds_needed,
)
from zoo.evaluation.predictions import read_predictions
from zoo.evaluation.proportions import score_interval, t_quantile
from zoo.evaluation.resampling import Aligned
from zoo.files import Home, home
from zoo.recipe import load_recipe
from zoo.runs import runs_on_split
from zoo.training.estimate import estimate

DISAGREEMENTS = (0.05, 0.1, 0.2, 0.3)
TYPICAL_SEED_SD = 0.015  # of top1 after fine-tuning, where no seeds are known; an assumption
DEFAULT_RECIPES = ("simple_cnn", "resnet18-lp", "resnet18-lpft")  # from scratch, the cheapest transfer, the best known


def plan(
    data: str,
    recipes: Sequence[str] | None = None,
    seeds: int = 3,
    root: Home | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Return what a benchmark on a dataset can show and what it costs, without training anything.

    - `images`, `groups`, `rarest`: of the test split, and its class with the fewest images.
    - `intervals`: half the width of a top1's 95 % interval at .7, .8 and .9, with images or groups as the unit.
    - `differences`: for each share of images on which two models disagree, the smallest difference that is shown at
      80 % power: `by_images` (images of a group tell as much as others), `by_groups` (each group counts once).
    - `measured`: the same by the disagreement and likeness of runs scored on this split, None where there are not two.
    - `seeds`: asked, and `needed`, so that seeds add a tenth of the test images' variance at most.
    - `recipes`: minutes of each, measured here (else `measured` false and a `reason`); `minutes` in all.

    Only training images are opened, to time their decoding. Raises ZooError where the dataset or a recipe is not
    known, has no test images, or seeds < 1.
    """
    root = root or home()
    if seeds < 1:
        raise ZooError(f"seeds must be at least 1. Got {seeds}")
    dataset = load_dataset(data, root)
    loaded = [load_recipe(name, root=root) for name in recipes or DEFAULT_RECIPES]
    test = dataset.of_split("test")
    if not len(test):
        raise ZooError(f"dataset {one_line(data)!r} has no test images; split it with `zoo data split`")
    sizes = _group_sizes(test["group"].tolist())
    counts = test["label"].value_counts()
    rarest = min(dataset.classes, key=lambda name: (int(counts.get(name, 0)), name))
    pairs = max(1, len(loaded) * (len(loaded) - 1) // 2)
    measured = _measured(dataset, root, seeds, pairs)
    images = {name: facts["images"] for name, facts in split_summary(dataset)["splits"].items()}
    rows = []
    for number, recipe in enumerate(loaded, 1):
        rows.append(_cost(recipe, dataset, images, seeds))
        (progress or (lambda done, total: None))(number, len(loaded))
    known = [row["minutes"] for row in rows if row["minutes"] is not None]
    return {
        "dataset": dataset.name,
        "split_digest": dataset.split_digest,
        "leaks": not find_leaks(dataset).ok,
        "images": len(test),
        "groups": len(sizes),
        "rarest": {"class": rarest, "images": int(counts.get(rarest, 0))},
        "intervals": _intervals(len(test), len(sizes)),
        "pairs": pairs,
        "differences": _differences(len(test), sizes, pairs),
        "measured": measured,
        "seeds": _seeds(seeds, measured, len(test), sizes),
        "recipes": rows,
        "minutes": sum(known) if known else None,
    }


def _group_sizes(groups: list[str]) -> list[int]:
    named = [group for group in groups if group]
    sizes = np.unique(named, return_counts=True)[1].tolist() if named else []
    return [*sizes, *([1] * (len(groups) - len(named)))]


def _intervals(n: int, units: int) -> list[dict[str, float]]:
    found = []
    for p in (0.7, 0.8, 0.9):
        row = {"top1": p}
        for name, count in (("by_images", n), ("by_groups", units)):
            low, high = score_interval(p, count, t_quantile(0.975, max(1, count - 1)))
            row[name] = (high - low) / 2
        found.append(row)
    return found


def _differences(n: int, sizes: list[int], pairs: int) -> list[dict[str, float | None]]:
    alpha, effect = 0.05 / pairs, design_effect(sizes, 1.0)
    return [
        {
            "disagreement": share,
            "by_images": detectable_difference(share, n, alpha=alpha),
            "by_groups": detectable_difference(share, n, design_effect=effect, units=len(sizes), alpha=alpha),
        }
        for share in DISAGREEMENTS
    ]


def _measured(dataset: Dataset, root: Home, seeds: int, pairs_planned: int) -> dict[str, Any] | None:
    """Return what scored runs on this split say of disagreement, likeness within groups and spread of seeds."""
    runs: dict[str, list[Any]] = {}
    for run in runs_on_split(dataset.name, dataset.split_digest, root):
        if run.finished and run.scored("test"):
            key = f"{run.record.recipe}@{run.record.recipe_digest[:6]}"
            runs.setdefault(key, []).append(read_predictions(run.predictions_file("test")))
    if len(runs) < 2:
        return None
    try:
        table = Aligned(runs)
    except ZooError:
        return None  # scored on other images than now
    right = {
        name: np.mean([each.predictions.y_pred == table.samples.y_true for each in scored], axis=0)
        for name, scored in table.runs.items()
    }
    units = table.samples.units
    pairs = [right[one] - right[two] for one, two in combinations(right, 2)]
    share = statistics.median(float((pair**2).mean()) for pair in pairs)
    icc = statistics.median(intraclass_correlation(pair, units) for pair in pairs)
    spreads = [float(values.std(ddof=1)) for values in table.values("top1").values() if len(values) > 1]
    effect = design_effect(np.bincount(units).tolist(), icc)
    spread = statistics.median(spreads) if spreads else None
    difference = None
    if share > 0:
        difference = detectable_difference(
            share,
            table.samples.n,
            design_effect=effect,
            units=table.samples.n_units,
            alpha=0.05 / pairs_planned,
            seed_variance=2 * (TYPICAL_SEED_SD if spread is None else spread) ** 2 / seeds,
        )
    return {
        "recipes": len(right),
        "disagreement": share,
        "icc": icc,
        "difference": difference,
        "seed_sd": spread,
    }


def _seeds(asked: int, measured: dict[str, Any] | None, n: int, sizes: list[int]) -> dict[str, Any]:
    spread = (measured or {}).get("seed_sd")
    share, icc = (measured["disagreement"], measured["icc"]) if measured else (0.1, 0.5)
    error = float(np.sqrt(share * design_effect(sizes, icc) / n))
    needed = seeds_needed(TYPICAL_SEED_SD if spread is None else spread, error / np.sqrt(2))
    return {
        "asked": asked,
        "needed": needed,
        "most": MOST_SEEDS,
        "seed_sd": TYPICAL_SEED_SD if spread is None else spread,
        "assumed": spread is None,
    }


def _cost(recipe: Any, dataset: Dataset, images: dict[str, int], seeds: int) -> dict[str, Any]:
    row: dict[str, Any] = {"recipe": recipe.name, "model": recipe.model.name, "strategy": recipe.finetune.strategy}
    try:
        found = estimate(recipe, dataset, images)
    except ZooError as error:
        return {**row, "measured": False, "reason": str(error), "minutes": None}
    except Exception as error:  # a network may break in any way; the other recipes are measured all the same
        reason = f"{type(error).__name__}: {one_line(error, 160)}"
        return {**row, "measured": False, "reason": reason, "minutes": None}
    return {
        **row,
        "measured": True,
        "reason": None,
        "minutes": found.total_s(seeds) / 60,
        "decode_s": found.decode_s,
        "features_s": found.features_s,
        "seed_s": found.seed_s,
        "train_images_per_s": found.train_images_per_s,
        "score_images_per_s": found.score_images_per_s,
        "device": found.device,
    }


def sentences(found: dict[str, Any]) -> list[str]:
    """Return the outlook in words, as `plan` found it."""
    groups = f" of {found['groups']} groups" if found["groups"] != found["images"] else ""
    rare = found["rarest"]
    said = [
        f"The test split has {found['images']} images{groups}; fewest are of {one_line(rare['class'], 40)!r}: "
        f"{rare['images']}."
    ]
    middle = found["intervals"][1]
    said.append(f"A top1 of 0.80 will be known to about ±{_between(middle['by_images'], middle['by_groups'])}.")
    tenth = next(row for row in found["differences"] if row["disagreement"] == 0.1)
    said.append(
        f"Of {_pairs(found['pairs'])}, two models that disagree on 10 % of the images are told apart, with 80 % power, "
        f"from this difference on: {_between(tenth['by_images'], tenth['by_groups'])}; less will often be a tie."
    )
    known = found["measured"]
    if known is not None and known["difference"] is not None:
        said.append(
            f"{known['recipes']} recipes scored here disagree on {100 * known['disagreement']:.0f} % (median): "
            f"such pairs, with the seeds' part, are told apart from {100 * known['difference']:.1f} points on."
        )
    if known is not None and known["difference"] is None:
        said.append(
            f"{known['recipes']} recipes scored here disagree on {100 * known['disagreement']:.0f} % (median): with "
            "the seeds' part no such pair would reliably be told apart."
        )
    seeds = found["seeds"]
    source = "assumed" if seeds["assumed"] else "seen here"
    more = " or more" if seeds["needed"] == seeds["most"] else ""
    said.append(
        f"Seeds: {seeds['needed']}{more} keep their part small (spread of seeds {100 * seeds['seed_sd']:.1f} points, "
        f"{source}); {seeds['asked']} asked."
    )
    if found["leaks"]:
        said.insert(0, "This split LEAKS, so no score on it would mean anything: see `zoo data audit`.")
    return said


def _pairs(count: int) -> str:
    return "one pair" if count == 1 else f"{count} pairs tested together"


def _between(one: float | None, two: float | None) -> str:
    """Return points from images as the unit to groups as the unit.

    >>> _between(0.031, 0.124), _between(0.03, 0.03), _between(0.09, None), _between(None, None)
    ('3.1 to 12.4 points', '3.0 points', '9.0 points, or not at all where a group counts as one image', 'never')
    """
    if one is None:
        return "never"
    if two is None:
        return f"{100 * one:.1f} points, or not at all where a group counts as one image"
    if round(1000 * one) == round(1000 * two):
        return f"{100 * one:.1f} points"
    return f"{100 * one:.1f} to {100 * two:.1f} points"
