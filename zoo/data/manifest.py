"""The dataset on disk: `dataset.toml` and the manifest, written byte for byte alike, read with care."""

from __future__ import annotations

import itertools
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from zoo.data.columns import COLUMNS, frame_of, read_columns
from zoo.errors import ZooError, nearest, one_line
from zoo.files import (
    SCHEMA_VERSION,
    Home,
    atomic_writer,
    check_name,
    home,
    read_toml,
    sha256_file,
    write_toml,
)
from zoo.runs import SPLITS

if TYPE_CHECKING:
    import pandas as pd

BAD_IMAGES = ("fail", "skip")
Row = tuple[str, str, str, str, str, str, str]
Progress = Callable[[int, int], None]

_OWN_KEYS = ("schema_version", "name", "root", "classes", "negative_class", "bad_images")
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images with a manifest.

    folder: `data/<name>`. root: the folder that the manifest's paths are relative to. classes: names in the
    stored order, which is that of the network's outputs. negative_class: the class of the healthy, if there
    is one. frame: the manifest, one row per image, sorted by path, all columns text. split_digest: SHA-256 of
    the file `manifest.csv`, the identity of the split. bad_images: `fail` or `skip`. facts: the rest of
    `dataset.toml`.
    """

    name: str
    folder: Path
    root: Path
    classes: list[str]
    negative_class: str | None
    frame: pd.DataFrame
    split_digest: str
    bad_images: str
    facts: dict[str, Any] = field(default_factory=dict)

    def image_path(self, path: str) -> Path:
        """Return where the image of a manifest's path lies."""
        return self.root / path

    def of_split(self, split: str) -> pd.DataFrame:
        """Return the manifest's rows of a split, numbered from 0; raises ZooError for an unknown split."""
        if split not in SPLITS:
            raise ZooError(f"split must be one of {', '.join(SPLITS)}. Got {one_line(split)!r}{nearest(split, SPLITS)}")
        return self.frame[self.frame["split"] == split].reset_index(drop=True)


def load_dataset(name: str, root: Home | None = None, *, make_builtin: bool = True) -> Dataset:
    """Return the dataset `data/<name>` below the home; a built-in one is made on first use.

    A dataset made just now has `facts["made_now"]`. Raises ZooError for an unknown name, and for a
    `dataset.toml` or manifest that lacks something or contradicts itself.
    """
    root = root or home()
    folder = root.data / check_name(name, "dataset")
    if not (folder / "dataset.toml").is_file():
        from zoo.data.find import builtin_names
        from zoo.data.sources import import_dataset

        if make_builtin and name in builtin_names():
            made = import_dataset(name, name, root)
            made.facts["made_now"] = True
            return made
        _refuse_without_images(name)
        if name in builtin_names():
            raise ZooError(f"dataset {name!r} is not made yet; make it with `zoo data import {name}`")
        known = [each["name"] for each in list_datasets(root)]
        raise ZooError(
            f"there is no dataset {name!r}{nearest(name, known)}; import one with "
            f"`zoo data import SOURCE --name {name}` (here are: {', '.join(known) or 'none'})"
        )
    record = _read_record(folder)
    if "original" in record and not (folder / record["root"]).is_dir():
        _refuse_without_images(str(record["name"]))
    columns, digest = read_columns(folder / "manifest.csv")
    _check_rows(zip(*columns, strict=True), record["classes"], folder / "manifest.csv")
    return Dataset(
        name=name,
        folder=folder,
        root=Path(os.path.normpath(folder.resolve() / record["root"])),
        classes=list(record["classes"]),
        negative_class=record.get("negative_class"),
        frame=frame_of(columns),
        split_digest=digest,
        bad_images=record["bad_images"],
        facts={key: value for key, value in record.items() if key not in _OWN_KEYS},
    )


def present_classes(name: str, root: Home | None = None) -> tuple[list[str], str | None]:
    """Return a dataset's classes and that of the healthy, or None, as its `dataset.toml` has them now.

    The manifest is not read. Raises ZooError where there is no such file, or it is damaged.
    """
    record = _read_record((root or home()).data / check_name(name, "dataset"))
    return list(record["classes"]), record.get("negative_class")


def _refuse_without_images(name: str) -> None:
    """Raise ZooError where a name is that of a public data set, which has to be downloaded first."""
    from zoo.data.canonical import canonical_names, canonical_record

    if name in canonical_names():
        raise ZooError(
            f"the data set {name!r} is not here; download it ({canonical_record(name).get('source', '')}) and "
            f"`zoo data import {name} --from FOLDER_OR_ZIP`"
        )


def list_datasets(root: Home | None = None) -> list[dict[str, Any]]:
    """Return name, status, images, classes and summary of every dataset here and of every built-in one.

    status: `ready`, `built-in` (made on first use), `to import with --from` (public data that has to be downloaded)
    or, for a `dataset.toml` that cannot be read, `damaged: <why>`.
    """
    from zoo.data.canonical import canonical_names
    from zoo.data.find import builtin_names

    rows: dict[str, dict[str, Any]] = {
        name: {"name": name, "status": "built-in", "images": None, "classes": None, "summary": summary}
        for name, summary in builtin_names().items()
    }
    for name, summary in canonical_names().items():
        rows[name] = {
            "name": name,
            "status": "to import with --from",
            "images": None,
            "classes": None,
            "summary": summary,
        }
    folder = (root or home()).data
    for path in sorted(folder.glob("*/dataset.toml")):
        name = path.parent.name
        row: dict[str, Any] = {
            "name": name,
            "status": "ready",
            "images": None,
            "classes": None,
            "summary": "",
        }
        try:
            record = _read_record(path.parent)
            row |= {"classes": len(record["classes"]), "summary": str(record.get("summary", ""))}
            row["images"] = record.get("counts", {}).get("images")
            if "original" in record and not (path.parent / record["root"]).is_dir():
                row["status"] = "to import with --from"
        except ZooError as error:
            row["status"] = f"damaged: {error}"
        rows[name] = row
    return [rows[name] for name in sorted(rows)]


def write_dataset(folder: Path, rows: Iterable[Row], record: dict[str, Any]) -> None:
    """Write `manifest.csv`, sorted by path, then `dataset.toml`; the same input gives the same bytes.

    record: name, root (relative to folder, or absolute), classes, negative_class, bad_images, and facts.
    Raises ZooError, and writes nothing, where the rows would not be read back.
    """
    rows = sorted(rows, key=lambda row: row[1])
    _check_record(record, folder / "dataset.toml")
    _check_rows(rows, record["classes"], folder / "manifest.csv")
    data = manifest_bytes(rows)
    with atomic_writer(folder / "manifest.csv") as stream:
        stream.write(data)
    write_toml(folder / "dataset.toml", {"schema_version": SCHEMA_VERSION, **record})


def check_dataset(folder: Path, rows: Iterable[Row], record: dict[str, Any]) -> None:
    """Raise ZooError where `write_dataset` would refuse rows or record; nothing is written."""
    _check_record(record, folder / "dataset.toml")
    _check_rows(sorted(rows, key=lambda row: row[1]), record["classes"], folder / "manifest.csv")


def manifest_bytes(rows: Iterable[Row]) -> bytes:
    r"""Return the content of `manifest.csv`: UTF-8, lines end in \n, fields quoted only if need be.

    >>> manifest_bytes([("1", "a, b.png", "=x", "g", "val", "0", "0")]).decode().splitlines()[1]
    '1,"a, b.png",=x,g,val,0,0'
    """
    # Not csv.writer: versions of Python differ in whether a lone carriage return is quoted.
    return "".join(",".join(map(_quoted, row)) + "\n" for row in (COLUMNS, *rows)).encode("utf-8")


def _quoted(text: str) -> str:
    if any(mark in text for mark in '",\r\n'):
        return '"' + text.replace('"', '""') + '"'
    return text


def split_summary(dataset: Dataset) -> dict[str, Any]:
    """Return dataset, split_digest and, per split, how many images, groups, and images by class."""
    splits = {}
    for split in SPLITS:
        rows = dataset.of_split(split)
        counts = Counter(rows["label"])
        splits[split] = {
            "images": len(rows),
            "groups": int(rows["group"].nunique()),
            "classes": {label: counts[label] for label in dataset.classes},
        }
    return {"dataset": dataset.name, "split_digest": dataset.split_digest, "splits": splits}


def verify_files(
    dataset: Dataset, splits: Sequence[str] = SPLITS, progress: Progress | None = None
) -> list[tuple[str, str, str]]:
    """Return (sample_id, path, reason) of every image of the splits that is gone or changed since the import.

    Every file is read and hashed; remembering the answer is up to the caller.
    """
    chosen = dataset.frame[dataset.frame["split"].isin(list(splits))]
    items = list(zip(chosen["sample_id"], chosen["path"], chosen["sha256"], strict=True))
    found = []
    reasons = map_files(lambda item: _file_fault(dataset.image_path(item[1]), item[2]), items)
    for number, ((sample_id, path, _), reason) in enumerate(zip(items, reasons, strict=True), start=1):
        if reason:
            found.append((sample_id, path, reason))
        if progress:
            progress(number, len(items))
    return found


def map_files(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield function of each item, in order, computed in as many threads as there are cores.

    Only a few dozen items are under way at once, so that results do not pile up; an error stops the rest.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    left = iter(items)
    with ThreadPoolExecutor(cores) as pool:
        waiting: deque[Future[Result]] = deque(
            pool.submit(function, item) for item in itertools.islice(left, cores * 8)
        )
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in itertools.islice(left, 1))
                yield result
        finally:
            for future in waiting:
                future.cancel()


def _file_fault(path: Path, digest: str) -> str:
    try:
        return "" if sha256_file(path) == digest else "changed since the import"
    except FileNotFoundError:
        return "gone"
    except OSError as error:
        return one_line(error.strerror or error)


def manifest_rows(dataset: Dataset) -> list[Row]:
    """Return the rows of a loaded manifest, in its order."""
    return list(zip(*(dataset.frame[column].tolist() for column in COLUMNS), strict=True))


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a `manifest.csv`; raises ZooError where it cannot be read."""
    return list(zip(*read_columns(path)[0], strict=True))


def _read_record(folder: Path) -> dict[str, Any]:
    record = read_toml(folder / "dataset.toml")
    _check_record(record, folder / "dataset.toml")
    return record


def _check_record(record: dict[str, Any], path: Path) -> None:
    classes, negative = record.get("classes"), record.get("negative_class")
    faults = []
    if not isinstance(record.get("root"), str) or not record["root"]:
        faults.append("root must be the folder of the images")
    if (
        not isinstance(classes, list)
        or len(classes) < 2
        or not all(isinstance(label, str) and label for label in classes)
        or len(set(classes)) < len(classes)
    ):
        faults.append("classes must be a list of two or more different names")
    elif negative is not None and negative not in classes:
        faults.append(f"negative_class must be one of the classes. Got {one_line(repr(negative))}")
    if record.get("bad_images") not in BAD_IMAGES:
        faults.append(f"bad_images must be fail or skip. Got {one_line(repr(record.get('bad_images')))}")
    if faults:
        raise ZooError(f"{one_line(path)!r}: {'; '.join(faults)}; import the dataset again")


def _check_rows(rows: Iterable[Sequence[str]], classes: Sequence[str], path: Path) -> None:
    """Raise ZooError for the first row, split or class that contradicts the rest."""
    allowed, ids, paths = set(classes), set[str](), set[str]()
    standing: set[tuple[str, str]] = set()
    for sample_id, image, label, group, split, *_ in rows:
        reason = ""
        if split not in SPLITS:
            reason = f"split must be one of {', '.join(SPLITS)}. Got {one_line(split)!r}{nearest(split, SPLITS)}"
        elif label not in allowed:
            reason = f"label {one_line(label)!r} is not among the classes of dataset.toml{nearest(label, classes)}"
        elif not image or image.startswith("/") or ".." in image.split("/") or _has_drive(image):
            reason = "its path must lie below the dataset's root, without '..'"
        elif not sample_id or sample_id in ids:
            reason = f"sample_id {one_line(sample_id)!r} must be there and be unique"
        elif image in paths:
            reason = "its path stands there twice"
        elif not group:
            reason = "its group is empty"
        if reason:
            raise ZooError(f"{one_line(path)!r}, image {one_line(image)!r}: {reason}")
        ids.add(sample_id)
        paths.add(image)
        standing.add((split, label))
    for split in SPLITS:
        if not any(each == split for each, _ in standing):
            raise ZooError(f"{one_line(path)!r}: split {split!r} has no image; split again with `zoo data split`")
    for label in classes:
        if ("train", label) not in standing:
            raise ZooError(
                f"{one_line(path)!r}: class {one_line(label)!r} has no image in train; split again with "
                "`zoo data split`, or leave the class out"
            )


def _has_drive(image: str) -> bool:
    return ":" in image and Path(image).is_absolute()
