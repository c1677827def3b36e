from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from zoo.models.registry import classifier_of, create_model, find_model
from zoo.training.strategy import (
    layer_groups,
    make_optimizer,
    make_scheduler,
    phases,
    set_trained,
    trained_names,
)

NETS = ["simple_cnn", "test_resnet", "test_efficientnet", "resnet18", "mobilenetv3_small_050", "test_vit"]


def net(name: str):
    spec = find_model(name)
    with torch.device("meta"):
        return create_model(spec, 3, image_size=spec.preprocessing.image_size)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"strategy": "full", "epochs": 5}, [("network", 1, 5)]),
        ({"strategy": "linear-probe", "epochs": 5, "policy": "none"}, [("head", 1, 5)]),
        ({"strategy": "lp-ft", "epochs": 12}, [("head", 1, 3), ("network", 4, 9)]),
        ({"strategy": "gradual", "epochs": 6, "head_epochs": 5}, [("head", 1, 5), ("network", 6, 1)]),
        ({"strategy": "lp-ft", "epochs": 2}, [("head", 1, 1), ("network", 2, 1)]),
    ],
)
def test_phases_cover_every_epoch_once(make_recipe, overrides, expected):
    found = phases(make_recipe(**overrides))
    assert [(each.name, each.first_epoch, each.epochs) for each in found] == expected


@pytest.mark.parametrize("name", NETS)
def test_stages_hold_every_parameter_once_with_the_head_first(name):
    model = net(name)
    groups = layer_groups(model)
    names = [each for group in groups for each in group]
    assert sorted(names) == sorted(each for each, _ in model.named_parameters())
    head, classifier = classifier_of(model)
    assert sorted(groups[0]) == sorted(f"{head}.{each}" for each, _ in classifier.named_parameters())
    assert len(groups) > 2


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("epochs", [1, 2, 3, 8, 20])
def test_gradual_opens_from_the_head_down_and_all_for_the_last_half(make_recipe, name, epochs):
    model = net(name)
    recipe = make_recipe(strategy="gradual", epochs=epochs + 2, head_epochs=2)
    phase = phases(recipe)[1]
    every = {each for each, _ in model.named_parameters()}
    before: set[str] = set()
    for epoch in range(phase.first_epoch, phase.first_epoch + phase.epochs):
        opened = trained_names(model, recipe, phase, epoch)
        opened = every if opened is None else opened
        assert before <= opened
        if epoch - phase.first_epoch >= max(1, phase.epochs // 2):
            assert opened == every
        before = opened
    first = trained_names(model, recipe, phase, phase.first_epoch)
    if first is not None:
        assert set(layer_groups(model)[0]) < first
    assert trained_names(model, make_recipe(), phase, 1) is None


def test_frozen_layers_keep_their_batch_statistics():
    model = create_model(find_model("test_resnet"), 3, image_size=32)
    names = set(layer_groups(model)[0])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    set_trained(model, names)
    assert {name for name, each in model.named_parameters() if each.requires_grad} == names
    model(torch.randn(4, 3, 32, 32)).sum().backward()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    set_trained(model, None)
    assert all(each.requires_grad for each in model.parameters()) and all(each.training for each in model.modules())
    model(torch.randn(4, 3, 32, 32))
    assert not all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["adamw", "sgd", "adam", "lamb", "nadamw", "rmsprop"])
def test_every_optimiser_is_made_over_every_parameter(make_recipe, name):
    model = net("simple_cnn")
    optimizer = make_optimizer(model, make_recipe(optimizer__name=name, weight_decay=0.1))
    held = [each for group in optimizer.param_groups for each in group["params"]]
    assert {id(each) for each in held} == {id(each) for each in model.parameters()}
    undecayed = [each for group in optimizer.param_groups if not group["weight_decay"] for each in group["params"]]
    assert undecayed and all(each.ndim <= 1 for each in undecayed)


def test_layer_decay_lowers_the_rate_towards_the_stem(make_recipe):
    model = net("resnet18")
    optimizer = make_optimizer(model, make_recipe(layer_decay=0.5))
    scales = {id(each): group["lr_scale"] for group in optimizer.param_groups for each in group["params"]}
    named = dict(model.named_parameters())
    assert scales[id(named["fc.weight"])] == 1.0
    assert scales[id(named["conv1.weight"])] < scales[id(named["layer1.0.conv1.weight"])] < 0.5


def rates(recipe, epochs, updates, name="simple_cnn"):
    optimizer = make_optimizer(net(name), recipe)
    scheduler = make_scheduler(optimizer, recipe, epochs, updates)
    found = [max(group["lr"] for group in optimizer.param_groups)]
    for step in range(1, epochs * updates):
        scheduler.step_update(step)
        found.append(max(group["lr"] for group in optimizer.param_groups))
    return found


def test_the_rate_warms_up_then_falls_as_a_cosine(make_recipe):
    found = rates(make_recipe(epochs=10, lr=1e-2, warmup_epochs=2), 10, 5)
    assert found[0] == pytest.approx(1e-4)
    assert all(a < b for a, b in pairwise(found[:11]))
    assert max(found) <= 1e-2 * (1 + 1e-9)
    assert all(a >= b for a, b in pairwise(found[11:]))
    assert found[-1] < 1e-4


def test_the_shape_is_the_schedule_s(make_recipe):
    constant = rates(make_recipe(epochs=4, lr=1e-2, schedule__name="constant"), 4, 5)
    assert constant == pytest.approx([1e-2] * 20)
    linear = rates(make_recipe(epochs=4, lr=1e-2, schedule__name="linear"), 4, 5)
    assert linear == pytest.approx([1e-2 * (1 - step / 20) for step in range(20)])
    floored = rates(make_recipe(epochs=4, lr=1e-2, min_lr=0.1), 4, 5)
    assert floored == pytest.approx([1e-3 + 9e-3 * (1 + math.cos(math.pi * step / 20)) / 2 for step in range(20)])
    decayed = rates(make_recipe(epochs=4, lr=1e-2, layer_decay=0.5), 4, 5)
    assert decayed[0] == pytest.approx(1e-2)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_layer_decay_scales_a_layer_s_whole_schedule(make_recipe, name):
    asked = {"epochs": 6, "lr": 1e-2, "warmup_epochs": 2, "min_lr": 0.1, "schedule__name": name}
    recipe = make_recipe(layer_decay=0.5, **asked)
    optimizer = make_optimizer(net("simple_cnn"), recipe)
    scheduler = make_scheduler(optimizer, recipe, 6, 5)
    for step, whole in enumerate(rates(make_recipe(**asked), 6, 5)):
        scheduler.step_update(step)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(whole * group["lr_scale"])
    assert min(group["lr_scale"] for group in optimizer.param_groups) < 0.1
