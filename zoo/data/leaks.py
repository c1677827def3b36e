"""Do train, val and test leak into each other? Copies, near-copies, torn groups, and numbers in scan order."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from zoo.data.duplicates import Ints, exact_pairs, key_codes, near_pairs, standardised
from zoo.data.facts import Facts, dataset_facts
from zoo.data.manifest import Dataset, Progress
from zoo.data.pictures import Chosen, blocks
from zoo.errors import ZooError, one_line
from zoo.files import digest_of, read_json, write_json

LEAKS_VERSION = 1
GROUPINGS = ("group_column", "group_regex", "group_blocks", "group_patient")
SCAN_BLOCK = 20  # neighbouring file numbers that stand in for a patient where nobody recorded patients
_NEIGHBOURS = 5  # file numbers
_QUERIES = 1000
_REFERENCES = 20_000
_EXAMPLES = 50


@dataclass(frozen=True)
class ScanOrder:
    """How often the image most like another has a neighbouring file number (at most 5 away) in its folder.

    share, by_chance: fractions of the images asked, in [0, 1]; across: the places of those neighbours that stand in
    different splits, (P, 2).
    """

    share: float
    by_chance: float
    asked: int
    across: Ints

    @property
    def found(self) -> bool:
        """Return whether the numbers plainly run in the order of scans, frames or patients."""
        return self.share >= 0.3 and self.share >= 5 * self.by_chance


@dataclass(frozen=True)
class Leaks:
    """What stands in more than one split, with examples; pairs are of paths.

    label_conflicts: exact copies of different classes, wherever they stand.
    """

    exact_pairs: int = 0
    near_pairs: int = 0
    groups: int = 0
    scan_order: int = 0
    label_conflicts: int = 0
    examples: dict[str, list[Any]] = field(default_factory=dict)
    remedy: str = ""

    @property
    def count(self) -> int:
        """Return how many leaks stand across splits."""
        return self.exact_pairs + self.near_pairs + self.groups + self.scan_order

    @property
    def ok(self) -> bool:
        """Return whether a score on test may be believed, as far as this check can see."""
        return self.count == 0 and self.label_conflicts == 0

    def sentences(self) -> list[str]:
        """Return what leaks, in sentences."""
        what = {
            "exact_pairs": "pairs of the same picture stand in different splits",
            "near_pairs": "pairs of nearly the same picture stand in different splits",
            "groups": "groups stand in more than one split",
            "scan_order": "images have their nearest likeness under a neighbouring file number in another split",
            "label_conflicts": "pairs of the same picture have different labels",
        }
        return [f"{getattr(self, key)} {text}" for key, text in what.items() if getattr(self, key)]


_found: dict[str, Leaks] = {}  # by file, for one process that plans many runs


@dataclass(frozen=True)
class Pairs:
    """Copies and near-copies of a dataset's images, by their places in the manifest: (P, 2) each."""

    exact: Ints
    near: Ints


def duplicate_pairs(dataset: Dataset, facts: Facts) -> Pairs:
    """Return the copies and near-copies among those images of a dataset that can be used."""
    frame, good = dataset.frame, np.flatnonzero(facts.good)
    keys, labels = frame["pixel_sha256"].to_numpy(dtype=object), frame["label"].to_numpy(dtype=object)
    small = facts.small if facts.good.all() else Chosen(facts.small, good)
    near = near_pairs(facts.phash[good], small, labels[good], keys[good])
    return Pairs(exact_pairs(keys), good[near])


def find_leaks(dataset: Dataset, progress: Progress | None = None) -> Leaks:
    """Return what leaks between a dataset's splits; remembered by the digest of its split.

    progress is called with images done and in all where files have to be read.
    """
    key = digest_of([LEAKS_VERSION, dataset.split_digest, dataset.facts.get("split"), dataset.facts.get("window")])
    file = dataset.folder / ".cache" / f"leaks-{key[:16]}.json"
    if (known := _found.get(str(file))) is not None:
        return known
    try:
        stored = read_json(file)
        stored.pop("schema_version", None)
        return Leaks(**stored)
    except (ZooError, TypeError):
        pass
    facts = dataset_facts(dataset, progress)
    leaks = leaks_of(dataset, duplicate_pairs(dataset, facts), scan_order(dataset, facts))
    if facts.good.all():
        _found[str(file)] = leaks
        with suppress(ZooError):  # a folder that cannot be written: found again the next time
            write_json(file, dict(vars(leaks)))
    return leaks


def refuse_leaks(dataset: Dataset, accept: bool, progress: Progress | None = None) -> bool:
    """Return whether the dataset leaks and that was accepted; raise ZooError where it leaks and was not."""
    leaks = find_leaks(dataset, progress)
    if leaks.ok:
        return False
    if accept:
        return True
    raise ZooError(
        f"dataset {dataset.name!r} leaks: {'; '.join(leaks.sentences())}. A score on its test split would be too "
        f"good: {leaks.remedy}, look with `zoo data audit {dataset.name}`, or go on with --accept-leaks"
    )


def leaks_of(dataset: Dataset, pairs: Pairs, order: ScanOrder | None) -> Leaks:
    """Return what leaks, out of a dataset's pairs of copies and the order of its file numbers."""
    frame = dataset.frame
    paths, splits = frame["path"].to_numpy(dtype=object), frame["split"].to_numpy(dtype=object)
    labels = frame["label"].to_numpy(dtype=object)
    across = {
        "exact_pairs": pairs.exact[splits[pairs.exact[:, 0]] != splits[pairs.exact[:, 1]]],
        "near_pairs": pairs.near[splits[pairs.near[:, 0]] != splits[pairs.near[:, 1]]],
        "label_conflicts": pairs.exact[labels[pairs.exact[:, 0]] != labels[pairs.exact[:, 1]]],
    }
    in_splits = frame.groupby("group")["split"].nunique()
    torn = sorted(in_splits.index[in_splits > 1].tolist())
    examples: dict[str, list[Any]] = {
        key: [[paths[one], paths[other]] for one, other in found[:_EXAMPLES]] for key, found in across.items()
    }
    counts = {key: len(found) for key, found in across.items()}
    unknown = order if order is not None and order.found and not declared_groups(dataset.facts) else None
    leaks = Leaks(
        exact_pairs=counts["exact_pairs"],
        near_pairs=counts["near_pairs"],
        label_conflicts=counts["label_conflicts"],
        groups=len(torn),
        scan_order=len(unknown.across) if unknown else 0,
        examples={
            **examples,
            "scan_order": [[paths[one], paths[other]] for one, other in unknown.across[:_EXAMPLES]] if unknown else [],
            "groups": torn[:_EXAMPLES],
        },
    )
    return Leaks(**{**vars(leaks), "remedy": _remedy(dataset, leaks)})


def declared_groups(facts: dict[str, Any]) -> bool:
    """Return whether somebody said what belongs together, in a `dataset.toml`; a patient here and there is not it."""
    recorded = facts.get("split", {})
    ways = [key for key in GROUPINGS if key in recorded]
    return ways != ["group_patient"] if ways and recorded.get("group_patient_share", 1.0) < 0.9 else bool(ways)


def _remedy(dataset: Dataset, leaks: Leaks) -> str:
    recorded = dataset.facts.get("split", {})
    name, shipped = recorded.get("of", dataset.name), recorded.get("shipped")
    if leaks.ok:
        return ""
    if dataset.facts.get("import", {}).get("kind") == "looked at":
        return "import it, and the new split will keep these together"
    if shipped and leaks.count > leaks.scan_order:
        conflicts = " --drop-duplicates" if leaks.label_conflicts else ""
        return f"drop the copies from train with `zoo data split {name} --repair{conflicts}`"
    options = [f"--group-blocks {SCAN_BLOCK}"] if leaks.scan_order else []
    options += ["--force"] if shipped and leaks.scan_order else []
    options += ["--drop-duplicates"] if leaks.label_conflicts else []
    options += ["--group-near-duplicates"] if leaks.near_pairs else []
    folds = " and make its folds again" if recorded.get("folds") else ""
    return f"split again with `{' '.join(['zoo data split', name, *options])}`{folds}"


def file_number(path: str) -> int:
    """Return the last number in a file's stem, or -1 where there is none.

    >>> file_number("a/case (7).jpg"), file_number("b/x.png")
    (7, -1)
    """
    found = re.findall(r"[0-9]+", PurePosixPath(path).stem)
    return int(found[-1][-15:]) if found else -1


def scan_order(dataset: Dataset, facts: Facts) -> ScanOrder | None:
    """Return whether likeness follows file numbers, asked of at most 1000 images; None where few have numbers."""
    contrast = np.concatenate([np.zeros(0, bool), *(block.std(axis=1) > 0 for block in blocks(facts.small))])
    good = np.flatnonzero(facts.good & contrast)
    paths, numbered = dataset.frame["path"].to_numpy(dtype=object), 0

    def keys() -> Iterator[tuple[str, int, int]]:
        nonlocal numbered
        for place in good.tolist():
            number = file_number(paths[place])
            numbered += number >= 0
            yield str(PurePosixPath(paths[place]).parent), number, place

    # Of many images a run of whole neighbourhoods is looked at: a random choice would have no neighbours.
    order = heapq.nsmallest(_REFERENCES, keys())
    if len(good) < 20 or numbered / len(good) < 0.9:
        return None
    folders, numbers = key_codes([name for name, _, _ in order]), np.array([number for _, number, _ in order])
    good = np.array([place for _, _, place in order])
    asked = np.unique(np.linspace(0, len(good) - 1, min(_QUERIES, len(good))).astype(int))
    nearest = _nearest(standardised(facts.small[good]), asked)
    near = (folders[asked] == folders[nearest]) & (np.abs(numbers[asked] - numbers[nearest]) <= _NEIGHBOURS)
    splits = dataset.frame["split"].to_numpy(dtype=object)[good]
    sizes = {name: int(count) for name, count in zip(*np.unique(folders, return_counts=True), strict=True)}
    chance = float(np.mean([min(1.0, 2 * _NEIGHBOURS / max(1, sizes[name] - 1)) for name in folders[asked].tolist()]))
    other = near & (splits[asked] != splits[nearest])
    across = np.stack([good[asked[other]], good[nearest[other]]], axis=1)
    return ScanOrder(float(near.mean()), chance, len(asked), across)


def _nearest(values: np.ndarray[Any, np.dtype[np.float32]], asked: Ints) -> Ints:
    """Return which other row is most like each of those asked for."""
    found = []
    for part in np.array_split(asked, max(1, len(asked) // 100)):
        likeness = values[part] @ values.T
        likeness[np.arange(len(part)), part] = -2
        found.append(likeness.argmax(axis=1))
    return np.concatenate(found)


def describe_leaks(leaks: Leaks) -> list[str]:
    """Return what an import or a split should say of leaks: nothing where there is none."""
    if leaks.ok:
        return []
    return [f"LEAKS: {one_line('; '.join(leaks.sentences()))}. Training is refused: {leaks.remedy}"]
