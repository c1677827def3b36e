"""What `zoo train` shows while it trains, and what it may be asked for instead."""

from __future__ import annotations

import pytest
from PIL import Image
from typer.testing import CliRunner

from zoo.cli import app
from zoo.errors import ZooError
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
