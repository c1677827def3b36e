from __future__ import annotations

import json

import pytest

from zoo.benchmark.comparisons import compare, comparison_of, score_missing
from zoo.benchmark.definition import list_benchmarks, load_benchmark
from zoo.benchmark.suite import bench
from zoo.data.manifest import load_dataset
from zoo.data.resplit import resplit_dataset
from zoo.errors import Interrupted, ZooError
from zoo.files import write_toml
from zoo.recipe import list_recipes
from zoo.runs import find_run, list_runs

TABLES = ("table.md", "table.csv", "table.json", "table.tex")


def files_of(folder):
    return {name: (folder / name).read_bytes() for name in TABLES}


@pytest.mark.slow
def test_failures_are_rows_and_the_others_go_on(tiny):
    steps = []
    recipes = ["tiny", "wild", "stranger", "absent", "tiny-lp"]
    result = bench(data="tiny", recipes=recipes, seeds=1, on_step=steps.append)
    assert result.failed == 3
    rows = {row["recipe"]: row for row in result.comparison.rows}
    assert [*rows][2:] == ["absent", "stranger", "wild"]
    assert {name: row["status"] for name, row in rows.items()} == {
        "tiny": "finished",
        "tiny-lp": "finished",
        "wild": "failed",
        "stranger": "failed",
        "absent": "failed",
    }
    assert "epoch 1, step" in rows["wild"]["reason"]
    assert "resnet81" in rows["stranger"]["reason"] and "did you mean" in rows["stranger"]["reason"]
    assert "unknown recipe 'absent'" in rows["absent"]["reason"]
    # What cannot be planned is told before anything is trained.
    states = [step.state for step in steps]
    assert states[:2] == ["refused", "refused"] and states.index("begins") == 2
    assert result.comparison.floors[0]["name"] == "majority class"
    assert result.folder == tiny.benchmarks / "tiny"
    made = {each.name for each in result.folder.iterdir()}
    assert made == {*TABLES, "test-scores.png", "learning-curves.png", "confusion-matrices.png", "samples.png"}
    document = json.loads((result.folder / "table.json").read_text())
    assert document["rows"] == json.loads(json.dumps(result.comparison.rows))
    assert document["images"] == {"train": 18, "val": 9, "test": 9}


@pytest.mark.slow
def test_finished_runs_are_reused_and_the_table_is_the_same_bytes(tiny):
    first = bench(data="tiny", recipes=["tiny", "tiny-lp", "wild"], seeds=2)
    weights = {run.name: run.weights_file.stat().st_mtime_ns for run in list_runs(tiny) if run.finished}
    before = files_of(first.folder)
    assert len(weights) == 4 and first.failed == 2
    steps = []
    again = bench(data="tiny", recipes=["tiny", "tiny-lp", "wild"], seeds=2, on_step=steps.append)
    assert {run.name: run.weights_file.stat().st_mtime_ns for run in list_runs(tiny) if run.finished} == weights
    assert [step.state for step in steps if step.state == "reused"] == ["reused"] * 4
    assert files_of(again.folder) == before
    for file in (load_dataset("tiny", tiny).folder / ".cache").glob("floors-*"):
        file.unlink()
    third = bench(data="tiny", recipes=["tiny", "tiny-lp", "wild"], seeds=2)
    assert files_of(third.folder) == before
    more = bench(data="tiny", recipes=["tiny"], seeds=[0, 5])
    assert more.comparison.rows[0]["seed_list"] == [0, 5]


def test_only_failures_are_a_table_too(tiny):
    result = bench(data="tiny", recipes=["wild", "absent"], seeds=1)
    assert result.failed == 2
    assert {each.name for each in result.folder.iterdir()} >= set(TABLES)


@pytest.mark.slow
def test_an_interrupted_benchmark_goes_on(tiny):
    def stop(tick):
        if "--tiny-lp--" in tick.run:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        bench(data="tiny", recipes=["tiny", "tiny-lp"], seeds=1, on_tick=stop)
    (done,) = list_runs(tiny)
    stat = done.weights_file.stat().st_mtime_ns
    result = bench(data="tiny", recipes=["tiny", "tiny-lp"], seeds=1)
    assert result.failed == 0 and done.weights_file.stat().st_mtime_ns == stat


@pytest.mark.slow
def test_a_run_that_cannot_be_scored_is_a_failed_row(tiny):
    bench(data="tiny", recipes=["tiny"], seeds=1)  # the floors are known
    dataset = load_dataset("tiny", tiny)
    dataset.image_path(dataset.of_split("test")["path"].iloc[0]).unlink()
    result = bench(data="tiny", recipes=["tiny", "tiny-lp"], seeds=1)
    rows = {row["recipe"]: row for row in result.comparison.rows}
    assert (result.failed, rows["tiny"]["status"], rows["tiny-lp"]["status"]) == (1, "finished", "failed")
    assert "of split 'test': gone" in rows["tiny-lp"]["reason"]
    partly = bench(data="tiny", recipes=["tiny"], seeds=2)
    assert (partly.failed, partly.comparison.rows[0]["status"]) == (1, "partly failed")


@pytest.mark.slow
def test_bad_test_images_may_be_left_out(tiny):
    dataset = load_dataset("tiny", tiny)
    dataset.image_path(dataset.of_split("test")["path"].iloc[0]).unlink()
    result = bench(data="tiny", recipes=["tiny", "tiny-lp"], seeds=1, bad_images="skip")
    assert result.failed == 0 and (result.folder / "samples.png").is_file()
    assert [row["test_images"] for row in result.comparison.rows] == [8, 8]
    for run in list_runs(tiny):
        run.metrics_file("test").unlink()
    score_missing([], data="tiny", root=tiny)  # as the runs were trained
    again = comparison_of(data="tiny", root=tiny)
    assert (again.rows, again.floors) == (result.comparison.rows, result.comparison.floors)


@pytest.mark.slow
def test_a_benchmark_s_file_is_read_and_its_keys_are_set_in_every_recipe(tiny):
    table = {"dataset": "tiny", "recipes": ["tiny"], "seeds": [4], "overrides": {"epochs": 1}}
    write_toml(tiny.benchmarks / "mine.toml", table)
    found = load_benchmark("mine", tiny)
    assert (found.name, found.dataset, found.seeds) == ("mine", "tiny", [4])
    result = bench("mine", overrides={"finetune.batch_size": 9})
    assert result.folder == tiny.benchmarks / "mine"
    record = find_run(result.comparison.rows[0]["runs"][0], tiny).record
    assert (record.epochs, record.seed) == (1, 4)
    assert bench("mine", recipes=["tiny-lp"], seeds=1).comparison.rows[0]["recipe"] == "tiny-lp"
    write_toml(tiny.benchmarks / "mine.toml", {**table, "seeds": 2})
    assert load_benchmark("mine", tiny).seeds == [0, 1]


def test_every_fault_of_a_benchmark_is_said_at_once(tiny):
    write_toml(tiny.benchmarks / "mine.toml", {"datasett": "tiny", "recipes": [], "seeds": [-1]})
    with pytest.raises(ZooError, match="has 4 faults") as refused:
        load_benchmark("mine", tiny)
    for said in ("unknown key 'datasett'; did you mean 'dataset'", "dataset: Field required", "recipes: ", "seeds.0: "):
        assert said in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "a benchmark needs a name of `zoo list benchmarks`, or --data N with --recipes A,B,C"),
        ({"name": "quickstrat"}, "unknown benchmark 'quickstrat'; did you mean 'quickstart'"),
        ({"data": "tiny", "recipes": ["tiny"], "seeds": 0}, "seeds must be at least 1. Got 0"),
        ({"data": "tiny", "recipes": ["tiny", "tiny"]}, "names recipe tiny twice"),
        ({"data": "tiny", "recipes": ["tiny"], "seeds": [1, 1]}, "names seed 1 twice"),
        ({"data": "tinny", "recipes": ["tiny"]}, "there is no dataset 'tinny'; did you mean 'tiny'"),
    ],
)
def test_a_benchmark_that_is_wrong_is_refused(tiny, arguments, said):
    with pytest.raises(ZooError) as refused:
        bench(**arguments)
    assert said in str(refused.value)


def test_a_folder_that_cannot_be_written_is_found_before_work(tiny):
    tiny.benchmarks.mkdir()
    (tiny.benchmarks / "tiny").write_text("in the way")
    with pytest.raises(ZooError, match="cannot write"):
        bench(data="tiny", recipes=["tiny"], on_tick=lambda _: pytest.fail("trained"))


def test_built_in_benchmarks_name_recipes_that_exist(root):
    names = list_benchmarks(root)
    assert names
    for name in names:
        assert set(load_benchmark(name, root).recipes) <= set(list_recipes(root))


def test_runs_are_compared_by_name_or_by_dataset(trained):
    names = [run.name for run in list_runs(trained)]
    frame = compare(data="tiny")
    assert set(frame["recipe"]) == {"tiny", "tiny-lp"}
    assert compare(names).equals(frame)
    assert len(frame.attrs["floors"]) == 4
    one = comparison_of(names[:1], root=trained)
    assert one.images["test"] == 9 and one.floors


def test_runs_of_different_splits_are_refused_naming_both(trained):
    from zoo.recipe import load_recipe
    from zoo.training.loop import train

    old = list_runs(trained)[0]
    dataset = resplit_dataset("tiny", trained, seed=8)
    with pytest.raises(ZooError, match="there is no run on the present split of 'tiny'"):
        comparison_of(data="tiny", root=trained)
    new = train(load_recipe("tiny-lp", root=trained), "tiny", 0, trained)
    with pytest.raises(ZooError, match="runs of different splits cannot be compared") as refused:
        compare([old, new])
    for said in (old.name, new.name, old.record.split_digest[:12], dataset.split_digest[:12]):
        assert said in str(refused.value)
    assert [row["recipe"] for row in comparison_of(data="tiny", root=trained).rows] == ["tiny-lp"]


def test_runs_are_compared_where_the_dataset_is_gone(trained):
    import shutil

    names = [run.name for run in list_runs(trained)]
    shutil.rmtree(trained.data)
    assert comparison_of(names, root=trained).floors == []
    with pytest.raises(ZooError, match="there is no dataset 'tiny'"):
        comparison_of(data="tiny", root=trained)
    with pytest.raises(ZooError, match="nothing to compare"):
        comparison_of(root=trained)


def test_runs_without_test_scores_are_scored_and_failed_ones_left(trained):
    run = list_runs(trained)[0]
    expected = run.metrics_file("test").read_bytes()
    run.metrics_file("test").unlink()
    score_missing([], data="tiny", root=trained)
    assert run.metrics_file("test").read_bytes() == expected
    run.write_record(run.record.model_copy(update={"status": "failed", "reason": "no luck"}))
    run.metrics_file("test").unlink()
    score_missing([run.name], root=trained)
    assert not run.metrics_file("test").exists()
