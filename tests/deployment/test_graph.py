from __future__ import annotations

import numpy as np
import pytest
import timm
import torch

from zoo.deployment import graph
from zoo.deployment.graph import write_onnx
from zoo.deployment.onnx_file import check_onnx
from zoo.deployment.runtime import Session
from zoo.errors import ZooError

# Which have a head that pools and then is linear, and the pixels that they are asked with.
NETWORKS = [
    ("resnet18", True, 64),
    ("efficientnet_b0", True, 64),
    ("densenet121", True, 64),
    ("mobilenetv3_small_050", False, 64),  # a layer and an activation stand between pooling and the last
    ("convnext_atto", False, 64),  # normalised after pooling
    ("vit_tiny_patch16_224", False, 64),
]


def network(name, size):
    torch.manual_seed(0)
    words = {"img_size": size} if name.startswith("vit") else {}
    model = timm.create_model(name, num_classes=5, **words).eval()
    classifier = model.get_classifier()
    torch.nn.init.normal_(classifier.weight)
    torch.nn.init.normal_(classifier.bias)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mapped", "size"), NETWORKS)
def test_an_exported_network_is_the_same_for_any_batch(tmp_path, name, mapped, size):
    model, file = network(name, size), tmp_path / "model.onnx"
    facts, found = write_onnx(model, size, file)
    assert facts["name"] == "torch.onnx dynamo" and facts["opset"] == graph.OPSET and "fallback" not in facts
    assert found is mapped
    session = Session(file, "onnx")
    bias = model.get_classifier().bias.detach().numpy()
    for count in (1, 2, 5):
        images = torch.randn(count, 3, size, size)
        with torch.no_grad():
            expected = model(images).numpy()
        logits, maps = session(images.numpy())
        assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
        assert (maps is not None) is mapped
        if mapped:
            assert maps.shape[:2] == (count, 5)
            np.testing.assert_allclose(maps.mean((2, 3)) + bias, logits, atol=1e-4 * np.abs(expected).max(), rtol=0)
    first = file.read_bytes()
    check_onnx(first)
    write_onnx(network(name, size), size, file)
    assert file.read_bytes() == first


class Small(torch.nn.Module):
    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images, 1).flatten(1) * 2


def test_where_the_newer_exporter_fails_the_older_is_taken_and_recorded(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such operator")

    newer, older = graph._EXPORTERS
    monkeypatch.setattr(graph, "_EXPORTERS", ((newer[0], broken, newer[2]), older))
    facts, mapped = write_onnx(Small(), 16, tmp_path / "model.onnx")
    assert facts["name"] == "torch.onnx TorchScript" and facts["opset"] == 17 and not mapped
    assert facts["fallback"] == "torch.onnx dynamo: RuntimeError"
    images = np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)
    logits, _ = Session(tmp_path / "model.onnx", "onnx")(images)
    np.testing.assert_allclose(logits, images.mean((2, 3)) * 2, atol=1e-6)


def test_where_the_newer_exporter_gives_another_function_the_older_is_taken(tmp_path, monkeypatch):
    newer, older = graph._EXPORTERS
    other = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())

    def wrong(_, images, outputs):
        return newer[1](other, images, outputs)

    monkeypatch.setattr(graph, "_EXPORTERS", ((newer[0], wrong, newer[2]), older))
    facts, _ = write_onnx(Small(), 16, tmp_path / "model.onnx")
    assert facts["name"] == "torch.onnx TorchScript" and "its logits differ" in facts["fallback"]


@pytest.mark.slow
def test_a_network_that_no_exporter_can_write_is_an_error_of_one_line(tmp_path):
    class Odd(torch.nn.Module):
        def forward(self, images):
            return images.new_tensor(images.detach().tolist())[:, :, 0, 0]

    with pytest.raises(ZooError, match="cannot be written as ONNX") as refused:
        write_onnx(Odd(), 16, tmp_path / "model.onnx")
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_maxvit_is_exported_though_the_newer_exporter_may_not_know_it(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("maxvit_rmlp_pico_rw_256", num_classes=3, img_size=64).eval()
    facts, _ = write_onnx(model, 64, tmp_path / "model.onnx")
    assert facts["name"] == "torch.onnx dynamo" or facts["fallback"].startswith("torch.onnx dynamo: ")
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected = model(images).numpy()
    logits, _ = Session(tmp_path / "model.onnx", "onnx")(images.numpy())
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


class Scaled(torch.nn.Module):
    """A network of a user's own, which does more with its parts than one after the other."""

    def __init__(self, scale):
        super().__init__()
        self.inner, self.scale = network("resnet18", 64), scale
        self.num_features = self.inner.num_features

    def get_classifier(self):
        return self.inner.get_classifier()

    def forward_features(self, images):
        return self.inner.forward_features(images)

    def forward_head(self, values):
        return self.inner.forward_head(values)

    def forward(self, images):
        return self.scale * self.forward_head(self.forward_features(images))


def test_a_network_that_is_more_than_its_head_on_its_features_gives_no_map():
    assert graph.pooled_classifier(network("resnet18", 64), 64) is not None
    assert graph.pooled_classifier(Scaled(1), 64) is not None
    assert graph.pooled_classifier(Scaled(2), 64) is None


@pytest.mark.slow
def test_a_classifier_that_is_a_1_x_1_convolution_gives_its_maps(tmp_path):
    model = network("resnetv2_18", 64)
    facts, mapped = write_onnx(model, 64, tmp_path / "model.onnx")
    assert mapped and "fallback" not in facts
    images = torch.randn(3, 3, 64, 64)
    logits, maps = Session(tmp_path / "model.onnx", "onnx")(images.numpy())
    bias = model.get_classifier().bias.detach().numpy()
    np.testing.assert_allclose(maps.mean((2, 3)) + bias, logits, rtol=1e-3, atol=1e-4)


def test_a_network_whose_parts_are_called_otherwise_gives_no_map():
    model = Scaled(1)
    model.forward_features = lambda images, mask: images
    assert graph.pooled_classifier(model, 64) is None
