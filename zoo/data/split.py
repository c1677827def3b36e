"""Groups that must not be torn apart, and the stratified, seeded split into train, val and test."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from zoo.errors import ZooError, one_line
from zoo.runs import SPLITS

Strings = Sequence[str] | np.ndarray[Any, Any]
Ints = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]

DEFAULT_RATIOS = (0.7, 0.15, 0.15)
_ATTEMPTS = 4  # of different orders, of which the best is kept, where there are few enough groups for it
_FEW_GROUPS = 2000
_WALK_STEPS = 100


def check_ratios(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Return the shares of train, val and test; raises ZooError unless all are above 0 and sum to 1.

    >>> check_ratios([0.8, 0.1, 0.1])
    (0.8, 0.1, 0.1)
    """
    try:
        values = [float(ratio) for ratio in ratios]
    except (TypeError, ValueError):
        values = []
    if len(values) != 3 or not all(value > 0 for value in values) or not abs(sum(values) - 1) <= 1e-6:
        raise ZooError(
            "ratios must be three numbers above 0 that sum to 1, for train, val and test, such as 0.7 0.15 "
            f"0.15. Got {one_line(ratios)}"
        )
    return values[0], values[1], values[2]


def check_seed(seed: int) -> int:
    """Return seed if it is a whole number of 0 or more; raises ZooError otherwise."""
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ZooError(f"seed must be a whole number of 0 or more. Got {one_line(repr(seed))}")
    return seed


def split_groups(
    labels: Strings, groups: Strings, ratios: Sequence[float] = DEFAULT_RATIOS, seed: int = 0
) -> np.ndarray[Any, np.dtype[np.str_]]:
    """Return the split of each sample: every group whole in one split, every class shared out by the ratios.

    labels, groups: one name per sample, N of each. Result: N of `train`, `val`, `test`. It depends on which
    groups hold which labels, on ratios and seed, and not on the order of the samples. Large groups are placed
    first, each where the classes lack most in proportion (chi-square); single images then fill up to the
    exact share. Every class of 3 or more groups stands in all three splits where groups of one class make
    that possible; where groups hold several classes, it is sought and nearly always found. A class of fewer
    groups stands in train.

    Raises ZooError for ratios or a seed out of range.
    """
    return split_into(labels, groups, SPLITS, check_ratios(ratios), seed)


def split_into(
    labels: Strings, groups: Strings, names: Sequence[str], shares: Sequence[float], seed: int
) -> np.ndarray[Any, np.dtype[np.str_]]:
    """Return the split of each sample as `split_groups` does, for any splits; the first is to train on.

    names, shares: one of each per split; shares are scaled to sum to 1.
    """
    rng = np.random.default_rng(check_seed(seed))
    if len(labels) == 0:
        return np.empty(0, dtype=np.array(names).dtype)
    table, group_of = _count(labels, groups, np.array(shares, dtype=float))
    best, best_score = None, (0, 0.0)
    for _ in range(_ATTEMPTS if len(table.large) <= _FEW_GROUPS else 1):
        drawn = _Draw(table, rng)
        score = (drawn.uncovered(), drawn.loss())
        if best is None or score < best_score:
            best, best_score = drawn.split_of, score
        if len(table.large) == 0 and score[0] == 0:
            break
    splits: np.ndarray[Any, np.dtype[np.str_]] = np.array(names)[np.asarray(best)[group_of]]
    return splits


def stratification_error(labels: Strings, splits: Strings) -> float:
    """Return how far a class's share in a split is from its share in all, at most; in [0, 1], 0 is perfect.

    >>> stratification_error(["a", "b", "a", "b"], ["train", "train", "test", "test"])
    0.0
    """
    labels, splits = np.asarray(labels), np.asarray(splits)
    worst = 0.0
    for label in np.unique(labels):
        is_label = labels == label
        for split in np.unique(splits):
            worst = max(worst, abs(float(is_label[splits == split].mean() - is_label.mean())))
    return worst


def groups_by_regex(paths: Iterable[str], pattern: str) -> list[str]:
    """Return each path's group: what the pattern's first bracket matches, else the whole match.

    Raises ZooError for a pattern that is no regular expression or does not match a path.

    >>> groups_by_regex(["benign/p07_3.png"], r"(p[0-9]+)_")
    ['p07']
    """
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ZooError(
            f"the group regex {one_line(pattern)!r} is no valid regular expression: {one_line(error)}"
        ) from error
    groups = []
    for path in paths:
        found = compiled.search(path)
        name = found.group(1 if compiled.groups else 0) if found else None
        if not name:
            raise ZooError(
                f"the group regex {one_line(pattern)!r} finds no group in {one_line(path)!r}; it must match "
                "every path below the dataset's root"
            )
        groups.append(name)
    return groups


def groups_by_blocks(paths: Iterable[str], labels: Iterable[str], size: int) -> list[str]:
    """Return `<label>/<block>` for each path: blocks of `size` neighbouring file numbers, counted from 1.

    The number is the last one in the file's stem: scans are often numbered in their order, so that neighbours
    are of one patient. Raises ZooError for a size below 1 or a path without a number.

    >>> groups_by_blocks(["n/case (20).jpg", "n/case (21).jpg"], ["n", "n"], 20)
    ['n/0', 'n/1']
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ZooError(f"group blocks must be a whole number of 1 or more. Got {one_line(repr(size))}")
    groups = []
    for path, label in zip(paths, labels, strict=True):
        numbers = re.findall(r"[0-9]+", PurePosixPath(path).stem)
        if not numbers:
            raise ZooError(
                f"group blocks need a number in every file name; {one_line(path)!r} has none. "
                "Group by a regex or a column instead"
            )
        groups.append(f"{label}/{(int(numbers[-1]) - 1) // size}")
    return groups


def merge_identical(groups: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Return the groups, those that share a key joined; a joined group has its smallest name.

    groups, keys: one of each per sample; a key is the digest of its pixels.

    >>> merge_identical(["p2", "p1", "p3"], ["x", "x", "y"])
    ['p1', 'p1', 'p3']
    """
    parent = {group: group for group in groups}

    def root(group: str) -> str:
        while parent[group] != group:
            parent[group] = parent[parent[group]]
            group = parent[group]
        return group

    first: dict[str, str] = {}
    for group, key in zip(groups, keys, strict=True):
        one, other = root(group), root(first.setdefault(key, group))
        parent[max(one, other)] = min(one, other)
    return [root(group) for group in groups]


def check_enough_groups(labels: Sequence[str], groups: Sequence[str], names: Sequence[str]) -> None:
    """Raise ZooError where a class has fewer groups than there are splits to stand in."""
    of_class: dict[str, set[str]] = {}
    for label, group in zip(labels, groups, strict=True):
        of_class.setdefault(label, set()).add(group)
    short = {label: len(found) for label, found in sorted(of_class.items()) if len(found) < len(names)}
    if short:
        label, count = next(iter(short.items()))
        more = f" ({len(short)} classes have too few)" if len(short) > 1 else ""
        raise ZooError(
            f"class {one_line(label)!r} has {count} {'group' if count == 1 else 'groups'} and needs at least "
            f"{len(names)} to stand in {', '.join(names)}{more}; add images, or make smaller groups"
        )


@dataclass(frozen=True)
class _Table:
    """What groups hold: pair p says that group `group[p]` has `count[p]` samples of class `cls[p]`.

    Pairs are sorted by group; those of group g are start[g] to start[g + 1]. target: samples (classes,
    splits). by_class: groups of each class. needed: splits that each class must stand in; weight: how much
    that matters.
    """

    group: Ints
    cls: Ints
    count: Ints
    start: Ints
    sizes: Ints
    target: Floats
    large: Ints
    by_class: list[Ints]
    needed: list[tuple[int, ...]]
    weight: list[int]

    def pairs(self, group: int) -> list[tuple[int, int]]:
        """Return the (class, samples) of a group."""
        begin, end = self.start[group], self.start[group + 1]
        return list(zip(self.cls[begin:end].tolist(), self.count[begin:end].tolist(), strict=True))


def _count(labels: Strings, groups: Strings, shares: Floats) -> tuple[_Table, Ints]:
    classes, class_of = np.unique(np.asarray(labels), return_inverse=True)
    _, group_of, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    pairs, count = np.unique(group_of.astype(np.int64) * len(classes) + class_of, return_counts=True)
    group, cls = pairs // len(classes), pairs % len(classes)
    order = np.argsort(cls, kind="stable")
    by_class = np.split(group[order], np.searchsorted(cls[order], np.arange(1, len(classes))))
    # A class of too few groups is needed in train first, then in the last split, then between.
    priority = [0, *range(len(shares) - 1, 0, -1)]
    target = np.bincount(class_of, minlength=len(classes))[:, None] * (shares / shares.sum())[None, :]
    table = _Table(
        group=group,
        cls=cls,
        count=count,
        start=np.searchsorted(group, np.arange(len(sizes) + 1)),
        sizes=sizes,
        target=target,
        large=np.flatnonzero(sizes > 1),
        by_class=by_class,
        needed=[tuple(priority[: len(of_class)]) for of_class in by_class],
        weight=[1000 if len(of_class) >= len(shares) else 1 for of_class in by_class],
    )
    return table, group_of


class _Draw:
    """One attempt at a split; `split_of` is the split's number for each group, -1 while there is none."""

    def __init__(self, table: _Table, rng: np.random.Generator) -> None:
        self.table, self.rng = table, rng
        self.split_of: Ints = np.full(len(table.sizes), -1, dtype=np.int64)
        self.have: list[list[float]] = [[0.0] * table.target.shape[1] for _ in table.target]
        self.target: list[list[float]] = table.target.tolist()
        self.places = range(table.target.shape[1])
        self._place_large()
        self._fill_with_singles()
        self.standing = self._standing()
        self._cover()

    def loss(self) -> float:
        """Return the chi-square distance between the samples placed and the target."""
        return float(((np.array(self.have) - self.table.target) ** 2 / self.table.target).sum())

    def uncovered(self) -> int:
        """Return the weight of all gaps: pairs of class and split that are needed and empty."""
        return sum(self.table.weight[cls] for cls, _ in self._missing())

    def _shuffled(self, values: Ints) -> Ints:
        # Of numpy's random methods `random` is the one whose numbers no version has changed.
        shuffled: Ints = values[np.argsort(self.rng.random(len(values)), kind="stable")]
        return shuffled

    def _place_large(self) -> None:
        """Place each group where it lowers the loss most, larger first; then move what fits better."""
        order = self._shuffled(self.table.large)
        # Ordered by powers of two alone: within one, chance decides, or all seeds would give one split.
        order = order[np.argsort(-np.log2(self.table.sizes[order]).astype(int), kind="stable")]
        ties = (self.rng.random((len(order), len(self.places))) * 1e-9).tolist()
        for group, tie in zip(order.tolist(), ties, strict=True):
            self._put(group, self._cheapest(self.table.pairs(group), tie))
        for _ in range(10 if len(order) <= _FEW_GROUPS else 0):
            moved = False
            for group in self._shuffled(self.table.large).tolist():
                old = int(self.split_of[group])
                self._put(group, -1)
                tie = [0.0 if place == old else 1e-9 for place in self.places]
                new = self._cheapest(self.table.pairs(group), tie)
                self._put(group, new)
                moved = moved or new != old
            if not moved:
                break

    def _cheapest(self, pairs: list[tuple[int, int]], ties: list[float]) -> int:
        return min(self.places, key=lambda place: self._cost(pairs, place) + ties[place])

    def _cost(self, pairs: list[tuple[int, int]], place: int) -> float:
        """Return by how much the loss grows when these samples come to a split."""
        return sum(
            count * (count - 2 * (self.target[cls][place] - self.have[cls][place])) / self.target[cls][place]
            for cls, count in pairs
        )

    def _put(self, group: int, place: int) -> None:
        old = int(self.split_of[group])
        for cls, count in self.table.pairs(group):
            if old >= 0:
                self.have[cls][old] -= count
            if place >= 0:
                self.have[cls][place] += count
        self.split_of[group] = place

    def _fill_with_singles(self) -> None:
        """Share out the groups of one image, class by class, up to the target; vectorised."""
        for cls, groups in enumerate(self.table.by_class):
            singles = self._shuffled(groups[self.table.sizes[groups] == 1])
            lacking = np.maximum(0, self.table.target[cls] - np.array(self.have[cls]))
            if len(singles) == 0:
                continue
            counts = _whole_shares(lacking / lacking.sum() * len(singles), self.rng)
            self.split_of[singles] = np.repeat(np.arange(len(counts)), counts)
            self.have[cls] = (np.array(self.have[cls]) + counts).tolist()

    def _standing(self) -> list[list[int]]:
        """Return for each class how many of its groups stand in each split."""
        standing = np.zeros(self.table.target.shape, dtype=np.int64)
        np.add.at(standing, (self.table.cls, self.split_of[self.table.group]), 1)
        rows: Any = standing.tolist()
        return [list(row) for row in rows]

    def _missing(self) -> list[tuple[int, int]]:
        return [
            (cls, place)
            for cls, places in enumerate(self.table.needed)
            for place in places
            if self.standing[cls][place] == 0
        ]

    def _move(self, group: int, place: int) -> None:
        for cls, _ in self.table.pairs(group):
            self.standing[cls][self.split_of[group]] -= 1
            self.standing[cls][place] += 1
        self._put(group, place)

    def _cover(self) -> None:
        """Bring each class into every split that it must stand in.

        With groups of one class, one move a gap does it. Groups of several classes may each take something
        from another class: then a walk goes on, with a step at random now and then, and the best place on it
        is kept.
        """
        for cls, place in self._missing():
            if self.standing[cls][place] == 0:
                self._move(self._mover(cls, place), place)
        missing = self._missing()
        best, least = self.split_of.copy(), self.uncovered()
        for _ in range(_WALK_STEPS):
            if not missing:
                break
            cls, place = missing[int(self.rng.random() * len(missing))]
            self._move(self._mover(cls, place, chance=0.1), place)
            missing = self._missing()
            if (weight := self.uncovered()) < least:
                best, least = self.split_of.copy(), weight
        for group in np.flatnonzero(self.split_of != best).tolist():
            self._move(group, int(best[group]))

    def _mover(self, cls: int, place: int, chance: float = 0.0) -> int:
        """Return the group of a class whose move to a split opens fewest gaps, then costs least."""
        candidates = self._shuffled(self.table.by_class[cls])[:64].tolist()
        if self.rng.random() < chance:
            return int(candidates[0])
        return int(min(candidates, key=lambda group: self._harm(group, place)))

    def _harm(self, group: int, place: int) -> tuple[int, float]:
        old, pairs = int(self.split_of[group]), self.table.pairs(group)
        needed, weight = self.table.needed, self.table.weight
        opened = sum(weight[cls] for cls, _ in pairs if old in needed[cls] and self.standing[cls][old] == 1)
        closed = sum(weight[cls] for cls, _ in pairs if place in needed[cls] and self.standing[cls][place] == 0)
        leaving = self._cost([(cls, -count) for cls, count in pairs], old)
        return opened - closed, self._cost(pairs, place) + leaving


def _whole_shares(shares: Floats, rng: np.random.Generator) -> Ints:
    """Return whole numbers of the same sum, each less than 1 away (largest remainders, ties by chance)."""
    counts = np.floor(shares + 1e-9).astype(np.int64)
    left = round(float(shares.sum())) - int(counts.sum())
    remainders = np.round(shares - counts, 9) + rng.random(len(shares)) * 1e-10
    counts[np.argsort(-remainders, kind="stable")[:left]] += 1
    return counts
