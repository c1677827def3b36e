"""What every file of a dataset is: each judged once, those that the manifest does not name among them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from zoo.data.facts import Facts, ImageFacts, collect, look_at_file, wrong_suffix
from zoo.data.layouts import IMAGE_SUFFIXES, match_classes, split_and_label
from zoo.data.manifest import Dataset, Progress, map_files
from zoo.data.window import Windowing, windowing_of_facts
from zoo.errors import ZooError, one_line
from zoo.files import sha256_bytes

# What the pages say of each kind; the first ones are worse than the last.
KINDS = {
    "unreadable": "cannot be used",
    "changed": "changed since the import",
    "no_image": "no image",
    "not_in_manifest": "an image that the manifest does not name",
    "wrong_suffix": "named as another format",
    "animated": "animated: the first frame counts",
    "oversized": "far larger than any network needs",
    "turned": "turned by EXIF",
    "odd_mode": "unusual mode",
    "hostile_name": "a name that breaks tables",
}
LARGE_PIXELS = 25_000_000
LARGE_BYTES = 64 << 20
_PLAIN_MODES = frozenset({"L", "RGB", "DICOM"})
_HOSTILE = re.compile(r"[\x00-\x1f\x7f|<>\"`\\]|^[=+\-@]|/[=+\-@]|(^|/)\s|\s(/|$)|[\u202a-\u202e\u2066-\u2069]")
_SCANNED = ("folder", "splits", "npz", "built-in", "published", "canonical", "torchvision", "huggingface")


@dataclass(frozen=True)
class Finding:
    """One file, a kind of KINDS, and what exactly."""

    path: str
    kind: str
    detail: str = ""


def open_folder(folder: Path, progress: Progress | None = None) -> tuple[Dataset, Facts]:
    """Return a folder of images that is not imported as a dataset, for looking at alone, and the facts of its files.

    Every file below it is one image, whatever it is; the label is the name of its first folder, or, below folders
    named as splits, of the second. Raises ZooError where there is no file.
    """
    paths = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(each for each in folders if not each.startswith(".") and each != "__MACOSX")
        paths += [(Path(place) / name).relative_to(folder).as_posix() for name in sorted(names) if name[0] != "."]
    if not paths:
        raise ZooError(f"there is no file in {one_line(folder)!r}; name a folder of images, or a dataset")
    rows: list[ImageFacts] = []
    for each in map_files(lambda path: look_at_file(folder / path, Windowing()), paths):
        rows.append(each)
        if progress:
            progress(len(rows), len(paths))
    shown = [path.encode(errors="backslashreplace").decode() for path in paths]
    placed = [split_and_label(path) for path in shown]
    facts: dict[str, Any] = {"import": {"kind": "looked at"}}
    of_splits: dict[str, set[str]] = {}
    for (split, label), each in zip(placed, rows, strict=True):
        if split and not each.no_image:
            of_splits.setdefault(split, set()).add(label)
    same = match_classes(list(of_splits.values())) if of_splits else {}
    if same is None:
        listed = "; ".join(
            f"{split} has {one_line(', '.join(sorted(names)), 200)}" for split, names in of_splits.items()
        )
        facts["class_mismatch"] = f"the class folders of the splits differ: {listed}"
    else:
        facts["renamed_classes"] = {old: new for old, new in same.items() if old != new}
        placed = [(split, same.get(label, label)) for split, label in placed]
    frame = pd.DataFrame(
        {
            "sample_id": [sha256_bytes(path.encode())[:16] for path in shown],
            "path": shown,
            "label": [label for _, label in placed],
            "group": shown,
            "split": [split or "train" for split, _ in placed],
            "sha256": [each.sha256 for each in rows],
            "pixel_sha256": [each.pixel_sha256 or f"none {place}" for place, each in enumerate(rows)],
        }
    )
    classes = sorted({label for _, label in placed})
    dataset = Dataset(folder.name, folder, folder, classes, None, frame, "0" * 64, "skip", facts)
    return dataset, collect(rows, frame["sha256"].tolist())


def judge_files(dataset: Dataset, facts: Facts, progress: Progress | None = None) -> list[Finding]:
    """Return what is to be said of single files, worst kinds first.

    Files below the dataset's root that the manifest does not name are looked at too, except those that a split
    dropped; progress is called with how many of them are done and in all.
    """
    found = _of_manifest(dataset, facts)
    others = list(_other_files(dataset))
    windowing = windowing_of_facts(dataset.facts)
    looked = map_files(lambda path: look_at_file(dataset.root / path, windowing), others)
    for number, (path, each) in enumerate(zip(others, looked, strict=True), 1):
        found.append(_judge_other(path, each))
        if progress:
            progress(number, len(others))
    order = list(KINDS)
    return sorted(found, key=lambda each: (order.index(each.kind), each.path))


def _of_manifest(dataset: Dataset, facts: Facts) -> list[Finding]:
    found = []
    for place, path in enumerate(dataset.frame["path"].tolist()):
        if _HOSTILE.search(path):
            found.append(Finding(path, "hostile_name"))
        if facts.reasons[place]:
            kind = "unreadable" if Path(path).suffix.lower() in IMAGE_SUFFIXES else "no_image"
            found.append(Finding(path, kind, str(facts.reasons[place])))
            continue
        width, height = (int(side) for side in facts.size[place])
        checks = {
            "changed": (bool(facts.changed[place]), ""),
            "wrong_suffix": (
                wrong_suffix(path, str(facts.formats[place])),
                f"{facts.formats[place]} named {Path(path).suffix or 'without an ending'}",
            ),
            "animated": (bool(facts.animated[place]), str(facts.formats[place])),
            "oversized": (
                width * height > LARGE_PIXELS or facts.bytes[place] > LARGE_BYTES,
                f"{width} x {height} pixels, {facts.bytes[place] >> 20} MiB",
            ),
            "turned": (facts.orientation[place] != 1, f"orientation {facts.orientation[place]}"),
            "odd_mode": (
                str(facts.modes[place]) not in _PLAIN_MODES or not facts.opaque[place],
                str(facts.modes[place]) + ("" if facts.opaque[place] else ", with transparency"),
            ),
        }
        found += [Finding(path, kind, detail) for kind, (wrong, detail) in checks.items() if wrong]
    return found


def _judge_other(path: str, facts: ImageFacts) -> Finding:
    shown = path.encode(errors="backslashreplace").decode()
    if facts.no_image or (facts.reason and Path(path).suffix.lower() not in IMAGE_SUFFIXES):
        return Finding(shown, "no_image", facts.reason)
    if facts.reason:
        return Finding(shown, "unreadable", facts.reason)
    return Finding(shown, "not_in_manifest", "import again to take it")


def _other_files(dataset: Dataset) -> Iterator[str]:
    """Yield the paths of the files that the manifest does not name: all below the root, or those once skipped."""
    known = {*dataset.frame["path"].tolist(), *dataset.facts.get("dropped", {})}
    if dataset.facts.get("import", {}).get("kind") not in _SCANNED:
        skipped = sorted(dataset.facts.get("skipped", {}))
        yield from (path for path in skipped if os.path.lexists(dataset.root / path))
        return
    for folder, folders, names in os.walk(dataset.root):
        folders[:] = sorted(each for each in folders if not each.startswith(".") and each != "__MACOSX")
        for name in sorted(names):
            path = (Path(folder) / name).relative_to(dataset.root).as_posix()
            if path not in known and not name.startswith("."):
                yield path
