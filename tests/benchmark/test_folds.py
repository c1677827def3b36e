from __future__ import annotations

import json
import shutil
import statistics

import pytest
from typer.testing import CliRunner

from zoo.benchmark.folds import compare_folds
from zoo.cli import app
from zoo.data.manifest import load_dataset
from zoo.data.resplit import fold_dataset
from zoo.errors import ZooError
from zoo.evaluation.exact_tests import corrected_resampled_t
from zoo.recipe import load_recipe
from zoo.runs import list_runs
from zoo.training.loop import train


@pytest.fixture(scope="module")
def folded(tmp_path_factory, image_folder):
    """A home with three folds, two recipes on each, one of them with two seeds."""
    from zoo.data.sources import import_dataset
    from zoo.files import home

    folder = tmp_path_factory.mktemp("folded")
    root = home(folder)
    import_dataset(image_folder, "many", root)
    fold_dataset("many", 3, root)
    for fold in range(3):
        for name, seeds in (("simple_cnn", (0, 1)), ("test_resnet-lp", (0,))):
            for seed in seeds:
                recipe = load_recipe(name, {"epochs": 2, "warmup_epochs": 0, "image_size": 32}, root)
                train(recipe, f"many-fold{fold}", seed, root)
    return root


def test_over_folds_the_test_is_that_of_nadeau_and_bengio(folded):
    found = compare_folds("many", folded)
    assert found["rows"][0]["letters"].startswith("a") and len(found["folds"]) == 3
    by_name = {row["recipe"]: row for row in found["rows"]}
    assert set(by_name) == {"simple_cnn", "test_resnet-lp"} and not found["missing"]
    for name, row in by_name.items():
        for fold in range(3):
            runs = [run for run in list_runs(folded, f"many-fold{fold}") if run.record.recipe == name]
            assert len(runs) == (2 if name == "simple_cnn" else 1)
            assert row["folds"][fold] == pytest.approx(statistics.fmean(run.metrics("test")["top1"] for run in runs))
    (pair,) = found["pairs"]
    gaps = [a - b for a, b in zip(by_name[pair["one"]]["folds"], by_name[pair["two"]]["folds"], strict=True)]
    datasets = [load_dataset(f"many-fold{fold}", folded) for fold in range(3)]
    n_train, n_test = (statistics.fmean(len(each.of_split(split)) for each in datasets) for split in ("train", "test"))
    expected = corrected_resampled_t(gaps, n_train, n_test)
    assert (pair["difference"], pair["low"], pair["high"], pair["p"]) == pytest.approx(expected, abs=1e-12)


def test_the_command_shows_rows_pairs_and_what_is_missing(folded, tmp_path, monkeypatch):
    shutil.copytree(folded.root, tmp_path / "home")
    monkeypatch.setenv("ZOO_HOME", str(tmp_path / "home"))
    shown = CliRunner().invoke(app, ["compare", "--data", "many", "--folds", "--pairs"])
    assert shown.exit_code == 0 and "many, 3 folds" in shown.output and "one − two" in shown.output
    (run,) = (tmp_path / "home" / "models" / "runs").glob("many-fold1--test_resnet-lp--*")
    shutil.rmtree(run)
    answer = json.loads(CliRunner().invoke(app, ["compare", "--data", "many", "--folds", "--json"]).output)
    assert answer["missing"] == ["test_resnet-lp"] and answer["pairs"] == []
    assert [row["recipe"] for row in answer["rows"]] == ["simple_cnn"]


def test_what_has_no_folds_is_said(folded, tiny):
    with pytest.raises(ZooError, match="has 0 of any folds; make them with `zoo data split tiny --folds 5`"):
        compare_folds("tiny", tiny)
    with pytest.raises(ZooError, match="metric must be one of top1"):
        compare_folds("many", folded, metric="accuracy")
    fold_dataset("tiny", 3, tiny)
    with pytest.raises(ZooError, match="no recipe was run on all 3 folds of 'tiny'"):
        compare_folds("tiny", tiny)
    shutil.rmtree(tiny.data / "tiny-fold2")
    with pytest.raises(ZooError, match="has 2 of 3 folds"):
        compare_folds("tiny", tiny)
