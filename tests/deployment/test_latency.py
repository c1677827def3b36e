from __future__ import annotations

import json
import os
import shutil
import signal

import pytest

from zoo.cores import cores
from zoo.deployment import turns
from zoo.deployment.bundle import list_bundles, open_bundle
from zoo.deployment.latency import latencies
from zoo.deployment.speed import Latency, machine, subject_of
from zoo.errors import ZooError
from zoo.files import read_json, write_json
from zoo.runs import find_run


@pytest.fixture
def bundle(bundled):
    [name] = list_bundles(bundled)
    return open_bundle(name, bundled)


@pytest.mark.slow
def test_a_bundle_is_measured_without_torch_beside_its_run_with_torch(bundled, bundle):
    run = find_run(bundle.record.run, bundled)
    steps = []
    found = latencies(
        [bundle], bundled, eager=[run], threads=1, seconds=0.2, progress=lambda done, of: steps.append((done, of))
    )[bundle.name]
    assert found.reason is None
    assert 0 < found.latency_p50_ms <= found.latency_p95_ms <= found.latency_p99_ms
    assert found.calls >= 2 * turns.ROUNDS and len(found.rounds_p50_ms) == turns.ROUNDS and found.warm_up == 5
    assert found.best_batch in found.batches and found.images_per_s == found.batches[found.best_batch]
    assert found.batches[found.best_batch] * turns.GAIN >= max(found.batches.values())
    assert found.threads == 1 and found.runtime.startswith("onnxruntime ")
    assert found.size_mib == bundle.size_bytes / (1 << 20)
    assert 0 < found.empty_mib < found.peak_mib <= found.peak_batches_mib
    assert found.environment["versions"]["onnxruntime"] and found.environment["processor"]
    assert found.machine == machine() and found.files == {"model.onnx": bundle.record.files["model.onnx"]}
    assert found.eager.runtime.startswith("torch ") and found.eager.measured_together == found.measured_together
    assert found.eager.peak_mib > found.peak_mib  # torch's own libraries are in one of the two only
    assert steps == sorted(steps) and steps[-1][0] == steps[-1][1]

    kept = bundled.latency / f"{bundle.name}.json"
    assert Latency.model_validate(read_json(kept)) == found
    assert latencies([bundle], bundled, eager=[run], threads=1)[bundle.name] == found  # not measured again
    before = read_json(kept)
    for change in ({"digest": "other"}, {"machine": {}}, {"runtime": "onnxruntime 0.1"}, {"method": 0}):
        write_json(kept, {**before, **change})
        anew = latencies([bundle], bundled, threads=1, seconds=0.05)[bundle.name]
        assert anew.measured_together != found.measured_together
    assert latencies([bundle], bundled, threads=1, seconds=0.05, again=True)[bundle.name] != anew


def process_of(subject, root):
    process = turns._start(subject, 1)
    turns._open(process, root, 1)
    return process


@pytest.mark.slow
def test_the_process_of_a_bundle_holds_no_torch(bundled, bundle):
    process = process_of(subject_of(bundle), bundled)
    try:
        assert process.reason is None and process.facts["torch_loaded"] is False
        told = process.ask({"batch": 2, "calls": 3})
        assert len(told["seconds"]) == 3 and min(told["seconds"]) > 0 and told["peak_mib"] > 1
        assert len(process.ask({"decode": 2})["seconds"]) == 2
    finally:
        process.end()
    assert process.child.returncode is not None


def test_a_process_that_dies_is_a_reason(bundled, bundle):
    process = process_of(subject_of(bundle), bundled)
    try:
        os.kill(process.child.pid, signal.SIGKILL)
        assert turns._asked(process, {"batch": 1, "calls": 1}) is None
        assert process.reason == "its process was ended by signal 9 (out of memory?)"
        assert turns._asked(process, {"batch": 1, "calls": 1}) is None
    finally:
        process.end()
    figures = turns._figures(process, {"threads": 1, "machine": {}, "measured_together": "", "measured_at": ""})
    assert figures.latency_p50_ms is None and figures.reason == process.reason


@pytest.mark.slow
def test_a_run_whose_weights_are_gone_is_a_reason_until_they_are_back(bundled, bundle):
    run = find_run(bundle.record.run, bundled)
    away = run.weights_file.rename(run.path / "elsewhere")
    found = latencies([bundle], bundled, eager=[run], threads=1, seconds=0.05)[bundle.name]
    assert found.reason is None and found.latency_p50_ms > 0
    assert found.eager.reason == "the run's weights are gone, so that there is nothing to compare with"
    assert found.eager.latency_p50_ms is None and found.eager.size_mib is None
    assert latencies([bundle], bundled, eager=[run], threads=1)[bundle.name] == found
    away.rename(run.weights_file)
    anew = latencies([bundle], bundled, eager=[run], threads=1, seconds=0.05)[bundle.name]
    assert anew.eager.reason is None and anew.eager.size_mib > 0


def test_a_bundle_that_was_changed_is_a_reason_and_nothing_is_kept(bundled, bundle):
    bundle.model_file.write_bytes(b"no model")
    found = latencies([bundle], bundled, threads=1, seconds=0.05)[bundle.name]
    assert "model.onnx was changed" in found.reason and found.latency_p50_ms is None
    assert not (bundled.latency / f"{bundle.name}.json").exists()


@pytest.mark.slow
def test_a_bundle_is_measured_under_the_name_of_its_folder(bundled, bundle):
    copy = bundled.bundles / "production"
    shutil.copytree(bundle.path, copy)
    both = [bundle, open_bundle("production", bundled)]
    found = latencies(both, bundled, threads=1, seconds=0.05)
    assert set(found) == {bundle.path.name, "production"} and all(each.latency_p50_ms for each in found.values())
    assert {file.name for file in bundled.latency.iterdir()} == {f"{name}.json" for name in found}
    again = latencies(both, bundled, threads=1, seconds=0.05)
    assert again["production"].measured_at == found["production"].measured_at


def test_a_home_that_cannot_be_written_is_an_error_of_one_line(bundled, bundle):
    shutil.rmtree(bundled.locks, ignore_errors=True)
    bundled.locks.write_text("a file")
    with pytest.raises(ZooError, match="cannot write"):
        latencies([bundle], bundled, threads=1)


def test_two_do_not_measure_at_once(bundled, bundle):
    with turns._alone(bundled), pytest.raises(ZooError, match="another process measures latencies in this home"):
        latencies([bundle], bundled, threads=1)


@pytest.mark.parametrize("known", [{"threads": 0}, {"threads": cores() + 1}, {"seconds": 0}, {"seconds": 601}])
def test_numbers_out_of_range_are_refused(bundled, bundle, known):
    with pytest.raises(ZooError, match=r"threads must be 1 to|seconds of measuring must be above 0"):
        latencies([bundle], bundled, **known)


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"name": 3}), ""])
def test_a_kept_file_that_is_damaged_counts_as_none(bundled, bundle, text):
    from zoo.deployment.latency import _stored

    bundled.latency.mkdir(parents=True)
    (bundled.latency / f"{bundle.name}.json").write_text(text)
    assert _stored(subject_of(bundle), None, bundled, 1) is None


def test_the_best_batch_is_the_smaller_where_a_larger_gains_next_to_nothing():
    assert turns._best({1: [100.0], 2: [199.0], 4: [200.0], 8: [150.0]}) == 2
    assert turns._best({1: [100.0], 2: []}) == 1
