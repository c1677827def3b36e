from __future__ import annotations

import numpy as np
import pytest

from zoo.evaluation.leak_tax import MAX_IMAGES, leak_tax, shortcuts


def scans(patients: int = 40, slices: int = 10, seed: int = 0):
    """Slices whose look hangs on the patient alone, and labels that do not show in the picture."""
    draw = np.random.default_rng(seed)
    looks = draw.integers(0, 200, (patients, 32, 32))
    small = np.repeat(looks, slices, axis=0) + draw.integers(0, 20, (patients * slices, 32, 32))
    groups = np.repeat([f"p{number}" for number in range(patients)], slices)
    return small.astype(np.uint8), np.repeat(np.arange(patients) % 2, slices), groups


@pytest.mark.slow
def test_the_tax_is_the_difference_between_a_random_split_and_one_by_patient():
    small, y_true, groups = scans()
    splits = np.where(np.arange(len(y_true)) % 4 == 0, "test", "train")
    tax = leak_tax(small, y_true, splits, {"grouped": groups})
    assert tax["random"]["top1"] > 0.99
    assert tax["given"]["top1"] > 0.99
    assert tax["grouped"]["top1"] < 0.7
    low, high = tax["grouped"]["top1_ci"]
    assert low < 0.5 < high
    assert tax["grouped"]["groups"] == 40
    assert tax["grouped"]["nearest_neighbour"]["top1"] == tax["grouped"]["top1"]
    assert set(tax["random"]["logistic_regression"]) == {"top1", "top1_ci"}
    # Intervals that count slices as if they were patients would be far narrower.
    assert high - low > 3 * (tax["random"]["top1_ci"][1] - tax["random"]["top1_ci"][0])


def test_the_tax_is_the_same_again_and_bounded_in_images(monkeypatch):
    small, y_true, groups = scans(12, 6)
    splits = np.full(len(y_true), "train")
    assert leak_tax(small, y_true, splits, {"grouped": groups}) == leak_tax(small, y_true, splits, {"grouped": groups})
    assert leak_tax(small, y_true, splits, {"grouped": groups})["given"] is None
    monkeypatch.setattr("zoo.evaluation.leak_tax.MAX_IMAGES", 30)
    assert leak_tax(small, y_true, splits, {"grouped": groups})["images"] == 30
    assert MAX_IMAGES == 10_000


def test_two_groups_are_enough_and_one_is_none():
    small, y_true, _ = scans(4, 5)
    splits = np.full(20, "train")
    tax = leak_tax(small, y_true, splits, {"grouped": np.full(20, "one"), "two": np.repeat(["x", "y"], 10)})
    assert tax["grouped"] is None
    assert tax["two"]["groups"] == 2


def test_a_fact_that_tells_the_label_is_suspicious_and_chance_is_not():
    draw = np.random.default_rng(0)
    y_true = np.arange(300) % 2
    facts = {
        "file size": draw.normal(size=300) + 3 * y_true,
        "mean brightness": draw.normal(size=300),
        "mode and format": np.full(300, "JPEG RGB"),
    }
    rows = {row["name"]: row for row in shortcuts(facts, y_true, np.arange(300).astype(str))}
    assert set(rows) == {"file size", "mean brightness", "all of these"}
    assert rows["file size"]["top1"] > 0.9
    assert rows["file size"]["suspicious"]
    assert not rows["mean brightness"]["suspicious"]
    assert rows["all of these"]["majority"] == pytest.approx(0.5, abs=0.03)


def test_texts_are_facts_too():
    y_true = np.arange(200) % 2
    rows = shortcuts({"mode": np.where(y_true == 1, "PNG L", "JPEG RGB")}, y_true, np.arange(200).astype(str))
    assert rows[0]["top1"] == 1.0
    assert rows[0]["suspicious"]
