from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from torch import nn

from zoo.data.cache import open_pixels
from zoo.data.manifest import load_dataset
from zoo.errors import ZooError
from zoo.files import sha256_file
from zoo.models.registry import classifier_of
from zoo.runs import find_run, list_runs
from zoo.training import features as module
from zoo.training.features import (
    StandardisedHead,
    backbone_digest,
    forward_pixels,
    head_logits,
    load_grown,
    split_features,
)
from zoo.training.loop import train
from zoo.training.plan import make_plan
from zoo.training.precision import PrecisionPlan

CPU = torch.device("cpu")
FLOAT32 = PrecisionPlan("float32", channels_last=True)


@pytest.mark.parametrize("model", ["simple_cnn", "test_resnet", "test_efficientnet", "mobilenetv3_small_050"])
def test_features_are_what_the_classifier_gets(tiny, make_recipe, model):
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


@pytest.mark.parametrize("bias", [True, False])
def test_a_1_x_1_convolution_is_the_linear_layer_that_it_is(bias):
    torch.manual_seed(0)
    values = torch.randn(50, 6, 1, 1) * 10 + 5
    conv = nn.Conv2d(6, 3, 1, bias=bias)
    before = conv(values).flatten(1).detach()
    head = StandardisedHead(conv, values)
    assert head.scaled and head(values).shape == (50, 3)
    torch.testing.assert_close(head(values).detach(), before, rtol=1e-3, atol=1e-3)
    whole = nn.ModuleDict({"fc": nn.Conv2d(6, 3, 1, bias=bias)})
    load_grown(whole, {f"fc.{key}": value for key, value in head.fold().items()})
    torch.testing.assert_close(whole["fc"](values).flatten(1), before, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["linear-probe", "lp-ft"])
@pytest.mark.parametrize("model", ["resnetv2_18", "dpn48b"])
def test_networks_whose_classifier_is_a_convolution_are_probed(tiny, make_recipe, model, strategy):
    from zoo.training.scoring import load_model, predictions_of

    head = {"head_epochs": 1} if strategy == "lp-ft" else {"policy": "none"}
    recipe = make_recipe(model__name=model, image_size=64, strategy=strategy, epochs=2, batch_size=6, **head)
    plan = make_plan(recipe, "tiny", 0, tiny)
    pixels = open_pixels(plan.dataset, "val", plan.preprocessing)
    assert split_features(plan.model()[0], pixels, "val", plan, FLOAT32, CPU).whole
    run = train(recipe, "tiny", 0, tiny)
    _, wanted = forward_pixels(load_model(run, tiny), pixels, plan.preprocessing, FLOAT32, CPU)
    np.testing.assert_allclose(predictions_of(run, "val").logits, wanted.numpy(), rtol=1e-3, atol=1e-4)
    assert wanted.std(0).min() > 0


def test_a_head_that_is_no_linear_layer_is_not_scaled():
    values = torch.randn(5, 4, 2, 2)
    conv = nn.Sequential(nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head = StandardisedHead(conv, values)
    assert torch.equal(head(values), conv(values))
    assert head.fold().keys() == conv.state_dict().keys()


NAMES = ["simple_cnn", "test_resnet", "test_efficientnet", "test_vit", "mobilenetv3_small_050"]
BF16 = PrecisionPlan("bf16", channels_last=True)


def trained_head(net: nn.Module, scale: float = 0.3) -> nn.Module:
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in classifier_of(net)[1].parameters():
            parameter.copy_(scale * torch.randn(parameter.shape))
    return net


@pytest.mark.parametrize("precision", [FLOAT32, BF16, PrecisionPlan("float32", channels_last=False)])
@pytest.mark.parametrize("model", NAMES)
def test_a_head_on_features_gives_the_logits_of_the_whole_network(tiny, make_recipe, model, precision):
    size = {"test_vit": 160}.get(model, 32)
    plan = make_plan(make_recipe(model__name=model, model__image_size=size), "tiny", 0, tiny)
    pixels = open_pixels(plan.dataset, "train", plan.preprocessing)
    net = trained_head(plan.model()[0].to(memory_format=precision.memory_format))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    found = split_features(net, pixels, "train", plan, precision, CPU)
    assert found.whole and found.values.dtype == torch.float32 and len(found.values) == 18
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    _, wanted = forward_pixels(net, pixels, plan.preprocessing, precision, CPU)
    logits = head_logits(classifier_of(net)[1], found, precision, CPU)
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(logits, head_logits(classifier_of(net)[1], found, precision, CPU))
    assert wanted.std(0).min() > 0


class Odd(nn.Module):
    """A network whose logits are no plain output of its classifier; `kind` says in which way."""

    def __init__(self, num_classes: int, kind: str) -> None:
        super().__init__()
        self.kind, self.stem, self.fc = kind, nn.Conv2d(3, 4, 3, stride=4), nn.Linear(4, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = self.stem(x).mean((2, 3))
        if self.kind == "twice":
            return self.fc(values) + self.fc(-values)
        return torch.tanh(self.fc(values))  # of a head that starts at zero, the same as the classifier's output


@pytest.fixture
def odd():
    from zoo.models.registry import own_models, register_model

    def build(kind: str):
        return lambda num_classes: Odd(num_classes, kind)

    for kind in ("tanh", "twice"):
        register_model(f"odd_{kind}", image_size=32)(build(kind))
    yield
    for kind in ("tanh", "twice"):
        own_models.pop(f"odd_{kind}")


def test_a_network_that_changes_its_classifiers_output_is_scored_whole(odd, trained, make_recipe, tmp_path):
    from safetensors.torch import save_file

    from zoo.training.scoring import evaluate, load_model, predictions_of

    save_file(Odd(3, "tanh").state_dict(), tmp_path / "odd.safetensors")
    recipe = make_recipe(
        "odd",
        model__name="odd_tanh",
        model__weights=str(tmp_path / "odd.safetensors"),
        finetune__strategy="linear-probe",
        augment__policy="none",
        device="cpu",
    )
    plan = make_plan(recipe, "tiny", 0, trained)
    pixels = open_pixels(plan.dataset, "train", plan.preprocessing)
    model, _ = plan.model()
    for _ in range(2):  # computed, and read again
        found = split_features(model, pixels, "train", plan, FLOAT32, CPU)
        assert not found.whole
    with pytest.raises(ValueError, match="do not give the network's logits"):
        head_logits(classifier_of(model)[1], found, FLOAT32, CPU)
    run = train(recipe, "tiny", 0, trained)
    evaluate(run, "test", trained)
    pixels = open_pixels(plan.dataset, "test", plan.preprocessing)
    _, wanted = forward_pixels(load_model(run, trained), pixels, plan.preprocessing, FLOAT32, CPU)
    np.testing.assert_array_equal(predictions_of(run, "test").logits, wanted.numpy())
    pixels = open_pixels(plan.dataset, "val", plan.preprocessing)
    _, wanted = forward_pixels(load_model(run, trained), pixels, plan.preprocessing, FLOAT32, CPU)
    np.testing.assert_array_equal(predictions_of(run, "val").logits, wanted.numpy())


def test_a_classifier_that_is_used_twice_is_refused(odd, trained, make_recipe):
    recipe = make_recipe("odd", model__name="odd_twice", finetune__strategy="linear-probe", augment__policy="none")
    with pytest.raises(ZooError, match=r"Odd uses its classifier more than once .*strategy = 'full'"):
        train(recipe, "tiny", 0, trained)


def probe_of(trained, make_recipe, name="probe"):
    source = next(run for run in list_runs(trained) if "--tiny--s0" in run.name)
    return make_recipe(name, weights=source.name, strategy="linear-probe", policy="none", epochs=3)


def test_no_pixel_goes_through_a_backbone_twice(trained, make_recipe, monkeypatch):
    from zoo.training.scoring import evaluate, predictions_of

    passes = []
    whole = module._each_batch

    def counted(model, pixels, *rest):
        passes.append(pixels.source.split)
        whole(model, pixels, *rest)

    monkeypatch.setattr(module, "_each_batch", counted)
    runs = [train(probe_of(trained, make_recipe), "tiny", seed, trained) for seed in (0, 1)]
    runs.append(train(probe_of(trained, make_recipe, "other"), "tiny", 0, trained))
    assert passes == ["train", "val"]
    for run in runs:
        evaluate(run, "test", trained)
    assert passes == ["train", "val", "test"]
    monkeypatch.undo()
    for run in runs:
        stored = {split: predictions_of(run, split).logits for split in ("val", "test")}
        for file in load_dataset("tiny", trained).folder.glob(".cache/features-*"):
            file.unlink()
        for split, logits in stored.items():
            run.metrics_file(split).unlink()
            evaluate(run, split, trained)
            np.testing.assert_allclose(predictions_of(run, split).logits, logits, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(predictions_of(run, "test").logits, stored["test"])


def test_where_nothing_is_kept_the_bits_are_the_same(trained, make_recipe, monkeypatch):
    from zoo.training.scoring import evaluate

    recipe = probe_of(trained, make_recipe)
    files = [
        make_plan(recipe, "tiny", 0, trained).run.path / name
        for name in ("weights.safetensors", "predictions-test.npz")
    ]
    found = []
    for limit in ("0", "50"):
        monkeypatch.setenv("ZOO_CACHE_GB", limit)
        run = train(recipe, "tiny", 0, trained)
        evaluate(run, "test", trained)
        kept = list(load_dataset("tiny", trained).folder.glob(".cache/features-*"))
        assert bool(kept) == (limit != "0")
        found.append([file.read_bytes() for file in files])
        shutil.rmtree(run.path)
    assert found[0] == found[1]


@pytest.mark.parametrize("place", [0.3, 0.6, 0.999])
def test_one_flipped_byte_of_features_is_never_taken(trained, make_recipe, place):
    plan = make_plan(probe_of(trained, make_recipe), "tiny", 0, trained)
    pixels = open_pixels(plan.dataset, "train", plan.preprocessing)
    first = split_features(plan.model()[0], pixels, "train", plan, FLOAT32, CPU)
    values = first.values.clone()
    file = next(plan.dataset.folder.glob(".cache/features-train-*.npy"))
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 1
    file.write_bytes(data)
    again = split_features(plan.model()[0], pixels, "train", plan, FLOAT32, CPU)
    assert torch.equal(again.values, values)
    assert file.read_bytes() != bytes(data)


def test_features_of_another_backbone_are_never_taken(trained, make_recipe):
    from safetensors.torch import load_file, save_file

    from zoo.training.scoring import evaluate, load_model, predictions_of

    run = train(probe_of(trained, make_recipe).model_copy(update={"device": "cpu"}), "tiny", 0, trained)
    evaluate(run, "test", trained)
    before = predictions_of(run, "test").logits
    state = load_file(run.weights_file)
    name = next(key for key in state if key.startswith("stages.0") and key.endswith("weight"))
    state[name].view(-1)[0] += 1.0  # somebody has changed one number of the backbone
    save_file(state, run.weights_file)
    run.metrics_file("test").unlink()
    with pytest.raises(ZooError, match="were changed after the run had ended"):
        evaluate(run, "test", trained)
    run.write_record(run.record.model_copy(update={"weights_sha256": sha256_file(run.weights_file)}))
    evaluate(run, "test", trained)
    pixels = open_pixels(load_dataset("tiny", trained), "test", run.record.preprocessing)
    _, wanted = forward_pixels(load_model(run, trained), pixels, run.record.preprocessing, FLOAT32, CPU)
    np.testing.assert_allclose(predictions_of(run, "test").logits, wanted.numpy(), rtol=1e-5, atol=1e-6)
    assert not np.allclose(before, wanted.numpy(), rtol=1e-4)


def test_the_backbones_digest_knows_every_tensor_but_the_heads():
    torch.manual_seed(0)
    state = {"a.weight": torch.randn(2, 3), "a.count": torch.tensor(3), "fc.weight": torch.randn(3, 2)}
    first = backbone_digest(state, "fc")
    assert first == backbone_digest({**state, "fc.weight": torch.zeros(1), "fc.bias": torch.ones(3)}, "fc")
    assert first == backbone_digest({**state, "a.weight": state["a.weight"].t().contiguous().t()}, "fc")
    for change in (
        {"a.count": torch.tensor(4)},
        {"a.weight": state["a.weight"].reshape(3, 2)},
        {"fcs.x": torch.ones(1)},
    ):
        assert backbone_digest({**state, **change}, "fc") != first
    assert backbone_digest({**state, "a.weight": state["a.weight"].double()}, "fc") != first


def test_progress_is_told_and_may_end_the_pass(trained, make_recipe):
    plan = make_plan(probe_of(trained, make_recipe), "tiny", 0, trained)
    pixels = open_pixels(plan.dataset, "train", plan.preprocessing)

    def stop(done: int, total: int) -> None:
        assert (done, total) == (18, 18)
        raise KeyboardInterrupt

    model = trained_head(plan.model()[0])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        split_features(model, pixels, "train", plan, FLOAT32, CPU, stop)
    assert not list(plan.dataset.folder.glob(".cache/features-*"))
    assert not list(plan.dataset.folder.glob(".cache/.features-*.npy.*"))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
