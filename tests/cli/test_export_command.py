"""What `zoo export` prints: a summary that fits the terminal, one JSON document, or one line of what is wrong."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from zoo.cli import app
from zoo.deployment.bundle import list_bundles, open_bundle
from zoo.errors import ZooError
from zoo.runs import list_runs


@pytest.fixture
def name(trained):
    return next(run.name for run in list_runs(trained) if "--tiny--s0" in run.name)


def run(*words: str, width: int = 80) -> str:
    done = CliRunner().invoke(app, ["export", *words], env={"COLUMNS": str(width)})
    if isinstance(done.exception, ZooError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.slow
def test_the_summary_fits_80_and_120_columns_and_a_second_export_says_that_nothing_changed(trained, name):
    first, again = run(name), run(name, width=120)
    assert list_bundles(trained) == [f"{name}--onnx-float32"]
    for said, width in ((first, 80), (again, 120)):
        whole = ("passed: ", "note: ", name)  # may be longer: a path is never broken
        assert all(len(line) <= width for line in said.splitlines() if not line.startswith(whole))
        assert "9 of 9 val images" in said and "0 harmful, 0 beneficial, 0 neutral" in said
        assert "+0.0000, 95% CI" in said and "torch.onnx dynamo" in said
    assert "note" not in first and "is there already, with the same content" in again


@pytest.mark.slow
def test_json_is_one_document_with_the_verdict(trained, name):
    found = json.loads(run(name, "--name", "mine", "--json"))
    bundle = open_bundle("mine", trained)
    assert found["bundle"] == "mine" and found["run"] == name and found["path"] == str(bundle.path)
    assert found["parity"]["passed"] is True and found["parity"] == bundle.record.parity
    assert found["size_bytes"] == bundle.size_bytes and found["rules"]["temperature"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing"], "there is no run 'nothing'"),
        (["RUN", "--int8", "--precision", "fp16"], "--int8 is --precision int8"),
        (["RUN", "--format", "onxx"], "did you mean 'onnx'"),
        (["RUN", "--precision", "int9"], "precision must be one of float32, fp16, bf16, int8"),
        (["RUN", "--precision", "bf16"], "computes no bf16 on a CPU"),
        (["RUN", "--margin", "2"], "margin must lie in"),
        (["RUN", "--metric", "top2"], "metric must be one of"),
        (["RUN", "--name", "a/../b"], "bundle name must be"),
    ],
)
def test_a_mistake_is_said_before_any_work(trained, name, words, said):
    with pytest.raises(ZooError, match=said) as caught:
        run(*(name if each == "RUN" else each for each in words))
    assert "\n" not in str(caught.value)
    assert not trained.bundles.exists()
