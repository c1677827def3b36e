"""What every file of a dataset is: each judged once, those that the manifest does not name among them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from zoo.data.facts import Facts, ImageFacts, look_at_file, wrong_suffix
from zoo.data.layouts import IMAGE_SUFFIXES
from zoo.data.manifest import Dataset, Progress, map_files
from zoo.data.window import windowing_of_facts

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
            found.append(Finding(path, "unreadable", str(facts.reasons[place])))
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
