from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest

from zoo.data.cache import open_pixels
from zoo.data.manifest import load_dataset
from zoo.errors import ZooError
from zoo.evaluation.metrics import compute_metrics
from zoo.evaluation.predictions import read_predictions
from zoo.files import sha256_file, write_json
from zoo.runs import Run, list_runs
from zoo.training.plan import make_plan
from zoo.training.precision import choose_device
from zoo.training.scoring import evaluate, load_model, predictions_of


@pytest.fixture
def run(trained) -> Run:
    return list_runs(trained)[0]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_split_is_scored_in_manifest_order_with_its_metrics(trained, run, split):
    dataset = load_dataset("tiny", trained)
    metrics = evaluate(run.name, split, trained)
    predictions = predictions_of(run, split)
    rows = dataset.of_split(split)
    assert predictions.sample_ids.tolist() == rows["sample_id"].tolist()
    assert predictions.groups.tolist() == rows["group"].tolist()
    assert [dataset.classes[each] for each in predictions.y_true] == rows["label"].tolist()
    found = compute_metrics(predictions, dataset.classes, dataset.negative_class)
    assert {key: metrics[key] for key in found} == found
    assert (metrics["run"], metrics["split"], metrics["images_skipped"]) == (run.name, split, [])


def test_a_split_is_scored_once(trained, run):
    for path in load_dataset("tiny", trained).of_split("test")["path"]:
        load_dataset("tiny", trained).image_path(path).unlink()
    before = run.predictions_file("test").read_bytes()
    assert evaluate(run, "test", trained) == run.metrics("test")
    assert run.predictions_file("test").read_bytes() == before
    run.metrics_file("test").unlink()
    with pytest.raises(ZooError, match="of split 'test': gone"):
        evaluate(run, "test", trained)


def test_the_same_weights_give_the_same_file(trained, run):
    before = run.predictions_file("test").read_bytes(), run.metrics_file("test").read_bytes()
    run.predictions_file("test").unlink()
    evaluate(run, "test", trained)
    assert (run.predictions_file("test").read_bytes(), run.metrics_file("test").read_bytes()) == before


def test_skipped_images_are_counted(trained, run):
    dataset = load_dataset("tiny", trained)
    gone = dataset.of_split("test")["path"].iloc[0]
    dataset.image_path(gone).unlink()
    run.metrics_file("test").unlink()
    metrics = evaluate(run, "test", trained, bad_images="skip")
    assert metrics["n"] == 8 and metrics["images_skipped"] == [f"{gone}: gone"]


def test_what_cannot_be_scored_is_said(trained, run):
    with pytest.raises(ZooError, match=r"split must be one of train, val, test. Got 'tset'"):
        evaluate(run, "tset", trained)
    with pytest.raises(ZooError, match="there is no run 'nothing'"):
        evaluate("nothing", "test", trained)
    run.predictions_file("test").unlink()
    with pytest.raises(ZooError, match="is not scored on 'test' yet"):
        predictions_of(run, "test")
    run.write_record(run.record.model_copy(update={"status": "failed", "reason": "no luck"}))
    for use in (evaluate, load_model):
        with pytest.raises(ZooError, match="did not finish: no luck; train it again"):
            use(run)


@pytest.mark.parametrize("kept", [0, 100, -10])
def test_damaged_weights_are_said(trained, run, kept):
    data = run.weights_file.read_bytes()
    run.weights_file.write_bytes(data[:kept])
    with pytest.raises(ZooError, match=r"weights of run .* cannot be read: .*; train it again"):
        load_model(run)


def test_missing_or_other_weights_are_said(trained, run):
    from safetensors.torch import load_file, save_file

    state = load_file(run.weights_file)
    state.pop(sorted(state)[0])
    save_file(state, run.weights_file)
    with pytest.raises(ZooError, match=r"do not fit 'simple_cnn': .*Missing key"):
        load_model(run)
    run.weights_file.unlink()
    with pytest.raises(ZooError, match="cannot be read"):
        load_model(run)


def test_a_loaded_model_is_ready_to_use(trained, run):
    import torch

    from zoo.data.transforms import center_crop, normalise_tensor

    device = choose_device("auto")
    model = load_model(run.name, trained, device.type)
    assert not model.training
    record = run.record
    pixels = open_pixels(load_dataset("tiny", trained), "test", record.preprocessing)
    batch = torch.from_numpy(np.stack([center_crop(pixels[0], 32)]))
    with torch.inference_mode():
        logits = model(normalise_tensor(batch.to(device), record.preprocessing)).cpu()
    stored = read_predictions(run.predictions_file("test")).logits[0]
    near = {"rtol": 1e-4, "atol": 1e-5} if device.type == "cpu" else {"rtol": 1e-2, "atol": 1e-3}  # TF32
    np.testing.assert_allclose(logits[0].numpy(), stored, **near)


def test_scores_of_other_weights_are_scored_anew_and_older_ones_without_a_digest_stay(trained, run):
    good = run.metrics("test")
    assert good["weights_sha256"] == run.record.weights_sha256 == sha256_file(run.weights_file)
    write_json(run.metrics_file("test"), {**good, "top1": -1.0, "weights_sha256": "0" * 64})
    assert not run.scored("test")
    assert evaluate(run, "test", trained) == good and run.scored("test")
    older = {key: value for key, value in good.items() if key != "weights_sha256"}
    write_json(run.metrics_file("test"), older)
    assert run.scored("test") and evaluate(run, "test", trained) == older
    run.write_record(run.record.model_copy(update={"weights_sha256": None}))
    write_json(run.metrics_file("test"), good)
    assert evaluate(run, "test", trained) == good


def test_damaged_metrics_are_said(trained, run):
    run.metrics_file("test").write_text("{")
    with pytest.raises(ZooError, match="is no valid JSON"):
        evaluate(run, "test", trained)


SCORE = """
import sys
from zoo.files import home
from zoo.training.scoring import evaluate
print("ready", flush=True)
sys.stdin.readline()
print(evaluate(sys.argv[1], "test", home())["log_loss"])
"""


@pytest.mark.slow
def test_two_processes_look_at_a_test_once(trained, run):
    expected, looks = run.metrics("test")["log_loss"], len(trained.ledger.read_text().splitlines())
    run.predictions_file("test").unlink()
    run.metrics_file("test").unlink()
    command = [sys.executable, "-c", SCORE, run.name]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    assert [each.stdout.readline() for each in both] == ["ready\n"] * 2
    for each in both:
        each.stdin.write("\n")
        each.stdin.flush()
    assert [float(each.communicate(timeout=120)[0]) for each in both] == [expected] * 2
    assert len(trained.ledger.read_text().splitlines()) == looks + 1


def test_what_another_process_scored_meanwhile_is_taken(trained, run, monkeypatch):
    from zoo.training import scoring

    really = scoring.run_lock

    def late(*args, **options):
        monkeypatch.setattr(scoring, "run_lock", really)
        evaluate(run, "test", trained)  # what the other process does before it lets go
        return really(*args, **options)

    run.metrics_file("test").unlink()
    looks = len(trained.ledger.read_text().splitlines())
    monkeypatch.setattr(scoring, "run_lock", late)
    evaluate(run, "test", trained)
    assert len(trained.ledger.read_text().splitlines()) == looks + 1


def test_a_run_whose_scoring_fails_is_noted_as_looked_at_and_its_lock_is_free(trained, run, monkeypatch):
    from zoo.training import scoring

    def broken(*_):
        raise ZooError("the disk is full")

    run.metrics_file("test").unlink()
    looks = len(trained.ledger.read_text().splitlines())
    with monkeypatch.context() as patched, pytest.raises(ZooError, match="the disk is full"):
        patched.setattr(scoring, "write_scores", broken)
        evaluate(run, "test", trained)
    assert len(trained.ledger.read_text().splitlines()) == looks + 1
    evaluate(run, "test", trained)
    assert run.scored("test") and not list(trained.locks.glob("*.json"))


def test_a_run_of_classes_in_another_order_is_no_longer_scored_and_is_trained_anew(trained, make_recipe):
    run = next(each for each in list_runs(trained) if "--tiny--s0" in each.name)
    before = make_plan("tiny", "tiny", 0, trained)
    assert before.run.name == run.name
    file = trained.data / "tiny" / "dataset.toml"
    text = file.read_text()
    order = ", ".join(f'"{name}"' for name in load_dataset("tiny", trained).classes[::-1])
    file.write_text(re.sub(r"classes = \[[^\]]*\]", f"classes = [{order}]", text))
    run.metrics_file("test").unlink()
    with pytest.raises(ZooError, match=r"tells benign, malignant, normal apart, in this order; .* normal, malignant"):
        evaluate(run, "test", trained)
    after = make_plan("tiny", "tiny", 0, trained)
    assert after.run.name != run.name
    assert after.with_seed(1).digest == make_plan("tiny", "tiny", 1, trained).digest
