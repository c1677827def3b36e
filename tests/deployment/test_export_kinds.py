"""Runs of every kind are exported: soups, networks that a user registered, and real backbones."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import nn

from zoo.data.sources import import_dataset
from zoo.deployment.export import export
from zoo.deployment.predictor import Predictor
from zoo.errors import ZooError
from zoo.models.registry import register_model
from zoo.models.spec import own_models
from zoo.training.loop import train
from zoo.training.scoring import load_model, predictions_of

pytestmark = pytest.mark.slow


@pytest.fixture
def own_network():
    """A network of the user's own: no halves that timm's have, so no map."""

    @register_model("own_mlp", summary="one layer", image_size=32)
    def own_mlp(num_classes: int) -> nn.Module:
        return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(3 * 8 * 8, num_classes))

    yield "own_mlp"
    own_models.pop("own_mlp")


def test_a_network_of_ones_own_is_exported_without_a_map(tiny, make_recipe, own_network):
    run = train(make_recipe(model__name=own_network, finetune__strategy="full"), "tiny", 0, tiny)
    bundle = export(run, tiny)
    assert not bundle.record.activation_map and bundle.record.parity["top1_agreement"] == 1.0
    own_models.pop(own_network)
    assert Predictor.load(bundle).classes == run.record.classes  # needs that code no more
    register_model(own_network, image_size=32)(
        lambda num_classes: nn.Sequential(nn.Flatten(), nn.Linear(3072, num_classes))
    )
    with pytest.raises(ZooError, match="no longer the one that run"):
        export(run, tiny)


def test_a_soup_is_exported_as_the_one_network_that_it_is(tiny, make_recipe):
    carried = {"model__name": "test_resnet.zoo_formula", "model__weights": "pretrained"}
    run = train(make_recipe(**carried, average__seeds=2), "tiny", 0, tiny)
    bundle = export(run, tiny)
    assert bundle.record.parity["recorded"]["agreement"] == 1.0
    assert bundle.record.weights_sha256 == run.record.weights_sha256
    assert all(name in bundle.card for name in run.record.made_of)


@pytest.mark.assets
def test_a_real_backbone_on_real_slices_passes_its_gate_and_names_no_folder(assets, root, make_recipe, monkeypatch):
    weights = assets / "weights"
    monkeypatch.setenv("ZOO_WEIGHTS", str(weights))
    import_dataset("iq_othnccd", "iq_othnccd", root, from_=assets / "data" / "iq_othnccd")
    overrides = {
        "model__name": "mobilenetv2_035.keras_in1k_notop",
        "model__weights": "pretrained",
        "model__image_size": 96,
        "finetune__strategy": "linear-probe",
        "finetune__epochs": 3,
        "finetune__batch_size": 32,
        "augment__policy": "none",
    }
    run = train(make_recipe(**overrides), "iq_othnccd", 0, root)
    bundle = export(run, root)
    parity = bundle.record.parity
    assert parity["images"] == len(predictions_of(run, "val").y_true) > 100
    assert parity["passed"] and parity["top1_agreement"] == 1.0 and parity["max_relative_difference"] < 1e-4
    assert bundle.record.medical and bundle.record.activation_map and "Not a medical device" in bundle.card
    model = load_model(run, root)
    images = np.random.default_rng(0).standard_normal((2, 3, 96, 96)).astype(np.float32)
    with torch.inference_mode():
        expected = model(torch.from_numpy(images)).numpy()
    found, maps = Predictor.load(bundle).network.session(images)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert maps is not None and maps.shape[:2] == expected.shape
    for file in bundle.path.iterdir():
        data = file.read_bytes()
        assert os.fsencode(weights) not in data and os.fsencode(root.root) not in data
