from __future__ import annotations

import shutil

import pytest
from safetensors.torch import load_file, save_file

from zoo.benchmark.suite import bench
from zoo.benchmark.tune import tune
from zoo.data.resplit import fold_dataset
from zoo.data.sources import import_dataset
from zoo.errors import ZooError
from zoo.files import write_toml
from zoo.reporting.comparison import make_comparison
from zoo.reporting.findings import findings
from zoo.runs import Run, list_runs
from zoo.training.loop import train
from zoo.training.plan import make_plan
from zoo.training.scoring import evaluate

pytestmark = pytest.mark.slow  # each trains once or more
AGAIN = "images of the test split of '{}', or of the same groups, were there for training.*--accept-leaks"


@pytest.fixture
def quick(make_recipe):
    def make(name="quick", **overrides):
        return make_recipe(name, **{"epochs": 1, "policy": "none", "image_size": 32, **overrides})

    return make


@pytest.fixture
def others(tiny, write_scenes, tmp_path):
    """A dataset `others` of as many classes as `tiny`, with other names and other pictures."""
    scenes = {name: range(start, start + 12) for name, start in (("x", 0), ("y", 100), ("z", 200))}
    import_dataset(write_scenes(tmp_path / "scenes", scenes), "others", tiny, near_duplicates=False)
    return tiny


def test_a_run_of_another_fold_is_refused_for_it_saw_this_one_s_test(tiny, quick):
    fold_dataset("tiny", 3, tiny)
    source = train(quick(), "tiny-fold0", 0, tiny)
    again = quick("again", weights=source.name)
    with pytest.raises(ZooError, match=AGAIN.format("tiny-fold2")):
        make_plan(again, "tiny-fold2", 0, tiny)
    assert make_plan(again, "tiny-fold0", 0, tiny).notes == ()
    run = train(again, "tiny-fold2", 0, tiny, accept_leaks=True)
    assert not run.record.leaks_accepted  # of the dataset: it does not leak
    (note,) = [each for each in run.record.notes if source.name in each]
    assert note.startswith("LEAKS ACCEPTED: ") and "were in the training of run" in note
    evaluate(run, "test", tiny)
    comparison = make_comparison([run])
    assert f"again: {note}" in comparison.notes and findings(comparison)[0] == f"again: {note}."


def test_a_benchmark_and_a_study_refuse_it_too(tiny, quick):
    fold_dataset("tiny", 3, tiny)
    source = train(quick(), "tiny-fold0", 0, tiny)
    again = quick("again", weights=source.name)
    write_toml(tiny.root / "recipes" / "again.toml", again.table())
    (row,) = bench(data="tiny-fold2", recipes=["again"], seeds=1, root=tiny).comparison.rows
    assert row["status"] == "failed" and "--accept-leaks" in row["reason"]
    search = {"optimizer.lr": {"low": 1e-4, "high": 1e-3, "log": True}}
    searched = quick("searched", weights=source.name, search=search)
    with pytest.raises(ZooError, match=AGAIN.format("tiny-fold2")):
        tune(searched, "tiny-fold2", 1, root=tiny)
    found = tune(searched, "tiny-fold2", 1, root=tiny, accept_leaks=True)
    assert [row["state"] for row in found.trials] == ["complete"]


def test_the_file_of_a_run_is_a_run_too(others, quick):
    fold_dataset("tiny", 3, others)
    first = train(quick(), "tiny-fold0", 0, others)
    by_file = quick("by-file", weights=str(first.weights_file))
    with pytest.raises(ZooError, match=AGAIN.format("tiny-fold2")):
        make_plan(by_file, "tiny-fold2", 0, others)
    second = train(by_file, "others", 0, others)
    assert (second.record.weights["from"], second.record.weights["run"]) == ("file", first.name)
    assert any("told other classes apart" in note for note in second.record.notes)
    with pytest.raises(ZooError, match=f"run '{first.name}' .*{AGAIN.format('tiny-fold2')}"):
        make_plan(quick("third", weights=second.name), "tiny-fold2", 0, others)
    copy = others.root / "copy.safetensors"  # which nobody can know again
    shutil.copy(first.weights_file, copy)
    assert make_plan(quick("copied", weights=str(copy)), "tiny-fold2", 0, others).source is None


def test_the_same_pictures_under_another_name_are_found(tiny, quick, image_folder):
    import_dataset(image_folder, "renamed", tiny, seed=3, near_duplicates=False)
    source = train(quick(), "tiny", 0, tiny)
    with pytest.raises(ZooError, match=AGAIN.format("renamed")):
        make_plan(quick("again", weights=source.name), "renamed", 0, tiny)


def test_what_a_run_before_saw_counts_too(others, quick):
    fold_dataset("tiny", 3, others)
    first = train(quick(), "tiny-fold0", 0, others)
    second = train(quick("second", weights=first.name), "others", 0, others)
    third = quick("third", weights=second.name)
    with pytest.raises(ZooError, match=f"run '{first.name}' .*{AGAIN.format('tiny-fold2')}"):
        make_plan(third, "tiny-fold2", 0, others)
    shutil.rmtree(first.path)
    (note,) = make_plan(third, "tiny-fold2", 0, others).notes
    assert note == (
        f"run {first.name!r}, which the weights come from, is gone: whether its training images stand in this test "
        "split could not be seen"
    )


def test_a_data_set_that_is_gone_is_a_note(others, quick):
    source = train(quick(), "tiny", 0, others)
    again = quick("again", weights=source.name)
    assert make_plan(again, "others", 0, others).notes == ()
    shutil.rmtree(others.data / "tiny")
    (note,) = make_plan(again, "others", 0, others).notes
    assert note.startswith(
        f"run {source.name!r} was trained on dataset 'tiny', which is not here as it was (there is no"
    )


def test_a_classifier_of_other_classes_is_not_kept(others, quick):
    source = train(quick(), "tiny", 0, others)
    again = quick("again", weights=source.name)
    plan = make_plan(again, "others", 0, others)
    model, note = plan.model()
    before = load_file(source.weights_file)
    assert note == f"the classifier of 'run {source.name}' told other classes apart: a fresh one takes its place"
    for name, value in model.state_dict().items():
        if name.startswith("fc."):
            assert not value.any() and before[name].any()
        else:
            assert value.equal(before[name])
    own = make_plan(again, "tiny", 0, others)
    assert own.model()[1] == "" and own.model()[0].state_dict()["fc.weight"].equal(before["fc.weight"])
    assert note in train(again, "others", 0, others).record.notes


def test_weights_that_were_changed_are_refused(trained, quick):
    source = next(run for run in list_runs(trained) if "--tiny--s0" in run.name)
    values = load_file(source.weights_file)
    values["fc.bias"] += 1
    save_file(values, source.weights_file)
    with pytest.raises(ZooError, match=f"weights of run '{source.name}' to go on from were changed after it had ended"):
        make_plan(quick("again", weights=source.name), "tiny", 0, trained)
    assert isinstance(source, Run)
