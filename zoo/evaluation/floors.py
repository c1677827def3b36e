"""Floors: trivial baselines on tiny grey pixels, or on file facts, that every trained network must beat."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from threadpoolctl import threadpool_limits

from zoo.data.cache import open_pixels
from zoo.data.facts import dataset_facts, file_facts
from zoo.data.manifest import Dataset
from zoo.data.transforms import center_crop
from zoo.data.window import windowing_of_facts
from zoo.errors import ZooError
from zoo.evaluation.metrics import compute_metrics
from zoo.evaluation.predictions import Predictions
from zoo.evaluation.statistics import metric_intervals
from zoo.files import digest_of, read_json, write_json
from zoo.runs import Preprocessing

SIDE = 32  # pixels
FACTS_ALONE = "file facts alone"
FLOOR_METRICS = ("top1", "balanced_accuracy", "macro_f1")  # a floor has labels, no scores
_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601
_COMPONENTS = 64
FLOORS_VERSION = 3
_SMALL = Preprocessing(
    image_size=SIDE, crop_pct=1.0, interpolation="bilinear", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
)


def dataset_floors(
    dataset: Dataset, bad_images: str | None = None, split: Literal["val", "test"] = "test"
) -> list[dict[str, Any]]:
    """Return the floors of a dataset's test split, or of val, computed once per split; keys as `compute_floors`.

    Those of val have `val_` where the others have `test_`. Raises ZooError where images are gone.
    """
    known = [FLOORS_VERSION, dataset.split_digest, bad_images or dataset.bad_images, dataset.facts.get("window")]
    key = digest_of(known if split == "test" else [*known, split])
    file = dataset.folder / ".cache" / f"floors-{key[:16]}.json"
    try:
        stored: list[dict[str, Any]] = read_json(file)["floors"]
    except (ZooError, KeyError):
        own = windowing_of_facts(dataset.facts)
        shown = {"window": dataset.facts.get("window"), "rescale_slope": own.slope, "rescale_intercept": own.intercept}
        preprocessing = _SMALL.model_copy(update=shown)
        train, test = (open_pixels(dataset, each, preprocessing, bad_images) for each in ("train", split))
        pixels = [np.stack([center_crop(each[i], SIDE) for i in range(len(each))]) for each in (train, test)]
        columns = fact_columns(file_facts(dataset_facts(dataset)))
        place = {sample: number for number, sample in enumerate(dataset.frame["sample_id"])}
        facts = [columns[[place[each] for each in part.sample_ids.tolist()]] for part in (train, test)]
        stored = compute_floors(
            pixels[0], train.y_true, pixels[1], test.y_true, test.groups, dataset.classes, facts[0], facts[1]
        )
        stored = [{key.replace("test_", f"{split}_", 1): value for key, value in row.items()} for row in stored]
        write_json(file, {"floors": stored})
    return stored


def compute_floors(
    train_images: np.ndarray,
    train_y: np.ndarray,
    test_images: np.ndarray,
    test_y: np.ndarray,
    test_groups: np.ndarray,
    classes: list[str],
    train_facts: np.ndarray | None = None,
    test_facts: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """Return a row for each floor: the majority class, one nearest neighbour, and logistic regressions.

    images: uint8, (N, 32, 32, 3), (N, 32, 32) or flattened (N, D); colour is turned to grey. y: (N,) int in
    [0, C). test_groups: (N,) str, what `test_top1_ci` resamples. facts: (N, D) of `fact_columns`, what is known of the
    files without looking at the picture; left out, there is no such floor. Each row has `name`, `test_top1`,
    `test_balanced_accuracy`, `test_macro_f1`, and of each `_ci` [low, high]; the same input gives the same rows.
    Raises ZooError where there is no training or test image.
    """
    if not len(train_images) or not len(test_images):
        raise ZooError(
            f"floors need training and test images. Got {len(train_images)} and {len(test_images)}; split again"
        )
    train_pixels, test_pixels = _grey(train_images), _grey(test_images)
    floors: dict[str, Callable[[], Any]] = {
        "majority class": majority,
        f"1-NN on {SIDE}x{SIDE} pixels": nearest_neighbour,
        f"logistic regression on {SIDE}x{SIDE} pixels": lambda: logistic_regression(train_pixels.shape),
    }
    rows = []
    if train_facts is not None and test_facts is not None:
        floors[f"logistic regression on {FACTS_ALONE}"] = lambda: logistic_regression(train_facts.shape, 1.0)
    for name, make in floors.items():
        # One class alone leaves nothing to fit.
        model = make() if len(np.unique(train_y)) > 1 else majority()
        on_facts = name.endswith(FACTS_ALONE)
        train_x, test_x = (train_facts, test_facts) if on_facts else (train_pixels, test_pixels)
        with threadpool_limits(1), warnings.catch_warnings(), np.errstate(all="ignore"):
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


def fact_columns(facts: dict[str, np.ndarray]) -> np.ndarray:
    """Return facts of files as columns of numbers (N, D) float32: texts as one column for each that occurs.

    facts: name to (N,) numbers or texts.

    >>> fact_columns({"bytes": np.array([1, 2]), "mode": np.array(["L", "RGB"])}).tolist()
    [[1.0, 1.0, 0.0], [2.0, 0.0, 1.0]]
    """
    columns = []
    for values in facts.values():
        if values.dtype.kind in "US":
            columns += [(values == each).astype(np.float32) for each in np.unique(values)]
        else:
            columns.append(values.astype(np.float32))
    return np.stack(columns, axis=1)


def majority() -> Any:
    """Return the model that always says the most frequent class."""
    from sklearn.dummy import DummyClassifier

    return DummyClassifier(strategy="most_frequent")


def nearest_neighbour() -> Any:
    """Return the model that says the class of the nearest training image."""
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(n_neighbors=1, algorithm="brute")


def logistic_regression(shape: tuple[int, ...], c: float = 0.01) -> Any:
    """Return a logistic regression on standardised inputs of this shape (N, D), by 64 components at most."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # Few components make it a matter of seconds for thousands of images, and the same on every run.
    # The covariance of 1024 pixels costs the same however few images there are; below some hundreds SVD is faster.
    solver = "full" if shape[0] < 256 else "covariance_eigh"
    components = PCA(min(_COMPONENTS, *shape), svd_solver=solver)
    return make_pipeline(StandardScaler(), components, LogisticRegression(C=c, max_iter=500))


def _row(y_pred: np.ndarray, y_true: np.ndarray, groups: np.ndarray, classes: list[str]) -> dict[str, Any]:
    predictions = Predictions(np.arange(len(y_true)).astype(str), groups, y_true, np.eye(len(classes))[y_pred])
    metrics = compute_metrics(predictions, classes)
    found = metric_intervals({"": [predictions]}, FLOOR_METRICS)
    row: dict[str, Any] = {}
    for name in FLOOR_METRICS:
        interval = found[name][""]
        row |= {f"test_{name}": metrics[name], f"test_{name}_ci": [interval.low, interval.high] if interval else None}
    return row
