import time

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.metrics import balanced_accuracy_score, f1_score
from sklearn.neighbors import KNeighborsClassifier

from zoo.errors import ZooError
from zoo.evaluation.floors import compute_floors
from zoo.evaluation.statistics import wilson_interval

NAMES = ["majority class", "1-NN on 32x32 pixels", "logistic regression on 32x32 pixels"]
DIGITS = [str(i) for i in range(10)]


@pytest.fixture(scope="module")
def digits():
    found = load_digits()
    images = (found.images * 15).astype(np.uint8).repeat(4, 1).repeat(4, 2)
    return np.stack([images] * 3, axis=-1), found.target


def floors(images, y, cut=1200, groups=None):
    n = len(y) - cut
    return compute_floors(
        images[:cut], y[:cut], images[cut:], y[cut:], np.full(n, "") if groups is None else groups, DIGITS
    )


def test_on_real_digits(digits):
    images, y = digits
    began = time.process_time()
    rows = floors(images, y)
    assert time.process_time() - began < 10
    assert [row["name"] for row in rows] == NAMES
    majority, neighbour, regression = rows
    most = np.bincount(y[:1200]).argmax()
    assert majority["test_top1"] == pytest.approx((y[1200:] == most).mean())
    assert majority["test_balanced_accuracy"] == pytest.approx(0.1)
    guess = (
        KNeighborsClassifier(1).fit(images[:1200].reshape(1200, -1), y[:1200]).predict(images[1200:].reshape(597, -1))
    )
    assert neighbour["test_top1"] == pytest.approx((guess == y[1200:]).mean())
    assert neighbour["test_balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y[1200:], guess))
    assert neighbour["test_macro_f1"] == pytest.approx(f1_score(y[1200:], guess, average="macro"))
    assert neighbour["test_top1_ci"] == pytest.approx(wilson_interval((guess == y[1200:]).sum(), 597))
    assert 0.85 < regression["test_top1"] < 0.97
    for row in rows:
        scores = ("test_top1", "test_balanced_accuracy", "test_macro_f1")
        assert set(row) == {"name", *scores, *(f"{score}_ci" for score in scores)}
        assert all(row[f"{score}_ci"][0] <= row[score] <= row[f"{score}_ci"][1] for score in scores)
        assert row["test_top1_ci"][0] < row["test_top1"] < row["test_top1_ci"][1]


@pytest.mark.slow
def test_the_same_images_give_the_same_rows_in_any_layout(digits):
    images, y = digits
    rows = floors(images, y, 1600)
    assert floors(images, y, 1600) == rows
    assert floors(images[..., 0], y, 1600) == rows
    assert floors(images[..., 0].reshape(len(y), -1), y, 1600) == rows


def test_the_interval_is_of_groups(digits):
    images, y = digits
    alone = floors(images, y, 1600)[1]["test_top1_ci"]
    grouped = floors(images, y, 1600, np.array([f"g{i // 40}" for i in range(197)]))[1]["test_top1_ci"]
    assert grouped != alone


@pytest.mark.parametrize(
    ("images", "y"),
    [
        (np.zeros((6, 32, 32, 3), np.uint8), [0, 0, 0, 1, 1, 1]),  # nothing to see
        (np.arange(6 * 1024).reshape(6, 32, 32).astype(np.uint8), [1, 1, 1, 1, 1, 1]),  # one class
        (np.arange(2 * 1024).reshape(2, 32, 32).astype(np.uint8), [0, 1]),  # fewer images than pixels
        (np.zeros((1, 32, 32), np.uint8), [0]),
    ],
)
def test_poor_data_give_floors_without_warnings(images, y):
    rows = compute_floors(images, np.array(y), images[:1], np.array(y[:1]), np.array([""]), ["a", "b"])
    assert [row["name"] for row in rows] == NAMES
    assert all(0 <= row["test_top1"] <= 1 for row in rows)


def test_no_images_are_refused():
    some, none = np.zeros((2, 32, 32), np.uint8), np.zeros((0, 32, 32), np.uint8)
    y, no_y = np.array([0, 1]), np.array([], int)
    with pytest.raises(ZooError, match=r"floors need training and test images. Got 2 and 0"):
        compute_floors(some, y, none, no_y, np.array([], str), ["a", "b"])
    with pytest.raises(ZooError, match="Got 0 and 2"):
        compute_floors(none, no_y, some, y, np.array(["", ""]), ["a", "b"])
