from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from zoo.data.manifest import load_dataset
from zoo.data.transforms import normalise
from zoo.deployment import export as exporting
from zoo.deployment.bundle import SUMS, open_bundle
from zoo.deployment.export import export
from zoo.deployment.placing import sha256_of
from zoo.deployment.predictor import Predictor
from zoo.deployment.rules import fit_rules
from zoo.deployment.runtime import Session
from zoo.errors import ZooError
from zoo.evaluation.metrics import compute_metrics
from zoo.evaluation.predictions import read_predictions
from zoo.files import read_json, read_toml, write_toml
from zoo.runs import list_runs
from zoo.training.scoring import predictions_of


@pytest.fixture
def run(trained):
    return next(run for run in list_runs(trained) if "--tiny--s0" in run.name)


def contents(folder):
    """Every file below a folder with its bytes; and empty folders."""
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def left(trained, run):
    """What an export may have left behind: anything in the folder of bundles, or beside the run."""
    found = sorted(path.name for path in trained.bundles.iterdir()) if trained.bundles.is_dir() else []
    return found + (["exports"] if (run.path / "exports").exists() else [])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_a_run_becomes_a_bundle_that_gives_the_same_labels(trained, run, form):
    steps = set()
    bundle = export(run, trained, format=form, progress=lambda what, *_: steps.add(what))
    assert bundle.path == trained.bundles / f"{run.name}--{form}-float32"
    assert open_bundle(bundle.name, trained).record == bundle.record
    assert {"exporting", "asking the artefact", "asking the network"} <= steps
    proof = run.path / "exports" / f"{form}-float32"
    own, exported = predictions_of(run, "val"), read_predictions(proof / "predictions-val.npz")
    np.testing.assert_array_equal(own.sample_ids, exported.sample_ids)
    np.testing.assert_allclose(own.logits, exported.logits, rtol=1e-4, atol=1e-5)
    parity = read_json(proof / "parity.json")
    assert parity["top1_agreement"] == 1.0 and parity["passed"] and parity["images"] == len(own.y_true)
    assert parity["recorded"]["agreement"] == 1.0
    assert bundle.record.exporter["name"] == "torch.onnx dynamo" and bundle.record.exporter["torch"]
    assert left(trained, run) == [bundle.name, "exports"]
    ids = {each.encode() for each in own.sample_ids}
    assert not any(each in data for data in contents(bundle.path).values() for each in ids)  # no sample travels


@pytest.mark.slow
def test_the_map_of_a_class_has_the_logit_as_its_mean_less_the_bias(trained, run):
    bundle = export(run, trained)
    images = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)
    logits, maps = Session(bundle.model_file, "onnx")(images)
    assert bundle.record.activation_map == (maps is not None)
    if maps is not None:
        bias = (logits - maps.mean((2, 3))).mean(0)
        np.testing.assert_allclose(maps.mean((2, 3)) + bias, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_same_run_gives_the_same_bytes_in_another_place_and_process(trained, run, tmp_path):
    first = export(run, trained)
    sums = (first.path / SUMS).read_bytes()
    said = []
    assert export(run, trained, on_note=said.append).path == first.path
    assert said == [f"bundle {first.name!r} is there already, with the same content"]
    shutil.copytree(trained.root, tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "models" / "bundles")
    code = f"from zoo.files import home; from zoo.deployment.export import export; export({run.name!r}, home())"
    env = {**os.environ, "ZOO_HOME": str(tmp_path / "moved")}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=env, cwd=tmp_path, check=True)
    assert (tmp_path / "moved" / "models" / "bundles" / first.name / SUMS).read_bytes() == sums


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_nothing_in_a_bundle_names_this_machine(trained, run, form):
    bundle = export(run, trained, format=form)
    places = [str(trained.root), str(Path.home()), str(Path.cwd()), sys.prefix, "/tmp/", "site-packages", "Traceback"]
    for path, data in contents(bundle.path).items():
        for place in places:
            assert place.encode() not in data, (path.name, place)


@pytest.mark.slow
def test_the_class_of_the_healthy_is_the_one_that_the_dataset_names_now(trained, run):
    assert run.record.negative_class == "normal"
    file, said = trained.data / "tiny" / "dataset.toml", []
    write_toml(file, read_toml(file) | {"negative_class": "benign"})
    record = export(run, trained, on_note=said.append).record
    assert record.negative_class == "benign"
    assert said[0] == (
        "when the run was trained, the class of the healthy was 'normal', and is now 'benign' in dataset.toml: rules "
        "and scores go by the present one"
    )
    artefact = read_predictions(run.path / "exports" / "onnx-float32" / "predictions-val.npz")
    assert (
        record.rules == fit_rules(artefact, record.classes, "benign") != fit_rules(artefact, record.classes, "normal")
    )
    for scores, split in ((record.val, "val"), (record.test, "test")):
        now, then = (compute_metrics(predictions_of(run, split), record.classes, each) for each in ("benign", "normal"))
        assert scores["sensitivity"] == now["sensitivity"] and scores["specificity"] == now["specificity"]
        assert (now["sensitivity"], now["specificity"]) != (then["sensitivity"], then["specificity"])


# What the gate must see -------------------------------------------------------------------------------------------


def plant(monkeypatch, **changes):
    """Have every bundle be made with another record than that of its run."""
    honest = exporting._record

    def planted(*words):
        record = honest(*words)
        wrong = {
            key: record.preprocessing.model_copy(update=value) for key, value in changes.items() if key != "classes"
        }
        if "classes" in changes:
            wrong["classes"] = changes["classes"](record.classes)
        found = record.model_copy(update=wrong)
        # The sample agrees with what is planted, so that it is the gate that has to see it.
        pixels = exporting._pixels(exporting.sample_png(), found.preprocessing)
        batch = normalise(pixels[None], found.preprocessing)
        logits = Session(words[1] / "model.onnx", "onnx")(batch)[0][0]
        return found.model_copy(update={"sample": found.sample.model_copy(update={"logits": logits.tolist()})})

    monkeypatch.setattr(exporting, "_record", planted)


def perturb(monkeypatch, by):
    """Have one weight in a hundred of the greatest tensor of every written graph be changed."""
    import onnx

    honest = exporting.write_onnx

    def planted(model, size, file):
        found = honest(model, size, file)
        proto = onnx.load(str(file))
        tensor = max(proto.graph.initializer, key=lambda each: len(each.raw_data))
        values = onnx.numpy_helper.to_array(tensor).copy()
        values.reshape(-1)[::100] += by
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        file.write_bytes(proto.SerializeToString())
        return found

    monkeypatch.setattr(exporting, "write_onnx", planted)


PLANTS = {
    "mean": lambda patch: plant(patch, preprocessing={"mean": (0.3, 0.3, 0.3)}),
    "std": lambda patch: plant(patch, preprocessing={"std": (0.25, 0.25, 0.25)}),
    "crop_pct": lambda patch: plant(patch, preprocessing={"crop_pct": 0.7}),
    "interpolation": lambda patch: plant(patch, preprocessing={"interpolation": "nearest"}),
    "order of classes": lambda patch: plant(patch, classes=lambda names: names[::-1]),
    "names of classes": lambda patch: plant(patch, classes=lambda names: [*names[:-1], "another"]),
    "a weight": lambda patch: perturb(patch, 0.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", PLANTS)
def test_a_bundle_that_is_not_the_network_is_refused_and_nothing_stays(trained, run, monkeypatch, what):
    PLANTS[what](monkeypatch)
    with pytest.raises(ZooError, match=r"it is not the network that was trained|has other classes") as refused:
        export(run, trained)
    assert "\n" not in str(refused.value)
    if what != "names of classes":
        assert re.search(r"\d of 9 val images get another label|logits differ by up to \d", str(refused.value))
    assert left(trained, run) == []


@pytest.mark.slow
def test_a_refused_export_leaves_the_older_bundle_as_it_was(trained, run, monkeypatch):
    before = contents(export(run, trained).path)
    proof = contents(run.path / "exports")
    PLANTS["std"](monkeypatch)
    with pytest.raises(ZooError, match="not written"):
        export(run, trained)
    target = trained.bundles / f"{run.name}--onnx-float32"
    assert contents(target) == before and contents(run.path / "exports") == proof
    assert [path.name for path in trained.bundles.iterdir()] == [target.name]


@pytest.mark.slow
def test_a_damaged_older_bundle_is_replaced_whole(trained, run):
    bundle = export(run, trained)
    before = contents(bundle.path)
    (bundle.path / "model.onnx").write_bytes(b"broken")
    (bundle.path / "more").mkdir()
    assert contents(export(run, trained).path) == before


# What an export asks for first ------------------------------------------------------------------------------------


def test_another_run_s_bundle_of_that_name_stays(trained, run):
    other = next(each for each in list_runs(trained) if each.finished and each.name != run.name)
    mine = export(run, trained, name="mine")
    before = {path: path.read_bytes() for path in mine.path.iterdir()}
    said = (
        f"bundle 'mine' is there already, of run '{run.name}' as onnx in float32; take another --name, or --replace it"
    )
    with pytest.raises(ZooError, match=re.escape(said)):
        export(other, trained, name="mine")
    with pytest.raises(ZooError, match=re.escape(said)):
        export(run, trained, name="mine", precision="int8")
    assert {path: path.read_bytes() for path in mine.path.iterdir()} == before
    assert export(run, trained, name="mine").path == mine.path
    assert export(other, trained, name="mine", replace=True).record.run == other.name


@pytest.mark.parametrize("what", [None, 3, object()])
def test_what_is_no_run_is_refused(trained, what):
    with pytest.raises(ZooError, match=r"export takes a run, its name, or a choice of pick\. Got "):
        export(what, trained)


def test_an_unknown_run_is_refused_with_the_nearest(trained, run):
    with pytest.raises(ZooError, match=re.escape(run.name)):
        export(run.name[:-1], trained)
    assert left(trained, run) == []


def test_a_run_that_did_not_finish_is_refused(trained, run):
    text = (run.path / "run.json").read_text()
    (run.path / "run.json").write_text(re.sub(r'"status":\s*"\w+"', '"status": "failed"', text))
    with pytest.raises(ZooError, match=re.escape(run.name)):
        export(run.name, trained)
    assert left(trained, run) == []


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ({"format": "tflite"}, "format must be one of onnx, openvino. Got 'tflite'"),
        ({"precision": "int4"}, "precision must be one of .* Got 'int4'"),
        ({"precision": "bf16"}, "ONNX Runtime computes no bf16"),
        ({"metric": "top2"}, "metric must be one of .* Got 'top2'"),
        ({"margin": -0.1}, r"margin must lie in \[0, 1\]"),
        ({"margin": float("nan")}, r"margin must lie in \[0, 1\]"),
        ({"name": "../x"}, "bundle"),
        ({"name": ""}, "bundle"),
    ],
)
def test_what_cannot_be_made_is_refused_before_any_work(trained, run, words, why):
    with pytest.raises(ZooError, match=why):
        export(run, trained, **words)
    assert left(trained, run) == []


def test_another_split_a_lost_image_or_changed_weights_are_refused(trained, run):
    dataset = load_dataset("tiny", trained)
    manifest = trained.data / "tiny" / "manifest.csv"
    text = manifest.read_text()
    manifest.write_text(text.replace(",val,", ",train,", 1))
    with pytest.raises(ZooError, match=r"another split|manifest"):
        export(run, trained)
    manifest.write_text(text)
    lost = next(dataset.image_path(row["path"]) for row in rows(manifest) if row["split"] == "val")
    data = lost.read_bytes()
    lost.unlink()
    with pytest.raises(ZooError, match=re.escape(lost.name)):
        export(run, trained)
    lost.write_bytes(data)
    weights = run.path / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ZooError, match="weights"):
        export(run, trained)
    assert left(trained, run) == []


def rows(manifest):
    import csv

    with manifest.open() as stream:
        return list(csv.DictReader(stream))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_a_full_disk_is_an_error_of_one_line_and_leaves_nothing(trained, run, full_disk, form):
    import errno

    (full_disk / "fill").write_bytes(bytes((1 << 20) - (48 << 10)))
    trained.bundles.mkdir(parents=True, exist_ok=True)
    trained.bundles.rmdir()
    trained.bundles.symlink_to(full_disk)
    said = os.strerror(errno.ENOSPC) if form == "onnx" else f"({os.strerror(errno.ENOSPC)}|free space on that disk)"
    with pytest.raises(ZooError, match=said):
        export(run, trained, format=form)
    assert [path.name for path in full_disk.iterdir()] == ["fill"]
    assert not (run.path / "exports").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_the_middle_leaves_nothing(trained, run, number, code):
    program = (
        "import sys, time; from zoo.files import home; from zoo.deployment.export import export\n"
        "from zoo.training.interruption import Stopped\n"
        "def shown(what, done, total):\n"
        "    if what == 'asking the network':\n"
        "        print('now', flush=True); time.sleep(60)\n"
        "try:\n"
        f"    export({run.name!r}, home(), progress=shown)\n"
        "except Stopped as stopped:\n"
        "    sys.exit(stopped.exit_code)\n"
    )
    started = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", program],
        stdout=subprocess.PIPE,
        env={**os.environ, "ZOO_HOME": str(trained.root)},
    )
    assert started.stdout is not None
    assert started.stdout.readline() == b"now\n"
    assert any(name.startswith(".new-") for name in left(trained, run))
    started.send_signal(number)
    assert started.wait(timeout=60) == code
    started.stdout.close()
    assert left(trained, run) == []


@pytest.mark.slow
def test_what_a_killed_process_left_is_removed_by_the_next(trained, run):
    stale = trained.bundles / f".new-{sha256_of(f'{run.name}--onnx-float32')}-abc"
    stale.mkdir(parents=True)
    (stale / "model.onnx").write_bytes(b"half")
    foreign = trained.bundles / ".new-of-another"
    foreign.mkdir()
    bundle = export(run, trained)
    assert sorted(path.name for path in trained.bundles.iterdir()) == sorted([bundle.name, foreign.name])


def test_two_at_once_are_kept_apart(trained, run):
    from filelock import FileLock

    trained.locks.mkdir(parents=True, exist_ok=True)
    with (
        FileLock(trained.locks / f"export-{run.name}--onnx-float32.lock"),
        pytest.raises(ZooError, match="is being made by another process"),
    ):
        export(run, trained)


@pytest.mark.slow
def test_a_missing_package_is_named_with_its_install_line(trained, run, monkeypatch):
    for module, words, line in (
        ("onnxscript", {}, "zoo[export]"),
        ("openvino", {"format": "openvino"}, "zoo[openvino]"),
        ("nncf", {"precision": "int8"}, "zoo[openvino]"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(ZooError, match=re.escape(f"pip install '{line}'")):
                export(run, trained, **words)
        assert left(trained, run) == []


# Runs made of others ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_of_several_views_is_exported_as_it_was_scored(trained, make_recipe):
    from zoo.training.loop import train

    made = train(make_recipe(score__tta="flip"), "tiny", 0, trained)
    bundle = export(made, trained)
    assert bundle.record.tta == "flip"
    own = predictions_of(made, "val")
    dataset = load_dataset("tiny", trained)
    files = {row["sample_id"]: dataset.image_path(row["path"]) for row in rows(trained.data / "tiny" / "manifest.csv")}
    predictor = Predictor.load(bundle)
    images = [predictor.prepare(files[each].read_bytes()) for each in own.sample_ids]
    np.testing.assert_allclose(predictor.logits(images)[0], own.logits, rtol=1e-4, atol=1e-5)
