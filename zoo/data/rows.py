"""From what a source holds to the manifest's rows: groups, splits, and what is counted on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from zoo.data.layouts import Found
from zoo.data.manifest import Row
from zoo.data.split import (
    Ints,
    check_enough_groups,
    check_ratios,
    check_seed,
    groups_by_blocks,
    groups_by_regex,
    merge_identical,
    split_into,
    stratification_error,
)
from zoo.errors import ZooError, one_line
from zoo.files import sha256_bytes
from zoo.runs import SPLITS


@dataclass(frozen=True)
class Grouping:
    """How images are put into groups; several ways are joined, so that none is torn.

    By a column, a regex on the path, blocks of file numbers, the patient of a DICOM; near_duplicates: kept
    together too, or left out, wherever the classes have groups enough for it.
    """

    group_column: str | None = None
    group_regex: str | None = None
    group_blocks: int | None = None
    group_patient: bool | None = None
    near_duplicates: bool | None = None

    def record(self) -> dict[str, Any]:
        """Return the ways that were asked for, as `dataset.toml` has them."""
        return {key: value for key, value in vars(self).items() if value is not None and key != "near_duplicates"}

    def apply(self, found: Found) -> None:
        """Set the images' groups by regex and blocks, joined with those that the source names."""
        ways = [found.groups] if any(found.groups) else []
        if self.group_regex is not None:
            ways.append(groups_by_regex(found.paths, self.group_regex))
        if self.group_blocks is not None:
            ways.append(groups_by_blocks(found.paths, found.labels, self.group_blocks))
        if self.group_regex is not None or self.group_blocks is not None:
            found.groups = join_groups(ways, found.paths)
            found.grouped_by = {**found.grouped_by, **self.record()}


def join_groups(ways: Sequence[Sequence[str]], paths: Sequence[str]) -> list[str]:
    """Return one group per image, such that images of one group by any way share it; "" is a group of its own.

    >>> join_groups([["p1", "p1", "p2"], ["a", "b", "b"]], ["1", "2", "3"])
    ['p1', 'p1', 'p1']
    """
    joined = list(paths)
    for way in ways:
        joined = merge_identical(joined, [group or f"\0{path}" for group, path in zip(way, paths, strict=True)])
    names: dict[str, tuple[int, str]] = {}
    for number, way in enumerate(ways):
        for whole, group in zip(joined, way, strict=True):
            if group and names.get(whole, (number, group)) >= (number, group):
                names[whole] = (number, group)
    taken: dict[str, str] = {}
    for whole in sorted(names):
        name = names[whole][1]
        # Two ways may use one name for different things.
        while taken.setdefault(name, whole) != whole:
            name += "+"
        names[whole] = (0, name)
    return [names.get(whole, (0, ""))[1] for whole in joined]


def split_rows(
    found: Found,
    digests: Sequence[tuple[str, str]],
    ratios: Sequence[float],
    seed: int,
    near: Ints | None = None,
    near_required: bool = False,
) -> tuple[list[Row], dict[str, Any]]:
    """Return the manifest's rows and what `dataset.toml` says of the split and in counts.

    Where splits are shipped, those missing are cut from train; images of one group, or of the same pixels,
    stay together in what is cut, and leaks between shipped splits are counted. near: (N,) numbers of the
    near-duplicate components, kept together too; where classes have too few groups for that they are not, which
    is said, unless near_required.
    """
    labels, pixels = found.labels, [pixel for _, pixel in digests]
    ids = [sha256_bytes(path.encode())[:16] for path in found.paths]
    if len(set(ids)) < len(ids):
        raise ZooError("two images have one sample_id: their paths' digests collide; rename one of them")
    own = [group or sample_id for group, sample_id in zip(found.groups or [""] * len(ids), ids, strict=True)]
    keys = [f"{split} {pixel}" for split, pixel in zip(found.splits, pixels, strict=True)]
    groups = merge_identical(own, keys)
    shipped = [split for split in SPLITS if split in found.splits]
    missing = [split for split in SPLITS if split not in shipped]
    names = ["train", *missing] if shipped else missing
    how: dict[str, Any] = {"shipped": shipped, "drawn": missing, **found.grouped_by}
    if near is None or not missing:
        splits = _draw(found, groups, names, ratios, seed)
    else:
        marks = [f"{split} {mark}" for split, mark in zip(found.splits, near.tolist(), strict=True)]
        joined = merge_identical(groups, marks)
        try:
            splits, groups = _draw(found, joined, names, ratios, seed), joined
            how["near_duplicates"] = True
        except ZooError as error:
            if near_required:
                raise
            splits = _draw(found, groups, names, ratios, seed)
            how |= {"near_duplicates": False, "near_duplicates_torn": str(error)}
    rows: list[Row] = [
        (sample_id, path, label, group, split, sha256, pixel)
        for sample_id, path, label, group, split, (sha256, pixel) in zip(
            ids, found.paths, labels, groups, splits, digests, strict=True
        )
    ]
    if missing:
        how |= {"ratios": list(check_ratios(ratios)), "seed": seed}
        how["stratification_error"] = round(stratification_error(labels, splits), 4)
    return rows, {"split": how, "counts": count_rows(rows)}


def count_rows(rows: Sequence[Row]) -> dict[str, int]:
    """Return what `dataset.toml` says of a manifest in numbers."""
    groups, splits, pixels = ([row[place] for row in rows] for place in (3, 4, 6))
    return {
        "images": len(rows),
        "groups": len(set(groups)),
        "pixel_copies": len(pixels) - len(set(pixels)),
        "copies_across_splits": _across(pixels, splits),
        "groups_across_splits": _across(groups, splits),
    }


_KEPT_FIRST = {"test": 0, "val": 1, "train": 2}


def repair_rows(
    rows: Sequence[Row], near: Ints, *, drop_duplicates: bool = False, across_splits: bool = True
) -> tuple[list[Row], dict[str, str]]:
    """Return the rows without what leaks or is a copy, and path to reason of each row that is dropped.

    near: (P, 2) places of near-duplicates. across_splits: images of train whose copy, near-copy or group stands in
    val or test are dropped, and images of val whose likes stand in test; never one of test. drop_duplicates: of
    images with the same pixels one stays, of test before val before train; where their labels differ, nobody
    knows the right one, and all go.
    """
    dropped: dict[int, str] = {}
    copies: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        copies.setdefault(row[6], []).append(place)
    if drop_duplicates:
        for same in (each for each in copies.values() if len(each) > 1):
            dropped |= _spare(rows, same)
    if across_splits:
        for same in copies.values():
            _keep_best(rows, same, "the same picture stands in", dropped)
        # Likes of test go first: what has gone from val then takes nothing from train.
        # A pair speaks for all copies of both pictures.
        alike = [[*copies[rows[one][6]], *copies[rows[other][6]]] for one, other in near.tolist()]
        for members in sorted(alike, key=lambda places: min(_KEPT_FIRST[rows[each][4]] for each in places)):
            _keep_best(rows, members, "nearly the same picture stands in", dropped)
        groups: dict[str, list[int]] = {}
        for place, row in enumerate(rows):
            groups.setdefault(row[3], []).append(place)
        for group, members in groups.items():
            _keep_best(rows, members, f"its group {one_line(group, 60)!r} stands in", dropped)
    kept = [row for place, row in enumerate(rows) if place not in dropped]
    return kept, {rows[place][1]: reason for place, reason in sorted(dropped.items())}


def _spare(rows: Sequence[Row], same: Sequence[int]) -> dict[int, str]:
    """Return which of images with the same pixels go, and why."""
    if len({rows[place][2] for place in same}) > 1:
        labels = " and ".join(sorted({one_line(rows[place][2], 40) for place in same}))
        return dict.fromkeys(same, f"the same picture is labelled {labels}")
    stays = min(same, key=lambda place: (_KEPT_FIRST[rows[place][4]], rows[place][1]))
    split, name = rows[stays][4], one_line(rows[stays][1], 200)
    return {
        place: f"copy of {name}" if rows[place][4] == split else f"the same picture stands in {split}: {name}"
        for place in same
        if place != stays
    }


def _keep_best(rows: Sequence[Row], alike: Iterable[int], why: str, dropped: dict[int, str]) -> None:
    """Of images that belong together and still stand, drop those of lesser splits: train below val below test."""
    standing = [place for place in alike if place not in dropped]
    best = min(standing, key=lambda place: _KEPT_FIRST[rows[place][4]], default=0)
    for place in standing:
        if rows[place][4] != rows[best][4]:
            dropped[place] = f"{why} {rows[best][4]}: {one_line(rows[best][1], 200)}"


def _draw(found: Found, groups: Sequence[str], names: Sequence[str], ratios: Sequence[float], seed: int) -> list[str]:
    """Return every image's split: those of train, or of none, are shared out among names."""
    check_seed(seed)
    shares = dict(zip(SPLITS, check_ratios(ratios), strict=True))
    splits = list(found.splits) or [""] * len(groups)
    if len(names) < 2:
        return splits
    pool = [place for place, split in enumerate(splits) if split in ("", "train")]
    labels, of_pool = [found.labels[place] for place in pool], [groups[place] for place in pool]
    check_enough_groups(labels, of_pool, names)
    drawn = split_into(labels, of_pool, names, [shares[name] for name in names], seed).tolist()
    gaps = {(label, name) for label in labels for name in names} - set(zip(labels, drawn, strict=True))
    if gaps:
        label, name = min(gaps)
        raise ZooError(
            f"class {one_line(label)!r} cannot stand in {name} without tearing a group apart: its groups "
            "hold several classes; add images, or make smaller groups"
        )
    for place, split in zip(pool, drawn, strict=True):
        splits[place] = split
    return splits


def _across(names: Sequence[str], splits: Sequence[str]) -> int:
    """Return how many names stand in more than one split."""
    times = Counter(name for name, _ in set(zip(names, splits, strict=True)))
    return sum(count > 1 for count in times.values())


def check_classes(labels: Sequence[str]) -> None:
    """Raise ZooError unless there are two classes or more."""
    classes = sorted(set(labels))
    if len(classes) < 2:
        only = f", {one_line(classes[0])!r}" if classes else ""
        raise ZooError(
            f"a dataset must have two or more classes. Got {len(labels)} "
            f"{'image' if len(labels) == 1 else 'images'} of {len(classes)}{only}; the source must hold a "
            "folder per class, or a column of labels"
        )
