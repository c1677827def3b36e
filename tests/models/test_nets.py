from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn

from zoo.errors import ZooError
from zoo.models import nets
from zoo.models.nets import SimpleCNN, check_forward, check_options, check_timm, classifier_of, classifiers_of


@settings(max_examples=15, deadline=None)
@given(height=st.integers(16, 70), width=st.integers(16, 70), classes=st.integers(1, 9))
def test_simple_cnn_takes_any_size(height: int, width: int, classes: int) -> None:
    model = SimpleCNN(classes).eval()
    with torch.no_grad():
        images = torch.zeros(1, 3, height, width)
        assert model(images).shape == (1, classes)
        features = model.forward_features(images)
    assert features.shape == (1, model.num_features, -(-height // 16), -(-width // 16))


def test_simple_cnn_is_small_and_learns() -> None:
    torch.manual_seed(0)
    model = SimpleCNN(3)
    assert 200_000 <= sum(each.numel() for each in model.parameters()) <= 600_000
    images, labels = torch.randn(12, 3, 32, 32), torch.arange(12) % 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1.0986, abs=0.25)  # log 3: it starts without an opinion
    assert losses[-1] < 0.2


def test_simple_cnn_dropout_and_pre_logits() -> None:
    model = SimpleCNN(2, drop_rate=0.5)
    features = model.forward_features(torch.randn(4, 3, 32, 32))
    assert model.forward_head(features, pre_logits=True).shape == (4, 128)
    model.train()
    assert not torch.equal(model.forward_head(features), model.forward_head(features))
    model.eval()
    assert torch.equal(model.forward_head(features), model.forward_head(features))


@pytest.mark.parametrize("width", [7, 257])
def test_simple_cnn_refuses_a_width(width: int) -> None:
    with pytest.raises(ZooError, match=f"width must be 8 to 256. Got {width}"):
        SimpleCNN(2, width=width)


@pytest.mark.parametrize(("coarse", "layers"), [(False, 7), (True, 5)])
def test_simple_cnn_groups_run_from_stem_to_head(coarse: bool, layers: int) -> None:
    model = SimpleCNN(2)
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    assert len(groups) == layers
    assert all(name.startswith("stem") for name in groups[0])
    assert groups[layers - 1] == ["fc.weight", "fc.bias"]
    assert sorted(name for names in groups.values() for name in names) == sorted(
        name for name, _ in model.named_parameters()
    )


def test_simple_cnn_layer_decay_by_timm() -> None:
    scales = {group["lr_scale"] for group in param_groups_layer_decay(SimpleCNN(2), layer_decay=0.5)}
    assert max(scales) == 1.0 and min(scales) == 0.5**6


def test_classifier_of_a_network_without_get_classifier() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2), nn.Linear(2, 5))
    assert classifier_of(model)[0] == "4"
    model.num_classes = 2  # type: ignore[assignment]
    assert classifier_of(model)[0] == "3"


def test_classifier_of_says_what_is_missing_or_too_many() -> None:
    with pytest.raises(ZooError, match=r"Flatten has no classifier .* get_classifier\(\)"):
        classifier_of(nn.Flatten())

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def get_classifier(self) -> tuple[nn.Module, nn.Module]:
            return self.a, self.b

    assert [name for name, _ in classifiers_of(Two())] == ["a", "b"]
    with pytest.raises(ZooError, match=r"Two has 2 classifiers \(a, b\).*finetune.strategy = 'full'"):
        classifier_of(Two())


def test_check_forward_names_what_is_no_classifier_and_restores_the_mode() -> None:
    model = nn.Conv2d(3, 2, 3)
    assert model.training
    with pytest.raises(ZooError, match=r"'mine' is no classifier.*\(2, 2\).*Got shape \(2, 2, 30, 30\)"):
        check_forward(model, "mine", 2, 32)
    assert model.training
    with pytest.raises(ZooError, match="'mine' refuses images of 2 x 2 pixels"):
        check_forward(model, "mine", 2, 2)


def test_check_timm_draws_no_random_numbers_and_uses_no_memory() -> None:
    before = torch.get_rng_state()
    nets.check_timm.cache_clear()
    check_timm("vit_giant_patch14_224", 3, 224)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("key", sorted(nets._RESERVED))
def test_options_that_a_recipe_says_elsewhere_are_refused(key: str) -> None:
    with pytest.raises(ZooError, match=f"model.options must not hold '{key}'"):
        check_options({key: 1})


def test_own_params_of_a_function_that_needs_memory_are_not_told() -> None:
    def build(num_classes: int) -> nn.Module:
        return nn.Linear(int(torch.ones(1).item()), num_classes)

    assert nets.count_own_params(build) is None
    assert nets.count_own_params(lambda n: nn.Linear(1, n)) == 2000
