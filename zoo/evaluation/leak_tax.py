"""What leaks and shortcuts are worth: trivial baselines under three ways of splitting, and on file facts alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from zoo.evaluation.floors import fact_columns, logistic_regression, majority, nearest_neighbour
from zoo.evaluation.predictions import Predictions
from zoo.evaluation.statistics import top1_interval

FOLDS = 5
MAX_IMAGES = 10_000
_TELLING = 0.05  # of top-1 above the most frequent class, below which a fact is no shortcut worth a word
_BASELINES: dict[str, Callable[[tuple[int, ...]], Any]] = {
    "nearest_neighbour": lambda _: nearest_neighbour(),
    "logistic_regression": logistic_regression,
}


def leak_tax(
    small: np.ndarray[Any, Any],
    y_true: np.ndarray[Any, Any],
    splits: np.ndarray[Any, Any],
    groups: dict[str, np.ndarray[Any, Any]],
    seed: int = 0,
) -> dict[str, Any]:
    """Return the top-1 of trivial baselines under the split at hand, a random one, and those by groups.

    small: (N, 32, 32) uint8 grey; y_true: (N,) int; splits: (N,) str; groups: name of the way to (N,) groups. `given`
    is trained on train and scored on test; the others are stratified 5-fold cross-validations over all images. Each
    has `top1` and `top1_ci` of one nearest neighbour, and both baselines in full; an interval resamples groups where
    the split kept them together. Above 10,000 images a seeded choice of that many is used, which `images` tells.
    """
    chosen = _choice(len(small), seed)
    x, y = small.reshape(len(small), -1)[chosen].astype(np.float32), y_true[chosen]
    classes = int(y_true.max()) + 1
    own = np.array([str(each) for each in range(len(y))])
    tax: dict[str, Any] = {"images": len(y), "folds": FOLDS, "given": None}
    train, test = np.flatnonzero(splits[chosen] == "train"), np.flatnonzero(splits[chosen] == "test")
    by_name = {name: values[chosen] for name, values in groups.items()}
    first = next(iter(by_name.values()), own)
    if len(train) and len(test):
        tax["given"] = _scores([(train, test)], x, y, first, classes)
    tax["random"] = _scores(_folds(y, None, seed), x, y, own, classes)
    for name, values in by_name.items():
        tax[name] = _scores(_folds(y, values, seed), x, y, values, classes)
    return tax


def shortcuts(
    facts: dict[str, np.ndarray[Any, Any]], y_true: np.ndarray[Any, Any], groups: np.ndarray[Any, Any], seed: int = 0
) -> list[dict[str, Any]]:
    """Return how well each file fact alone, and all together, predict the label: rows of name, top1, interval.

    facts: name to (N,) numbers or texts. A shallow decision tree under 5-fold cross-validation by groups;
    `majority` is what the most frequent class scores under the same folds, `suspicious` whether the interval's
    lower end is 5 points above it.
    """
    chosen = _choice(len(y_true), seed)
    y, of_group = y_true[chosen], groups[chosen]
    classes, folds = int(y_true.max()) + 1, _folds(y_true[chosen], groups[chosen], seed)
    columns = {name: fact_columns({name: values})[chosen] for name, values in facts.items()}
    if not folds:
        return []
    columns["all of these"] = np.concatenate(list(columns.values()), axis=1)
    base = _top1(folds, columns["all of these"], y, of_group, classes, lambda _: majority())
    rows = []
    for name, x in columns.items():
        if (x == x[:1]).all():
            continue  # a fact that all images share tells nothing
        found = _top1(folds, x, y, of_group, classes, _tree)
        rows.append(
            {
                "name": name,
                **found,
                "majority": base["top1"],
                "suspicious": found["top1_ci"][0] > base["top1"] + _TELLING,
            }
        )
    return rows


def _choice(count: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    if count <= MAX_IMAGES:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).permutation(count)[:MAX_IMAGES])


def _tree(_: tuple[int, ...]) -> Any:
    from sklearn.tree import DecisionTreeClassifier

    return DecisionTreeClassifier(max_depth=4, min_samples_leaf=5, random_state=0)


def _folds(y: np.ndarray[Any, Any], groups: np.ndarray[Any, Any] | None, seed: int) -> list[tuple[Any, Any]]:
    """Return (train, test) places of a stratified 5-fold cross-validation that tears no group; fewer for few groups."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    count = min(FOLDS, len(y) if groups is None else len(np.unique(groups)))
    if count < 2:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes of fewer images than folds
        try:
            if groups is None:
                return list(StratifiedKFold(count, shuffle=True, random_state=seed).split(y, y))
            return list(StratifiedGroupKFold(count, shuffle=True, random_state=seed).split(y, y, groups))
        except ValueError:  # no class has as many images as there are folds
            return []


def _scores(
    folds: list[tuple[Any, Any]], x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], groups: Any, classes: int
) -> dict[str, Any] | None:
    if not folds:
        return None
    found = {name: _top1(folds, x, y, groups, classes, make) for name, make in _BASELINES.items()}
    return {**found["nearest_neighbour"], **found, "groups": len(np.unique(groups))}


def _top1(
    folds: list[tuple[Any, Any]],
    x: np.ndarray[Any, Any],
    y: np.ndarray[Any, Any],
    groups: np.ndarray[Any, Any],
    classes: int,
    make: Callable[[tuple[int, ...]], Any],
) -> dict[str, Any]:
    """Return top1 and its interval over the test parts of all folds."""
    y_pred = np.full(len(y), -1)
    # One thread: small matrices gain little from two, and lose tenfold where another process wants the core.
    with threadpool_limits(1), warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # constant pictures, or not converged: still a baseline
        for train, test in folds:
            model = make(x[train].shape) if len(np.unique(y[train])) > 1 else majority()
            y_pred[test] = model.fit(x[train], y[train]).predict(x[test])
    scored = np.flatnonzero(y_pred >= 0)
    scores = np.eye(classes)[y_pred[scored]]
    predictions = Predictions(scored.astype(str), groups[scored].astype(str), y[scored], scores)
    low, high = top1_interval([predictions])
    return {"top1": float((y_pred[scored] == y[scored]).mean()), "top1_ci": [low, high]}
