"""`zoo list bundles` and `zoo show BUNDLE`."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from zoo.cli import app
from zoo.deployment.bundle import list_bundles
from zoo.errors import ZooError


def _zoo(*words: object) -> str:
    done = CliRunner().invoke(app, [*map(str, words)])
    if isinstance(done.exception, ZooError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def test_bundles_are_listed_with_the_state_of_their_gate(bundled, monkeypatch):
    (row,) = json.loads(_zoo("list", "bundles", "--json"))
    assert row["name"] == list_bundles(bundled)[0]
    assert (row["format"], row["precision"], row["model"]) == ("onnx", "float32", "simple_cnn")
    assert row["status"] == "gate passed" and 0 <= row["val_top1"] <= 1 and row["reason"] is None
    model = bundled.bundles / row["name"] / "model.onnx"
    assert row["size_MB"] == pytest.approx(model.stat().st_size / 1e6, abs=1e-3)
    assert "gate passed" in _zoo("list", "bundles", "*float32")
    for width, shown in (120, True), (50, False):  # names stay whole; what there is no room for goes
        monkeypatch.setenv("COLUMNS", str(width))
        told = _zoo("list", "bundles")
        assert row["name"] in told and ("gate passed" in told) == shown and max(map(len, told.splitlines())) <= width
    assert "no bundles here match 'int8'" in _zoo("list", "bundles", "int8")


def test_a_bundle_whose_gate_was_not_run_or_failed_is_listed_so(bundled):
    record = bundled.bundles / list_bundles(bundled)[0] / "bundle.json"
    table = json.loads(record.read_text())
    for parity, said in ({}, "gate not run"), ({"passed": False}, "gate failed"):
        record.write_text(json.dumps({**table, "parity": parity}))
        assert json.loads(_zoo("list", "bundles", "--json"))[0]["status"] == said


@pytest.mark.parametrize(("text", "said"), [("{", "no valid JSON"), ('{"name": "x"}', "is damaged at")])
def test_a_damaged_bundle_is_listed_as_such(bundled, text, said):
    (bundled.bundles / list_bundles(bundled)[0] / "bundle.json").write_text(text)
    (row,) = json.loads(_zoo("list", "bundles", "--json"))
    assert row["status"] == "damaged" and said in row["reason"]


def test_a_bundle_without_its_model_is_listed_as_damaged(bundled):
    (bundled.bundles / list_bundles(bundled)[0] / "model.onnx").unlink()
    (row,) = json.loads(_zoo("list", "bundles", "--json"))
    assert row["status"] == "damaged" and "model.onnx" in row["reason"]


def test_show_gives_the_card_or_the_record(bundled):
    (name,) = list_bundles(bundled)
    card = (bundled.bundles / name / "card.md").read_text()
    assert card.strip() in _zoo("show", name)
    found = json.loads(_zoo("show", bundled.bundles / name, "--json"))
    assert (found["kind"], found["name"], found["card"]) == ("bundle", name, card)
    assert found["size_bytes"] == (bundled.bundles / name / "model.onnx").stat().st_size


def test_show_refuses_a_changed_bundle_and_names_the_nearest(bundled):
    (name,) = list_bundles(bundled)
    (bundled.bundles / name / "card.md").write_text("# Perfect")
    with pytest.raises(ZooError, match=r"is refused: card\.md was changed"):
        _zoo("show", name)
    with pytest.raises(ZooError, match=f"did you mean '{name}'"):
        _zoo("show", name[:-1])


def test_no_bundle_is_said(trained):
    assert json.loads(_zoo("list", "bundles", "--json")) == []
    assert "no bundles here" in _zoo("list", "bundles")
