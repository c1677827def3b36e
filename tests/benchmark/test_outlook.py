from __future__ import annotations

import json

import pytest

from zoo.benchmark.comparisons import score_missing
from zoo.benchmark.outlook import plan, sentences
from zoo.data import cache
from zoo.data.manifest import load_dataset
from zoo.errors import ZooError
from zoo.files import to_json
from zoo.recipe import load_recipe
from zoo.training import estimate as measured
from zoo.training.estimate import estimate


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(measured, "_SECONDS", 0.05)


def test_before_anything_is_trained(tiny):
    before = {file for file in tiny.root.rglob("*") if ".cache" not in file.parts}
    found = plan("tiny", ["tiny", "tiny-lp"], seeds=2, root=tiny)
    test = load_dataset("tiny", tiny).of_split("test")
    assert (found["images"], found["groups"]) == (len(test), test["group"].nunique())
    assert found["measured"] is None and found["seeds"]["assumed"] and not found["leaks"]
    assert [row["recipe"] for row in found["recipes"]] == ["tiny", "tiny-lp"]
    for row in found["recipes"]:
        assert row["measured"] and row["minutes"] > 0 and row["score_images_per_s"] > 0
    assert found["recipes"][1]["train_images_per_s"] is None  # a probe trains its head alone
    assert found["minutes"] == pytest.approx(sum(row["minutes"] for row in found["recipes"]))
    assert {file for file in tiny.root.rglob("*") if ".cache" not in file.parts} == before  # no run is written
    json.loads(to_json(found))
    said = " ".join(sentences(found))
    assert f"{len(test)} images" in said and "80 % power" in said and "assumed" in said


def test_no_test_image_is_opened(tiny, monkeypatch):
    dataset = load_dataset("tiny", tiny)
    plan("tiny", ["tiny"], seeds=1, root=tiny)  # what leaks is known from now on
    for path in dataset.of_split("test")["path"]:
        dataset.image_path(path).unlink()
    monkeypatch.setattr(cache, "open_pixels", None)
    assert plan("tiny", ["tiny"], seeds=1, root=tiny)["recipes"][0]["measured"]


@pytest.mark.slow
def test_more_seeds_and_epochs_cost_more(tiny):
    images = {"train": 1000, "val": 100, "test": 100}
    dataset = load_dataset("tiny", tiny)
    short, long = (estimate(load_recipe("tiny", {"epochs": epochs}, tiny), dataset, images) for epochs in (2, 40))
    assert long.seed_s > 5 * short.seed_s
    assert long.total_s(3) == pytest.approx(long.decode_s + long.features_s + 3 * long.seed_s)
    probe = estimate(load_recipe("tiny-lp", {"epochs": 40}, tiny), dataset, images)
    assert probe.seed_s < long.seed_s / 2


def test_scored_runs_say_how_far_models_disagree(trained):
    score_missing([], data="tiny", root=trained)
    known = plan("tiny", ["tiny"], seeds=1, root=trained)["measured"]
    assert known["recipes"] == 2 and 0 <= known["disagreement"] <= 1 and 0 <= known["icc"] <= 1
    assert known["seed_sd"] is not None


def test_what_cannot_be_planned_is_said(tiny, make_recipe):
    with pytest.raises(ZooError, match=r"seeds must be at least 1\. Got 0"):
        plan("tiny", ["tiny"], seeds=0, root=tiny)
    with pytest.raises(ZooError, match="unknown recipe 'tinny'; did you mean 'tiny'"):
        plan("tiny", ["tinny"], root=tiny)
    with pytest.raises(ZooError, match="tinny"):
        plan("tinny", ["tiny"], root=tiny)
    make_recipe("stranger", model__name="resnet81").write(tiny.recipes / "stranger.toml")
    row = plan("tiny", ["stranger"], seeds=1, root=tiny)["recipes"][0]
    assert not row["measured"] and row["minutes"] is None and "did you mean" in row["reason"]
