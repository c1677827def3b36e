from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from zoo.data.cache import open_pixels
from zoo.data.manifest import load_dataset
from zoo.data.transforms import center_crop, normalise
from zoo.deployment import export as exporting
from zoo.deployment.export import export
from zoo.deployment.predictor import Predictor
from zoo.deployment.quantise import IMAGES, Calibration
from zoo.deployment.runtime import Session
from zoo.errors import ZooError
from zoo.evaluation.predictions import read_predictions
from zoo.files import read_json
from zoo.runs import list_runs

VARIANTS = [("onnx", "fp16"), ("onnx", "int8"), ("openvino", "fp16"), ("openvino", "bf16"), ("openvino", "int8")]
# Of 9 images no interval is narrow: whether a variant is near is asked of its logits here, not of its labels.
APART = {"fp16": 0.01, "bf16": 0.05, "int8": 0.2}


@pytest.fixture
def run(trained):
    return next(run for run in list_runs(trained) if "--tiny--s0" in run.name)


def test_calibration_sees_val_as_the_network_does(trained, run):
    dataset = load_dataset("tiny", trained)
    pixels = open_pixels(dataset, "val", run.record.preprocessing)
    found = Calibration(pixels, run.record.preprocessing)
    assert found.facts == {"split": "val", "images": 9, "seed": 0} and len(found) == 9
    expected = [normalise(center_crop(pixels[place], 32)[None], run.record.preprocessing) for place in range(9)]
    for _ in range(2):  # it is gone through more than once
        np.testing.assert_array_equal(np.concatenate(list(found)), np.concatenate(expected))


def test_of_many_images_a_seeded_choice_is_seen():
    class Many:
        def __len__(self):
            return 10_000

    one, same, other = (Calibration(Many(), None, seed).chosen for seed in (0, 0, 1))
    assert len(one) == len(set(one.tolist())) == IMAGES and one.max() >= 5_000
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


@pytest.mark.slow
@pytest.mark.parametrize(("form", "precision"), VARIANTS)
def test_every_variant_passes_keeps_its_map_and_predicts(trained, run, form, precision):
    plain = export(run, trained, format=form)
    bundle = export(run, trained, format=form, precision=precision, margin=1.0)
    assert bundle.name == f"{run.name}--{form}-{precision}"
    assert (bundle.record.format, bundle.record.precision) == (form, precision)
    proof = run.path / "exports"
    wanted, found = (
        read_predictions(proof / f"{form}-{kind}" / "predictions-val.npz").logits for kind in ("float32", precision)
    )
    assert 0 < np.abs(found - wanted).max() <= APART[precision] * np.abs(wanted).max()
    parity = read_json(proof / f"{form}-{precision}" / "parity.json")
    assert parity["passed"] and parity["margin"] == 1.0 and parity["max_relative_difference"] > 0
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    logits, maps = Session(bundle.model_file, form, precision)(images)
    assert logits.dtype == np.float32 and logits.shape == (2, 3)
    assert (maps is not None) == bundle.record.activation_map == plain.record.activation_map
    facts = bundle.record.exporter
    if precision == "int8":
        assert facts["calibration"] == {"split": "val", "images": 9, "seed": 0}
        assert facts["quantiser"] == "nncf" and facts["nncf"]
    if (form, precision) == ("onnx", "fp16"):
        assert facts["converter"] == "onnxruntime.transformers.float16"
        assert bundle.size_bytes < 0.7 * plain.size_bytes
    file = next(load_dataset("tiny", trained).root.rglob("*.png"))
    assert Predictor.load(bundle).predict([file])[0].error is None


# The last conversion is the user's own, not ours, and shows that what calls home is seen.
_CALLS = """
import os, sys, time
from pathlib import Path
first, home, run, plain, file = sys.argv[1] == "first", *sys.argv[2:]
heard = os.open(file, os.O_CREAT | os.O_APPEND | os.O_WRONLY)  # of children too: they do the calling
def hear(event, given):
    if event in ("socket.getaddrinfo", "socket.connect"):
        os.write(heard, b"1")
        raise OSError("no network")
def calls():
    return os.fstat(heard).st_size
sys.addaudithook(hear)
if first:
    import nncf, openvino
    time.sleep(1)
before = calls()
from zoo.deployment.export import export
from zoo.deployment.predictor import Predictor
from zoo.files import Home
from zoo.runs import find_run
at = Home(Path(home))
for precision in ("float32", "int8"):
    bundle = export(find_run(run, at), at, format="openvino", precision=precision, margin=1.0)
Predictor.load(bundle)
time.sleep(1)
ours = calls() - before
if first:
    openvino.convert_model(plain)
    until = time.monotonic() + 20
    while calls() == before + ours and time.monotonic() < until:
        time.sleep(0.1)
print(ours, calls() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("who", ["first", "after"])
def test_openvino_calls_nobody(trained, run, tmp_path, who):
    plain = export(run, trained)
    in_ci = ("CI", "TF_BUILD", "JENKINS_URL", "PYTEST_CURRENT_TEST")  # where it holds its tongue
    environment = {name: value for name, value in os.environ.items() if name not in in_ci} | {"HOME": str(tmp_path)}
    command = [
        sys.executable,
        "-c",
        _CALLS,
        who,
        str(trained.root),
        run.name,
        str(plain.model_file),
        str(tmp_path / "calls"),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours, calls = map(int, done.stdout.split())
    assert ours == 0 and (calls > 0) == (who == "first")


@pytest.mark.slow
@pytest.mark.parametrize(("form", "precision"), [("onnx", "int8"), ("openvino", "int8"), ("onnx", "fp16")])
def test_the_same_run_gives_the_same_bytes(trained, run, form, precision):
    export(run, trained, format=form, precision=precision, margin=1.0)
    said = []
    export(run, trained, format=form, precision=precision, margin=1.0, on_note=said.append)
    assert said and "with the same content" in said[0]


@pytest.mark.slow
def test_a_bad_quantisation_fails_with_numbers_and_leaves_nothing(trained, run, monkeypatch):
    import onnx

    honest = exporting.int8_onnx

    def planted(file, calibration):
        facts = honest(file, calibration)
        proto = onnx.load(str(file))
        for tensor in proto.graph.initializer:
            if "scale" in tensor.name.lower():
                values = onnx.numpy_helper.to_array(tensor)
                tensor.CopyFrom(
                    onnx.numpy_helper.from_array(
                        np.asarray(values.reshape(-1)[::-1].reshape(values.shape) * 40, values.dtype), tensor.name
                    )
                )
        file.write_bytes(proto.SerializeToString())
        return facts

    older = export(run, trained)
    before = {path: path.read_bytes() for path in older.path.iterdir()}
    monkeypatch.setattr(exporting, "int8_onnx", planted)
    with pytest.raises(ZooError, match="is not written") as refused:
        export(run, trained, precision="int8")
    text = str(refused.value)
    assert "top1 changes by -0." in text and "on 9 val images in 9 groups" in text and "margin of 0.01" in text
    assert "take float32, allow more with --margin" in text and "\n" not in text
    assert [path.name for path in trained.bundles.iterdir()] == [older.name]
    assert not (run.path / "exports" / "onnx-int8").exists()
    assert {path: path.read_bytes() for path in older.path.iterdir()} == before
