from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from zoo.data.cache import open_pixels
from zoo.data.manifest import load_dataset
from zoo.runs import find_run, list_runs
from zoo.training.features import StandardisedHead, forward_pixels, split_features
from zoo.training.loop import train
from zoo.training.plan import make_plan
from zoo.training.precision import PrecisionPlan

CPU = torch.device("cpu")
FLOAT32 = PrecisionPlan("float32", channels_last=True)


@pytest.mark.parametrize("model", ["simple_cnn", "test_resnet", "test_efficientnet", "mobilenetv3_small_050"])
def test_features_are_what_the_classifier_gets(tiny, make_recipe, model):
    from zoo.models.registry import classifier_of

    plan = make_plan(make_recipe(model__name=model), "tiny", 0, tiny)
    pixels = open_pixels(plan.dataset, "val", plan.preprocessing)
    net = plan.model()[0]
    values, logits = forward_pixels(net, pixels, plan.preprocessing, FLOAT32, CPU)
    assert values.shape[0] == logits.shape[0] == 9 and logits.shape[1] == 3
    assert values.dtype == logits.dtype == torch.float32
    with torch.inference_mode():
        torch.testing.assert_close(classifier_of(net)[1](values), logits, rtol=1e-5, atol=1e-5)
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_features_of_pretrained_weights_are_kept_those_of_random_ones_are_not(trained, make_recipe):
    source = next(run for run in list_runs(trained) if "--tiny--s0" in run.name)
    cache = load_dataset("tiny", trained).folder / ".cache"
    before = set(cache.glob("features-*"))
    assert before == set()  # tiny-lp had random weights
    probe = {"strategy": "linear-probe", "policy": "none"}
    first = train(make_recipe("one", weights=source.name, **probe), "tiny", 0, trained)
    made = {file: file.stat().st_mtime_ns for file in cache.glob("features-*")}
    assert len(made) == 4  # train and val, each an array and its record
    second = train(make_recipe("two", weights=source.name, **probe), "tiny", 0, trained)
    assert {file: file.stat().st_mtime_ns for file in cache.glob("features-*")} == made
    assert first.weights_file.read_bytes() == second.weights_file.read_bytes()
    for file in made:  # a cut-off one is made again
        file.write_bytes(file.read_bytes()[:100])
    third = train(make_recipe("three", weights=source.name, **probe), "tiny", 0, trained)
    assert first.weights_file.read_bytes() == third.weights_file.read_bytes()


def test_kept_features_charge_what_they_cost(trained, make_recipe):
    source = next(run for run in list_runs(trained) if "--tiny--s0" in run.name)
    plan = make_plan(make_recipe(weights=source.name), "tiny", 0, trained)
    pixels = open_pixels(plan.dataset, "train", plan.preprocessing)
    found = [split_features(plan.model()[0], pixels, "train", plan, FLOAT32, CPU) for _ in range(2)]
    assert found[0].seconds == found[1].seconds > 0
    assert torch.equal(found[0].values, found[1].values)
    assert found[0].y_true.tolist() == pixels.y_true.tolist()


def test_a_probe_leaves_the_backbone_as_it_was(trained, make_recipe):
    from safetensors.torch import load_file

    source = next(run for run in list_runs(trained) if "--tiny--s0" in run.name)
    recipe = make_recipe("probe", weights=source.name, strategy="linear-probe", policy="none", epochs=5)
    run = train(recipe, "tiny", 0, trained)
    before, after = load_file(source.weights_file), load_file(find_run(run.name, trained).weights_file)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and len({key.rsplit(".", 1)[0] for key in changed}) == 1
    assert run.record.params_trained == sum(before[key].numel() for key in changed)


@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_head_is_the_same_function(bias):
    torch.manual_seed(0)
    values = torch.randn(50, 6) * torch.tensor([1e-3, 1, 10, 100, 1, 1]) + 5
    values[:, 5] = 3.0  # a feature that never varies
    linear = nn.Linear(6, 3, bias=bias)
    before = linear(values).detach()
    head = StandardisedHead(linear, values)
    torch.testing.assert_close(head(values).detach(), before, rtol=1e-3, atol=1e-3)
    state = head.fold()
    folded = nn.functional.linear(values, state["weight"], state["bias"])
    torch.testing.assert_close(folded, head(values).detach(), rtol=1e-3, atol=1e-3)
    scaled = (values - head.mean) / head.scale
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-2)
    np.testing.assert_allclose(scaled.var(0, correction=0).mean(), 1, rtol=1e-3)
    assert torch.isfinite(scaled).all()


def test_a_head_that_is_no_linear_layer_is_not_scaled():
    values = torch.randn(5, 4, 2, 2)
    conv = nn.Sequential(nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head = StandardisedHead(conv, values)
    assert torch.equal(head(values), conv(values))
    assert head.fold().keys() == conv.state_dict().keys()
