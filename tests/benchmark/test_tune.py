from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import zoo
from zoo.benchmark.space import space_of
from zoo.benchmark.study import Study
from zoo.benchmark.tune import parse_duration, tune
from zoo.data.manifest import load_dataset
from zoo.data.sources import import_dataset
from zoo.errors import Hindered, Interrupted, ZooError
from zoo.evaluation.metrics import compute_metrics
from zoo.evaluation.predictions import read_predictions
from zoo.files import read_json, read_toml, write_toml
from zoo.recipe import list_recipes, load_recipe, parse_recipe

SPACE = {
    "optimizer.lr": {"low": 1e-5, "high": 1e-1, "log": True},
    "augment.policy": {"choices": ["none", "light"]},
    "finetune.batch_size": {"low": 4, "high": 18},
}


@pytest.fixture
def searched(make_recipe):
    """Return `searched(search=SPACE, **overrides)`: the recipe `tiny` with a search space, four epochs long."""

    def make(search=None, **overrides):
        return make_recipe(**{"epochs": 4, "search": SPACE if search is None else search, **overrides})

    return make


def lasting(rows):
    """What does not hang on how long anything took."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def studies(root):
    folder = root.root / "models" / "tune"
    return sorted(folder.iterdir()) if folder.is_dir() else []


# The space --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("search", "overrides", "said"),
    [
        ({}, {}, "recipe 'tiny' has no [search], so that there is nothing to tune; add a table such as [search] with"),
        ({"finetune.metric": {"choices": ["top1", "auroc"]}}, {}, "'finetune.metric' cannot be varied; name a value"),
        ({"optimizer.name": {"choices": ["sgd", "sgd", "adam"]}}, {}, "'optimizer.name' names sgd twice"),
        ({"optimizer.momentum": {"low": 0.1, "high": 0.9}}, {}, "'optimizer.momentum' changes nothing where"),
        (
            {"finetune.head_lr": {"low": 0.1, "high": 0.9}},
            {},
            "nothing where finetune.strategy = 'full'; vary 'optimiz",
        ),
        (
            {"optimizer.lr": {"low": 0.1, "high": 0.9}},
            {"strategy": "linear-probe", "policy": "none"},
            "nothing where finetune.strategy = 'linear-probe'; vary 'finetune.head_lr'",
        ),
        (
            {"finetune.head_epochs": {"low": 1, "high": 9}},
            {"strategy": "lp-ft"},
            "'finetune.head_epochs' = 9 goes with nothing else that is searched: finetune.head_epochs must be below",
        ),
        (
            {"loss.name": {"choices": ["focal"]}, "loss.label_smoothing": {"low": 0.1, "high": 0.2}},
            {},
            "has 3 faults: 'loss.name' = focal goes with nothing",
        ),
        (
            {"model.weights": {"choices": ["scratch", "away.safetensors"]}},
            {},
            "cannot be trained: 'model.weights' = away",
        ),
        (
            {"finetune.batch_size": {"choices": [8, 512]}},
            {},
            "cannot be trained: 'finetune.batch_size' = 512: finetune.batch_size must be at most the 18 training imag",
        ),
        ({"finetune.batch_size": {"low": 4, "high": 19}}, {}, "cannot be trained: 'finetune.batch_size' = 19: "),
        ({"finetune.accumulate": {"low": 1, "high": 4}}, {}, "'finetune.accumulate' = 4: finetune.batch_size must be"),
        (
            {"finetune.batch_size": {"choices": [6, 9]}, "finetune.accumulate": {"choices": [1, 4]}},
            {},
            "cannot be trained: 'finetune.accumulate' = 4: finetune.batch_size must be at most the 18 training images",
        ),
        (
            {"finetune.image_sizes": {"choices": [[16, 24], [16, 32]]}},
            {},
            "cannot be trained: 'finetune.image_sizes' = [16, 24]: finetune.image_sizes must end at the model's image",
        ),
        (
            {"augment.transforms": {"choices": [[{"name": "Flipp"}]]}},
            {"augment": {}},
            "cannot be trained: 'augment.trans",
        ),
    ],
)
def test_a_wrong_space_is_refused_before_any_work(tiny, searched, search, overrides, said):
    with pytest.raises(ZooError) as error:
        tune(searched(search, **overrides), "tiny", 2, root=tiny)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not studies(tiny)
    assert not tiny.runs.exists() or not list(tiny.runs.iterdir())


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({"optimizer.lrr": {"low": 1, "high": 2}}, "search: unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
        ({"optimizer.lr": {"low": 0, "high": 1, "log": True}}, "must have low above 0 where log"),
        ({"finetune.batch_size": {"low": 1.5, "high": 3}}, "finetune.batch_size must be a whole number. Got 1.5"),
        ({"augment.policy": {"choices": ["light", "heavy"]}}, "augment.policy must be 'none'"),
    ],
)
def test_a_wrong_table_is_refused_with_the_recipe(tiny, search, said):
    write_toml(tiny.recipes / "wrong.toml", {"model": {"name": "simple_cnn", "weights": "scratch"}, "search": search})
    with pytest.raises(ZooError, match=r"recipe 'wrong' has") as error:
        zoo.tune("wrong", "tiny", root=tiny)
    assert said in str(error.value)
    assert not studies(tiny)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"trials": 0}, "trials must be at least 1. Got 0"),
        ({"timeout": 0.0}, "the timeout must be seconds above 0. Got 0.0"),
        ({"timeout": math.nan}, "the timeout must be seconds above 0. Got nan"),
        ({"jobs": 0}, "jobs must be from 1 to 256. Got 0"),
        (
            {"pruner": "hyperbnd"},
            "the pruner must be one of halving, hyperband, none. Got 'hyperbnd'; did you mean 'hyperband'?",
        ),
        ({"name": "no/name"}, "recipe name must be 1 to 80 letters"),
        ({"name": "simple_cnn"}, "there is a recipe 'simple_cnn' already, and this study did not write it"),
        ({"seed": -1}, "the seed must be from 0 to 2147483647. Got -1"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(tiny, searched, options, said):
    with pytest.raises(ZooError) as error:
        tune(searched(), "tiny", root=tiny, **options)
    assert said in str(error.value)
    assert not [each for folder in studies(tiny) for each in folder.glob("trials/*")]


@pytest.mark.parametrize("text", ["", "0", "-3m", "5 weeks", "m", "1e3", "nan", "inf", "3mm"])
def test_wrong_times_are_refused(text):
    with pytest.raises(ZooError, match="a time must be a number above 0 and a unit of s, m, h or d, such as 30m"):
        parse_duration(text)


@pytest.mark.parametrize(("text", "seconds"), [("45", 45), ("90s", 90), ("1.5h", 5400), ("2d", 172800), (" 10 m", 600)])
def test_times_are_read(text, seconds):
    assert parse_duration(text) == seconds


def test_without_optuna_the_extra_is_named(tiny, searched, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ZooError, match=r"zoo tune needs the extra: pip install 'zoo\[tune\]'"):
        tune(searched(), "tiny", root=tiny)


def test_proposals_become_recipes_of_few_digits_within_their_range(searched):
    search = {
        "optimizer.lr": {"low": 0.00012342, "high": 0.1, "log": True},
        "finetune.epochs": {"low": 2, "high": 5},
        "schedule.warmup_epochs": {"low": 0, "high": 1},
        "finetune.freeze": {"choices": [[], ["stem"]]},
    }
    space = space_of(searched(search))
    found = space.distributions()
    assert [type(found[key]).__name__ for key in search] == [
        "FloatDistribution",
        "IntDistribution",
        "FloatDistribution",
        "CategoricalDistribution",
    ]
    params = {
        "optimizer.lr": 0.00012342,
        "finetune.epochs": 3,
        "schedule.warmup_epochs": 0.123456,
        "finetune.freeze": '["stem"]',
    }
    recipe = space.recipe_of(params)
    assert recipe.optimizer.lr == 0.00012342, "rounding does not leave the range"
    assert recipe.schedule.warmup_epochs == 0.1235
    assert (recipe.finetune.epochs, recipe.finetune.freeze, recipe.search) == (3, ["stem"], {})
    assert space.own_params() == {
        "optimizer.lr": 3e-3,
        "finetune.epochs": 4,
        "schedule.warmup_epochs": 0.0,
        "finetune.freeze": "[]",
    }


# A study ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_study_never_opens_test_and_ends_with_a_recipe_a_comparison_and_figures(tiny, searched):
    dataset = load_dataset("tiny", tiny)
    for path in dataset.of_split("test")["path"]:
        dataset.image_path(path).unlink()
    told = []
    recipe = searched(lr=2e-5)
    found = tune(recipe, "tiny", 9, root=tiny, pruner="none", on_step=told.append)
    assert not tiny.ledger.exists()
    assert not list(tiny.root.glob("models/**/*-test.*"))
    assert [step.state for step in told] == ["begins", "complete"] * 9
    rows = found.trials
    assert [row["number"] for row in rows] == list(range(9))
    assert {row["state"] for row in rows} == {"complete"}
    # The first is the recipe as it is; the best is the best, of equals the first.
    assert rows[0]["params"] == {"optimizer.lr": 2e-5, "augment.policy": "light", "finetune.batch_size": 6}
    assert found.default == rows[0]
    assert found.best["value"] == max(row["value"] for row in rows)
    assert found.best["number"] == min(row["number"] for row in rows if row["value"] == found.best["value"])
    # Values are those of the kept weights, by what is on disk.
    study = Study(found.folder, space_of(recipe), 0, "none")
    for row in rows:
        run = study.run(row["number"])
        predictions = read_predictions(run.predictions_file("val"))
        metrics = compute_metrics(predictions, dataset.classes)
        assert metrics["balanced_accuracy"] == pytest.approx(row["value"])
        assert run.weights_file.is_file() == (row["number"] in (0, found.best["number"])), "weights cost room"
        assert row["epochs"] == len(run.history()) == 4
    # The recipe is one of its own: loadable, without a space, and what the best trial trained.
    assert found.file == tiny.recipes / "tiny-tuned.toml"
    tuned = load_recipe("tiny-tuned", root=tiny)
    assert tuned.search == {} and "search" not in read_toml(found.file)
    assert tuned.digest == parse_recipe(read_toml(study.run(found.best["number"]).path / "recipe.toml"), "x").digest
    assert tuned.summary.startswith(
        f"tiny tuned: trial {found.best['number']} of 9 trials on tiny, val balanced_accuracy"
    )
    # Tuned against default, on val and honestly.
    said = found.comparison
    assert said["split"] == "val" and said["images"] == 9
    assert said["difference"] == pytest.approx(found.best["value"] - rows[0]["value"])
    assert said["ci"][0] <= said["difference"] <= said["ci"][1]
    assert said["tuned_ci"][0] <= said["tuned"] <= said["tuned_ci"][1]
    assert any("only test compares them fairly" in note for note in found.notes)
    assert found.next_command == "zoo bench --data tiny --recipes tiny,tiny-tuned --seeds 3"
    assert set(found.importance) == set(SPACE)
    assert all(value >= 0 for value in found.importance.values()) and sum(found.importance.values()) <= 1 + 1e-6
    names = {each.name for each in found.folder.iterdir()}
    assert names >= {
        "journal.log",
        "study.json",
        "history.png",
        "parallel-coordinate.png",
        "importance.png",
        "tuned.toml",
    }
    stored = read_json(found.folder / "study.json")
    assert stored["trials"] == json.loads(json.dumps(rows)) and stored["counts"]["complete"] == 9
    assert str(tiny.root) not in (found.folder / "study.json").read_text()


@pytest.mark.slow
def test_log_loss_is_minimised_and_few_trials_have_no_importance(tiny, searched):
    found = tune(searched(metric="log_loss"), "tiny", 3, root=tiny, pruner="none")
    values = [row["value"] for row in found.trials]
    assert found.best["value"] == min(values) < max(values)
    assert found.importance is None
    assert any("importances need 6 complete trials; there are 3" in note for note in found.notes)
    assert not (found.folder / "importance.png").exists()


def test_a_linear_probe_is_tuned_by_its_head(tiny, make_recipe):
    recipe = make_recipe(
        "lp",
        strategy="linear-probe",
        policy="none",
        epochs=6,
        search={"finetune.head_lr": {"low": 1e-4, "high": 1.0, "log": True}},
    )
    found = tune(recipe, "tiny", 4, root=tiny)
    assert found.default["params"] == {"finetune.head_lr": 3e-3}, "what a recipe that says nothing means"
    assert load_recipe("lp-tuned", root=tiny).finetune.strategy == "linear-probe"


@pytest.mark.slow
def test_halving_gives_up_early_but_never_the_recipe_as_it_is(tiny, searched):
    # The recipe as it is cannot learn; with its rate it would be the first to go.
    recipe = searched(lr=1e-9, epochs=6)
    found = tune(recipe, "tiny", 12, root=tiny, pruner="halving")
    states = [row["state"] for row in found.trials]
    assert states[0] == "complete" and found.trials[0]["epochs"] == 6
    assert "pruned" in states
    study = Study(found.folder, space_of(recipe), 0, "halving")
    for row in found.trials:
        if row["state"] == "pruned":
            assert row["epochs"] < 6 and row["reason"].startswith("not among the best after epoch")
            run = study.run(row["number"])
            assert not run.weights_file.exists() and not (run.path / "checkpoint").exists()
            assert len(run.history()) == row["epochs"]
    assert any("own value of optimizer.lr is not in the space" in note for note in found.notes)


@pytest.mark.slow
def test_hyperband_prunes_too(tiny, searched):
    found = tune(searched(epochs=6), "tiny", 8, root=tiny, pruner="hyperband")
    assert {row["state"] for row in found.trials} == {"complete", "pruned"}


@pytest.mark.slow
def test_what_failed_is_a_row_and_the_study_goes_on(tiny, searched):
    found = tune(searched({"optimizer.lr": {"choices": [3e-3, 1e30]}}, policy="none"), "tiny", 5, root=tiny)
    states = [row["state"] for row in found.trials]
    assert states[0] == "complete" and "failed" in states
    reasons = [row["reason"] for row in found.trials if row["state"] == "failed"]
    assert all("the loss was not finite" in reason for reason in reasons)
    same = [row for row in found.trials if (row["reason"] or "").startswith("the same recipe as trial 0")]
    assert all(row["value"] == found.trials[0]["value"] for row in same)
    assert len(same) + 1 + len(reasons) == 5, "one recipe is trained once"
    assert found.best["number"] == 0
    assert any("no trial was better than the recipe as it is" in note for note in found.notes)
    assert load_recipe(found.recipe, root=tiny).digest == load_recipe(found.recipe, {"lr": 3e-3}, tiny).digest


@pytest.mark.slow
def test_if_all_fail_the_study_says_why(tiny, searched):
    recipe = searched({"optimizer.lr": {"choices": [1e29, 1e30]}}, policy="none", lr=1e30)
    with pytest.raises(
        ZooError, match=r"none of the study's 2 trials is complete; the first failed: the loss was not fin"
    ):
        tune(recipe, "tiny", 2, root=tiny)
    assert not (tiny.recipes / "tiny-tuned.toml").exists()
    # Trials that ended stay ended; more can be asked for.
    with pytest.raises(ZooError, match=r"none of the study's 3 trials .* ask for more with --trials 6"):
        tune(recipe, "tiny", 3, root=tiny)


@pytest.mark.slow
def test_combinations_that_contradict_are_refused_without_training(tiny, searched):
    search = {"loss.name": {"choices": ["focal", "cross_entropy"]}, "loss.label_smoothing": {"choices": [0.0, 0.1]}}
    found = tune(searched(search), "tiny", 12, root=tiny, pruner="none")
    refused = [row for row in found.trials if row["state"] == "pruned"]
    assert refused, "twelve draws of four combinations hit the one that contradicts"
    assert all("loss.label_smoothing cannot go with loss.name = 'focal'" in row["reason"] for row in refused)
    assert all(row["epochs"] == 0 for row in refused)


@pytest.mark.slow
def test_values_that_go_with_some_others_alone_are_searched_and_the_rest_is_not_trained(tiny, searched):
    search = {
        "model.image_size": {"choices": [32, 48]},
        "finetune.image_sizes": {"choices": [[16, 48], [16, 32]]},
        "finetune.batch_size": {"choices": [6, 9]},
        "finetune.accumulate": {"choices": [1, 3]},
    }
    found = tune(searched(search, epochs=2), "tiny", 14, root=tiny, pruner="none")
    refused = [row for row in found.trials if row["state"] == "pruned"]
    assert {row["state"] for row in found.trials} == {"complete", "pruned"}
    sizes = [row for row in refused if "finetune.image_sizes must end at the model's image size" in row["reason"]]
    batches = [row for row in refused if "finetune.batch_size must be at most the 18" in row["reason"]]
    assert sizes and batches and all(row["epochs"] == 0 for row in refused)


def test_a_metric_that_val_cannot_define_is_refused_before_work(root, write_scenes, tmp_path, searched):
    parts = {"train/a": range(8), "train/b": range(10, 18), "val/a": range(20, 24), "test/a": [30], "test/b": [40]}
    folder = write_scenes(tmp_path / "scenes", parts)
    lines = [f"{each.relative_to(folder)},{each.parts[-2]},{each.parts[-3]}" for each in sorted(folder.rglob("*.png"))]
    (folder / "images.csv").write_text("\n".join(["path,label,split", *lines]) + "\n")
    import_dataset(folder / "images.csv", "lopsided", root, copy=True)
    with pytest.raises(ZooError, match=r"^val cannot define auroc; set another finetune.metric \(split 'val'"):
        tune(searched(metric="auroc", epochs=1), "lopsided", 2, root=root)
    assert not studies(root)


# Going on ---------------------------------------------------------------------------------------------------------


def stop_at(trial, epoch):
    def stop(tick):
        if f"--t{trial}--" in tick.run and tick.epoch == epoch and tick.phase == "network":
            raise KeyboardInterrupt

    return stop


@pytest.mark.slow
def test_an_interrupted_study_ends_as_if_it_had_not_been(tiny, searched):
    recipe = searched(epochs=5)
    whole = tune(recipe, "tiny", 14, root=tiny)
    assert {row["state"] for row in whole.trials} == {"complete", "pruned"}, "both ways of ending are compared"
    proposed = [json.dumps(row["params"], sort_keys=True) for row in whole.trials]
    assert len(set(proposed)) == 14, "no proposal comes twice"
    whole.folder.rename(tiny.root / "away")
    whole.file.unlink()
    for trial, epoch in ((0, 1), (0, 3), (2, 1), (11, 1), (13, 1)):
        with pytest.raises(Interrupted, match=r"the study goes on with the same command") as stop:
            tune(recipe, "tiny", 14, root=tiny, on_tick=stop_at(trial, epoch))
        assert stop.value.exit_code == 130
    broken = tune(recipe, "tiny", 14, root=tiny)
    assert broken.folder == whole.folder
    assert lasting(broken.trials) == lasting(whole.trials)
    assert broken.file.read_bytes() == (tiny.root / "away" / "tuned.toml").read_bytes()
    journals = [folder / "journal.log" for folder in (broken.folder, tiny.root / "away")]
    reports = [sorted(_reports(journal)) for journal in journals]
    assert reports[0] == reports[1], "no epoch is lost and none reported twice"
    assert len(set(reports[0])) == len(reports[0])


@pytest.mark.slow
@pytest.mark.parametrize("pruner", ["halving", "hyperband"])
def test_trials_of_searched_epochs_are_given_up_before_their_own_last_one(tiny, searched, pruner):
    search = {"finetune.epochs": {"low": 2, "high": 9}, "optimizer.lr": {"low": 1e-7, "high": 1e-2, "log": True}}
    recipe = searched(search, epochs=2)
    whole = tune(recipe, "tiny", 12, root=tiny, pruner=pruner)
    given_up = [row for row in whole.trials if row["state"] == "pruned"]
    assert all(row["epochs"] < row["params"]["finetune.epochs"] for row in given_up)
    late = [row for row in given_up if row["epochs"] >= 2]
    assert late, "some are given up after as many epochs as the recipe as it is has in all"
    for row in whole.trials:
        if row["state"] == "complete":
            assert row["epochs"] == row["params"]["finetune.epochs"]
    study = Study(whole.folder, space_of(recipe), 0, pruner)
    stopped = [trial.number for trial in study.frozen() if trial.user_attrs.get("stopped")]
    assert stopped == [row["number"] for row in given_up], "what the pruner has given up does not go on"
    # Cut off at the very epoch at which it is given up, or at its last, a trial ends as it would have.
    whole.folder.rename(tiny.root / "away")
    whole.file.unlink()
    ended = next(row for row in whole.trials if row["number"] and row["state"] == "complete")
    for row in sorted((late[0], ended), key=lambda row: row["number"]):
        with pytest.raises(Interrupted):
            tune(recipe, "tiny", 12, root=tiny, pruner=pruner, on_tick=stop_at(row["number"], row["epochs"]))
    assert lasting(tune(recipe, "tiny", 12, root=tiny, pruner=pruner).trials) == lasting(whole.trials)


def _reports(journal):
    for line in journal.read_text().splitlines():
        entry = json.loads(line)
        if entry["op_code"] == 7:
            yield entry["trial_id"], entry["step"]


def _image_gone(home, monkeypatch):
    dataset = load_dataset("tiny", home)
    image = dataset.image_path(dataset.of_split("train")["path"].iloc[0])
    image.rename(home.root / "kept.png")
    for file in dataset.folder.glob(".cache/pixels-*"):
        file.unlink()
    return lambda: (home.root / "kept.png").rename(image)


def _weights_gone(home, monkeypatch):
    file = home.root / "start.safetensors"
    file.rename(home.root / "kept.safetensors")
    return lambda: (home.root / "kept.safetensors").rename(file)


def _folder_gone(home, monkeypatch):
    folder = home.root / "weights"
    folder.rename(home.root / "kept")
    return lambda: (home.root / "kept").rename(folder)


def _disk_full(home, monkeypatch):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))  # no file may grow: as a disk that takes no more
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="a disk is filled by a limit of POSIX")
@pytest.mark.parametrize(
    ("hinder", "said"),
    [
        (_image_gone, "of split 'train': gone; mend it, import the data again"),
        (_weights_gone, "start.safetensors', and there is no such file"),
        (_folder_gone, "ZOO_WEIGHTS must name a folder of weight files"),
        (_disk_full, "cannot write"),
    ],
)
def test_what_is_no_fault_of_a_trial_ends_the_study_and_leaves_the_trial_to_be_run(
    trained, searched, monkeypatch, hinder, said
):
    run = next(run for run in zoo.list_runs(trained) if "--tiny--s0" in run.name)
    shutil.copy(run.weights_file, trained.root / "start.safetensors")
    (trained.root / "weights").mkdir()
    monkeypatch.setenv("ZOO_WEIGHTS", str(trained.root / "weights"))
    recipe = searched(epochs=1, model__weights="start.safetensors")
    whole = tune(recipe, "tiny", 4, root=trained)
    whole.folder.rename(trained.root / "away")
    whole.file.unlink()
    mend = []

    def on_step(step):
        if step.number == 2 and step.state == "begins" and not mend:
            mend.append(hinder(trained, monkeypatch))

    try:
        with pytest.raises(Hindered) as error:
            tune(recipe, "tiny", 4, root=trained, on_step=on_step)
    finally:
        mend[0]()
    assert said in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).endswith("; once that is mended the study goes on with the same command")
    study = Study(whole.folder, space_of(recipe), 0, "halving")
    assert [row["state"] for row in study.rows()] == ["complete", "running"]
    claim = study.claim(4)
    # However often it is hindered, no process has died of it; a full disk takes no note of that either.
    assert (claim.number, claim.deaths) == (1, int(hinder is _disk_full))
    claim.release()
    again = tune(recipe, "tiny", 4, root=trained)
    assert lasting(again.trials) == lasting(whole.trials)


@pytest.mark.slow
def test_images_that_are_gone_end_all_processes_and_no_trial(tiny, searched, monkeypatch):
    recipe = searched(epochs=1)
    mend = _image_gone(tiny, monkeypatch)
    with pytest.raises(Hindered, match=r"of split 'train': gone; .* the study goes on with the same command$"):
        tune(recipe, "tiny", 3, root=tiny, jobs=2)
    mend()
    found = tune(recipe, "tiny", 3, root=tiny)
    assert {row["state"] for row in found.trials} == {"complete"}


@pytest.mark.slow
def test_more_trials_go_on_and_another_space_seed_or_pruner_is_another_study(tiny, searched):
    recipe = searched(epochs=1)
    first = tune(recipe, "tiny", 2, root=tiny)
    more = tune(recipe, "tiny", 4, root=tiny)
    assert more.trials[:2] == first.trials and len(more.trials) == 4
    again = tune(recipe, "tiny", 3, root=tiny, on_step=lambda step: pytest.fail("nothing is left to do"))
    assert again.trials == more.trials
    assert len(studies(tiny)) == 1
    narrow = {**SPACE, "optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True}}
    tune(searched(narrow, epochs=1), "tiny", 1, root=tiny)
    tune(recipe, "tiny", 1, seed=1, root=tiny)
    tune(recipe, "tiny", 1, root=tiny, pruner="none")
    assert len(studies(tiny)) == 4
    assert not any(list(folder.glob(".*.toml*")) for folder in studies(tiny))


def test_after_the_timeout_no_trial_begins(tiny, searched):
    found = tune(searched(epochs=1), "tiny", 50, root=tiny, timeout=1e-6)
    assert len(found.trials) == 1, "the one that was begun ends"


@pytest.mark.slow
def test_files_of_others_are_never_overwritten(tiny, searched):
    recipe = searched(epochs=1)
    own = tiny.recipes / "tiny-tuned.toml"
    own.write_text("# mine\n")
    found = tune(recipe, "tiny", 1, root=tiny)
    assert found.recipe == "tiny-tuned-2" and own.read_text() == "# mine\n"
    # It writes its own file anew with more trials, but not one that was changed since.
    assert tune(recipe, "tiny", 2, root=tiny).recipe == "tiny-tuned-2"
    changed = found.file.read_text() + "# changed\n"
    found.file.write_text(changed)
    assert tune(recipe, "tiny", 3, root=tiny).recipe == "tiny-tuned-3"
    assert found.file.read_text() == changed
    with pytest.raises(ZooError, match=r"there is a recipe 'tiny-tuned-2' already, and this study did not write it"):
        tune(recipe, "tiny", 3, root=tiny, name="tiny-tuned-2")
    assert tune(recipe, "tiny", 3, root=tiny, name="chosen").file == tiny.recipes / "chosen.toml"


@pytest.mark.slow
def test_a_line_that_was_cut_off_is_dropped_and_a_damaged_journal_named(tiny, searched):
    recipe = searched(epochs=1)
    found = tune(recipe, "tiny", 2, root=tiny)
    journal = found.folder / "journal.log"
    with journal.open("ab") as stream:
        stream.write(b'{"op_code":4,"worker')
    more = tune(recipe, "tiny", 3, root=tiny)
    assert more.trials[:2] == found.trials and len(more.trials) == 3
    lines = journal.read_text().splitlines()
    assert [json.loads(line) for line in lines]
    journal.write_text("\n".join([lines[0], "no json", *lines[1:]]) + "\n")
    with pytest.raises(ZooError, match=r"journal.log' is damaged: .*; remove .* to start anew"):
        tune(recipe, "tiny", 3, root=tiny)


@pytest.mark.slow
@pytest.mark.parametrize("number", [3, 12])
def test_a_process_that_died_before_its_first_epoch_leaves_the_same_trial(tiny, searched, number):
    recipe = searched(epochs=1)
    whole = tune(recipe, "tiny", 14, root=tiny, pruner="none")
    journal = whole.folder / "journal.log"
    lines = journal.read_text().splitlines(keepends=True)
    begun = [place for place, line in enumerate(lines) if json.loads(line)["op_code"] == 4][number]
    journal.write_text("".join(lines[: begun + 1]))
    again = tune(recipe, "tiny", 14, root=tiny, pruner="none")
    assert lasting(again.trials) == lasting(whole.trials)


@pytest.mark.slow
def test_a_process_that_died_as_it_gave_a_trial_up_leaves_it_given_up(tiny, searched):
    recipe = searched(epochs=5)
    whole = tune(recipe, "tiny", 8, root=tiny)
    number = next(row["number"] for row in whole.trials if row["state"] == "pruned")
    journal = whole.folder / "journal.log"
    lines = journal.read_text().splitlines(keepends=True)
    entries = [json.loads(line) for line in lines]
    last = max(place for place, each in enumerate(entries) if each["op_code"] == 7 and each["trial_id"] == number)
    ended = next(place for place, each in enumerate(entries) if each["op_code"] == 6 and each["trial_id"] == number)
    assert ended > last + 2, "there are moments between the last epoch and the end"
    for place in range(last + 1, ended + 1):
        journal.write_text("".join(lines[:place]))
        again = tune(recipe, "tiny", number + 1, root=tiny)
        assert lasting(again.trials) == lasting(whole.trials[: number + 1])


@pytest.mark.slow
def test_a_trial_whose_process_dies_again_and_again_fails(tiny, searched):
    recipe = searched(epochs=1)
    found = tune(recipe, "tiny", 1, root=tiny, pruner="none")
    for death in range(20):  # the operating system frees a lock as `release` does
        study = Study(found.folder, space_of(recipe), 0, "none")
        claim = study.claim(2)
        assert (claim.number, claim.deaths) == (1, death)
        assert study.claim(2) is None, "nobody else has it meanwhile"
        claim.release()
    more = tune(recipe, "tiny", 2, root=tiny, pruner="none")
    assert [row["state"] for row in more.trials] == ["complete", "failed"]
    assert more.trials[1]["reason"] == "its processes died again and again in one epoch, for want of memory?"
    # Of deaths that are no doubt the trial's fault two are enough; one is not.
    for crashes, state in ((1, "complete"), (2, "failed")):
        number = len(study.frozen())
        for _ in range(crashes):
            study.claim(number + 1).release()
            study.crashed(number)
        more = tune(recipe, "tiny", number + 1, root=tiny, pruner="none")
        assert more.trials[number]["state"] == state


# Several processes ------------------------------------------------------------------------------------------------


def start(root, *words, **options):
    command = [sys.executable, "-m", "zoo", "tune", "tiny-search", "--data", "tiny", "--offline", *words]
    environment = {**os.environ, "ZOO_HOME": str(root.root), "COLUMNS": "120"}
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


TRIALS = 30  # more than one process ends before the other has started


@pytest.fixture
def long_study(tiny, searched):
    """The recipe `tiny-search` in the home, whose trials take a second or so."""
    recipe = searched(epochs=12, policy="light")
    write_toml(tiny.recipes / "tiny-search.toml", {**recipe.table()})
    return tiny


def reported(root):
    """How many epochs the study has reported, by trial."""
    found: dict[int, int] = {}
    for folder in studies(root):
        journal = folder / "journal.log"
        for line in journal.read_text().splitlines() if journal.is_file() else []:
            entry = json.loads(line)
            if entry["op_code"] == 7:
                found[entry["trial_id"]] = found.get(entry["trial_id"], 0) + 1
    return found


def wait_for(condition, process, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_study_goes_on_with_the_same_trials(long_study):
    whole = start(long_study, "--trials", "4", "--json")
    out, err = whole.communicate(timeout=200)
    assert whole.returncode == 0, err
    expected = json.loads(out)
    studies(long_study)[0].rename(long_study.root / "away")
    killed_at = []
    for trial, epochs in ((0, 2), (1, 1), (3, 1)):
        process = start(long_study, "--trials", "4")
        wait_for(lambda trial=trial, epochs=epochs: reported(long_study).get(trial, 0) >= epochs, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        killed_at.append(reported(long_study))
    last = start(long_study, "--trials", "4", "--json")
    out, err = last.communicate(timeout=200)
    assert last.returncode == 0, err
    found = json.loads(out)
    assert lasting(found["trials"]) == lasting(expected["trials"])
    assert found["counts"] == expected["counts"]
    assert any(killed_at[0].values()), "something was there to go on from"


@pytest.mark.slow
def test_two_processes_share_a_study_and_none_trains_what_the_other_does(long_study):
    both = [start(long_study, "--trials", "7") for _ in range(2)]
    said = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    told = [[line.split()[1].rstrip(":") for line in err.splitlines() if line.startswith("trial ")] for _, err in said]
    assert sorted(int(each) for each in told[0] + told[1]) == list(range(7)), "each trial was trained by one of them"
    stored = read_json(studies(long_study)[0] / "study.json")
    assert [row["number"] for row in stored["trials"]] == list(range(7))
    assert stored["counts"]["running"] == 0
    assert len({json.dumps(row["params"], sort_keys=True) for row in stored["trials"]}) == 7
    runs = list(studies(long_study)[0].glob("trials/*/*/history.jsonl"))
    assert len(runs) == 7


@pytest.mark.slow
def test_jobs_stop_together_and_go_on(long_study):
    process = start(long_study, "--trials", str(TRIALS), "--jobs", "2")
    wait_for(lambda: len(reported(long_study)) >= 2, process)
    workers = children(process.pid)
    assert len(workers) >= 2
    os.kill(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "the study goes on with the same command" in err and "Traceback" not in err
    deadline = time.monotonic() + 10  # a process may still be on its way out
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [command_of(pid) for pid in workers if alive(pid)], "no orphan is left"
    # One of two is killed for good: the other takes its trial over.
    process = start(long_study, "--trials", str(TRIALS), "--jobs", "2", "--json")
    wait_for(lambda: len(trainers_of(process.pid)) == 2, process)
    before = sum(reported(long_study).values())
    wait_for(lambda: sum(reported(long_study).values()) > before, process)
    os.kill(trainers_of(process.pid)[0], signal.SIGKILL)
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    rows = json.loads(out)["trials"]
    assert [row["number"] for row in rows] == list(range(TRIALS))
    assert {row["state"] for row in rows} <= {"complete", "pruned"}


def trainers_of(pid: int) -> list[int]:
    return [child for child in children(pid) if "spawn_main" in command_of(child)]


@pytest.mark.slow
def test_workers_whose_first_process_is_killed_end_by_themselves(long_study):
    process = start(long_study, "--trials", "60", "--jobs", "2")
    wait_for(lambda: len(reported(long_study)) >= 2, process)
    workers = children(process.pid)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "orphans go on"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("by_the_group", [True, False])
def test_a_worker_is_stopped_by_one_signal_alone(by_the_group):
    code = (
        "import multiprocessing, os, signal, sys, threading, time\n"
        "from zoo.benchmark import crew\n"
        "came = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: came.append(time.monotonic()))\n"
        "mine, theirs = multiprocessing.Pipe()\n"
        "threading.Thread(target=crew._heed, args=(theirs, crew.noted_signals()), daemon=True).start()\n"
        f"if {by_the_group}: os.kill(os.getpid(), signal.SIGTERM)\n"
        "time.sleep(0.3)\n"
        "mine.close()\n"
        "until = time.monotonic() + 1\n"
        "while time.monotonic() < until: time.sleep(0.05)\n"
        "print(len(came))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.returncode) == ("1\n", 0), done.stderr


def children(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(each) for each in found.stdout.split()]


def command_of(pid):
    return subprocess.run(
        ["ps", "-ww", "-o", "args=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout


def alive(pid):
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state.strip()) and not state.strip().startswith("Z")


def test_importance_finds_what_decides(tiny, searched):
    # Told values that hang on the rate alone, over its logarithm.
    recipe = searched()
    space = space_of(recipe)
    study = Study(tiny.root / "models" / "tune" / "tiny--tiny--01234567", space, 0, "none")
    from zoo.benchmark.tuned import importance_of

    for _ in range(30):
        claim = study.claim(30)
        value = -((math.log10(claim.params["optimizer.lr"]) + 3) ** 2)
        study.end(claim.number, "complete", value)
        claim.release()
    found = importance_of(study)
    assert next(iter(found)) == "optimizer.lr" and found["optimizer.lr"] > 0.8
    best = study.best()
    assert abs(math.log10(best["params"]["optimizer.lr"]) + 3) < 0.3, "TPE comes close to the best rate"
    assert found == importance_of(study)
    assert np.isfinite(list(found.values())).all()


def test_runs_of_trials_are_no_runs_of_the_home(tiny, searched):
    tune(searched(epochs=1), "tiny", 1, root=tiny)
    assert zoo.list_runs(tiny) == []


def test_the_spaces_of_all_built_in_recipes_are_accepted(root):
    searchable = [name for name in list_recipes(root) if load_recipe(name, root=root).search]
    assert len(searchable) >= 20
    for name in searchable:
        recipe = load_recipe(name, root=root)
        space = space_of(recipe)
        assert set(space.own_params()) == set(recipe.search), f"{name}: the recipe as it is lies in its space"
