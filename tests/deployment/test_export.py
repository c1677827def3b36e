from __future__ import annotations

import numpy as np
import pytest

from zoo.deployment.bundle import open_bundle
from zoo.deployment.export import export
from zoo.evaluation.predictions import read_predictions
from zoo.files import read_json
from zoo.runs import list_runs
from zoo.training.scoring import predictions_of


@pytest.fixture
def run(trained):
    return next(run for run in list_runs(trained) if "--tiny--s0" in run.name)


def test_a_run_becomes_a_bundle_that_gives_the_same_labels(trained, run):
    bundle = export(run, trained)
    assert bundle.path == trained.bundles / f"{run.name}--onnx-float32"
    assert open_bundle(bundle.name, trained).record == bundle.record
    proof = run.path / "exports" / "onnx-float32"
    own, exported = predictions_of(run, "val"), read_predictions(proof / "predictions-val.npz")
    np.testing.assert_array_equal(own.sample_ids, exported.sample_ids)
    np.testing.assert_allclose(own.logits, exported.logits, rtol=1e-4, atol=1e-5)
    parity = read_json(proof / "parity.json")
    assert parity["top1_agreement"] == 1.0 and parity["passed"] and parity["images"] == len(own.y_true)
    assert parity["recorded"]["agreement"] == 1.0
