"""Prediction sets: which classes an answer names so that the true one is among them as often as was asked."""

from __future__ import annotations

import numpy as np

from zoo.errors import ZooError, nearest, one_line

METHODS = ("lac", "aps")


def prediction_sets(y_score: np.ndarray, quantile: float, method: str) -> np.ndarray:
    """Return which classes are in each sample's set: (N, C) bool, of y_score (N, C) in [0, 1].

    quantile: of `conformal_quantile` by the same method. `aps` takes classes from the highest score on, the one at
    which the sum crosses the quantile included: no set is empty, and without randomising it is conservative (above
    all where top1 exceeds the coverage asked, and the quantile is 0). Raises ZooError for an unknown method.
    """
    check_method(method)
    return np.asarray(nonconformity(y_score, method) <= quantile)


def nonconformity(y_score: np.ndarray, method: str) -> np.ndarray:
    """Return for each class how ill it fits the sample: (N, C)."""
    if method == "lac":
        return np.asarray(1 - y_score)
    order = np.argsort(-y_score, axis=1, kind="stable")
    above = np.cumsum(np.take_along_axis(y_score, order, axis=1), axis=1)[:, :-1]
    above = np.concatenate([np.zeros((len(above), 1)), above], axis=1)
    return np.take_along_axis(above, np.argsort(order, axis=1), axis=1)


def check_method(method: str) -> None:
    """Raise ZooError unless the method is one of METHODS."""
    if method not in METHODS:
        raise ZooError(
            f"conformal method must be one of {', '.join(METHODS)}. Got {one_line(method)!r}{nearest(method, METHODS)}"
        )
