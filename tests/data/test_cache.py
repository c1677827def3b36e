from __future__ import annotations

import pickle
import time

import numpy as np
import pytest

from zoo.data.cache import open_pixels
from zoo.data.decode import decode, resize
from zoo.data.manifest import load_dataset
from zoo.errors import ZooError
from zoo.runs import Preprocessing

HERE = Preprocessing(image_size=32, crop_pct=1.0, interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@pytest.fixture
def dataset(tiny):
    return load_dataset("tiny", tiny)


def first_file(dataset, split="val", place=0):
    return dataset.image_path(dataset.of_split(split)["path"].iloc[place])


def files(dataset):
    return sorted((dataset.folder / ".cache").glob("pixels-*"))


def test_pixels_are_the_decoded_and_resized_images_in_manifest_order(dataset):
    calls: list[tuple[int, int]] = []
    pixels = open_pixels(dataset, "train", HERE, progress=lambda done, total: calls.append((done, total)))
    rows = dataset.of_split("train")
    assert len(pixels) == len(rows) == 18
    assert calls == [(number, 18) for number in range(1, 19)]
    assert pixels.sample_ids.tolist() == rows["sample_id"].tolist()
    assert pixels.groups.tolist() == rows["group"].tolist()
    assert pixels.paths == rows["path"].tolist()
    assert [dataset.classes[place] for place in pixels.y_true] == rows["label"].tolist()
    for place in (0, 7, 17):
        raw = first_file(dataset, "train", place).read_bytes()
        expected = resize(decode(raw), 32, "bilinear")
        assert pixels[place].dtype == np.uint8 and min(pixels[place].shape[:2]) == 32
        np.testing.assert_array_equal(pixels[place], expected)
    with pytest.raises(IndexError):
        pixels[18]
    with pytest.raises(ValueError, match="read-only"):
        pixels[0][0, 0, 0] = 1


def test_the_cache_is_read_and_not_made_again_and_travels_small(dataset):
    first = open_pixels(dataset, "val", HERE)
    stats = [each.stat().st_mtime_ns for each in files(dataset)]
    assert len(stats) == 2
    again = open_pixels(dataset, "val", HERE, progress=lambda *_: pytest.fail("decoded again"))
    assert [each.stat().st_mtime_ns for each in files(dataset)] == stats
    np.testing.assert_array_equal(again[3], first[3])
    travelled = pickle.dumps(again)
    assert len(travelled) < 8_000
    np.testing.assert_array_equal(pickle.loads(travelled)[3], first[3])
    open_pixels(dataset, "val", HERE.model_copy(update={"interpolation": "bicubic"}))
    assert len(files(dataset)) == 4


def test_only_the_split_that_is_asked_for_is_opened(dataset):
    for path in dataset.of_split("test")["path"]:
        dataset.image_path(path).unlink()
    assert len(open_pixels(dataset, "train", HERE)) == 18


def test_a_touched_file_is_the_same_image(dataset):
    before = open_pixels(dataset, "val", HERE)
    first_file(dataset).touch()
    after = open_pixels(dataset, "val", HERE, progress=lambda *_: pytest.fail("decoded again"))
    np.testing.assert_array_equal(after[0], before[0])


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda file: file.unlink(), "gone"),
        (lambda file: file.write_bytes(b"no image"), "changed since the import"),
        (lambda file: file.write_bytes(file.read_bytes()[:-20]), "changed since the import"),
        (lambda file: (file.unlink(), file.mkdir()), "Is a directory"),
    ],
)
def test_a_file_that_is_gone_or_changed_is_named_or_left_out(dataset, harm, reason, cached):
    if cached:
        open_pixels(dataset, "val", HERE)
        open_pixels(dataset, "val", HERE, "skip")
    file = first_file(dataset, place=2)
    time.sleep(0.01)
    harm(file)
    with pytest.raises(ZooError, match=f"of split 'val': {reason}; mend it") as refused:
        open_pixels(dataset, "val", HERE)
    assert file.name in str(refused.value)
    pixels = open_pixels(dataset, "val", HERE, "skip")
    assert pixels.skipped == [f"{dataset.of_split('val')['path'].iloc[2]}: {reason}"]
    assert len(pixels) == 8
    assert dataset.of_split("val")["sample_id"].iloc[2] not in pixels.sample_ids
    raw = first_file(dataset, place=3).read_bytes()
    np.testing.assert_array_equal(pixels[2], resize(decode(raw), 32, "bilinear"))
    assert open_pixels(dataset, "val", HERE, "skip").skipped == pixels.skipped


def test_a_mended_image_comes_back(dataset):
    file = first_file(dataset)
    data = file.read_bytes()
    file.unlink()
    assert len(open_pixels(dataset, "val", HERE, "skip")) == 8
    file.write_bytes(data)
    assert len(open_pixels(dataset, "val", HERE, "skip")) == 9


def test_a_split_without_readable_images_is_refused(dataset):
    for path in dataset.of_split("val")["path"]:
        dataset.image_path(path).unlink()
    with pytest.raises(ZooError, match=r"no image of split 'val' can be read \(the first, .*: gone\)"):
        open_pixels(dataset, "val", HERE, "skip")
    assert files(dataset) == [] or all(each.suffix != ".npz" for each in files(dataset))


@pytest.mark.parametrize("ending", [".npz", ".bin"])
@pytest.mark.parametrize("kept", [0, 40, 0.5])
def test_a_cache_that_was_cut_off_is_made_again(dataset, ending, kept):
    whole = open_pixels(dataset, "val", HERE)
    expected = np.array(whole[8])
    (file,) = [each for each in files(dataset) if each.suffix == ending]
    data = file.read_bytes()
    file.write_bytes(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
    np.testing.assert_array_equal(open_pixels(dataset, "val", HERE)[8], expected)
    assert file.read_bytes()[:40] == data[:40]


def test_an_index_that_was_changed_is_made_again(dataset):
    expected = np.array(open_pixels(dataset, "val", HERE)[8])
    (file,) = [each for each in files(dataset) if each.suffix == ".npz"]
    data = file.read_bytes()
    for place in range(0, len(data), 97):
        file.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        np.testing.assert_array_equal(open_pixels(dataset, "val", HERE)[8], expected)


def test_another_split_of_the_data_has_a_cache_of_its_own(dataset, tiny):
    from zoo.data.resplit import resplit_dataset

    open_pixels(dataset, "val", HERE)
    other = resplit_dataset("tiny", tiny, seed=9)
    assert open_pixels(other, "val", HERE).sample_ids.tolist() == other.of_split("val")["sample_id"].tolist()
    with pytest.raises(ZooError, match="split must be one of train, val, test"):
        open_pixels(dataset, "vall", HERE)
