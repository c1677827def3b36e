from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoo.data.cache import open_pixels
from zoo.data.loader import TrainBatches, epoch_order, fixed_batches
from zoo.data.manifest import load_dataset
from zoo.data.transforms import center_crop, make_augment
from zoo.runs import Preprocessing

HERE = Preprocessing(image_size=32, crop_pct=1.0, interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@given(st.integers(1, 300), st.integers(1, 64), st.integers(0, 2**31 - 1), st.integers(0, 1000))
def test_an_epoch_has_every_place_once_and_no_batch_of_one(count, batch_size, seed, epoch):
    batches = epoch_order(count, batch_size, seed, epoch)
    assert sorted(place for batch in batches for place in batch) == list(range(count))
    assert all(len(batch) <= batch_size + 1 for batch in batches)
    if batch_size > 1 and count > 1:
        assert all(len(batch) > 1 for batch in batches)
    assert batches == epoch_order(count, batch_size, seed, epoch)
    assert len(batches) == len(epoch_order(count, batch_size, seed + 1, epoch + 1))


def test_epochs_and_seeds_differ():
    orders = [epoch_order(50, 50, seed, epoch)[0] for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9


@pytest.fixture
def pixels(tiny):
    return open_pixels(load_dataset("tiny", tiny), "train", HERE)


@pytest.mark.parametrize("policy", ["none", "light", "strong", "ct"])
def test_batches_are_the_same_for_any_number_of_workers(pixels, policy):
    augment = make_augment(policy, None, 32, 4)
    alone, helped = (TrainBatches(pixels, augment, 4, 4, workers, pin_memory=False) for workers in (0, 2))
    assert len(alone) == len(helped) == 5
    for epoch in (2, 1):  # in any order of epochs: nothing is carried over
        for (one, labels, places), (two, labels_two, places_two) in zip(
            alone.epoch(epoch), helped.epoch(epoch), strict=True
        ):
            assert one.dtype == torch.uint8 and one.shape[1:] == (32, 32, 3)
            assert torch.equal(one, two) and torch.equal(labels, labels_two) and torch.equal(places, places_two)
            assert labels.tolist() == pixels.y_true[places.numpy()].tolist()
    places = [each for batch in alone.epoch(1) for each in batch[2].tolist()]
    assert places == [each for batch in epoch_order(18, 4, 4, 1) for each in batch]


def test_an_augmented_image_differs_by_epoch(pixels):
    batches = TrainBatches(pixels, make_augment("light", None, 32, 0), 18, 0, 0, pin_memory=False)
    by_place = []
    for epoch in (0, 1):
        ((images, _, places),) = batches.epoch(epoch)
        by_place.append(images[places.argsort()])
    assert (by_place[0] != by_place[1]).flatten(1).any(1).all()


def test_fixed_batches_are_the_centre_crops_in_order(pixels):
    batches = list(fixed_batches(pixels, 30, 7))
    assert [batch.shape for batch in batches] == [(7, 30, 30, 3), (7, 30, 30, 3), (4, 30, 30, 3)]
    expected = np.stack([center_crop(pixels[place], 30) for place in range(18)])
    np.testing.assert_array_equal(np.concatenate(batches), expected)
