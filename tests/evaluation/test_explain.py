import numpy as np
import pytest
import timm
import torch
from captum.attr import LayerGradCam
from torch import nn

from zoo.errors import ZooError
from zoo.evaluation.explain import activation_maps, paint_over
from zoo.evaluation.heat import overlay
from zoo.models.registry import create_model, find_model

# Where captum finds the map that `forward_features` gives; None: the layer before the network's pooling is found by us.
LAYERS = {
    "test_resnet": "layer4",
    "resnet18": "layer4",
    "test_efficientnet": "bn2",
    "mobilenetv3_small_050": "blocks",
    "test_convnext": "norm_pre",
}


def made(name, size=64, classes=3, seed=0, **options):
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=classes, **options).eval()
    for module in model.modules():  # a fresh network's head is too small to say anything
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.2)
    return model, torch.randn(4, 3, size, size)


def scaled(maps):
    maps = maps.relu().squeeze(1)
    return maps / maps.amax(dim=(1, 2), keepdim=True).clamp_min(1e-30)


@pytest.mark.parametrize(("name", "layer"), LAYERS.items())
def test_of_convolutions_it_is_captums_grad_cam(name, layer):
    model, images = made(name, 96)
    targets = torch.tensor([0, 1, 2, 1])
    expected = scaled(LayerGradCam(model, model.get_submodule(layer)).attribute(images, targets).detach())
    found = activation_maps(model, images, targets)
    assert found.shape == expected.shape and found.amax() == 1
    assert torch.allclose(found, expected, atol=1e-4)
    others = activation_maps(model, images, (targets + 1) % 3)
    assert not torch.allclose(found, others, atol=0.05)  # another class, another map


def test_of_a_network_that_is_not_timms_it_is_captums_grad_cam_too():
    torch.manual_seed(0)
    own = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 3),
    ).eval()
    images, targets = torch.randn(3, 3, 32, 32), torch.tensor([2, 0, 1])
    expected = scaled(LayerGradCam(own, own[3]).attribute(images, targets).detach())
    assert torch.allclose(activation_maps(own, images, targets), expected, atol=1e-5)
    simple = create_model(find_model("simple_cnn"), 3, image_size=64).eval()
    maps = activation_maps(simple, torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))
    assert maps.shape[0] == 2 and min(maps.shape[1:]) > 1


def test_of_a_class_token_it_is_grad_cam_at_the_last_block_s_first_norm():
    model, images = made("test_vit", 160)
    targets = torch.tensor([0, 1, 2, 1])
    block = model.blocks[-1]
    with torch.no_grad():
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        for each in model.blocks[:-1]:
            tokens = each(tokens)
        normed = block.norm1(tokens)
    normed = normed.clone().requires_grad_()
    # By hand: the block's two halves, then the last norm and the head.
    after = tokens + block.drop_path1(block.ls1(block.attn(normed)))
    after = after + block.drop_path2(block.ls2(block.mlp(block.norm2(after))))
    model.forward_head(model.norm(after)).gather(1, targets[:, None]).sum().backward()
    weights = normed.grad[:, model.num_prefix_tokens :].mean(dim=1, keepdim=True)
    expected = (weights * normed.detach()[:, model.num_prefix_tokens :]).sum(2).reshape(4, 1, 10, 10)
    assert torch.allclose(activation_maps(model, images, targets), scaled(expected), atol=1e-4)


def test_of_pooled_tokens_it_is_grad_cam_of_the_final_ones():
    model, images = made("test_vit", 160, global_pool="avg")
    targets = torch.tensor([0, 1, 2, 1])
    tokens = model.forward_features(images).detach().requires_grad_()
    model.forward_head(tokens).gather(1, targets[:, None]).sum().backward()
    weights = tokens.grad[:, model.num_prefix_tokens :].mean(dim=1, keepdim=True)
    expected = (weights * tokens.detach()[:, model.num_prefix_tokens :]).sum(2).reshape(4, 1, 10, 10)
    assert torch.allclose(activation_maps(model, images, targets), scaled(expected), atol=1e-4)


@pytest.mark.parametrize("name", ["test_vit", "test_vit3", "test_resnet", "mixer_s32_224", "levit_128s"])
def test_a_map_is_more_than_rounding(name):
    # What cancels but for rounding comes out otherwise in float64.
    model, images = made(name, 224 if "_224" in name or "levit" in name else 160)
    targets = torch.tensor([0, 1, 2, 1])
    single = activation_maps(model, images, targets)
    assert torch.allclose(single, activation_maps(model.double(), images.double(), targets), atol=5e-3)
    assert single.any()


@pytest.mark.parametrize(
    "name", ["test_mambaout", "test_nfnet", "test_byobnet", "test_vit3", "mixer_s32_224", "levit_128s"]
)
def test_other_families_have_a_map_with_places(name):
    size = 224 if "_224" in name or "levit" in name else 160
    model, images = made(name, size)
    maps = activation_maps(model, images[:2], torch.tensor([0, 2]))
    assert maps.ndim == 3 and min(maps.shape[1:]) > 1
    assert maps.min() >= 0 and all(float(each.amax()) in (0.0, 1.0) for each in maps)


def squares(rng, count, size=64):
    """Noise with a square of 16 pixels that is red or blue, which is the class."""
    images = 0.2 * rng.standard_normal((count, 3, size, size)).astype(np.float32)
    labels, places = rng.integers(0, 2, count), rng.integers(0, size - 16, (count, 2))
    for image, label, (y, x) in zip(images, labels, places, strict=True):
        image[2 * label, y : y + 16, x : x + 16] += 2
    return torch.from_numpy(images), torch.from_numpy(labels), places


@pytest.mark.slow
def test_the_map_of_a_trained_network_lies_on_what_decides():
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 16, 5, 2, 2), nn.ReLU(),
        nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(60):
        images, labels, _ = squares(rng, 32)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    images, labels, places = squares(rng, 60)
    model.eval()
    assert (model(images).argmax(1) == labels).float().mean() > 0.95
    maps = activation_maps(model, images, labels)
    hits = 0
    for each, (y, x) in zip(maps, places, strict=True):
        row, column = np.unravel_index(int(each.argmax()), each.shape)
        hits += y - 4 <= 4 * row + 2 <= y + 20 and x - 4 <= 4 * column + 2 <= x + 20
    assert hits / 60 >= 0.9


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training):
    for name in ("test_resnet", "test_vit"):
        model, images = made(name, 160)
        model.train(training)
        next(model.parameters()).requires_grad_(False)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        flags = [parameter.requires_grad for parameter in model.parameters()]
        with torch.no_grad():  # as callers who score may have it
            activation_maps(model, images[:2], torch.tensor([0, 1]))
        assert model.training is training
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert [parameter.requires_grad for parameter in model.parameters()] == flags
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_part_that_is_frozen_stays_so_and_inference_mode_is_no_hindrance():
    model, images = made("test_resnet", 96)
    model.train()
    frozen = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    frozen.eval()
    expected = activation_maps(model, images, torch.tensor([0, 1, 2, 1]))
    assert model.training and not frozen.training
    with torch.inference_mode():
        made_there, targets = images.clone(), torch.tensor([0, 1, 2, 1])
        assert torch.equal(activation_maps(model, made_there, targets), expected)


def test_a_network_without_a_map_is_refused():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2))
    with pytest.raises(ZooError, match=r"Sequential keeps no map of its image.*explain a network with"):
        activation_maps(flat, torch.zeros(1, 3, 16, 16), torch.tensor([0]))


def test_a_map_of_nothing_stays_nothing():
    own = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    nn.init.zeros_(own[3].weight)
    assert not activation_maps(own, torch.randn(1, 3, 16, 16), torch.tensor([1])).any()


def test_an_overlay_changes_what_is_warm_alone():
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    assert np.array_equal(overlay(image, np.zeros((5, 5))), image)
    heat = np.zeros((5, 5))
    heat[0, 0] = 1
    warm = overlay(image, heat)
    assert warm.dtype == np.uint8 and warm.shape == image.shape
    assert (warm[:4, :4] != image[:4, :4]).any() and np.array_equal(warm[20:, 20:], image[20:, 20:])


@pytest.mark.parametrize("side", [32, 33, 96, 224])
def test_each_part_that_is_painted_over_is_half_of_the_image(side):
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    centre, border = paint_over(image, "centre"), paint_over(image, "border")
    middle = side // 2
    mean = image.reshape(-1, 3).mean(axis=0).round()
    assert np.array_equal(centre[middle, middle], mean) and np.array_equal(border[0, 0], mean)
    assert np.array_equal(centre[0], image[0]) and np.array_equal(border[middle, middle], image[middle, middle])
    share = (centre != image).any(axis=2).mean()
    assert share == pytest.approx(0.5, abs=0.04)
    assert (border != image).any(axis=2).mean() == pytest.approx(1 - share, abs=0.02)
