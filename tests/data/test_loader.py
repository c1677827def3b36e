from __future__ import annotations

import dataclasses
import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoo.data.cache import open_pixels
from zoo.data.loader import TrainBatches, epoch_order, fixed_batches, share
from zoo.data.manifest import load_dataset
from zoo.data.transforms import center_crop, make_augment
from zoo.errors import ZooError
from zoo.runs import Preprocessing

HERE = Preprocessing(image_size=32, crop_pct=1.0, interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def as_lists(batches):
    return [batch.tolist() for batch in batches]


@given(st.integers(1, 300), st.integers(1, 64), st.integers(0, 2**31 - 1), st.integers(0, 1000))
def test_an_epoch_has_every_place_once_and_no_batch_of_one(count, batch_size, seed, epoch):
    batches = epoch_order(count, batch_size, seed, epoch)
    assert sorted(place for batch in batches for place in batch) == list(range(count))
    assert all(len(batch) <= batch_size + 1 for batch in batches)
    if batch_size > 1 and count > 1:
        assert all(len(batch) > 1 for batch in batches)
    assert as_lists(batches) == as_lists(epoch_order(count, batch_size, seed, epoch))
    assert len(batches) == len(epoch_order(count, batch_size, seed + 1, epoch + 1))
    assert all(batch.dtype == np.int64 for batch in batches)


def test_the_order_is_that_of_earlier_versions():
    assert as_lists(epoch_order(9, 4, seed=3, epoch=2)) == [[1, 8, 4, 0], [2, 6, 3, 7, 5]]


def test_epochs_and_seeds_differ():
    orders = [epoch_order(50, 50, seed, epoch)[0] for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9


def test_a_million_places_are_not_a_million_objects():
    import tracemalloc

    tracemalloc.start()
    batches = epoch_order(1_000_000, 32, 0, 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(batches) == 31_250
    assert peak < 32 * 2**20  # 8 MB of numbers, and the arrays that look into them


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=120), st.integers(1, 40), st.integers(0, 2**31), st.integers(0, 9)
)
def test_a_balanced_epoch_draws_every_class_equally_often_up_to_one(labels, batch_size, seed, epoch):
    y_true = np.array(labels, dtype=np.int64)
    batches = epoch_order(len(labels), batch_size, seed, epoch, y_true)
    drawn = np.concatenate(batches)
    counts = [int((y_true[drawn] == label).sum()) for label in set(labels)]
    assert sum(counts) == len(labels)
    assert max(counts) - min(counts) <= 1
    assert [len(batch) for batch in batches] == [len(batch) for batch in epoch_order(len(labels), batch_size, seed, 0)]
    assert as_lists(batches) == as_lists(epoch_order(len(labels), batch_size, seed, epoch, y_true))


def test_balanced_draws_reach_every_image_alike_and_are_mixed():
    y_true = np.array([0] * 90 + [1] * 10, dtype=np.int64)
    epochs = [epoch_order(100, 20, 0, epoch, y_true) for epoch in range(400)]
    often = np.bincount(np.concatenate([np.concatenate(each) for each in epochs]), minlength=100)
    # 400 x 50 draws of each class, over 90 and over 10 images, within four standard deviations
    assert abs(often[:90] - 20000 / 90).max() < 4 * np.sqrt(20000 / 90)
    assert abs(often[90:] - 2000).max() < 4 * np.sqrt(2000)
    in_first = np.array([(y_true[each[0]] == 1).sum() for each in epochs])
    assert 9.5 < in_first.mean() < 10.5 and in_first.std() > 1  # no batch is balanced by rule: places are shuffled
    assert len({tuple(np.concatenate(each)) for each in epochs}) == 400


@given(st.integers(0, 200), st.integers(1, 9))
def test_shares_are_the_batch_and_keep_mirror_images_together(batch_len, world):
    shares = [share(batch_len, rank, world) for rank in range(world)]
    assert sorted(itertools.chain(*shares)) == list(range(batch_len))
    for each in shares:
        assert each == sorted(each)
        assert {batch_len - 1 - place for place in each} == set(each)
        half = [place for place in each if place < batch_len / 2 - 0.5]
        assert half == list(range(half[0], half[0] + len(half))) if half else len(each) <= 1
    sizes = [len(each) for each in shares]
    assert max(sizes) - min(sizes) <= 2


@pytest.fixture
def pixels(tiny):
    return open_pixels(load_dataset("tiny", tiny), "train", HERE)


@pytest.fixture
def opened():
    """A maker of batches that are closed after the test."""
    made: list[TrainBatches] = []

    def open_batches(*args, pin_memory=False, **options) -> TrainBatches:
        made.append(TrainBatches(*args, pin_memory, **options))
        return made[-1]

    yield open_batches
    for each in made:
        each.close()


def same(one, two) -> bool:
    return len(one) == len(two) and all(
        torch.equal(a, b) for left, right in zip(one, two, strict=True) for a, b in zip(left, right, strict=True)
    )


@pytest.fixture
def threads():
    """A setter of torch's threads, which are the loader's too; afterwards they are as many as before."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("policy", ["none", "light", "strong", "ct"])
def test_batches_are_the_same_for_any_number_of_threads(pixels, opened, threads, policy):
    augment = make_augment(policy, None, 32, 4)
    threads(1)
    expected = list(opened(pixels, augment, 7, 4, 0).epoch(1))
    for count in (2, 3, 16):
        threads(count)
        assert same(list(opened(pixels, augment, 7, 4, 0).epoch(1)), expected)


def test_threads_end_with_their_batches(pixels, opened, threads):
    threads(4)
    before = set(threading.enumerate())
    for leave in (TrainBatches.close, lambda _: None):
        batches = TrainBatches(pixels, make_augment("light", None, 32, 4), 7, 4, 0, pin_memory=False)
        next(batches.epoch(1))
        assert 1 <= len(set(threading.enumerate()) - before) <= 3  # one that is idle again is used again
        leave(batches)
        del batches
        gc.collect()
        end = time.monotonic() + 5
        while set(threading.enumerate()) - before and time.monotonic() < end:
            time.sleep(0.01)
        assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("policy", ["none", "light", "strong", "ct"])
def test_batches_are_the_same_for_any_number_of_workers(pixels, opened, policy):
    augment = make_augment(policy, None, 32, 4)
    alone, helped = (opened(pixels, augment, 4, 4, workers) for workers in (0, 2))
    assert len(alone) == len(helped) == 5
    for epoch in (2, 1):  # in any order of epochs: nothing is carried over
        for (one, labels, places), (two, labels_two, places_two) in zip(
            alone.epoch(epoch), helped.epoch(epoch), strict=True
        ):
            assert one.dtype == torch.uint8 and one.shape[1:] == (32, 32, 3)
            assert torch.equal(one, two) and torch.equal(labels, labels_two) and torch.equal(places, places_two)
            assert labels.dtype == places.dtype == torch.int64
            assert labels.tolist() == pixels.y_true[places.numpy()].tolist()
            expected = [augment(pixels[place], epoch, place) for place in places.tolist()]
            np.testing.assert_array_equal(one.numpy(), np.stack(expected))
    places = [each for batch in alone.epoch(1) for each in batch[2].tolist()]
    assert places == [each for batch in epoch_order(18, 4, 4, 1) for each in batch]


def test_batches_that_were_given_out_stay_as_they_are(pixels, opened):
    batches = opened(pixels, make_augment("light", None, 32, 4), 4, 4, 0)
    kept = list(batches.epoch(1))
    copies = [tuple(each.clone() for each in batch) for batch in kept]
    list(batches.epoch(2))
    assert same(kept, copies)


def test_an_augmented_image_differs_by_epoch(pixels, opened):
    batches = opened(pixels, make_augment("light", None, 32, 0), 18, 0, 0)
    by_place = []
    for epoch in (0, 1):
        ((images, _, places),) = batches.epoch(epoch)
        by_place.append(images[places.argsort()])
    assert (by_place[0] != by_place[1]).flatten(1).any(1).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_goes_on_in_its_middle(pixels, opened, workers):
    batches = opened(pixels, make_augment("light", None, 32, 4), 4, 4, workers)
    whole = list(batches.epoch(3))
    for start in range(6):
        assert same(list(batches.epoch(3, start)), whole[start:])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_may_be_left_in_its_middle(pixels, opened, workers):
    batches = opened(pixels, make_augment("light", None, 32, 4), 2, 4, workers)
    expected = list(batches.epoch(2))
    left = batches.epoch(1)
    next(left)
    left.close()
    assert same(list(batches.epoch(2)), expected)
    forgotten = batches.epoch(1)
    next(forgotten)
    assert same(list(batches.epoch(2)), expected)
    assert list(forgotten) == []  # the next epoch has ended it


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_that_are_loaded_ahead_are_the_same(pixels, opened, workers):
    augment = make_augment("light", None, 32, 4)
    plain = opened(pixels, augment, 4, 4, 0)
    wanted = {epoch: list(plain.epoch(epoch)) for epoch in (1, 2, 3, 4, 9)}
    ahead = opened(pixels, augment, 4, 4, workers, last_epoch=3)
    for epoch in (1, 2, 3, 4, 1):  # also beyond the last, and again from the start
        assert same(list(ahead.epoch(epoch)), wanted[epoch])
    left = ahead.epoch(2)
    next(left)
    assert same(list(ahead.epoch(2, 1)), wanted[2][1:])  # where the one before was left
    left = ahead.epoch(3)
    next(left)
    assert same(list(ahead.epoch(9)), wanted[9])


class _Noted:
    """An augmentation that leaves a file for each epoch that it works on."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, pixels, epoch, place):
        (self.folder / str(epoch)).touch()
        return pixels[:32, :32]


def test_workers_begin_the_next_epoch_before_it_is_asked_for_and_none_after_the_last(pixels, opened, tmp_path):
    noted = tmp_path / "noted"
    noted.mkdir()
    batches = opened(pixels, _Noted(noted), 4, 4, 2, last_epoch=2)
    list(batches.epoch(1))
    end = time.monotonic() + 30
    while not (noted / "2").exists():
        assert time.monotonic() < end, "the second epoch was not begun"
        time.sleep(0.01)
    list(batches.epoch(2))
    batches.close()
    assert {file.name for file in noted.iterdir()} == {"1", "2"}


def test_an_image_that_is_drawn_again_in_an_epoch_is_augmented_anew(pixels, opened):
    rare = np.array([0] + [1] * 17, np.int64)
    uneven = dataclasses.replace(pixels, y_true=rare)
    light = make_augment("light", None, 32, 4)
    whole = list(opened(uneven, light, 4, 4, 0, balanced=True).epoch(1))
    places = torch.cat([batch[2] for batch in whole])
    images = torch.cat([batch[0] for batch in whole])[places == 0]
    assert len(images) == 9 and len({each.numpy().tobytes() for each in images}) == 9
    assert same(list(opened(uneven, light, 4, 4, 2, balanced=True).epoch(1)), whole)
    assert same(list(opened(uneven, light, 4, 4, 0, balanced=True).epoch(1, 2)), whole[2:])
    # The first of them is what it is to an epoch that draws each image once.
    first = torch.from_numpy(light(pixels[0], 1, 0))
    assert images[0].equal(first)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("world", [2, 3])
def test_the_shares_of_all_ranks_are_the_batches(pixels, opened, world, balanced):
    augment = make_augment("light", None, 32, 4)
    whole = list(opened(pixels, augment, 5, 4, 0, balanced=balanced).epoch(1))
    ranks = [opened(pixels, augment, 5, 4, 0, balanced=balanced, rank=rank, world=world) for rank in range(world)]
    assert {len(each) for each in ranks} == {len(whole)}
    for number, parts in enumerate(zip(*(each.epoch(1) for each in ranks), strict=True)):
        positions = [share(len(whole[number][1]), rank, world) for rank in range(world)]
        for part, own in zip(parts, positions, strict=True):
            assert [len(each) for each in part] == [len(own)] * 3
            if own:
                assert same([part], [tuple(each[own] for each in whole[number])])


@pytest.mark.parametrize(("workers", "count"), [(0, 1), (0, 3), (2, 1)])
def test_an_own_transform_that_fails_is_said_in_one_line(pixels, opened, threads, workers, count):
    threads(count)
    broken = make_augment("own", [{"name": "RandomCrop", "height": 32, "width": 32}], 32, 0)
    small = int(epoch_order(18, 9, 0, 0)[0][4])  # in the middle of a batch: the second thread's
    shapes = pixels.shapes.copy()
    shapes[small] = 8
    batches = opened(dataclasses.replace(pixels, shapes=shapes), broken, 9, 0, workers)
    for _ in range(2):  # and again: the error has broken nothing
        with pytest.raises(ZooError, match=r"^augment.transforms failed on an image of 8 x 8 pixels: [^\n]*$"):
            list(batches.epoch(0))


class _Dies:
    """An augmentation whose process is killed, as one is that the system has no memory for."""

    def __call__(self, pixels, epoch, place):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_an_error_that_says_what_to_do(pixels, opened):
    batches = opened(pixels, _Dies(), 4, 0, 1)
    with pytest.raises(ZooError, match=r"a loading process died .*--set workers=0"):
        list(batches.epoch(0))


def test_closed_batches_have_no_workers_and_no_epochs(pixels, opened):
    before = set(children(os.getpid()))
    batches = opened(pixels, make_augment("light", None, 32, 4), 4, 4, 2)
    epoch = batches.epoch(1)
    next(epoch)
    assert len(set(children(os.getpid())) - before) == 2
    batches.close()
    assert set(children(os.getpid())) == before
    with pytest.raises(ValueError, match="closed"):
        next(batches.epoch(2))
    batches.close()


def children(pid: int) -> list[int]:
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(each) for file in files for each in file.read_text().split()]


LOADING = """
import signal, sys
from pathlib import Path
from zoo.data.cache import open_pixels
from zoo.data.loader import TrainBatches
from zoo.data.manifest import load_dataset
from zoo.data.transforms import make_augment
from zoo.files import home
from zoo.runs import Preprocessing

def stop(number, frame):
    raise KeyboardInterrupt

signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGUSR1, lambda number, frame: sys.exit(0))
here = Preprocessing(image_size=32, crop_pct=1.0, interpolation="bilinear", mean=(.5,) * 3, std=(.5,) * 3)
pixels = open_pixels(load_dataset("tiny", home(Path(sys.argv[1]))), "train", here)
batches = TrainBatches(pixels, make_augment("strong", None, 32, 0), 4, 0, 2, False)
try:
    for epoch in range(10**6):
        for _ in batches.epoch(epoch):
            print(epoch, flush=True)
except KeyboardInterrupt:
    list(batches.epoch(0, 3))  # another epoch can be had
    batches.close()
    print("ended", flush=True)
"""


@pytest.fixture
def loading(tiny):
    """A process of its own group that loads with two workers, and those workers."""
    process = subprocess.Popen(
        [sys.executable, "-c", LOADING, str(tiny.root)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    yield process, children(process.pid)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
def test_workers_die_with_a_killed_parent(loading):
    process, workers = loading
    assert len(workers) == 2
    process.kill()
    end = time.monotonic() + 15
    while time.monotonic() < end and not all(gone(worker) for worker in workers):
        time.sleep(0.1)
    assert all(gone(worker) for worker in workers)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_is_the_parents_to_answer(loading, number):
    process, workers = loading
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=30)
    assert out.splitlines()[-1] == "ended"
    assert err == "" and process.returncode == 0
    assert all(gone(worker) for worker in workers)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
def test_a_process_that_forgets_to_close_ends_its_workers(loading):
    process, workers = loading
    os.kill(process.pid, signal.SIGUSR1)
    _, err = process.communicate(timeout=30)
    assert err == "" and process.returncode == 0
    assert all(gone(worker) for worker in workers)


def test_fixed_batches_are_the_centre_crops_in_order(pixels):
    batches = list(fixed_batches(pixels, 30, 7))
    assert [batch.shape for batch in batches] == [(7, 30, 30, 3), (7, 30, 30, 3), (4, 30, 30, 3)]
    expected = np.stack([center_crop(pixels[place], 30) for place in range(18)])
    np.testing.assert_array_equal(np.concatenate(batches), expected)
