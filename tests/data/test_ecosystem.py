from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scenes import draw_scene

from zoo.data.ecosystem import is_huggingface
from zoo.data.sources import import_dataset
from zoo.errors import ZooError


def write_mnist(folder: Path) -> Path:
    """Write files in MNIST's format, which torchvision finds as its own."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 20)):
        images = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, array, magic in (("images-idx3", images, 2051), ("labels-idx1", labels, 2049)):
            head = struct.pack(f">{1 + array.ndim}I", magic, *array.shape)
            (raw / f"{part}-{kind}-ubyte").write_bytes(head + array.tobytes())
            with gzip.open(raw / f"{part}-{kind}-ubyte.gz", "wb") as stream:
                stream.write(head + array.tobytes())
    return folder


def test_a_torchvision_set_on_disk_keeps_its_splits_and_class_names(root, tmp_path):
    dataset = import_dataset("torchvision:MNIST", "mnist", root, from_=write_mnist(tmp_path / "tv"))
    assert len(dataset.of_split("test")) == 20
    assert len(dataset.of_split("train")) + len(dataset.of_split("val")) == 40
    assert dataset.classes[0] == "0 - zero"
    assert dataset.facts["import"] == {"kind": "torchvision", "name": "MNIST"}
    assert dataset.facts["source"] == "torchvision.datasets.MNIST"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("torchvision:MINST", "torchvision has no data set 'MINST'; did you mean"),
        ("torchvision:CIFAR10", "torchvision's CIFAR10 is not in .*--from"),
        ("torchvision:ImageNet", "torchvision's ImageNet is not in .*--from"),
        ("torchvision:VOCDetection", "torchvision's VOCDetection is not in .*--from|no image classification"),
        ("medmnist:bloodmnist", "there is no .*bloodmnist.npz.*--from"),
    ],
)
def test_what_is_not_here_is_said_and_nothing_is_left(root, tmp_path, source, said, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ZooError, match=said):
        import_dataset(source, "x", root)
    assert not (root.data / "x").exists()


def test_a_download_that_the_network_refuses_is_one_line(root, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(ZooError, match="cannot be downloaded") as caught:
        import_dataset("torchvision:CIFAR10", "x", root, from_=tmp_path / "tv")
    assert "\n" not in str(caught.value)


def test_a_medmnist_file_is_found_by_name(root, tmp_path):
    draw = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 12), ("val", 4), ("test", 4)):
        arrays[f"{split}_images"] = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % 2)[:, None]
    np.savez(tmp_path / "breastmnist.npz", **arrays)
    dataset = import_dataset("medmnist:breastmnist", "breast", root, from_=tmp_path)
    assert len(dataset.of_split("val")) == 4
    assert len(dataset.classes) == 2


def test_a_hugging_face_set_on_disk(root, tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "note": datasets.Value("string"),
        }
    )

    def part(first: int, count: int):
        rows = {
            "image": [Image.fromarray(draw_scene(first + number, 16)) for number in range(count)],
            "label": [number % 2 for number in range(count)],
            "note": ["x"] * count,
        }
        return datasets.Dataset.from_dict(rows, features=features)

    parts = {"train": part(0, 12), "validation": part(50, 4), "test": part(80, 4), "extra": part(90, 2)}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "hf"))
    assert is_huggingface(tmp_path / "hf")
    dataset = import_dataset(tmp_path / "hf", "pets", root)
    assert dataset.classes == ["cat", "dog"]
    assert {split: len(dataset.of_split(split)) for split in ("train", "val", "test")} == {
        "train": 12,
        "val": 4,
        "test": 4,
    }
    assert dataset.facts["left_out"] == {"images of the split extra": 2}
    part(0, 12).remove_columns("label").save_to_disk(str(tmp_path / "unlabelled"))
    with pytest.raises(ZooError, match="must have one column of images and one of class labels"):
        import_dataset(tmp_path / "unlabelled", "x", root)
    next((tmp_path / "hf" / "train").glob("*.arrow")).write_bytes(b"")
    with pytest.raises(ZooError, match="is no whole Hugging Face data set"):
        import_dataset(tmp_path / "hf", "broken", root)
