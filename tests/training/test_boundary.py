from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from zoo.data.cache import open_pixels
from zoo.data.loader import epoch_order, fixed_batches
from zoo.models.registry import create_model, find_model
from zoo.training.boundary import Boundary, find_boundary
from zoo.training.features import forward_pixels
from zoo.training.plan import make_plan
from zoo.training.precision import PrecisionPlan
from zoo.training.speed import to_input
from zoo.training.strategy import layer_groups, set_trained

CPU = torch.device("cpu")
FLOAT32 = PrecisionPlan("float32", channels_last=True)
BF16 = PrecisionPlan("bf16", channels_last=True)
NAMES = ["test_resnet", "test_efficientnet", "test_vit", "mobilenetv3_small_050", "simple_cnn"]
SIZES = {"test_vit": 160}


def build(name: str, stages: int, **options) -> tuple[nn.Module, torch.Tensor]:
    """Return a network whose first coarse stages are frozen as training freezes them, and a batch for it."""
    torch.manual_seed(1)
    size = SIZES.get(name, 64)
    model = create_model(find_model(name), 3, image_size=size, **options).to(memory_format=torch.channels_last)
    for buffer in model.buffers():  # batch statistics as training leaves them
        if buffer.is_floating_point() and buffer.ndim == 1:
            buffer.add_(0.1 * torch.rand_like(buffer))
    groups = layer_groups(model)
    set_trained(model, {parameter for group in groups[: len(groups) - stages] for parameter in group})
    return model, FLOAT32.place(torch.randn(4, 3, size, size))


def rest_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.clone() for name, each in model.state_dict().items()}


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_the_rest_trains_as_the_whole_network_does_to_the_last_bit(name, stages):
    model, images = build(name, stages, **({} if name == "simple_cnn" else {"drop_rate": 0.2}))
    before, modes = rest_of(model), [module.training for module in model.modules()]
    found = find_boundary(model, images, FLOAT32, CPU)
    assert found is not None and 0 < found.macs < found.total_macs
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    other = copy.deepcopy(model)
    activations = activations_of(model, found, images)
    labels = torch.tensor([0, 1, 2, 1])
    for net, replayed in ((model, False), (other, True)):
        optimizer = torch.optim.SGD([each for each in net.parameters() if each.requires_grad], lr=0.1)
        for step in range(3):
            torch.manual_seed(step)
            if replayed:
                with found.replay(net):
                    loss = nn.functional.cross_entropy(net(activations.clone()), labels)
            else:
                loss = nn.functional.cross_entropy(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    gradients = [{name: each.grad for name, each in net.named_parameters()} for net in (model, other)]
    assert any(each is not None and each.any() for each in gradients[0].values())
    for key, gradient in gradients[0].items():
        assert (gradient is None) == (gradients[1][key] is None)
        assert gradient is None or torch.equal(gradient, gradients[1][key]), key
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    assert all("forward" not in vars(module) for module in other.modules())


def activations_of(model: nn.Module, found: Boundary, images: torch.Tensor) -> torch.Tensor:
    caught = []
    evaluating = copy.deepcopy(model).eval()
    evaluating.get_submodule(found.module).register_forward_hook(lambda *each: caught.append(each[2].clone()))
    with torch.no_grad():
        evaluating(images)
    return caught[0]


@pytest.mark.parametrize(
    ("name", "stages", "module", "skips"),
    [
        ("test_resnet", 2, "layer1", True),
        ("test_efficientnet", 2, "blocks.0", True),
        ("test_vit", 3, "blocks.1", True),
        ("simple_cnn", 2, "stages.0", True),
    ],
)
def test_the_boundary_is_the_end_of_the_last_frozen_stage(name, stages, module, skips):
    model, images = build(name, stages)
    found = find_boundary(model, images, FLOAT32, CPU)
    assert found is not None and found.module == module
    assert bool(found.skipped) == skips


def test_the_frozen_part_is_not_run_again():
    model, images = build("test_resnet", 3)
    found = find_boundary(model, images, FLOAT32, CPU)
    assert found is not None
    activations = activations_of(model, found, images)
    with torch.no_grad():
        for name in found.ran:  # what is frozen is spoilt
            for parameter in model.get_submodule(name).parameters(recurse=False) if name else []:
                parameter.fill_(torch.nan)
    model.eval()
    with torch.no_grad(), found.replay(model):
        assert torch.isfinite(model(activations)).all()
    assert torch.isnan(model(images)).any()


def test_nothing_frozen_or_nothing_trained_has_no_boundary():
    model, images = build("test_resnet", 0)
    assert find_boundary(model, images, FLOAT32, CPU) is None
    set_trained(model, set())
    assert find_boundary(model, images, FLOAT32, CPU) is None


def test_a_frozen_part_that_draws_at_random_ends_before_it():
    class Drops(nn.Module):
        def __init__(self, rate: float) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3)
            self.drop = nn.Dropout(rate)
            self.mid = nn.Conv2d(4, 4, 3)
            self.fc = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.mid(self.drop(self.stem(x))).mean((2, 3)))

    images = torch.randn(4, 3, 16, 16)
    for rate, module in ((0.0, "mid"), (1e-6, "stem")):  # so rare that one batch would hardly show it
        model = Drops(rate)
        set_trained(model, {"fc.weight", "fc.bias"})
        found = find_boundary(model, images, FLOAT32, CPU)
        assert found is not None and found.module == module


def test_statistics_of_the_batch_are_no_frozen_part():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    model.append(nn.Linear(4, 3))
    set_trained(model, {"5.weight", "5.bias"})
    found = find_boundary(model, torch.randn(4, 3, 16, 16), FLOAT32, CPU)
    assert found is not None and found.module == "0"
    assert not model[1].running_mean.any()  # it has seen no batch


def test_trained_weights_that_a_frozen_module_uses_are_seen():
    class Borrows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.mid, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)
            self.lender = nn.Linear(1, 4)
            self.mid.register_forward_pre_hook(lambda _, inputs: (inputs[0] + self.lender.bias[0],))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.mid(self.stem(x)).mean((2, 3)))

    model = Borrows()
    set_trained(model, {"fc.weight", "fc.bias", "lender.bias"})
    found = find_boundary(model, torch.randn(4, 3, 16, 16), FLOAT32, CPU)
    assert found is not None and found.module == "stem"


def test_a_stage_whose_input_is_used_again_later_is_kept_whole_or_not_at_all():
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.mid = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.late = nn.Conv2d(4, 4, 3, padding=1)
            self.fc = nn.Linear(4, 3)
            nn.init.zeros_(self.late.weight)
            nn.init.zeros_(self.fc.weight)  # all outputs are alike until training begins

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.stem(x)
            return self.fc((self.late(first) + self.mid(first)).mean((2, 3)))

    model = Skips()
    set_trained(model, {name for name, _ in model.named_parameters() if name.startswith(("late", "fc"))})
    found = find_boundary(model, torch.randn(4, 3, 16, 16), FLOAT32, CPU)
    assert found is not None and found.module == "stem"
    assert not model.fc.weight.any() and not model.late.weight.any()


@pytest.mark.parametrize("precision", [FLOAT32, BF16, PrecisionPlan("float32", channels_last=False)])
@pytest.mark.parametrize("name", NAMES)
def test_kept_activations_give_what_the_images_give(trained, make_recipe, tmp_path, name, precision):
    options = {"model__name": name, "model__image_size": SIZES.get(name, 32)}
    plan = make_plan(make_recipe(**options), "tiny", 0, trained)
    pixels = open_pixels(plan.dataset, "train", plan.preprocessing)
    model, _ = build(name, 2)
    model = model.to(memory_format=precision.memory_format)
    batch = next(fixed_batches(pixels, plan.preprocessing.image_size, 4))
    found = find_boundary(model, to_input(batch, plan.preprocessing, precision, CPU), precision, CPU)
    assert found is not None
    seen = []
    kept = found.activations(
        model, pixels, "train", plan, precision, CPU, tmp_path, lambda done, total: seen.append((done, total))
    )
    assert seen == [(18, 18)] and kept.y_true.tolist() == pixels.y_true.tolist()
    _, wanted = forward_pixels(model, pixels, plan.preprocessing, precision, CPU)
    assert torch.equal(found.logits(model, kept, precision, CPU), wanted)
    file = next(tmp_path.glob("boundary-train-*.npy"))
    assert file.stat().st_size - 128 <= 18 * found.bytes_per_image <= file.stat().st_size
    again = found.activations(model, pixels, "train", plan, precision, CPU, tmp_path, lambda *each: seen.append(each))
    assert len(seen) == 1 and torch.equal(again.stored.values, kept.stored.values)
    order = epoch_order(len(kept), 5, 0, 3)
    got = list(kept.batches(order))
    assert [places.tolist() for _, _, places in got] == [list(each) for each in order]
    for activations, labels, places in got:
        assert torch.equal(activations, kept.stored.values[places]) and activations.dtype == found.dtype
        assert torch.equal(labels, kept.y_true[places])
        if activations.ndim == 4:
            assert activations.is_contiguous(memory_format=precision.memory_format)
    with torch.no_grad():
        next(iter(model.parameters())).add_(0.5)  # other frozen weights: other activations
    found.activations(model, pixels, "train", plan, precision, CPU, tmp_path, lambda *each: seen.append(each))
    assert len(seen) == 2


def test_what_pays_follows_from_counts_alone(monkeypatch):
    model, images = build("test_resnet", 3)
    found = find_boundary(model, images, FLOAT32, CPU)
    assert found is not None
    wide = Boundary(**{**vars(found), "macs": 10**9, "total_macs": 2 * 10**9, "shape": (64, 56, 56)})
    assert wide.bytes_per_image == 64 * 56 * 56 * 4
    cuda = torch.device("cuda")
    assert wide.pays(1000, 10, CPU) and not wide.pays(1000, 10, cuda)
    assert not wide.pays(1000, 1, CPU)
    assert not wide.pays(1000, 10, CPU, limit=1000 * wide.bytes_per_image - 1)
    assert wide.pays(1000, 10, CPU, limit=1000 * wide.bytes_per_image)
    assert not Boundary(**{**vars(wide), "macs": 10**7}).pays(10, 10, CPU)
    assert not Boundary(**{**vars(wide), "total_macs": 10**11}).pays(10, 10, CPU)
    monkeypatch.setenv("ZOO_CACHE_GB", "0")
    assert not wide.pays(1000, 10, CPU)
    monkeypatch.setenv("ZOO_CACHE_GB", "inf")
    assert wide.pays(1000, 10, CPU) and not wide.pays((8 << 30) // wide.bytes_per_image + 1, 10, CPU)
