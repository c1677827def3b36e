"""The size limit of the pixel caches, and training on what does not fit."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from zoo.data import cache, room
from zoo.data.cache import open_pixels
from zoo.data.loader import TrainBatches
from zoo.data.manifest import load_dataset
from zoo.data.room import GB, cache_limit, make_room
from zoo.data.transforms import center_crop
from zoo.errors import ZooError
from zoo.runs import Preprocessing

HERE = Preprocessing(image_size=32, crop_pct=1.0, interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
ONE = 32 * 35 * 3  # bytes of one image: 44 x 40 pixels, the shorter side 32


@pytest.fixture
def dataset(tiny):
    return load_dataset("tiny", tiny)


@pytest.fixture
def limit(monkeypatch):
    """Return `limit(images)`: room for that many images."""
    return lambda images: monkeypatch.setenv("ZOO_CACHE_GB", repr(images * ONE / GB))


def bins(dataset):
    return sorted(each.name for each in (dataset.folder / ".cache").glob("pixels-*.bin"))


def left_over(dataset):
    return [each for each in (dataset.folder / ".cache").iterdir() if each.name.startswith(".pixels")]


def sized(size):
    return HERE.model_copy(update={"image_size": size})


def use_again(dataset, file, seconds_ago):
    path = dataset.folder / ".cache" / file
    os.utime(path, ns=(time.time_ns() - int(seconds_ago * 1e9), path.stat().st_mtime_ns))


def start(code, dataset, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code, str(dataset.folder.parent.parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


OPEN = """
import sys
from zoo.data.cache import open_pixels
from zoo.data.manifest import load_dataset
from zoo.files import home
from zoo.runs import Preprocessing
here = Preprocessing(image_size=32, crop_pct=1.0, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)
dataset = load_dataset("tiny", home(sys.argv[1]))
"""


@pytest.mark.parametrize(("text", "gigabytes"), [("", 50), ("2.5", 2.5), ("0", 0), ("inf", float("inf"))])
def test_the_limit_is_a_number_of_gigabytes(monkeypatch, text, gigabytes):
    monkeypatch.setenv("ZOO_CACHE_GB", text)
    assert cache_limit() == gigabytes * 1e9
    monkeypatch.delenv("ZOO_CACHE_GB")
    assert cache_limit() == 50e9


@pytest.mark.parametrize("text", ["-1", "nan", "fifty", "50GB", "1,5"])
def test_a_wrong_limit_is_refused_before_any_work(dataset, monkeypatch, text):
    monkeypatch.setenv("ZOO_CACHE_GB", text)
    with pytest.raises(ZooError, match=f"ZOO_CACHE_GB must be how many gigabytes .* Got '{text}'; correct or unset it"):
        open_pixels(dataset, "val", HERE)
    assert bins(dataset) == []


def test_the_least_recently_used_cache_leaves_and_the_size_is_kept(dataset, limit):
    limit(9 + 9 + 9)
    sizes = {}
    for split, interpolation in (("val", "nearest"), ("val", "bilinear"), ("val", "bicubic")):
        pixels = open_pixels(dataset, split, HERE.model_copy(update={"interpolation": interpolation}))
        assert pixels.cached
        sizes[interpolation] = pixels.file.name
        del pixels
    assert len(bins(dataset)) == 3
    for ago, interpolation in ((30, "nearest"), (20, "bilinear"), (10, "bicubic")):
        use_again(dataset, sizes[interpolation], ago)
    open_pixels(dataset, "val", HERE.model_copy(update={"interpolation": "nearest"}))  # used again
    assert open_pixels(dataset, "val", HERE.model_copy(update={"interpolation": "lanczos"})).cached
    assert sizes["bilinear"] not in bins(dataset)
    assert {sizes["nearest"], sizes["bicubic"]} < set(bins(dataset))
    files = (dataset.folder / ".cache").glob("pixels-*.bin")
    assert sum(each.stat().st_size for each in files) <= 27 * ONE
    again = open_pixels(dataset, "val", HERE)  # its index has stayed: it is decoded again
    assert again.cached and len(bins(dataset)) == 3
    assert left_over(dataset) == []


def test_caches_of_all_datasets_count_and_the_smaller_need_comes_first(dataset, limit, tiny, image_folder):
    from zoo.data.sources import import_dataset

    other = import_dataset(image_folder, "other", tiny, ratios=(0.5, 0.25, 0.25))
    limit(18)
    open_pixels(other, "val", HERE)
    open_pixels(other, "test", HERE)
    assert len(bins(other)) == 2
    use_again(other, bins(other)[1], 60)
    kept = bins(other)[0]
    open_pixels(dataset, "val", HERE)
    assert bins(other) == [kept] and len(bins(dataset)) == 1


def test_a_cache_that_a_living_process_uses_is_never_removed(dataset, limit):
    limit(20)
    reader = start(
        OPEN + "pixels = open_pixels(dataset, 'val', here)\nprint(pixels.cached, flush=True)\ninput()\n"
        "print(int(sum(pixels[i].sum() for i in range(9))))",
        dataset,
    )
    assert reader.stdout.readline() == "True\n"
    (used,) = bins(dataset)
    use_again(dataset, used, 1000)
    mine = open_pixels(dataset, "train", HERE)  # 18 more do not fit beside 9
    assert not mine.cached and bins(dataset) == [used]
    out, err = reader.communicate("\n", timeout=60)
    expected = open_pixels(dataset, "val", HERE)
    assert (out, err) == (f"{int(sum(expected[i].sum() for i in range(9)))}\n", "")
    del expected
    assert open_pixels(dataset, "train", HERE).cached  # and once nobody uses it
    assert used not in bins(dataset)


def test_a_map_outlives_its_pixels_and_keeps_the_cache(dataset, limit):
    limit(20)
    first = open_pixels(dataset, "val", HERE)
    image, file = first[0], first.file
    del first
    assert not make_room(file.with_name("pixels-train-x.bin"), 18 * ONE, 20 * ONE)
    del image
    assert make_room(file.with_name("pixels-train-x.bin"), 18 * ONE, 20 * ONE)
    assert not file.exists()


@pytest.mark.parametrize("policy", ["fail", "skip"])
@pytest.mark.parametrize("room_for", [0, 3, 17.5])
def test_what_does_not_fit_is_decoded_when_asked_for_to_the_same_bits(dataset, limit, room_for, policy):
    if policy == "skip":
        dataset.image_path(dataset.of_split("train")["path"].iloc[4]).write_bytes(b"no image")
    limit(1000)
    kept = open_pixels(dataset, "train", HERE, policy)
    expected = [np.array(kept[place]) for place in range(len(kept))]
    assert kept.cached
    for file in (dataset.folder / ".cache").glob("pixels-*"):
        file.unlink()
    limit(room_for if policy == "fail" else min(room_for, 16.5))
    calls = []
    pixels = open_pixels(dataset, "train", HERE, policy, lambda done, total: calls.append((done, total)))
    assert not pixels.cached and bins(dataset) == [] and left_over(dataset) == []
    assert calls == [(number, 18) for number in range(1, 19)]
    assert pixels.skipped == kept.skipped and pixels.paths == kept.paths
    for name in ("sample_ids", "groups", "y_true", "shapes"):
        np.testing.assert_array_equal(getattr(pixels, name), getattr(kept, name))
    for place, image in enumerate(expected):
        np.testing.assert_array_equal(pixels[place], image)
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(pixels))[place], image)
    with pytest.raises(IndexError):
        pixels[len(expected)]
    with pytest.raises(ValueError, match="read-only"):
        pixels[0][0, 0, 0] = 1
    again = open_pixels(dataset, "train", HERE, policy, lambda *_: pytest.fail("decoded again"))
    assert not again.cached and again.skipped == kept.skipped
    limit(1000)
    assert open_pixels(dataset, "train", HERE, policy).cached  # room was made for it


def test_a_build_stops_where_the_sample_promised_less_than_there_is(dataset, limit, monkeypatch):
    monkeypatch.setattr(cache, "_SAMPLE", 1)
    from PIL import Image

    from zoo.data.sources import import_dataset

    folder = dataset.folder.parent.parent / "wide"
    draw = np.random.default_rng(0)
    for number in range(24):
        (folder / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        shape = (32, (32, 120)[number % 2], 3)  # the first of train is of class a
        Image.fromarray(draw.integers(0, 255, shape, dtype=np.uint8)).save(
            folder / "ab"[number % 2] / f"{number:02}.png"
        )
    wide = import_dataset(folder, "wide", room_home(dataset))
    count = len(wide.of_split("train"))
    monkeypatch.setenv("ZOO_CACHE_GB", repr(count * 32 * 50 * 3 / GB))
    seen, rooms = [], []
    original = cache.make_room
    monkeypatch.setattr(cache, "make_room", lambda *given: rooms.append(original(*given)) or rooms[-1])
    pixels = open_pixels(wide, "train", HERE, progress=lambda done, _: seen.append(done))
    assert rooms[0] is True and rooms[-1] is False  # it was begun, and given up
    assert not pixels.cached and bins(wide) == [] and left_over(wide) == []
    assert seen == list(range(1, count + 1))  # every image was looked at once, none twice
    assert pixels[count - 1].shape == (32, 120, 3)


def room_home(dataset):
    from zoo.files import home

    return home(dataset.folder.parent.parent)


def crops(image, _epoch, _place):
    return center_crop(image, 32)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_decode_what_has_no_cache_and_a_vanished_image_is_named(dataset, limit, workers):
    kept = open_pixels(dataset, "train", HERE)
    expected = [[each.numpy() for each in batch] for batch in TrainBatches(kept, crops, 4, 7, 0, False).epoch(1)]
    limit(0)
    kept.file.unlink()
    pixels = open_pixels(dataset, "train", HERE)
    assert not pixels.cached
    batches = TrainBatches(pixels, crops, 4, 7, workers, False)
    for batch, wanted in zip(batches.epoch(1), expected, strict=True):
        for one, other in zip(batch, wanted, strict=True):
            np.testing.assert_array_equal(one.numpy(), other)
    gone = dataset.image_path(pixels.paths[11])
    gone.unlink()
    with pytest.raises(ZooError) as caught:
        list(batches.epoch(2))
    assert str(caught.value) == (
        f"image {str(gone)!r} of split 'train': gone; mend it, import the data again, or leave such images out with "
        "--bad-images skip"
    )
    assert len(open_pixels(dataset, "train", HERE, "skip")) == 17


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fail", "skip"])
def test_processes_that_build_the_same_cache_at_once_both_end_well(dataset, name):
    code = OPEN + (
        "calls = []\ninput()\n"
        f"pixels = open_pixels(dataset, 'train', here, {name!r}, lambda done, total: calls.append(done))\n"
        "print(pixels.cached, len(calls), int(sum(pixels[i].sum() for i in range(len(pixels)))))"
    )
    processes = [start(code, dataset) for _ in range(3)]
    for each in processes:
        each.stdin.write("\n")
        each.stdin.flush()
    ends = [each.communicate(timeout=120) for each in processes]
    assert [each.returncode for each in processes] == [0, 0, 0], ends
    pixels = open_pixels(dataset, "train", HERE, name, lambda *_: pytest.fail("decoded again"))
    total = int(sum(pixels[place].sum() for place in range(18)))
    assert sorted(out for out, _ in ends) == [f"True 0 {total}\n"] * 2 + [f"True 18 {total}\n"]  # built once
    assert len(bins(dataset)) == 1 and left_over(dataset) == []


def test_what_a_killed_build_left_behind_is_removed_by_the_next(dataset):
    code = OPEN + (
        "import time\n"
        "def wait(done, total):\n    if done == 9:\n        print('half', flush=True)\n        time.sleep(60)\n"
        "open_pixels(dataset, 'train', here, progress=wait)"
    )
    process = start(code, dataset)
    assert process.stdout.readline() == "half\n"
    assert len(left_over(dataset)) == 1
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert len(left_over(dataset)) == 1
    assert open_pixels(dataset, "train", HERE).cached
    assert left_over(dataset) == []


def test_a_cache_that_is_being_written_holds_its_room(dataset, limit):
    limit(20)
    seen = []

    def look(done, _total):
        if done == 1:
            seen.append(make_room(dataset.folder / ".cache" / "pixels-val-y.bin", 9 * ONE, 20 * ONE))
            seen.append(make_room(dataset.folder / ".cache" / "pixels-val-y.bin", 2 * ONE, 20 * ONE))

    assert open_pixels(dataset, "train", HERE, progress=look).cached
    assert seen == [False, True]


def test_a_full_disk_leaves_no_half_cache(full_disk, image_folder):
    from zoo.data.sources import import_dataset
    from zoo.files import home

    root = home(full_disk)
    dataset = import_dataset(image_folder, "tiny", root, copy=False, ratios=(0.5, 0.25, 0.25))
    large = Preprocessing(image_size=256, crop_pct=1.0, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(ZooError, match=r"cannot write .*: No space left on device; free space"):
        open_pixels(dataset, "train", large)
    assert bins(dataset) == [] and left_over(dataset) == []
    assert open_pixels(dataset, "train", HERE).cached  # what fits is cached


def test_a_folder_that_cannot_be_written_can_be_trained_from_without_a_cache(dataset, limit, monkeypatch):
    limit(0)

    def refuse(path):
        raise ZooError(f"cannot write {path}")

    monkeypatch.setattr(cache, "atomic_writer", refuse)
    pixels = open_pixels(dataset, "val", HERE)
    assert not pixels.cached and pixels[0].shape == (32, 35, 3)


def test_an_abandoned_file_of_another_cache_is_removed_and_a_young_one_stays(dataset):
    folder = dataset.folder / ".cache"
    folder.mkdir(exist_ok=True)
    old, young = folder / ".pixels-val-99-nearest-0.bin.abc", folder / ".pixels-val-98-nearest-0.bin.abc"
    for file in (old, young):
        file.write_bytes(b"x")
    os.utime(old, (time.time() - 2 * room._ABANDONED,) * 2)
    open_pixels(dataset, "val", HERE)
    assert not old.exists() and young.exists()


def test_the_doctor_says_how_much_room_the_caches_take(dataset, monkeypatch):
    from zoo.cli.checkup import checks

    open_pixels(dataset, "val", HERE)
    monkeypatch.setenv("ZOO_CACHE_GB", "3")
    (found,) = [each for each in checks() if each["name"] == "pixel cache"]
    assert found["ok"] and found["detail"] == "0.0 of 3 GB (ZOO_CACHE_GB), 1 files"
    monkeypatch.setenv("ZOO_CACHE_GB", "much")
    (found,) = [each for each in checks() if each["name"] == "pixel cache"]
    assert not found["ok"] and "Got 'much'" in found["detail"]
