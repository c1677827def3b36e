from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from zoo.data.cache import open_pixels
from zoo.data.loader import fixed_batches
from zoo.data.manifest import load_dataset
from zoo.data.transforms import center_crop, normalise_tensor
from zoo.data.views import VIEWS, views_of
from zoo.recipe import ScoreTable
from zoo.runs import Preprocessing
from zoo.training.features import forward_pixels
from zoo.training.plan import make_plan
from zoo.training.precision import PrecisionPlan
from zoo.training.views import combine, logits_of_views

TTA = list(VIEWS)


def preprocessing(size: int = 32, crop_pct: float = 0.875) -> Preprocessing:
    return Preprocessing(
        image_size=size, crop_pct=crop_pct, interpolation="bicubic", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)
    )


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_every_value_of_the_recipe_has_its_views():
    assert get_args(ScoreTable.model_fields["tta"].annotation) == tuple(TTA)
    assert [len(VIEWS[tta]) for tta in TTA] == [1, 2, 5, 10]


@pytest.mark.parametrize("tta", TTA)
@given(
    size=st.integers(16, 40),
    crop_pct=st.sampled_from([0.7, 0.8, 0.875, 0.9, 0.95, 1.0]),
    longer=st.integers(0, 20),
    upright=st.booleans(),
)
def test_views_are_of_the_networks_size_and_the_first_is_the_centre(tta, size, crop_pct, longer, upright):
    facts = preprocessing(size, crop_pct)
    short = facts.resize_size
    pixels = picture(short + longer, short) if upright else picture(short, short + longer)
    before = pixels.copy()
    views = views_of(pixels, facts, tta)
    assert len(views) == len(VIEWS[tta])
    assert all(view.shape == (size, size, 3) and view.dtype == np.uint8 for view in views)
    assert np.array_equal(views[0], center_crop(pixels, size))
    assert np.array_equal(pixels, before)
    assert len({view.tobytes() for view in views}) == len(views)  # each view says something of its own


@given(size=st.integers(16, 40), crop_pct=st.sampled_from([0.7, 0.8, 0.875]), longer=st.integers(0, 20))
def test_corners_are_the_pixels_themselves_where_the_crop_leaves_room(size, crop_pct, longer):
    facts = preprocessing(size, crop_pct)
    pixels = picture(facts.resize_size, facts.resize_size + longer)
    _, *corners = views_of(pixels, facts, "crops")
    expected = [pixels[:size, :size], pixels[:size, -size:], pixels[-size:, :size], pixels[-size:, -size:]]
    assert all(np.array_equal(*pair) for pair in zip(corners, expected, strict=True))


def test_corners_of_a_whole_image_are_enlarged():
    pixels = picture(32, 32)
    views = dict(zip(VIEWS["crops"], views_of(pixels, preprocessing(32, 1.0), "crops"), strict=True))
    part = Image.fromarray(pixels[4:, :28])
    assert np.array_equal(views["bottom left"], np.asarray(part.resize((32, 32), Image.Resampling.BICUBIC)))


def test_mirrored_views_follow_in_the_same_order():
    pixels = picture(36, 50)
    for tta, plain in (("flip", "none"), ("flip-crops", "crops")):
        views = views_of(pixels, preprocessing(), tta)
        assert np.array_equal(
            np.stack(views[len(views) // 2 :]), np.stack(views_of(pixels, preprocessing(), plain))[:, :, ::-1]
        )
        names = VIEWS[tta]
        assert names[len(names) // 2 :] == tuple(f"{name} mirrored" for name in VIEWS[plain])


def test_combined_logits_have_the_mean_probability():
    logits = 5 * torch.randn(10, 7, 4, generator=torch.Generator().manual_seed(0))
    combined = combine(logits)
    assert combined.dtype == torch.float32 and combined.shape == (7, 4)
    torch.testing.assert_close(torch.softmax(combined, 1), torch.softmax(logits, 2).mean(0))
    assert torch.equal(combine(logits[:1]), logits[0])
    same = combine(torch.stack([logits[0]] * 3))
    torch.testing.assert_close(same, torch.log_softmax(logits[0], 1))


def test_combined_logits_stay_finite_where_views_are_certain():
    logits = torch.tensor([[[900.0, 0, -900]], [[-900.0, 0, 900]]])
    combined = combine(logits)
    assert torch.isfinite(combined).all()
    torch.testing.assert_close(torch.softmax(combined, 1), torch.tensor([[0.5, 0, 0.5]]))


@pytest.fixture
def scored(tiny, make_recipe):
    """A network with random weights, the pixels of a split, and a function from uint8 images to logits."""
    plan = make_plan(make_recipe(model__name="test_resnet"), "tiny", 0, tiny)
    pixels = open_pixels(load_dataset("tiny", tiny), "val", plan.preprocessing)
    model = plan.model()[0].eval()

    def forward(batch: np.ndarray) -> torch.Tensor:
        with torch.inference_mode():
            return model(normalise_tensor(torch.from_numpy(batch), plan.preprocessing))

    return plan.preprocessing, pixels, model, forward


def test_without_augmentation_the_logits_are_the_plain_ones(scored):
    facts, pixels, model, forward = scored
    images = [pixels[place] for place in range(len(pixels))]
    found = logits_of_views(images, facts, "none", forward)
    (crops,) = fixed_batches(pixels, facts.image_size, len(pixels))
    assert torch.equal(found, forward(crops))
    _, plain = forward_pixels(model, pixels, facts, PrecisionPlan("float32", channels_last=True), torch.device("cpu"))
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tta", TTA[1:])
def test_each_view_is_seen_once_and_counts_alike(scored, tta):
    facts, pixels, _, forward = scored
    images, seen = [pixels[place] for place in range(4)], []

    def watched(batch: np.ndarray) -> torch.Tensor:
        seen.append(batch)
        return forward(batch)

    found = logits_of_views(images, facts, tta, watched)
    views = np.stack([np.stack(views_of(image, facts, tta)) for image in images], axis=1)
    assert np.array_equal(np.stack(seen), views)
    mean = torch.stack([torch.softmax(forward(view), 1) for view in views]).mean(0)
    torch.testing.assert_close(torch.softmax(found, 1), mean, rtol=1e-4, atol=1e-6)


def test_a_mirrored_image_gets_the_same_logits_with_its_mirror(scored):
    facts, pixels, _, forward = scored
    image = center_crop(pixels[0], facts.resize_size // 2 * 2)
    turned = np.ascontiguousarray(image[:, ::-1])
    for tta in ("flip", "flip-crops"):
        both = [logits_of_views([each], facts, tta, forward) for each in (image, turned)]
        torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)
    plain = [logits_of_views([each], facts, "none", forward) for each in (image, turned)]
    assert not torch.allclose(*plain, rtol=1e-4, atol=1e-5)
