from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from drawn_runs import CLASSES, FLOORS, make_run, record

from zoo.errors import ZooError
from zoo.evaluation.metrics import compute_metrics
from zoo.evaluation.predictions import Predictions, read_predictions, write_predictions
from zoo.evaluation.statistics import top1_interval
from zoo.files import to_json, write_json
from zoo.reporting.comparison import make_comparison
from zoo.reporting.tables import ENDINGS, FORMATS, cells, format_of, legend, tex, title, to_csv, to_latex, to_markdown

KEYS = {
    "recipe", "model", "weights", "seeds", "status", "reason", "params", "val_top1", "test_top1",
    "test_top1_ci", "letters", "train_s",
}  # fmt: skip


def test_seeds_are_one_row_with_mean_deviation_and_interval(root):
    runs = [make_run(root, seed=seed) for seed in (1, 0, 2)]
    comparison = make_comparison(runs, floors=FLOORS, images={"test": 60})
    (row,) = comparison.rows
    scores = [run.metrics("test")["top1"] for run in runs]
    assert row["test_top1"] == pytest.approx(np.mean(scores))
    assert row["test_top1_sd"] == pytest.approx(np.std(scores, ddof=1))
    assert row["test_top1_ci"][0] < row["test_top1"] < row["test_top1_ci"][1]
    assert (row["seeds"], row["seed_list"], row["status"], row["letters"]) == (3, [0, 1, 2], "finished", "a")
    assert (row["test_images"], row["test_groups"], row["params"]) == (60, 30, 1000)
    assert set(row) >= KEYS
    assert title(comparison) == "tiny, split abababab, 60 test images of 30 groups"


def test_floors_come_first_and_failures_last_whatever_it_is_sorted_by(root):
    runs = [make_run(root, "weak", right=0.3), make_run(root, "strong", right=0.99)]
    failed = record("awful", status="failed", reason="the loss was not finite")
    by_top1 = make_comparison([failed, *runs], floors=FLOORS)
    assert [row["recipe"] for row in by_top1.rows] == ["strong", "weak", "awful"]
    assert [row["letters"] for row in by_top1.rows] == ["a", "b", None]
    assert [row["beats_floors"] for row in by_top1.rows] == [True, False, None]
    for by in ("test_top1", "test_ece", "train_s", "recipe", "letters", "reason"):
        assert make_comparison([failed, *runs], by=by).rows[-1]["recipe"] == "awful", by
    table = to_markdown(by_top1).split("## Pairs")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines] == [
        "| recipe", "| *floor: majority class*", "| strong", "| weak", "| awful",
    ]  # fmt: skip
    assert lines[-1].endswith("failed: the loss was not finite |")
    assert len({line.count(" |") for line in lines}) == 1
    assert "- Note: not above every floor with its interval of top1: weak" in to_markdown(by_top1)
    with pytest.raises(ZooError, match=r"a table can be sorted by one of recipe, .* Got 'top'"):
        make_comparison(runs, by="top")


def test_a_seed_that_failed_before_it_had_an_identity_joins_its_recipe(root):
    failed = record(seed=1, recipe_digest="other", status="failed", reason="no weights")
    (row,) = make_comparison([make_run(root), failed]).rows
    assert (row["status"], row["reason"], row["seeds"]) == ("partly failed", "no weights", 1)
    assert cells(row)["status"] == "partly failed: no weights"


def test_only_failures_make_a_table_too():
    comparison = make_comparison([record(status="failed", reason="no weights", params=None, train_s=None)])
    assert comparison.rows[0]["test_top1"] is None
    assert "failed: no weights" in to_markdown(comparison) and "no weights" in to_csv(comparison)
    with pytest.raises(ZooError, match="there is no run to compare"):
        make_comparison([])


HOSTILE = ["=HYPERLINK(1)", "a|b", "<img src=x>", "+1", "-1", "@x", "a\nb", "a\\|b", "\t=1", "&lt;"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_stays_in_its_cell(root, name):
    runs = [make_run(root), record(name, status="failed", reason=name, model=name)]
    comparison = make_comparison(runs, floors=FLOORS)
    lines = [line for line in to_markdown(comparison).splitlines() if line.startswith("|")]
    bars = [line.replace("\\\\", "").replace("\\|", "").count("|") for line in lines]
    assert len(lines) == 5 and len(set(bars)) == 1
    assert "<img" not in to_markdown(comparison)
    rows = list(csv.DictReader(io.StringIO(to_csv(comparison))))
    assert len(rows) == 2
    for key in ("recipe", "model", "reason"):
        assert rows[1][key].lstrip("'") == name and not rows[1][key].startswith(("=", "+", "-", "@", "\t"))
    assert json.loads(to_json(comparison.document()))["rows"][1]["recipe"] == name


def test_negative_numbers_stay_numbers(root):
    run = make_run(root)
    metrics = run.metrics("test") | {"log_loss": -0.5}
    write_json(run.metrics_file("test"), metrics)
    (row,) = csv.DictReader(io.StringIO(to_csv(make_comparison([run]))))
    assert float(row["test_log_loss"]) == -0.5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"split_digest": "cd" * 32},
            "different splits cannot .*'tiny--cnn--s0--0' has abababababab, 'tiny--b--s0--0' has cdcd",
        ),
        ({"dataset": "other"}, "different datasets cannot .* has tiny, .* has other"),
        ({"classes": ["a", "b"]}, "different class lists"),
    ],
)
def test_what_cannot_be_compared_is_refused_naming_both(root, changes, said):
    with pytest.raises(ZooError, match=said):
        make_comparison([make_run(root), make_run(root, "b", **changes)])


def test_other_test_images_are_refused(root):
    with pytest.raises(ZooError, match=r"'cnn' and 'b' were scored on different test images \(60 and 57\)"):
        make_comparison([make_run(root), make_run(root, "b", n=57)])


def test_two_recipes_of_one_name_are_told_apart(root):
    runs = [make_run(root), make_run(root, seed=1, recipe_digest="feedbeef")]
    assert sorted(row["recipe"] for row in make_comparison(runs).rows) == ["cnn@cnn", "cnn@feedbe"]


def test_the_same_runs_give_the_same_bytes_in_any_order(root):
    runs = [
        make_run(root, name, seed, right) for name, right in (("a", 0.7), ("b", 0.75), ("c", 0.9)) for seed in (0, 1)
    ]
    one, two = make_comparison(runs, floors=FLOORS), make_comparison(runs, floors=FLOORS)
    assert to_markdown(one) == to_markdown(two) and to_csv(one) == to_csv(two)
    assert to_json(one.document()) == to_json(two.document())
    turned = make_comparison(runs[::-1], floors=FLOORS)
    assert [row["letters"] for row in turned.rows] == [row["letters"] for row in one.rows]
    assert [row["test_top1_ci"] for row in turned.rows] == [row["test_top1_ci"] for row in one.rows]


def test_a_document_and_a_frame_hold_what_scripts_rely_on(root):
    comparison = make_comparison([make_run(root), make_run(root, "b", splits=("val",))], floors=FLOORS)
    document = json.loads(to_json(comparison.document()))
    assert {"dataset", "split_digest", "leaks_accepted", "floors", "rows"} <= set(document)
    assert set(document["rows"][0]) >= KEYS and document["rows"][1]["test_top1"] is None
    frame = comparison.frame()
    assert frame["recipe"].tolist() == ["cnn", "b"]
    assert frame.attrs["split_digest"] == comparison.split_digest


# Metrics, pairs, formats ----------------------------------------------------------------------------------------------


def four(root):
    return [
        make_run(root, name, seed, right)
        for name, right in (("weak", 0.35), ("good", 0.93), ("better", 0.95))
        for seed in (0, 1)
    ]


def test_every_metric_has_its_interval_around_its_value(root):
    for row in make_comparison(four(root), floors=FLOORS).rows:
        for score in ("top1", "balanced_accuracy", "macro_f1", "auroc", "auprc", "log_loss", "brier"):
            low, high = row[f"test_{score}_ci"]
            assert low <= row[f"test_{score}"] <= high and low < high, score
        assert row["test_ece_ci"][0] < row["test_ece_ci"][1]
        assert row["test_sensitivity_ci"] is None  # three classes, none of them negative
        assert row["test_top1_se_test"] > 0 and row["test_top1_se_seeds"] >= 0
        assert row["temperature"] > 0 and 0 <= row["test_ece_calibrated"] <= 1


def test_the_interval_of_the_table_is_that_of_the_statistics(root):
    runs = four(root)
    row = next(row for row in make_comparison(runs).rows if row["recipe"] == "good")
    of_good = [read_predictions(run.predictions_file("test")) for run in runs if "--good--" in run.name]
    low, high = top1_interval(of_good)
    assert row["test_top1_ci"] == pytest.approx([low, high], abs=1e-12)


def test_letters_floors_and_order_go_by_the_metric(root):
    runs = four(root)
    found = {name: make_comparison(runs, floors=FLOORS, metric=name) for name in ("macro_f1", "auroc", "log_loss")}
    for metric, comparison in found.items():
        assert comparison.metric == metric and {pair["metric"] for pair in comparison.pairs} == {metric}
        assert [row["recipe"] for row in comparison.rows][-1] == "weak"
        assert comparison.relative_to == comparison.rows[0]["recipe"]
        assert comparison.rows[-1]["letters"] == "b"
        assert any(head.startswith("test ") for head in cells(comparison.rows[0], metric))
    beats = {row["recipe"]: row["beats_floors"] for row in found["macro_f1"].rows}
    assert beats == {"good": True, "better": True, "weak": found["macro_f1"].rows[-1]["test_macro_f1_ci"][0] > 0.2}
    assert all(row["beats_floors"] is None for row in found["auroc"].rows)  # floors have no scores
    with pytest.raises(ZooError, match=r"metric must be one of top1, .*Got 'macro_f'; did you mean 'macro_f1'"):
        make_comparison(runs, metric="macro_f")


def test_pairs_say_what_differs_what_is_equivalent_and_what_is_open(root):
    runs = four(root)
    pairs = {(pair["one"], pair["two"]): pair for pair in make_comparison(runs, margin=0.25).pairs}
    assert set(pairs) == {("better", "good"), ("better", "weak"), ("good", "weak")}
    open_pair, apart = pairs[("better", "good")], pairs[("good", "weak")]
    assert apart["different"] and apart["low"] > 0 and apart["p"] <= apart["p_holm"] < 0.05
    assert not open_pair["different"] and open_pair["low"] < 0 < open_pair["high"]
    assert open_pair["equivalent"] and not apart["equivalent"]
    assert not any(pair["equivalent"] for pair in make_comparison(runs, margin=1e-6).pairs)
    text = to_markdown(make_comparison(runs, margin=0.25))
    assert "| good | weak |" in text and "| different |" in text and "| equivalent |" in text
    for margin in (0, -0.1, float("inf"), float("nan")):
        with pytest.raises(ZooError, match="a margin of equivalence must be above 0"):
            make_comparison(runs, margin=margin)


def test_exact_tests_stand_beside_the_pairs_where_they_hold(root):
    alone = [make_run(root, name, 0, right) for name, right in (("a", 0.6), ("b", 0.9))]
    (grouped,) = make_comparison(alone).pairs
    assert grouped["mcnemar_p"] == []  # it knows nothing of groups
    (ranked,) = make_comparison(alone, metric="auroc").pairs
    assert len(ranked["delong_p"]) == 1 and 0 <= ranked["delong_p"][0] < 0.05
    for run in alone:
        found = read_predictions(run.predictions_file("test"))
        bare = Predictions(found.sample_ids, np.full(60, ""), found.y_true, found.logits)
        write_predictions(run.predictions_file("test"), bare)
    (single,) = make_comparison(alone).pairs
    assert len(single["mcnemar_p"]) == 1 and single["mcnemar_p"][0] == pytest.approx(single["p"], abs=0.02)


def test_a_table_says_how_often_test_was_looked_at(root):
    runs = [make_run(root, seed=seed) for seed in (0, 1)]
    assert "this test split was scored twice, for 1 recipe" in make_comparison(runs).notes
    looks = {"scorings": 17, "recipes": 5, "first": "2026-01-01", "last": "2026-02-01"}
    comparison = make_comparison(runs, looks=looks)
    assert "this test split was scored 17 times, for 5 recipes" in comparison.notes
    assert comparison.document()["test_looks"] == looks
    assert make_comparison([make_run(root, "v", splits=("val",))]).notes == []


def test_the_legend_says_which_recipe_is_the_best(root):
    comparison = make_comparison(four(root))
    assert comparison.relative_to in ("good", "better")
    assert f"The best mean has {comparison.relative_to}; who shares no letter with it is worse." in legend(comparison)


def test_scores_that_do_not_belong_together_are_refused(root):
    run = make_run(root)
    write_json(run.metrics_file("test"), {**run.metrics("test"), "top1": 0.123})
    with pytest.raises(ZooError, match=r"does not belong to the predictions beside it \(top1 0\.123, of"):
        make_comparison([run])
    write_json(run.metrics_file("test"), {"x": 1})
    with pytest.raises(ZooError, match="remove both and score the run again"):
        make_comparison([run])


def test_a_seed_without_predictions_counts_nowhere(root):
    runs = [make_run(root, seed=seed, right=right) for seed, right in ((0, 0.9), (1, 0.9), (2, 0.3))]
    runs[2].predictions_file("test").unlink()
    (row,) = make_comparison(runs).rows
    assert row["test_top1_ci"][0] < row["test_top1"] < row["test_top1_ci"][1]
    assert len(row["test_top1_seeds"]) == 2


def test_what_a_reader_must_know_stands_in_the_notes(root):
    runs = [make_run(root, "one"), make_run(root, "two", 0), make_run(root, "two", 1)]
    notes = " ".join(make_comparison(runs).notes)
    assert "one seed alone: letters tell these runs apart, not the recipes: one" in notes
    for run in runs:
        found = read_predictions(run.predictions_file("test"))
        y_true = np.where(np.arange(60) < 57, found.y_true % 2, 2)
        changed = Predictions(found.sample_ids, np.full(60, ""), y_true, found.logits)
        write_predictions(run.predictions_file("test"), changed)
        write_json(run.metrics_file("test"), compute_metrics(changed, CLASSES))
    comparison = make_comparison(runs)
    assert "fewer than 10 groups or images of a class in test, so its scores are rough: normal (3)" in comparison.notes
    assert title(comparison).endswith("60 test images")


def test_what_the_runs_themselves_note_is_said_once_for_all_of_them(root):
    new, less = "the classifier of 'x' is absent; it starts with a fresh one", "a batch of 32 needed more memory"
    runs = [
        make_run(root, "one", 0, notes=[new, less]),
        make_run(root, "one", 1, notes=[new, less]),
        make_run(root, "two", 0, notes=[less]),
        make_run(root, "two", 1, notes=[*(f"note {number}" for number in range(20))]),
        record("three", status="failed", reason="x", notes=["of a failed one"]),
    ]
    notes = make_comparison(runs).notes
    assert f"one, two (seed 0): {less}" in notes and "two (seed 1): note 10" in notes
    assert "9 more notes of runs: `zoo show RUN`" in notes
    assert not any("starts with a fresh one" in note or "of a failed one" in note for note in notes)


def test_calibrated_columns_sort_the_right_way_and_lists_do_not(root):
    rows = make_comparison(four(root), by="test_ece_calibrated").rows
    values = [row["test_ece_calibrated"] for row in rows]
    assert values == sorted(values)
    with pytest.raises(ZooError, match="cannot be sorted by 'test_top1_ci', which is a list"):
        make_comparison([make_run(root, "x")], by="test_top1_ci")


def test_a_failure_of_an_older_recipe_is_a_row_of_its_own(root):
    old = make_run(root, "a", seed=1, status="failed", reason="old version broke", recipe_digest="older")
    rows = make_comparison([make_run(root, "a"), old]).rows
    assert sorted(row["status"] for row in rows) == ["failed", "finished"]


def test_latex_is_a_booktabs_table_in_which_nothing_is_a_command(root):
    runs = [make_run(root, "a"), record(r"50%_of\\x{}$#&~^", status="failed", reason="x")]
    text = to_latex(make_comparison(runs, floors=FLOORS))
    assert [text.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 2, 1]
    columns = len(text.split("{tabular}{")[1].split("}")[0])
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 4
    assert all(len(re.findall(r"(?<!\\)&", row)) == columns - 1 for row in rows)
    assert r"50\%\_of\textbackslash{}" in text and "†" not in text
    assert tex("<a> – ±") == r"$<$a$>$ -- $\pm$"


def test_every_format_has_a_name_and_an_ending(root):
    comparison = make_comparison(four(root), floors=FLOORS)
    assert {format_of(Path(f"x{ending}")) for ending in ENDINGS} == set(FORMATS)
    for name, write in FORMATS.items():
        assert format_of(name) == name and write(comparison).endswith("\n")
    assert json.loads(FORMATS["json"](comparison))["rows"]
    with pytest.raises(ZooError, match=r"ends in \.md, \.csv, \.json, \.tex\. Got 'x\.pdf'"):
        format_of(Path("x.pdf"))
    with pytest.raises(ZooError, match=r"one of markdown, csv, json, latex\. Got 'latx'; did you mean 'latex'"):
        format_of("latx")


def test_an_interval_is_two_columns_of_a_spreadsheet(root):
    (row,) = csv.DictReader(io.StringIO(to_csv(make_comparison([make_run(root)]))))
    assert float(row["test_auroc_ci_low"]) < float(row["test_auroc"]) < float(row["test_auroc_ci_high"])
    assert row["test_sensitivity_ci_low"] == ""
