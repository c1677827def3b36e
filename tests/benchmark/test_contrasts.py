"""A benchmark of several datasets: tables for each, differences over all, what is not here left out and said to be."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
from typer.testing import CliRunner

from zoo.benchmark.contrasts import bench_all, contrast_rows
from zoo.benchmark.suite import bench
from zoo.cli import app
from zoo.errors import ZooError
from zoo.evaluation.exact_tests import holm
from zoo.files import write_toml
from zoo.reporting.contrasts import contrast_cells, contrasts_markdown, plot_contrasts, verdict

MANY = {
    "summary": "two small sets",
    "datasets": ["tiny"],
    "optional_datasets": ["second", "absent"],
    "recipes": ["tiny", "tiny-lp"],
    "optional_recipes": ["stranger"],
    "contrasts": [["tiny-lp", "tiny"], ["tiny", "tiny-lp"]],
    "seeds": [0],
}


@pytest.fixture
def many(trained):
    """A home with a benchmark of the dataset tiny, its copy `second`, and `absent`, which is not here."""
    shutil.copytree(trained.data / "tiny", trained.data / "second")
    file = trained.data / "second" / "dataset.toml"
    file.write_text(file.read_text().replace('name = "tiny"', 'name = "second"'))
    write_toml(trained.benchmarks / "many.toml", MANY)
    return trained


@pytest.mark.slow
def test_every_dataset_has_its_table_and_the_contrasts_stand_beside(many):
    steps = []
    result = bench_all("many", on_step=steps.append)
    assert list(result.results) == ["tiny", "second"]
    assert list(result.missing) == ["absent"]
    assert "absent" in result.missing["absent"]
    folder = many.benchmarks / "many"
    assert {path.name for path in folder.iterdir()} == {
        *("tiny", "second"),
        *("contrasts.md", "contrasts.csv", "contrasts.json", "contrasts.png"),
    }
    assert (folder / "second" / "table.json").is_file()
    assert result.failed == 0
    assert [step.state for step in steps].count("left out") == 3  # a dataset, and a recipe on each of two
    assert "left out: stranger" in result.results["tiny"].comparison.notes[0]
    rows = list(csv.DictReader((folder / "contrasts.csv").read_text().splitlines()))
    assert [(row["dataset"], row["one"]) for row in rows] == [
        ("tiny", "tiny-lp"),
        ("tiny", "tiny"),
        ("second", "tiny-lp"),
        ("second", "tiny"),
    ]
    said = json.loads((folder / "contrasts.json").read_text())
    assert said["contrasts"] == json.loads(json.dumps(result.contrasts))
    assert "Left out: absent" in (folder / "contrasts.md").read_text()
    # The same from the same runs, byte for byte.
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    bench_all("many")
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


@pytest.mark.slow
def test_a_contrast_is_the_pair_of_the_table_with_its_sign_and_holm_over_the_contrasts_alone(many):
    result = bench_all("many")
    table = result.results["tiny"].comparison
    scores = {row["recipe"]: row["test_top1"] for row in table.rows}
    one, two = (row for row in result.contrasts if row["dataset"] == "tiny")
    assert one["difference"] == pytest.approx(scores["tiny-lp"] - scores["tiny"])
    assert (one["difference"], one["low"], one["high"]) == (-two["difference"], -two["high"], -two["low"])
    assert one["low"] <= one["difference"] <= one["high"]
    assert [row["p_holm"] for row in result.contrasts] == holm([row["p"] for row in result.contrasts])
    assert (one["score_one"], one["score_two"]) == (scores["tiny-lp"], scores["tiny"])
    assert (one["train_images"], one["test_images"], one["seeds"]) == (18, 9, 1)


@pytest.mark.slow
def test_a_contrast_with_a_recipe_that_failed_has_no_numbers(trained):
    table = bench(data="tiny", recipes=["tiny", "wild"], seeds=1).comparison
    (row,) = contrast_rows([table], [("tiny", "wild")])
    assert row["difference"] is None
    assert contrast_cells(row)["shown"] == "not run"
    assert "–" in contrasts_markdown("x", [row], {})
    assert plot_contrasts([row], "x").axes == []


@pytest.mark.parametrize(
    ("difference", "p_holm", "said"),
    [(0.1, 0.01, "better"), (-0.1, 0.01, "worse"), (0.1, 0.05, "not told apart"), (None, None, "not run")],
)
def test_what_a_contrast_shows(difference, p_holm, said):
    assert verdict({"difference": difference, "p_holm": p_holm}) == said


def test_a_dataset_that_is_not_optional_must_be_here(many):
    write_toml(many.benchmarks / "many.toml", {**MANY, "datasets": ["tiny", "missing"]})
    with pytest.raises(ZooError, match="missing"):
        bench_all("many")
    assert not (many.benchmarks / "many").exists()


@pytest.mark.slow
def test_one_dataset_of_many_can_be_run_alone_into_its_own_folder(many):
    with pytest.raises(ZooError, match=r"zoo.bench_all runs them all, data='tiny' one"):
        bench("many")
    assert bench("many", data="second").folder == many.benchmarks / "many" / "second"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dataset": "tiny"}, r"it must have either dataset = NAME or datasets = \[NAMES\]"),
        ({"datasets": ["tiny", "second"]}, "has 1 faults: dataset 'second' stands twice"),
        ({"datasets": []}, r"it must have either.*optional_datasets go with datasets"),
        ({"contrasts": [["tiny", "tiny-lpp"]]}, "contrasts: 'tiny-lpp' is none of its recipes; did you mean 'tiny-lp'"),
        ({"contrasts": [["tiny"]]}, "contrasts.0: List should have at least 2 items"),
    ],
)
def test_wrong_benchmarks_are_refused(many, changes, said):
    write_toml(many.benchmarks / "many.toml", {**MANY, **changes})
    with pytest.raises(ZooError, match=said):
        bench_all("many")


@pytest.mark.slow
def test_the_command_prints_tables_contrasts_and_what_was_left_out(many):
    for width in ("80", "120"):
        shown = CliRunner().invoke(app, ["bench", "many"], env={"COLUMNS": width, "NO_COLOR": "1"})
        assert shown.exit_code == 0, shown.output
        assert "many: test top1" in shown.output
        assert "left out: absent" in shown.output
        assert all(len(line) <= int(width) for line in shown.stdout.splitlines() if "│" in line or "─" in line)
    shown = CliRunner().invoke(app, ["bench", "many", "--json"])
    document = json.loads(shown.stdout)
    assert [each["dataset"] for each in document["results"]] == ["tiny", "second"]
    assert document["missing"][0]["dataset"] == "absent"
    assert len(document["contrasts"]) == 4
    shown = CliRunner().invoke(app, ["list", "benchmarks", "many", "--json"])
    (row,) = json.loads(shown.stdout)
    assert (row["dataset"], row["datasets"]) == ("3 datasets", ["tiny", "second", "absent"])


@pytest.mark.slow
def test_a_report_is_of_one_of_its_datasets(many):
    bench_all("many")
    shown = CliRunner().invoke(app, ["report", "many", "--no-explain"])
    assert shown.exit_code == 1
    assert "has several datasets; name one: zoo report many --data tiny" in str(shown.exception)
    shown = CliRunner().invoke(app, ["report", "many", "--data", "tiny", "--no-explain", "--json"])
    assert shown.exit_code == 0, shown.output
    assert (many.benchmarks / "many" / "tiny" / "report.html").is_file()
