"""The carried backbones: whole, small, loaded without a network by their tag alone, and named as a remedy."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from zoo.cli import app
from zoo.data.formula import GENERATOR_VERSION, formula_classes
from zoo.errors import ZooError
from zoo.files import sha256_file
from zoo.models import carried
from zoo.models.carried import FOLDER, carried_weights
from zoo.models.registry import create_model, find_model, list_models
from zoo.models.weights import load_weights, resolve_weights

NAMES = sorted(carried_weights())


def test_there_are_three_of_three_kinds_of_architecture():
    assert NAMES == ["mobilenetv3_small_050.zoo_formula", "test_efficientnet.zoo_formula", "test_resnet.zoo_formula"]
    assert {path.suffix for path in FOLDER.iterdir() if path.is_file()} == {".py", ".json", ".safetensors"}
    assert sum(path.stat().st_size for path in FOLDER.glob("*.safetensors")) < 8e6


@pytest.mark.parametrize("name", NAMES)
def test_each_file_is_small_whole_and_what_its_card_says(name):
    each = carried_weights()[name]
    assert each.path.stat().st_size == each.size_bytes <= 2.5e6
    assert sha256_file(each.path) == each.sha256
    facts = each.facts
    assert facts["generator_version"] == GENERATOR_VERSION
    assert facts["classes"] == len(formula_classes())
    assert facts["images_seen"] > 1e6
    assert facts["hours"] > 0.1
    assert {"torch", "timm", "numpy"} <= set(facts["versions"])
    assert facts["settings"]["arch"] == name.partition(".")[0]
    assert isinstance(facts["settings"]["seed"], int)
    tensors = load_file(each.path)
    assert {value.dtype for value in tensors.values() if value.is_floating_point()} == {torch.float16}


@pytest.mark.parametrize("name", NAMES)
def test_each_loads_without_a_network_or_a_folder(name, root):
    spec = find_model(name)
    assert (spec.origin, spec.weights_at_hand, spec.licence) == ("carried", "carried", "Apache-2.0")
    assert (spec.preprocessing.image_size, spec.preprocessing.mean) == (64, (0.5, 0.5, 0.5))
    found = resolve_weights(spec, "pretrained", root, offline=True)
    assert (found.origin, found.sha256) == ("carried", spec.sha256)
    assert found.location == f"zoo/{name}.safetensors"
    model = create_model(spec, 5)
    report = load_weights(model, found, spec)
    assert report.head == "absent"
    key = next(key for key in load_file(found.path) if key.endswith("weight"))
    assert torch.equal(model.state_dict()[key], load_file(found.path)[key].float())
    model.eval()
    assert torch.isfinite(model(torch.rand(2, 3, 64, 64) * 2 - 1)).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_its_features_tell_formula_classes_apart_that_random_ones_do_not(name, root):
    """The weights are what the card says: a nearest class mean in their features knows unseen images of its classes."""
    import numpy as np

    from zoo.data.formula import formula_image

    classes = formula_classes()[::29]
    spec = find_model(name)
    scores = {}
    for source in ("pretrained", "scratch"):
        torch.manual_seed(0)
        model = create_model(spec, 2)
        if source == "pretrained":
            load_weights(model, resolve_weights(spec, source, root, offline=True), spec)
        model.eval()

        def features(instances, model=model):
            pixels = np.stack([formula_image(each, number, 64) for each in classes for number in instances])
            with torch.inference_mode():
                images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
                found = model.forward_head(model.forward_features(images), pre_logits=True)
            return found.view(len(classes), len(instances), -1)

        # Instances from 246 on were held out.
        means, held_out = features(range(100, 108)).mean(1), features(range(246, 250))
        nearest = torch.cdist(held_out.flatten(0, 1), means).argmin(1).view(len(classes), -1)
        scores[source] = float((nearest == torch.arange(len(classes))[:, None]).float().mean())
    assert scores["pretrained"] > scores["scratch"] + 0.15


def test_a_name_without_the_tag_never_gives_them(root, monkeypatch):
    monkeypatch.delenv("ZOO_WEIGHTS", raising=False)
    spec = find_model("test_resnet")
    assert spec.origin == "timm"
    with pytest.raises(
        ZooError, match=r"\(5\) take small weights .* \[model\] name = \"test_resnet.zoo_formula\"\. Ran"
    ):
        resolve_weights(spec, "pretrained", root, offline=True)
    every = " or ".join(f'"{name}"' for name in NAMES)
    with pytest.raises(ZooError, match=every):
        resolve_weights(find_model("resnet50"), "pretrained", root, offline=True)


def test_a_file_of_that_name_in_zoo_weights_does_not_stand_in_for_them(root, tmp_path, monkeypatch):
    other = carried_weights()[NAMES[0]].path
    shutil.copy(other, tmp_path / "test_resnet.zoo_formula.safetensors")
    monkeypatch.setenv("ZOO_WEIGHTS", str(tmp_path))
    spec = find_model("test_resnet.zoo_formula")
    assert resolve_weights(spec, "pretrained", root).sha256 == carried_weights()["test_resnet.zoo_formula"].sha256
    assert [row.name for row in list_models("test_resnet.zoo")] == ["test_resnet.zoo_formula"]


def test_a_changed_byte_is_refused(root, tmp_path, monkeypatch):
    spec = find_model("test_resnet.zoo_formula")
    data = bytearray(carried_weights()[spec.name].path.read_bytes())
    data[-100] ^= 1
    (tmp_path / f"{spec.name}.safetensors").write_bytes(data)
    monkeypatch.setattr(carried, "FOLDER", tmp_path)
    with pytest.raises(ZooError, match=r"'test_resnet.zoo_formula.safetensors' is damaged or another file"):
        resolve_weights(spec, "pretrained", root)


def test_a_damaged_card_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "x.json").write_text("{")
    monkeypatch.setattr(carried, "FOLDER", tmp_path)
    carried_weights.cache_clear()
    try:
        with pytest.raises(ZooError, match=r"the carried weights' card 'x.json' is damaged; install the package again"):
            carried_weights()
    finally:
        monkeypatch.undo()
        carried_weights.cache_clear()


@pytest.mark.slow
def test_the_command_lists_them_with_licence_size_and_preprocessing(root):
    for width in ("80", "120"):
        shown = CliRunner().invoke(app, ["list", "models", "--carried"], env={"COLUMNS": width, "NO_COLOR": "1"})
        assert shown.exit_code == 0
        assert all(len(line) <= int(width) for line in shown.stdout.splitlines())
        for word in ("test_resnet", "Apache-2.0", "0.5/0.5", "64"):
            assert word in shown.stdout
    rows = json.loads(CliRunner().invoke(app, ["list", "models", "--carried", "--json"]).stdout)
    assert [row["name"] for row in rows] == NAMES
    assert all(row["sha256"] and row["size_bytes"] and row["mean"] and row["std"] for row in rows)
    assert all(row["weights_at_hand"] == "carried" for row in rows)
    shown = json.loads(CliRunner().invoke(app, ["show", "test_resnet.zoo_formula", "--json"]).stdout)
    assert shown["card"]["settings"]["arch"] == "test_resnet"
    refused = CliRunner().invoke(app, ["list", "recipes", "--carried"])
    assert "--carried and --at-hand go with `zoo list models` alone. Got recipes" in str(refused.exception)
