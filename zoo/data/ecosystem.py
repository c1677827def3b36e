"""Data sets that other libraries know: torchvision's by name, MedMNIST's, and Hugging Face's on disk."""

from __future__ import annotations

import inspect
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from zoo.data.layouts import Found
from zoo.errors import ZooError, nearest, one_line
from zoo.files import write_error
from zoo.runs import SPLITS

# What the constructors of torchvision call their splits; each is the first of its kind that is accepted.
_SPLITS = {"train": ("train", "trainval"), "val": ("val", "valid"), "test": ("test",)}


def find_in_torchvision(name: str, folder: Path | None, images: Path, offline: bool) -> Found:
    """Return the images of a torchvision data set, written as PNG files to `images/<split>/<class>/`.

    folder: where torchvision keeps or puts its files; left out, `~/.cache/torchvision`. What it names as splits is
    kept. Raises ZooError for an unknown name, for one that is no image classification, and where a download would
    be needed and cannot be had.
    """
    from torchvision import datasets

    known = [each for each in datasets.__all__ if isinstance(getattr(datasets, each), type)]
    if name not in known:
        raise ZooError(
            f"torchvision has no data set {one_line(name)!r}{nearest(name, known)}; it has {', '.join(known[:8])}, …"
        )
    kind = getattr(datasets, name)
    root = folder or Path.home() / ".cache" / "torchvision"
    found = Found("torchvision", images)
    found.options = {"name": name}
    found.described = {"summary": f"torchvision's {name}", "source": f"torchvision.datasets.{name}"}
    for split, options in _torchvision_splits(kind):
        data = _open_torchvision(kind, name, root, options, offline)
        classes = [str(each) for each in getattr(data, "classes", [])]
        _write_items(_pairs(data, name), classes, split, images, found)
    return found


def _torchvision_splits(kind: Any) -> list[tuple[str, dict[str, Any]]]:
    """Return (split, arguments of the constructor) of every split that a data set names; "" where it names none."""
    parameters = inspect.signature(kind.__init__).parameters
    if "train" in parameters:
        return [("train", {"train": True}), ("test", {"train": False})]
    if "split" not in parameters:
        return [("", {})]
    text = inspect.getdoc(kind) or ""
    splits = []
    for split, names in _SPLITS.items():
        named = [each for each in names if f'"{each}"' in text or f"'{each}'" in text or f"``{each}``" in text]
        splits += [(split, {"split": named[0]})] if named else []
    return splits or [("train", {"split": "train"}), ("test", {"split": "test"})]


def _open_torchvision(kind: Any, name: str, root: Path, options: dict[str, Any], offline: bool) -> Any:
    from urllib.error import URLError

    parameters = inspect.signature(kind.__init__).parameters
    arguments: dict[str, Any] = dict(options)
    if "root" in parameters:
        arguments["root"] = str(root)
    try:
        return kind(**arguments)
    except (RuntimeError, FileNotFoundError, OSError):
        if offline or "download" not in parameters:
            raise ZooError(
                f"torchvision's {name} is not in {str(root)!r}; put its files there and name the folder with --from"
                + (", or leave --offline out to download it" if "download" in parameters else "")
            ) from None
    except (TypeError, ValueError, ImportError) as error:
        raise ZooError(
            f"torchvision's {name} cannot be opened: {one_line(error, 160)}; import its images as a folder"
        ) from None
    try:
        root.mkdir(parents=True, exist_ok=True)
        return kind(**arguments, download=True)
    except (URLError, RuntimeError, OSError, ImportError) as error:
        raise ZooError(
            f"torchvision's {name} is not in {str(root)!r} and cannot be downloaded ({one_line(error, 120)}); "
            "put its files there and name the folder with --from"
        ) from None


def _items(data: Any, name: str) -> Iterator[Any]:
    """Yield the items of a data set; raises ZooError for one that cannot be read."""
    for number in range(len(data)):
        try:
            item = data[number]
        except Exception as error:  # whatever a library raises for a damaged file
            reason = one_line(error, 120)
            raise ZooError(f"{name}: item {number} cannot be read ({reason}); download or save it again") from error
        yield item


def _pairs(data: Any, name: str) -> Iterator[tuple[Any, Any]]:
    for item in _items(data, name):
        if not isinstance(item, tuple) or len(item) != 2:
            raise ZooError(f"{name} is no image classification: an item must be an image and a class")
        yield item


def _write_items(pairs: Iterator[tuple[Any, Any]], classes: list[str], split: str, images: Path, found: Found) -> None:
    """Write images as PNG files, numbered in their order, and take them with their labels."""
    from PIL import Image

    for number, (image, target) in enumerate(pairs):
        index = getattr(target, "item", lambda target=target: target)()
        if not isinstance(image, Image.Image) or isinstance(index, bool) or not isinstance(index, int):
            raise ZooError(
                f"{found.options.get('name', found.kind)} is no image classification: an item must be an image "
                f"and a class. Got {type(image).__name__} and {type(target).__name__}"
            )
        label = classes[index] if 0 <= index < len(classes) else str(index)
        path = f"{split or 'all'}/{index}/{number:06}.png"
        try:
            (images / path).parent.mkdir(parents=True, exist_ok=True)
            fits = image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")
            (image if fits else image.convert("RGB")).save(images / path, "PNG")
        except OSError as error:
            raise write_error(images / path, error) from error
        found.add(path, label, split)


def find_in_medmnist(name: str, folder: Path | None, images: Path) -> Found:
    """Return the images of a MedMNIST file, `<name>.npz` in a folder; left out, `~/.medmnist`, where medmnist puts it.

    Classes have MedMNIST's names where the package medmnist is installed, else its numbers. Raises ZooError where
    the file is not there.
    """
    folder = folder or Path.home() / ".medmnist"
    file = folder / f"{name}.npz"
    if not file.is_file():
        raise ZooError(
            f"there is no {str(file)!r}; download {one_line(name)}.npz from MedMNIST (doi 10.5281/zenodo.10519652) "
            "and name its folder with --from"
        )
    found = find_in_npz(file, images)
    try:
        from medmnist import INFO
    except ImportError:
        return found
    names = {
        str(key): str(value) for key, value in INFO.get(name.split("_", maxsplit=1)[0], {}).get("label", {}).items()
    }
    found.labels = [names.get(label, label) for label in found.labels]
    return found


def is_huggingface(folder: Path) -> bool:
    """Return whether a folder is what `datasets.save_to_disk` writes."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def find_in_huggingface(folder: Path, images: Path) -> Found:
    """Return the images of a Hugging Face data set on disk, written as PNG files to `images/<split>/<class>/`.

    It has one column of images and one of class labels; its splits train, validation and test are kept. Needs the
    extra `huggingface`. Raises ZooError.
    """
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    try:
        from datasets import ClassLabel, DatasetDict, Image, Value, load_from_disk
    except ImportError:
        raise ZooError("a Hugging Face data set needs the extra: pip install 'zoo[huggingface]'") from None
    try:
        loaded: Any = load_from_disk(str(folder))
    except Exception as error:
        raise ZooError(
            f"{one_line(folder)!r} is no whole Hugging Face data set: {one_line(error, 160)}; save it again"
        ) from error
    parts = dict(loaded) if isinstance(loaded, DatasetDict) else {"": loaded}
    names = {"train": "train", "validation": "val", "valid": "val", "val": "val", "dev": "val", "test": "test", "": ""}
    found = Found("huggingface", images)
    for part, data in parts.items():
        if part not in names:
            found.leave_out(f"images of the split {one_line(part, 40)}", len(data))
            continue
        features = data.features
        pictures = [key for key, kind in features.items() if isinstance(kind, Image)]
        labels = [key for key, kind in features.items() if isinstance(kind, ClassLabel)]
        labels = labels or [key for key in ("label", "labels", "class") if isinstance(features.get(key), Value)]
        if len(pictures) != 1 or len(labels) != 1:
            raise ZooError(
                f"{one_line(folder)!r} must have one column of images and one of class labels. It has "
                f"{one_line(', '.join(f'{key}: {type(kind).__name__}' for key, kind in features.items()))}"
            )
        kind = features[labels[0]]
        classes = list(kind.names) if isinstance(kind, ClassLabel) else sorted({str(each) for each in data[labels[0]]})
        place = {} if isinstance(kind, ClassLabel) else {label: number for number, label in enumerate(classes)}
        rows = _items(data, repr(one_line(folder)))
        pairs = ((row[pictures[0]], place.get(str(row[labels[0]]), row[labels[0]])) for row in rows)
        _write_items(pairs, [str(each) for each in classes], names[part], images, found)
    if not found.paths:
        raise ZooError(
            f"{one_line(folder)!r} has no split train, validation or test; it has {one_line(', '.join(parts))}"
        )
    return found


def find_in_npz(path: Path, images: Path) -> Found:
    """Return the images of a MedMNIST-style .npz, written as PNG files to `images/<split>/`.

    It holds `<split>_images`, uint8 (N, H, W) or (N, H, W, 3), and `<split>_labels`, whole numbers (N,) or
    (N, 1), for train and, if shipped, val and test. The classes are named by the numbers. Raises ZooError for
    anything else.
    """
    from PIL import Image

    found = Found("npz", images)
    for split, (pixels, labels) in _npz_arrays(path).items():
        digits = len(str(max(0, len(pixels) - 1)))
        try:
            (images / split).mkdir(parents=True)
            for number, (array, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
                name = str(PurePosixPath(split) / f"{number:0{digits}}.png")
                Image.fromarray(np.ascontiguousarray(array)).save(images / name)
                found.add(name, str(label), split)
        except OSError as error:
            raise write_error(images / split, error) from error
    return found


def _npz_arrays(path: Path) -> dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    try:
        if not zipfile.is_zipfile(path):
            raise ZooError(f"{one_line(path)!r} is no .npz: it is cut off, or of another kind")
        # Opened here, because numpy leaves a file open that it cannot read.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            keys = list(stored.keys())
            wanted = {f"{split}_{what}" for split in SPLITS for what in ("images", "labels")}
            arrays = {key: stored[key] for key in keys if key in wanted}
    except ZooError:
        raise
    except Exception as error:  # ValueError for pickles, and what zipfile, zlib and struct raise for damage
        raise ZooError(f"{one_line(path)!r} is no .npz of plain arrays: {one_line(error)}") from error
    if not {"train_images", "train_labels"} <= set(arrays):
        raise ZooError(
            f"{one_line(path)!r} must hold train_images and train_labels (and val_, test_). It holds "
            f"{one_line(', '.join(keys)) or 'none'}"
        )
    parts = {}
    for split in SPLITS:
        pixels, labels = arrays.get(f"{split}_images"), arrays.get(f"{split}_labels")
        if pixels is not None and labels is not None:
            parts[split] = _checked(pixels, labels, f"{one_line(path)!r}: {split}")
        elif (pixels is None) != (labels is None):
            raise ZooError(f"{one_line(path)!r} must hold both {split}_images and {split}_labels, or neither")
    return parts


def _checked(
    pixels: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], what: str
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return images of shape (N, H, W) or (N, H, W, 3) and labels of shape (N,)."""
    if pixels.ndim == 4 and pixels.shape[3] == 1:
        pixels = pixels[:, :, :, 0]
    if pixels.dtype != np.uint8 or not (pixels.ndim == 3 or (pixels.ndim == 4 and pixels.shape[3] == 3)):
        raise ZooError(
            f"{what}_images must be uint8 of shape (N, H, W) or (N, H, W, 3). Got {pixels.dtype} of {pixels.shape}"
        )
    if labels.ndim == 2 and labels.shape[1] > 1:
        raise ZooError(f"{what}_labels has {labels.shape[1]} labels per image; only one label per image is supported")
    labels = labels.reshape(-1) if labels.ndim == 2 else labels
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(pixels):
        raise ZooError(
            f"{what}_labels must be {len(pixels)} whole numbers, one per image. Got {labels.dtype} of {labels.shape}"
        )
    if len(pixels) == 0 or 0 in pixels.shape:
        raise ZooError(f"{what}_images has no pixels: its shape is {pixels.shape}")
    return pixels, labels
