"""What `zoo train` shows while it trains, and what it may be asked for instead."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from zoo.cli import app
from zoo.errors import ZooError
from zoo.files import read_json, write_json
from zoo.runs import list_runs


def run(*words: str) -> str:
    done = CliRunner().invoke(app, list(words), env={"COLUMNS": "80"})
    if isinstance(done.exception, ZooError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def test_a_watched_run_leaves_its_figure_and_says_its_precision_plan(tiny):
    said = run("train", "tiny", "--data", "tiny", "--watch")
    (made,) = list_runs(tiny)
    with Image.open(made.path / "loss.png") as picture:
        assert picture.size[0] > 600
    assert "float32-channels-last (default)" in said.replace("\n", " ")
    assert run("train", "tiny", "--data", "tiny", "--watch")  # finished: shown again, not trained again


AVERAGE = ("train", "tiny", "--data", "tiny", "--set", "average.method=swa", "--set", "epochs=3")


def test_what_is_kept_is_what_is_said(tiny):
    plain = json.loads(run("train", "tiny", "--data", "tiny", "--json"))
    assert (plain["averaged_epochs"], plain["made_of"]) == ([], [])
    said = " ".join(run("train", "tiny", "--data", "tiny").split())
    assert f"kept epoch {plain['best_epoch']} of 2; " in said
    said, made = " ".join(run(*AVERAGE).split()), json.loads(run(*AVERAGE, "--json"))
    assert made["averaged_epochs"] == [2, 3], "val must score the average no worse, that there be something to say"
    assert "kept the average of epochs 2, 3 of 3; " in said and "kept epoch" not in said
    assert f"note: swa of epochs 2, 3: val balanced_accuracy {made['val']['balanced_accuracy']:.4f}, kept in" in said


def test_records_from_before_a_field_was_known_are_read(trained):
    one = list_runs(trained)[0]
    facts = read_json(one.path / "run.json")
    del facts["averaged_epochs"]
    write_json(one.path / "run.json", facts)
    assert one.record.averaged_epochs == [] and one.finished


def test_of_a_soup_the_runs_are_named_and_of_an_average_of_one_epoch_that_epoch(trained):
    made = next(each for each in list_runs(trained) if "--tiny--s0" in each.name)
    facts = read_json(made.path / "run.json")
    for changed, kept in (
        ({"made_of": ["one", "two"]}, "the average of runs one, two; "),
        ({"made_of": ["one"]}, f"epoch {facts['best_epoch']} of 2; "),
        ({"averaged_epochs": [1]}, "epoch 1 of 2; "),
    ):
        write_json(made.path / "run.json", {**facts, **changed})
        assert f"kept {kept}" in " ".join(run("train", "tiny", "--data", "tiny").split())


def test_the_range_test_trains_nothing_that_is_kept(tiny):
    said = run("train", "tiny", "--data", "tiny", "--lr-find")
    assert "optimizer.lr is 0.003 in the recipe" in said.replace("\n", " ")
    assert list_runs(tiny) == []
    (figure,) = tiny.runs.glob("*/lr-find.png")
    assert figure.stat().st_size > 10_000


def test_an_unknown_writer_is_refused_before_work(tiny):
    with pytest.raises(ZooError, match=r"a run can write to tensorboard, mlflow\. Got 'tensorbord'; did you mean"):
        run("train", "tiny", "--data", "tiny", "--log", "tensorbord")
    assert not tiny.runs.exists() or not list(tiny.runs.iterdir())
