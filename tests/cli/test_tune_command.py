from __future__ import annotations

import json
import shlex

import pytest

from zoo.benchmark.tuned import bench_command
from zoo.cli import main
from zoo.data.manifest import load_dataset
from zoo.files import home, read_toml, to_toml, write_toml
from zoo.recipe import load_recipe, parse_assignment
from zoo.runs import list_runs

KEYS = {
    "study",
    "dataset",
    "recipe",
    "tuned_recipe",
    "metric",
    "best",
    "default",
    "counts",
    "comparison",
    "importance",
    "trials",
    "notes",
    "next",
    "file",
    "folder",
}


@pytest.fixture
def command(tiny, capsys, monkeypatch):
    """Return `command(words...)`: exit code, standard output and standard error of `zoo` in a home with a search."""
    table = load_recipe(
        "tiny", {"epochs": 1, "search": {"optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True}}}, tiny
    )
    write_toml(tiny.recipes / "wide.toml", table.table())

    def run(*words):
        monkeypatch.setattr("sys.argv", ["zoo", *words])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return run


def test_tune_prints_what_scripts_rely_on(command, tiny):
    code, out, err = command("tune", "wide", "--data", "tiny", "--trials", "2", "--json", "--set", "weight_decay=0.1")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert set(found) >= KEYS
    assert found["counts"] == {"complete": 2, "pruned": 0, "failed": 0, "running": 0}
    assert found["next"] == ("zoo bench --data tiny --recipes wide,wide-tuned --seeds 3 --set weight_decay=0.1")
    assert load_recipe("wide-tuned", root=home()).optimizer.weight_decay == 0.1


def test_the_next_command_runs_as_it_is_printed(command, tiny, monkeypatch):
    dataset = load_dataset("tiny", tiny)
    dataset.image_path(dataset.of_split("train")["path"].iloc[0]).unlink()
    given = {
        "search": {"optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True}, "finetune.epochs": {"choices": [1]}},
        "finetune": {"strategy": "full", "epochs": 1, "batch_size": 5},
        "model.options": {"width": 8},
        "mean": [0.4, 0.5, 0.5],
        "optimizer.lr": 2e-3,
        "window": "lung",
    }
    words = [each for key, value in given.items() for each in ("--set", f"{key}={to_toml(value)}")]
    monkeypatch.delenv("ZOO_HOME")
    where = ("--home", str(tiny.root), "--bad-images", "skip", "--accept-leaks", "--offline", "--json")
    code, out, err = command("tune", "tiny", "--data", "tiny", "--trials", "2", *words, *where)
    assert (code, err) == (0, "")
    study = json.loads(out)
    assert study["next"].startswith("zoo bench --data tiny --recipes tiny,tiny-tuned --seeds 3 --set ")
    assert study["next"].endswith(f"--bad-images skip --accept-leaks --offline --home {tiny.root}")
    monkeypatch.delenv("ZOO_HOME")
    code, out, err = command(*shlex.split(study["next"])[1:], "--json")
    assert (code, err) == (0, "")
    rows = {row["recipe"]: row for row in json.loads(out)["rows"]}
    assert {name: row["status"] for name, row in rows.items()} == {"tiny": "finished", "tiny-tuned": "finished"}
    runs = {run.record.recipe: read_toml(run.path / "recipe.toml") for run in list_runs(tiny)}
    for table in runs.values():
        assert (table["model"]["options"], table["model"]["mean"]) == ({"width": 8}, [0.4, 0.5, 0.5])
        assert (table["finetune"]["batch_size"], table["model"]["window"]) == (5, "lung")
    tuned = load_recipe("tiny-tuned", root=tiny)
    assert runs["tiny-tuned"]["optimizer"]["lr"] == tuned.optimizer.lr, "what was searched stays as it was found"
    # The home may be named before the verb, too.
    code, out, err = command(
        "--home", str(tiny.root), "tune", "tiny", "--data", "tiny", "--trials", "2", *words, *where[2:]
    )
    assert (code, err) == (0, "")
    assert json.loads(out)["next"] == study["next"]


def test_text_that_would_be_read_as_something_else_is_quoted():
    given = {
        "recipe": "7",
        "b": "true",
        "c": "[1]",
        "d": "lp-ft",
        "e": ' "x',
        "f": 1e-5,
        "g": "a\nb",
        "h": [{"a b": "c"}],
    }
    for key, value in given.items():
        command = bench_command("d", "r", {f"model.options.{key}": value}, [], [], "t")
        assert parse_assignment(shlex.split(command)[-1]) == (f"model.options.{key}", value)


@pytest.mark.parametrize("columns", [80, 120])
def test_tune_prints_a_table_that_fits(command, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, err = command("tune", "wide", "--data", "tiny", "--trials", "3", "--timeout", "10m", "--name", "chosen")
    assert code == 0
    assert [line.split(":")[0] for line in err.splitlines()] == ["trial 0", "trial 1", "trial 2"]
    table = out.splitlines()
    assert table[0] == "wide on tiny, val balanced_accuracy; trials: 3 complete"
    assert any(line.split()[:2] == ["0", "default"] for line in table)
    endless = ("recipe: ", "trials and figures: ", "next, tuned against default on test: ")
    assert all(len(line) <= columns for line in table if not line.startswith(endless))
    for start in (*endless, "note: "):
        assert any(line.startswith(start) for line in table)
    assert "tuned − default" in " ".join(out.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tune", "tiny", "--data", "tiny"], "error: recipe 'tiny' has no [search]"),
        (["tune", "wide", "--data", "tiny", "--trials", "0"], "error: trials must be at least 1. Got 0"),
        (["tune", "wide", "--data", "tiny", "--timeout", "soon"], "error: a time must be a number above 0"),
        (["tune", "wide", "--data", "tiny", "--pruner", "median"], "error: the pruner must be one of halving"),
        (["tune", "wide", "--data", "tinny"], "error: there is no dataset 'tinny'; did you mean 'tiny'?"),
        (
            ["tune", "tiny", "--data", "tiny", "--set", 'search={"optimizer.lr"={low=1,high=0.1}}'],
            "error: recipe 'tiny' has 1 fault: search: 'optimizer.lr' must have low below high",
        ),
    ],
)
def test_mistakes_are_one_line(command, words, said):
    code, out, err = command(*words)
    assert (code, out) == (1, "")
    assert err.startswith(said) and err.count("\n") == 1


@pytest.mark.slow
def test_a_range_test_prints_its_suggestion_and_where_the_figure_lies(tiny, capsys):
    from zoo.cli.tuning import find_lr

    recipe = load_recipe("tiny", root=tiny)
    found = find_lr(recipe, "tiny", 0)
    out = capsys.readouterr().out
    assert out.startswith("optimizer.lr is 0.003 in the recipe;") and "lr-find.png" in out.splitlines()[-1]
    assert find_lr(recipe, "tiny", 0, json=True) == found
    document = json.loads(capsys.readouterr().out)
    assert document["suggested"] == found.suggested and document["figure"].endswith("lr-find.png")
