from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import zoo
from zoo.benchmark.comparisons import compare
from zoo.benchmark.offers import OF_SCORES, best_seeds, gather, score_test, set_apart
from zoo.benchmark.picking import Wish, _of_answers, outcome, pick
from zoo.cli.picking import _rows
from zoo.data.manifest import load_dataset
from zoo.deployment.bundle import Rules, list_bundles, open_bundle, seal
from zoo.deployment.export import export, healthy_fault
from zoo.errors import ZooError
from zoo.evaluation.metrics import compute_metrics
from zoo.evaluation.predictions import Predictions, read_predictions, write_predictions
from zoo.files import read_json, read_toml, write_json, write_toml
from zoo.runs import list_runs
from zoo.training.scoring import predictions_of


def looks(root):
    return len(root.ledger.read_text().splitlines()) if root.ledger.is_file() else 0


def edit_dataset(root, **changes):
    """Change keys of the dataset's own record, as a person does with an editor."""
    file = root.data / "tiny" / "dataset.toml"
    write_toml(file, read_toml(file) | changes)
    return load_dataset("tiny", root)


def test_pick_is_public():
    assert zoo.pick is pick and zoo.export is export


@pytest.mark.slow
def test_from_a_table_to_a_bundle(trained):
    before = looks(trained)
    found = pick(compare(list_runs(trained)), trained, margin=1.0)
    document = found.document
    assert set(document) >= {"run", "reason", "candidates", "test", "bundle", "runner_up", "would_change"}
    assert document["run"] == found.run.name and document["bundle"] == found.bundle.name
    assert len(document["candidates"]) == len(list_bundles(trained)) == 2  # of each recipe one seed
    costs = {row["name"]: row["latency_ms"] for row in document["candidates"]}
    assert costs[found.bundle.name] == min(costs.values())  # a margin of 1 lets everything in
    assert all(row["eager"]["latency_p50_ms"] > 0 for row in document["candidates"])
    assert sum("stands for 2 seeds" in note for note in document["notes"]) == 1

    folder = found.run.path / "exports" / "onnx-float32"
    own, test = read_predictions(folder / "predictions-val.npz"), read_predictions(found.run.predictions_file("test"))
    record = found.run.record
    assert document["candidates"][0]["val_top1"] == compute_metrics(own, record.classes)["top1"]
    assert found.test["top1"] == compute_metrics(test, record.classes)["top1"]
    low, high = found.test["top1_ci"]
    assert low <= found.test["top1"] <= high
    # The run was scored in float32, and its artefact is float32 too: test is not looked at again.
    assert not found.test["first_look"] and looks(trained) == before == document["test_looks"]["scorings"]

    assert export(found, trained).name == found.bundle.name
    again = pick("tiny", trained, margin=1.0)  # nothing is measured, exported or scored anew
    assert again.document["measured_at"] == document["measured_at"]
    assert again.bundle.name == found.bundle.name and not again.test["first_look"]
    assert again.test["top1"] == found.test["top1"] and looks(trained) == before

    with pytest.raises(ZooError, match=r"nothing fits: 0 of 2 candidates keep .*; nearest: .*has .*, off by"):
        pick("tiny", trained, max_size_mb=1e-6)
    missed = outcome("tiny", Wish(max_size_mb=1e-6), trained)
    assert missed.pick is None and missed.document["run"] is None and missed.document["test"] is None
    assert len(missed.document["nearest_misses"]) == 2 and looks(trained) == before


@pytest.mark.slow
def test_what_cannot_be_opened_or_is_of_other_weights_is_a_row_with_a_reason(bundled):
    [name] = list_bundles(bundled)
    bundle = open_bundle(name, bundled)
    run = next(each for each in list_runs(bundled) if each.name == bundle.record.run)
    other = export(run, bundled, name="mine")
    (other.path / "card.md").write_text("changed")
    (run.path / "exports" / "onnx-float32" / "parity.json").unlink()  # then val is asked again
    found = outcome([run], Wish(), bundled, test=False)
    rows = {row["name"]: row for row in found.document["candidates"]}
    assert set(rows) == {name, "mine"}
    assert "card.md was changed" in rows["mine"]["reason"] and not rows["mine"]["fits"]
    assert found.pick.bundle.name == name and found.pick.test is None
    assert found.document["runner_up"] is None and "the only one" in found.document["reason"]
    own = compute_metrics(read_predictions(run.predictions_file("val")), run.record.classes)
    assert rows[name]["val_top1"] == own["top1"]
    file = bundled.picks / "tiny.png"
    found.save_figure(file)
    assert file.read_bytes().startswith(b"\x89PNG")


def test_of_each_recipe_the_seed_that_is_best_on_val_stands_for_it(trained):
    runs = list_runs(trained)
    one, two = (run for run in runs if "--tiny--s" in run.name)
    for run, value in ((one, 0.25), (two, 0.75)):
        write_json(run.metrics_file("val"), {**run.metrics("val"), "top1": value})
    chosen, broken, notes = best_seeds(runs, "top1", load_dataset("tiny", trained))
    assert broken == []
    assert two in chosen and one not in chosen and len(chosen) == 2
    assert notes == ["of tiny, seed 1 stands for 2 seeds: the best of them on val"]
    assert read_json(one.metrics_file("val"))["top1"] == 0.25


def test_seeds_are_compared_by_the_scores_that_a_bundle_would_give(trained):
    runs = list_runs(trained)
    loud, weak = (run for run in runs if "--tiny--s" in run.name)
    for run, wrong, scale in ((loud, 1, 40.0), (weak, 4, 1.0)):
        val = predictions_of(run, "val")
        y_pred = np.where(np.arange(len(val.y_true)) < wrong, (val.y_true + 1) % 3, val.y_true)
        val = Predictions(val.sample_ids, val.groups, val.y_true, np.eye(3)[y_pred] * scale)
        write_predictions(run.predictions_file("val"), val)
        write_json(run.metrics_file("val"), compute_metrics(val, run.record.classes, run.record.negative_class))
    assert loud.metrics("val")["log_loss"] > weak.metrics("val")["log_loss"]  # before the temperature
    chosen, broken, _ = best_seeds(runs, "log_loss", load_dataset("tiny", trained))
    assert broken == [] and loud in chosen and weak not in chosen


def test_what_is_ranked_and_told_are_the_scores_of_the_answers(bundled):
    [name] = list_bundles(bundled)
    bundle, dataset = open_bundle(name, bundled), load_dataset("tiny", bundled)
    seal(bundle.path, bundle.record.model_copy(update={"rules": Rules(temperature=3.0)}))
    run = next(each for each in list_runs(bundled) if each.name == bundle.record.run)
    [offer], _ = gather([run], [run], dataset, bundled, lambda *_: None)
    folder, classes = run.path / "exports" / "onnx-float32", dataset.classes

    def answers(predictions):
        cooled = Predictions(predictions.sample_ids, predictions.groups, predictions.y_true, predictions.logits / 3)
        return compute_metrics(cooled, classes, dataset.negative_class)

    of_val = read_predictions(folder / "predictions-val.npz")
    raw, said = compute_metrics(of_val, classes), answers(of_val)
    files = (run.predictions_file("test"), folder / "predictions-test.npz", folder / "predictions-test.npz")
    told = []
    for file, first in zip(files, (False, True, False), strict=True):  # of the run, asked, kept
        told.append(score_test(offer, dataset, bundled))
        of_test = answers(read_predictions(file))
        assert told[-1]["first_look"] == first
        for metric in OF_SCORES:
            assert told[-1][metric] == pytest.approx(of_test[metric], abs=1e-6)
        run.predictions_file("test").unlink(missing_ok=True)
    assert told[1] | {"first_look": False} == told[2]
    for metric in OF_SCORES:
        assert offer.val[metric] == offer.facts["val"][metric] == pytest.approx(said[metric], abs=1e-6)
        assert metric in ("auroc", "auprc") or abs(said[metric] - raw[metric]) > 1e-3
    assert offer.val["top1"] == raw["top1"]


@pytest.mark.parametrize(
    "metric, classes, noted",
    [("ece", 2, True), ("brier", 3, True), ("auroc", 3, True), ("auroc", 2, False), ("top1", 3, False)],
)
def test_a_note_says_where_the_temperature_counts(metric, classes, noted):
    assert [note.split()[0] for note in _of_answers(metric, ["a"] * classes)] == [metric] * noted


def test_seeds_are_compared_by_the_class_that_is_healthy_now(trained):
    runs = [run for run in list_runs(trained) if "--tiny--s" in run.name]
    dataset = load_dataset("tiny", trained)
    for negative in dataset.classes:
        said = {}
        for run in runs:
            found = compute_metrics(predictions_of(run, "val"), dataset.classes, negative)
            said[run.name] = (-found["specificity"], run.record.seed)
        chosen, _, _ = best_seeds(runs, "specificity", replace(dataset, negative_class=negative))
        assert [run.name for run in chosen] == [min(said, key=said.__getitem__)]


@pytest.mark.slow
def test_a_run_whose_classes_stand_in_another_order_is_left_out_with_its_reason(bundled):
    [name] = list_bundles(bundled)
    turned = load_dataset("tiny", bundled).classes[::-1]
    runs = list_runs(bundled)
    for run in runs:  # of the same recipe there is another seed, whose bundle is not there
        if run.name != open_bundle(name, bundled).record.run:
            run.write_record(run.record.model_copy(update={"classes": turned}))
    found = outcome("tiny", Wish(), bundled, test=False)
    rows = {row["name"]: row for row in found.document["candidates"]}
    assert found.pick.bundle.name == name and len(rows) == 3 == len(runs)
    assert not any("other seeds" in note for note in found.document["notes"])
    for row in rows.values():
        assert row["name"] == name or "stand in another order" in row["reason"]

    dataset = edit_dataset(bundled, classes=turned)  # now it is the bundle whose logits stand in the old order
    alike, apart = set_apart(runs, dataset)
    assert [each.name for each in alike] == [run.name for run in runs if run.name != found.pick.run.name]
    assert [each.name for each in apart] == [found.pick.run.name]


@pytest.mark.parametrize("by_name", [True, False])
def test_where_no_run_has_the_classes_in_order_one_line_says_so(trained, by_name):
    edit_dataset(trained, classes=load_dataset("tiny", trained).classes[::-1])
    with pytest.raises(ZooError) as error:
        pick("tiny" if by_name else list_runs(trained), trained)
    assert str(error.value).startswith("there is no run to pick from, of 3: the classes of 'tiny' stand in another")
    assert "normal, malignant, benign, then benign, malignant, normal; set the old ones in dataset.toml" in str(
        error.value
    )
    assert "\n" not in str(error.value) and list_bundles(trained) == []


@pytest.mark.slow
def test_a_bundle_of_another_healthy_class_is_exported_anew_or_left_out(bundled):
    [name] = list_bundles(bundled)
    run = next(each for each in list_runs(bundled) if each.name == open_bundle(name, bundled).record.run)
    export(run, bundled, name="mine")
    dataset = edit_dataset(bundled, negative_class="benign")
    offers, notes = gather([run], [run], dataset, bundled, lambda *_: None)
    changed = "the class of the healthy was 'normal', and is now 'benign' in dataset.toml"
    assert notes == [f"{name} was exported anew: {changed}"]
    found = {each.name: each for each in offers}
    assert found["mine"].reason == f"{changed}; export it again" and found["mine"].bundle is None
    record = found[name].bundle.record
    assert record.negative_class == open_bundle(name, bundled).record.negative_class == "benign"
    metrics = compute_metrics(predictions_of(run, "val"), dataset.classes, "benign")
    for metric in ("sensitivity", "specificity"):
        assert found[name].val[metric] == record.val[metric] == metrics[metric]
    again, notes = gather([run], [run], dataset, bundled, lambda *_: None)
    assert notes == [] and {each.name: each.reason for each in again} == {each.name: each.reason for each in offers}


@pytest.mark.parametrize(
    "classes, then, now, words",
    [
        (["cancer", "normal"], None, "normal", "was 'cancer', and is now 'normal' in dataset.toml"),
        (["cancer", "normal"], None, "cancer", None),  # of two the first, where none is named
        (["cancer", "normal"], "cancer", None, None),
        (["a", "b", "c"], "b", None, "was 'b', and is now none"),
        (["a", "b", "c"], None, None, None),
        (["a", "b", "c"], "x\ny", "a", "was 'x y', and is now 'a'"),  # of a foreign record
    ],
)
def test_another_class_is_healthy_now(classes, then, now, words):
    found = healthy_fault(classes, then, now)
    assert found is None if words is None else words in found


@pytest.mark.slow
def test_what_is_chosen_is_told_though_test_cannot_be_scored(bundled):
    [name] = list_bundles(bundled)
    bundle = open_bundle(name, bundled)
    run = next(each for each in list_runs(bundled) if each.name == bundle.record.run)
    run.predictions_file("test").unlink()
    dataset = load_dataset("tiny", bundled)
    dataset.image_path(dataset.of_split("test")["path"][0]).unlink()
    before = looks(bundled)
    found = outcome([run], Wish(), bundled)
    assert found.pick is not None and found.document["test"] is None and looks(bundled) == before
    assert any("test could not be scored" in note for note in found.document["notes"])


@pytest.mark.slow
def test_a_bundle_whose_run_lost_its_weights_can_be_picked(bundled):
    [name] = list_bundles(bundled)
    run = next(each for each in list_runs(bundled) if each.name == open_bundle(name, bundled).record.run)
    run.weights_file.unlink()
    found = outcome([run], Wish(), bundled)
    [row] = found.document["candidates"]
    assert found.pick.bundle.name == name and found.pick.test["top1_ci"] and row["reason"] is None
    assert "weights are gone" in row["eager"]["reason"] and row["eager"]["latency_p50_ms"] is None
    [_, beside] = _rows(row, "top1")
    assert beside[0] == "  the same in eager torch" and "weights are gone" in beside[-1]


def test_runs_of_another_split_are_refused(trained):
    runs = list_runs(trained)
    for run in runs:
        run.write_record(run.record.model_copy(update={"split_digest": "f" * 64}))
    with pytest.raises(ZooError, match=r"trained on another split of 'tiny' .*; train them again"):
        pick(runs, trained)
    with pytest.raises(ZooError, match=r"there is no finished run on the present split of 'tiny'"):
        pick("tiny", trained)
    with pytest.raises(ZooError, match=r"there is no finished run to pick from. Got 0 runs"):
        pick([], trained)


def test_a_table_of_something_else_is_refused(trained):
    table = compare(list_runs(trained)).drop(columns="runs")
    with pytest.raises(ZooError, match=r"the table has no column `runs`"):
        pick(table, trained)


@pytest.mark.parametrize(
    "wish, words",
    [
        ({"metric": "top-1"}, "--metric must be one of .* did you mean 'top1'"),
        ({"cost": "price"}, "--cost must be one of latency, size, memory. Got 'price'"),
        ({"percentile": "p90"}, "--percentile must be one of p50, p95, p99. Got 'p90'"),
        ({"margin": -1}, r"the margin must be in \[0, 1\] of top1; 0.01 is one point. Got -1"),
        ({"max_latency_ms": -5}, "the most latency must be a number of ms above 0. Got -5"),
        ({"threads": 0}, "threads must be 1 to"),
    ],
)
def test_wishes_that_make_no_sense_are_refused_before_anything_is_made(trained, wish, words):
    with pytest.raises(ZooError, match=words):
        pick("tiny", trained, **wish)
    assert list_bundles(trained) == []
