"""Floors: trivial baselines on tiny grey pixels that every trained network must beat."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from zoo.errors import ZooError
from zoo.evaluation.metrics import compute_metrics
from zoo.evaluation.predictions import Predictions
from zoo.evaluation.statistics import top1_interval

SIDE = 32  # pixels
_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601
_COMPONENTS = 64


def compute_floors(
    train_images: np.ndarray,
    train_y: np.ndarray,
    test_images: np.ndarray,
    test_y: np.ndarray,
    test_groups: np.ndarray,
    classes: list[str],
) -> list[dict[str, Any]]:
    """Return a row for each floor: the majority class, one nearest neighbour, and logistic regression.

    images: uint8, (N, 32, 32, 3), (N, 32, 32) or flattened (N, D); colour is turned to grey. y: (N,) int in
    [0, C). test_groups: (N,) str, what `test_top1_ci` resamples. Each row has `name`, `test_top1`,
    `test_balanced_accuracy`, `test_macro_f1`, `test_top1_ci` [low, high]; the same input gives the same rows.
    Raises ZooError where there is no training or test image.
    """
    if not len(train_images) or not len(test_images):
        raise ZooError(
            f"floors need training and test images. Got {len(train_images)} and {len(test_images)}; split again"
        )
    train_x, test_x = _grey(train_images), _grey(test_images)
    floors: dict[str, Callable[[], Any]] = {
        "majority class": _majority,
        f"1-NN on {SIDE}x{SIDE} pixels": _nearest_neighbour,
        f"logistic regression on {SIDE}x{SIDE} pixels": lambda: _logistic_regression(train_x.shape),
    }
    rows = []
    for name, make in floors.items():
        # One class alone leaves nothing to fit.
        model = make() if len(np.unique(train_y)) > 1 else _majority()
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # constant images, or not converged: still a floor
            y_pred = model.fit(train_x, train_y).predict(test_x)
        rows.append({"name": name, **_row(y_pred, test_y, test_groups, classes)})
    return rows


def _grey(images: np.ndarray) -> np.ndarray:
    """Return (N, D) float32 of whole grey levels, so that a neighbour's distance is exact on every machine."""
    grey = images
    if images.ndim == 4 and images.shape[-1] == 3:
        grey = np.rint(sum(np.float32(part) * images[..., channel] for channel, part in enumerate(_GREY)))
    return grey.reshape(len(images), -1).astype(np.float32)


def _majority() -> Any:
    from sklearn.dummy import DummyClassifier

    return DummyClassifier(strategy="most_frequent")


def _nearest_neighbour() -> Any:
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(n_neighbors=1, algorithm="brute")


def _logistic_regression(shape: tuple[int, ...]) -> Any:
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # Few components make it a matter of seconds for thousands of images, and the same on every run.
    components = PCA(min(_COMPONENTS, *shape), svd_solver="covariance_eigh")
    return make_pipeline(StandardScaler(), components, LogisticRegression(C=0.01, max_iter=500))


def _row(y_pred: np.ndarray, y_true: np.ndarray, groups: np.ndarray, classes: list[str]) -> dict[str, Any]:
    predictions = Predictions(np.arange(len(y_true)).astype(str), groups, y_true, np.eye(len(classes))[y_pred])
    metrics = compute_metrics(predictions, classes)
    row: dict[str, Any] = {f"test_{key}": metrics[key] for key in ("top1", "balanced_accuracy", "macro_f1")}
    return row | {"test_top1_ci": list(top1_interval([predictions]))}
