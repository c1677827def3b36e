"""Recipes compared over the folds of a dataset: every image is test once, and the folds' overlap is accounted for."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from itertools import combinations
from typing import Any

from zoo.benchmark.comparisons import score_missing
from zoo.data.manifest import Dataset, load_dataset, split_summary
from zoo.errors import ZooError, one_line
from zoo.evaluation.exact_tests import corrected_resampled_t, holm
from zoo.evaluation.letters import compact_letters
from zoo.evaluation.metrics import METRIC_SIGN
from zoo.files import Home, home
from zoo.reporting.comparison import check_metric
from zoo.runs import runs_on_split


def compare_folds(
    data: str,
    root: Home | None = None,
    *,
    metric: str = "top1",
    alpha: float = 0.05,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Return the comparison of recipes over the datasets `<data>-fold0` and so on; runs not scored yet are scored.

    A recipe's score in a fold is the mean over its seeds. `rows`, best first: `recipe`, `model`, `folds`, `mean`, `sd`
    over folds, `ci` and `letters`; `pairs`: `one`, `two`, `difference`, `low`, `high`, `p`, `p_holm`, `different`.
    Training sets of folds overlap, so interval and test are those of Nadeau and Bengio 2003 (doi
    10.1023/A:1024068626366). Recipes that lack a fold are in `missing`. Raises ZooError where there are no folds, no
    recipe was run on all of them, or the metric is unknown.
    """
    root = root or home()
    check_metric(metric)
    folds = _folds(data, root)
    scores: dict[tuple[str, str], dict[int, list[float]]] = {}
    models: dict[tuple[str, str], str] = {}
    for number, dataset in enumerate(folds):
        score_missing([], data=dataset.name, root=root, progress=progress)
        for run in runs_on_split(dataset.name, dataset.split_digest, root):
            if not run.finished or not run.scored("test"):
                continue
            value = run.metrics("test").get(metric)
            if value is not None:
                key = (run.record.recipe, run.record.recipe_digest)
                scores.setdefault(key, {}).setdefault(number, []).append(float(value))
                models[key] = run.record.model
    names = [key[0] for key in scores]
    labels = {key: key[0] if names.count(key[0]) == 1 else f"{key[0]}@{key[1][:6]}" for key in scores}
    whole = {
        labels[key]: [statistics.fmean(found[number]) for number in range(len(folds))]
        for key, found in scores.items()
        if len(found) == len(folds)
    }
    if not whole:
        raise ZooError(
            f"no recipe was run on all {len(folds)} folds of {one_line(data)!r}; run the same `zoo bench --data "
            f"{one_line(data)}-fold0 --recipes ...` on each"
        )
    n_train, n_test = (statistics.fmean(_images(dataset, split) for dataset in folds) for split in ("train", "test"))
    pairs = _pairs(whole, n_train, n_test, alpha)
    return {
        "dataset": data,
        "folds": [{"dataset": each.name, "split_digest": each.split_digest} for each in folds],
        "metric": metric,
        "rows": _rows(whole, {labels[key]: model for key, model in models.items()}, pairs, metric, n_train, n_test),
        "pairs": pairs,
        "missing": sorted(labels[key] for key, found in scores.items() if len(found) < len(folds)),
    }


def _folds(data: str, root: Home) -> list[Dataset]:
    """Return the datasets of the folds, of one folding."""
    found: list[Dataset] = []
    while (root.data / f"{data}-fold{len(found)}" / "manifest.csv").is_file():
        dataset = load_dataset(f"{data}-fold{len(found)}", root, make_builtin=False)
        if dataset.facts.get("split", {}).get("folds") is None:
            break
        if found and len(found) >= found[0].facts["split"]["folds"]:
            break  # of an older folding into more parts
        found.append(dataset)
    wanted = found[0].facts["split"]["folds"] if found else 0
    if not found or len(found) < wanted:
        raise ZooError(
            f"dataset {one_line(data)!r} has {len(found)} of {wanted or 'any'} folds; make them with "
            f"`zoo data split {one_line(data)} --folds 5`"
        )
    return found


def _images(dataset: Dataset, split: str) -> int:
    return int(split_summary(dataset)["splits"][split]["images"])


def _pairs(scores: dict[str, list[float]], n_train: float, n_test: float, alpha: float) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for one, two in combinations(sorted(scores), 2):
        differences = [a - b for a, b in zip(scores[one], scores[two], strict=True)]
        mean, low, high, p_value = corrected_resampled_t(differences, n_train, n_test)
        found.append({"one": one, "two": two, "difference": mean, "low": low, "high": high, "p": p_value})
    for pair, p_value in zip(found, holm([pair["p"] for pair in found]), strict=True):
        pair |= {"p_holm": p_value, "different": p_value < alpha}
    return found


def _rows(
    scores: dict[str, list[float]],
    models: dict[str, str],
    pairs: list[dict[str, Any]],
    metric: str,
    n_train: float,
    n_test: float,
) -> list[dict[str, Any]]:
    sign = METRIC_SIGN[metric]
    order = sorted(scores, key=lambda name: (-sign * statistics.fmean(scores[name]), name))
    letters = compact_letters(order, [(pair["one"], pair["two"]) for pair in pairs if pair["different"]])
    top = math.inf if metric == "log_loss" else 2.0 if metric == "brier" else 1.0
    rows = []
    for name in order:
        mean, low, high, _ = corrected_resampled_t(scores[name], n_train, n_test)
        rows.append(
            {
                "recipe": name,
                "model": models[name],
                "folds": scores[name],
                "mean": mean,
                "sd": statistics.stdev(scores[name]),
                "ci": [max(0.0, low), min(top, high)],
                "letters": letters[name],
            }
        )
    return rows
