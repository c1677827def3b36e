"""From what a source holds to the manifest's rows: groups, splits, and what is counted on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zoo.data.layouts import Found
from zoo.data.manifest import Row
from zoo.data.split import (
    check_enough_groups,
    check_ratios,
    check_seed,
    groups_by_blocks,
    groups_by_regex,
    merge_identical,
    split_into,
)
from zoo.errors import ZooError, one_line
from zoo.files import sha256_bytes
from zoo.runs import SPLITS


@dataclass(frozen=True)
class Grouping:
    """How images are put into groups: by a column, a regex, blocks of file numbers, or each by itself."""

    group_column: str | None = None
    group_regex: str | None = None
    group_blocks: int | None = None

    def record(self) -> dict[str, Any]:
        """Return the way that was asked for, as `dataset.toml` has it; raises ZooError for more than one."""
        asked = {key: value for key, value in vars(self).items() if value is not None}
        if len(asked) > 1:
            raise ZooError(f"give at most one way of grouping. Got {' and '.join(asked)}")
        return asked

    def apply(self, found: Found) -> None:
        """Set the images' groups, by regex or blocks; those of a column are there already."""
        if self.group_regex is not None:
            found.groups = groups_by_regex(found.paths, self.group_regex)
        elif self.group_blocks is not None:
            found.groups = groups_by_blocks(found.paths, found.labels, self.group_blocks)
        else:
            return
        found.grouped_by = self.record()


def split_rows(
    found: Found, digests: Sequence[tuple[str, str]], ratios: Sequence[float], seed: int
) -> tuple[list[Row], dict[str, Any]]:
    """Return the manifest's rows and what `dataset.toml` says of the split and in counts.

    Where splits are shipped, those missing are cut from train; images of one group, or of the same pixels,
    stay together in what is cut, and leaks between shipped splits are counted.
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
    splits = _draw(found, groups, ["train", *missing] if shipped else missing, ratios, seed)
    rows: list[Row] = [
        (sample_id, path, label, group, split, sha256, pixel)
        for sample_id, path, label, group, split, (sha256, pixel) in zip(
            ids, found.paths, labels, groups, splits, digests, strict=True
        )
    ]
    how = {"shipped": shipped, "drawn": missing, **found.grouped_by}
    if missing:
        how |= {"ratios": list(check_ratios(ratios)), "seed": seed}
    counts = {
        "images": len(rows),
        "groups": len(set(groups)),
        "pixel_copies": len(pixels) - len(set(pixels)),
        "copies_across_splits": _across(pixels, splits),
        "groups_across_splits": _across(groups, splits),
    }
    return rows, {"split": how, "counts": counts}


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
