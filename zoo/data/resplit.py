"""Splitting a dataset again: by other groups or ratios, in folds, without copies, or repaired where it leaks."""

from __future__ import annotations

import functools
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from zoo.data.dicom import DicomFault, read_subject
from zoo.data.duplicates import Ints, components
from zoo.data.facts import dataset_facts
from zoo.data.layouts import Found
from zoo.data.leaks import GROUPINGS, duplicate_pairs
from zoo.data.listings import column_of_csv
from zoo.data.look import patient_group, read_salt, write_salt
from zoo.data.manifest import Dataset, Progress, Row, load_dataset, manifest_rows, map_files, write_dataset
from zoo.data.rows import Grouping, count_rows, join_groups, repair_rows, split_rows
from zoo.data.split import DEFAULT_RATIOS, check_seed, split_into, stratification_error
from zoo.errors import ZooError, one_line
from zoo.files import Home, check_name, home, read_toml, user_path
from zoo.runs import SPLITS

MAX_FOLDS = 50
_HIDDEN = re.compile(r"(patient-[0-9a-f]{16}|no-patient)/")


@dataclass(frozen=True)
class _Wanted:
    """What a new split was asked for; None is what the old one says."""

    ratios: Sequence[float] | None
    seed: int | None
    grouping: Grouping
    group_csv: str | Path | None
    path_column: str
    drop_duplicates: bool
    repair: bool

    @property
    def regroups(self) -> bool:
        return bool(self.grouping.record())

    @property
    def redraws(self) -> bool:
        return self.regroups or any(
            each is not None for each in (self.ratios, self.seed, self.grouping.near_duplicates)
        )


def resplit_dataset(
    name: str,
    root: Home | None = None,
    *,
    ratios: Sequence[float] | None = None,
    seed: int | None = None,
    group_column: str | None = None,
    group_csv: str | Path | None = None,
    path_column: str = "path",
    group_regex: str | None = None,
    group_blocks: int | None = None,
    group_patient: bool | None = None,
    near_duplicates: bool | None = None,
    drop_duplicates: bool = False,
    repair: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Dataset:
    """Split a dataset again and return it; options left out are those recorded in its `dataset.toml`.

    With no option the recorded split is drawn once more, with the same bytes. Several ways of grouping are joined;
    group_column is one of the manifest's or, with group_csv, of a CSV that names the images by path. Splits that
    were shipped are kept, and only those cut from train are drawn again; `force` draws all of them, and `repair`
    drops from train (and from val, where test has it) what leaks, never from test. drop_duplicates: of images with
    the same pixels one stays, and none where their labels differ; what is dropped is listed in `dataset.toml`.

    Raises ZooError where options are given and every split was shipped, and for options out of range.
    """
    dataset = load_dataset(name, root)
    grouping = Grouping(group_column, group_regex, group_blocks, group_patient or None, near_duplicates)
    wanted = _Wanted(ratios, seed, grouping, group_csv, path_column, drop_duplicates, repair)
    old: dict[str, Any] = dataset.facts.get("split", {})
    shipped = [] if force else list(old.get("shipped", []))
    _refuse_impossible(name, wanted, old, shipped, force)
    record = read_toml(dataset.folder / "dataset.toml")
    rows = manifest_rows(dataset)
    dropped: dict[str, str] = dict(record.get("dropped", {}))
    near = _near(dataset, wanted, old, progress)
    if repair or drop_duplicates:
        pairs = (
            duplicate_pairs(dataset, dataset_facts(dataset, progress)).near if repair else np.zeros((0, 2), np.int64)
        )
        kept, gone = repair_rows(rows, pairs, drop_duplicates=drop_duplicates, across_splits=repair)
        if near is not None:
            places = {row[0]: place for place, row in enumerate(rows)}
            near = near[[places[row[0]] for row in kept]]
        rows, dropped = kept, dropped | gone
    facts: dict[str, Any] = {"counts": count_rows(rows)}
    if len(shipped) < len(SPLITS) and not (old.get("folds") and not force):
        rows, facts = _draw_again(dataset, rows, wanted, shipped, near, progress)
    record |= facts
    if dropped:
        record["dropped"] = dropped
    write_dataset(dataset.folder, rows, record)
    return load_dataset(name, root)


def _refuse_impossible(name: str, wanted: _Wanted, old: dict[str, Any], shipped: Sequence[str], force: bool) -> None:
    """Raise ZooError for options that contradict each other or the dataset's own split."""
    if old.get("folds") and not force and wanted.redraws:
        raise ZooError(f"{name!r} is one of {old['folds']} folds; split the dataset that it was made of, or --force")
    if len(shipped) == len(SPLITS) and wanted.redraws:
        raise ZooError(
            f"the splits of {name!r} were shipped with the data and are kept; --repair drops what leaks, --force "
            f"draws others"
        )
    if wanted.grouping.near_duplicates is False and old.get("near_duplicates") and not wanted.regroups:
        raise ZooError(
            f"the groups of {name!r} hold near-duplicates already; name a way of grouping too, or import it again with "
            "--no-group-near-duplicates"
        )
    if wanted.group_csv is not None and wanted.grouping.group_column is None:
        raise ZooError("--group-csv needs --group-column, the name of its column to group by")
    if wanted.repair and not shipped:
        raise ZooError(f"--repair is for splits that were shipped with the data; {name!r} can be drawn anew without it")


def _near(dataset: Dataset, wanted: _Wanted, old: dict[str, Any], progress: Progress | None) -> Ints | None:
    """Return the near-duplicate components of all images, or None where they are not asked for."""
    asked = wanted.grouping.near_duplicates
    if asked is None:
        # A split of an older day, or one that near-duplicates made impossible, is drawn as it was.
        asked = bool(old.get("near_duplicates", wanted.regroups or bool(old.get("shipped"))))
    if not asked:
        return None
    facts = dataset_facts(dataset, progress)
    return components(len(dataset.frame), duplicate_pairs(dataset, facts).near)


def _draw_again(
    dataset: Dataset,
    rows: Sequence[Row],
    wanted: _Wanted,
    shipped: Sequence[str],
    near: Ints | None,
    progress: Progress | None,
) -> tuple[list[Row], dict[str, Any]]:
    old: dict[str, Any] = dataset.facts.get("split", {})
    columns = list(zip(*rows, strict=True))
    splits = [split if split in shipped else "train" if shipped else "" for split in columns[4]]
    found = Found("", dataset.root, list(columns[1]), list(columns[2]), splits, list(columns[3]))
    found.grouped_by = {key: value for key, value in old.items() if key.startswith("group_")}
    if wanted.regroups:
        found.groups, found.grouped_by = _groups(dataset, found, wanted, progress), wanted.grouping.record()
        if wanted.group_csv is not None:
            found.grouped_by["group_csv"] = Path(wanted.group_csv).name
    return split_rows(
        found,
        [(row[5], row[6]) for row in rows],
        wanted.ratios if wanted.ratios is not None else old.get("ratios", DEFAULT_RATIOS),
        wanted.seed if wanted.seed is not None else old.get("seed", 0),
        near,
        near_required=bool(wanted.grouping.near_duplicates),
    )


def _groups(dataset: Dataset, found: Found, wanted: _Wanted, progress: Progress | None) -> list[str]:
    """Return the images' groups by every way that is asked for, joined."""
    grouping, ways = wanted.grouping, []
    if grouping.group_column is not None:
        ways.append(_column(dataset, found, wanted))
    if grouping.group_patient:
        ways.append(_patients(dataset, found.paths, progress))
    by_name = (grouping.group_regex, grouping.group_blocks, wanted.group_csv)
    if any(each is not None for each in by_name) and any(_HIDDEN.match(path) for path in found.paths):
        raise ZooError(
            f"the files of {dataset.name!r} are named by pseudonyms, which tell nothing; group by --group-patient or "
            "--group-column group, or import it again with that grouping"
        )
    rest = Found("", found.root, found.paths, found.labels, found.splits, [])
    Grouping(None, grouping.group_regex, grouping.group_blocks).apply(rest)
    return join_groups([*ways, *([rest.groups] if rest.groups else [])], found.paths)


def _column(dataset: Dataset, found: Found, wanted: _Wanted) -> list[str]:
    column = wanted.grouping.group_column or ""
    if wanted.group_csv is not None:
        return column_of_csv(user_path(wanted.group_csv), wanted.path_column, column, found.paths)
    if column not in ("group", "label"):
        raise ZooError(
            f"the manifest's columns to group by are group and label. Got {one_line(column)!r}; "
            "name a CSV that has the column with --group-csv"
        )
    values = dict(zip(dataset.frame["path"], dataset.frame[column], strict=True))
    return [values[path] for path in found.paths]


def _patients(dataset: Dataset, paths: Sequence[str], progress: Progress | None) -> list[str]:
    """Return a pseudonym of each image's patient; raises ZooError where no image names one."""
    salt_file = dataset.folder / ".salt"
    salt = read_salt(salt_file) or secrets.token_bytes(16)
    groups: list[str] = []
    for group in map_files(functools.partial(_patient, dataset, salt), paths):
        groups.append(group)
        if progress:
            progress(len(groups), len(paths))
    if not any(groups):
        raise ZooError(
            f"no image of {dataset.name!r} is a DICOM that names a patient; group by a regex, a column or blocks"
        )
    write_salt(salt_file, salt)
    return groups


def _patient(dataset: Dataset, salt: bytes, path: str) -> str:
    try:
        subject = read_subject(dataset.image_path(path).read_bytes())
    except (OSError, DicomFault):
        return ""
    return patient_group(subject.key, subject.pseudonymous, salt)


# Folds --------------------------------------------------------------------------------------------------------------


def fold_dataset(
    name: str, folds: int, root: Home | None = None, *, seed: int = 0, progress: Progress | None = None
) -> list[Dataset]:
    """Write a dataset for each of k folds, `<name>-fold0` and so on, and return them.

    In fold i, part i is test, part i + 1 val, and the rest train; parts are stratified, and whole groups and
    near-duplicates stay together. The images stay where they are. Raises ZooError where a class has fewer groups
    than folds.
    """
    check_seed(seed)
    if isinstance(folds, bool) or not isinstance(folds, int) or not 3 <= folds <= MAX_FOLDS:
        raise ZooError(f"folds must be from 3 to {MAX_FOLDS}: one is test, one val, the rest train. Got {folds!r}")
    dataset = load_dataset(name, root)
    check_name(f"{name}-fold{folds - 1}", "dataset")
    for fold in range(folds):
        _refuse_stranger(root or home(), f"{name}-fold{fold}", name)
    rows = manifest_rows(dataset)
    pairs = duplicate_pairs(dataset, dataset_facts(dataset, progress))
    near = components(len(rows), pairs.near, pairs.exact)
    groups = join_groups(
        [dataset.frame["group"].tolist(), [f"near {each}" for each in near]], dataset.frame["path"].tolist()
    )
    labels = dataset.frame["label"].tolist()
    part = split_into(labels, groups, [str(each) for each in range(folds)], [1.0] * folds, seed).astype(int)
    for label in dataset.classes:
        stands = {int(each) for each, name in zip(part, labels, strict=True) if name == label}
        if len(stands) < folds:
            raise ZooError(
                f"class {one_line(label)!r} has groups for {len(stands)} folds alone. Got {folds} folds; "
                "ask for fewer, or make smaller groups"
            )
    return [_write_fold(dataset, rows, groups, part, fold, folds, seed, root or home()) for fold in range(folds)]


def _refuse_stranger(root: Home, name: str, parent: str) -> None:
    """Raise ZooError where a dataset of a fold's name is there that is no fold of this one."""
    file = root.data / name / "dataset.toml"
    if file.is_file() and read_toml(file).get("split", {}).get("of") != parent:
        raise ZooError(f"there is a dataset {name!r} already that is no fold of {parent!r}; move it away")


def _write_fold(
    dataset: Dataset,
    rows: Sequence[Row],
    groups: Sequence[str],
    part: Ints,
    fold: int,
    folds: int,
    seed: int,
    root: Home,
) -> Dataset:
    name = f"{dataset.name}-fold{fold}"
    splits = ["test" if each == fold else "val" if each == (fold + 1) % folds else "train" for each in part.tolist()]
    made: list[Row] = [
        (row[0], row[1], row[2], group, split, row[5], row[6])
        for row, group, split in zip(rows, groups, splits, strict=True)
    ]
    record = read_toml(dataset.folder / "dataset.toml")
    old = {key: value for key, value in record.get("split", {}).items() if key in GROUPINGS}
    if not Path(record["root"]).is_absolute():
        record["root"] = (PurePosixPath("..") / dataset.name / record["root"]).as_posix()
    error = round(stratification_error([row[2] for row in made], splits), 4)
    record |= {
        "name": name,
        "split": {
            "shipped": [],
            "drawn": list(SPLITS),
            **old,
            "near_duplicates": True,
            "of": dataset.name,
            "folds": folds,
            "fold": fold,
            "seed": seed,
            "stratification_error": error,
        },
        "counts": count_rows(made),
    }
    write_dataset(root.data / name, made, record)
    return load_dataset(name, root)
