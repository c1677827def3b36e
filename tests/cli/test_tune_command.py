from __future__ import annotations

import json

import pytest

from zoo.cli import main
from zoo.files import home, write_toml
from zoo.recipe import load_recipe

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
