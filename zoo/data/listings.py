"""What a CSV lists: images with labels, splits and groups; labels of files, folders or patients; groups to split by."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from zoo.data.layouts import IMAGE_SUFFIXES, SPLIT_OF, Found, files_below, no_image
from zoo.errors import ZooError, nearest, one_line

PATIENT_COLUMNS = ("patient", "patient_id", "patientid", "subject", "subject_id")


def find_with_labels(
    root: Path, labels: Path, path_column: str, label_column: str, subject_of: Callable[[Path], str | None]
) -> Found:
    """Return the images of a folder, DICOM above all, with their labels from a CSV.

    The CSV names either files or folders below root (path_column), or patients (a column such as `patient_id`),
    and a label for each; a column `split` is kept. subject_of: path to the patient named in a DICOM, "" where none
    is named, None for what is no DICOM. Images without a label are left out and counted. Raises ZooError.
    """
    header = [name.lower() for name in _csv_header(labels)]
    key_column = path_column
    if path_column.lower() not in header:
        named = [name for name in _csv_header(labels) if name.lower() in PATIENT_COLUMNS]
        if not named:
            raise ZooError(
                f"{one_line(labels)!r} must have a column {path_column!r} or one of "
                f"{', '.join(PATIENT_COLUMNS)}. It has "
                f"{one_line(', '.join(header)) or 'none'}; name the column of files with --path-column"
            )
        key_column = named[0]
    label_of, split_of = _labels_by_key(labels, key_column, label_column, is_path=key_column == path_column)
    found, used = Found("labels", root), set[str]()
    for file in files_below(root):
        path = file.relative_to(root)
        subject = subject_of(file)
        if subject is None and file.suffix.lower() not in IMAGE_SUFFIXES:
            found.leave_out(no_image(file))
            continue
        keys = [str(each) for each in (path, *path.parents)] if key_column == path_column else [subject or ""]
        key = next((each for each in keys if each in label_of), None)
        if key is None:
            found.leave_out("images without a label")
            continue
        used.add(key)
        found.add(path.as_posix(), label_of[key], split_of.get(key, ""))
    found.leave_out("rows of labels without an image", len(label_of) - len(used))
    if not found.paths:
        rest = "; ".join(f"{count} {what}" for what, count in found.left_out.items()) or "nothing"
        raise ZooError(
            f"{one_line(labels)!r} labels no image of {one_line(root)!r} (found: {rest}); see its {key_column!r}"
        )
    if any(found.splits) and ("" in found.splits or "train" not in found.splits):
        raise ZooError(f"{one_line(labels)!r}: column 'split' must be filled in every row, with rows of train")
    return found


def _csv_header(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8-sig") as stream:
            first = stream.readline(100_000)
    except (OSError, UnicodeDecodeError) as error:
        raise ZooError(
            f"cannot read {one_line(path)!r}: {one_line(getattr(error, 'strerror', None) or error)}"
        ) from error
    return [name.strip().strip('"') for name in re.split("[,;\t]", first.strip())]


def _labels_by_key(
    labels: Path, key_column: str, label_column: str, is_path: bool
) -> tuple[dict[str, str], dict[str, str]]:
    """Return key to label and key to split; raises ZooError for a key that has two labels."""
    label_of: dict[str, str] = {}
    split_of: dict[str, str] = {}
    for number, row in enumerate(_csv_rows(labels, key_column, label_column, None), 1):
        key, label, split = row[key_column], row[label_column], row.get("split", "")
        key = os.path.normpath(key.replace("\\", "/")) if is_path and key else key
        reason = ""
        if not key or not label:
            reason = f"its {key_column if not key else label_column!r} is empty"
        elif label_of.setdefault(key, label) != label:
            reason = f"its {key_column!r} has another label further up ({one_line(label_of[key], 40)!r})"
        elif split and split.lower() not in SPLIT_OF:
            reason = f"split must be one of train, val, test. Got {one_line(split)!r}"
        if reason:
            raise ZooError(f"{one_line(labels)!r}, row {number}: {reason}")
        if split:
            split_of[key] = SPLIT_OF[split.lower()]
    return label_of, split_of


def column_of_csv(path: Path, path_column: str, group_column: str, paths: Sequence[str]) -> list[str]:
    """Return a column of a CSV for each of the paths; raises ZooError for a path that it does not name."""
    rows = _csv_rows(path, path_column, group_column, None)
    named = {os.path.normpath(row[path_column]): row[group_column] for row in rows}
    missing = [each for each in paths if not named.get(os.path.normpath(each))]
    if missing:
        raise ZooError(
            f"{one_line(path)!r} names no {group_column!r} for {one_line(missing[0])!r} (and {len(missing) - 1} more); "
            "its paths must be relative to the dataset's root"
        )
    return [named[os.path.normpath(each)] for each in paths]


def find_in_csv(path: Path, path_column: str, label_column: str, group_column: str | None) -> Found:
    """Return the images that a CSV lists: columns for path and label and, if wanted, `split` and a group.

    Fields are separated by commas, semicolons or tabs. Paths are relative to the CSV's folder, or absolute;
    root is that folder, or, where some lie outside, the deepest folder that holds all. group_column: left
    out, `group` where there is such a column. Raises ZooError that names the line at fault.
    """
    rows = _csv_rows(path, path_column, label_column, group_column)
    places = [os.path.normpath(path.parent / row[path_column]) for row in rows]
    root = path.parent
    if not all(Path(place).is_relative_to(root) for place in places):
        try:
            root = Path(os.path.commonpath([str(Path(place).parent) for place in places]))
        except ValueError:  # other drives
            root = Path(path.anchor)
        if root == Path(root.anchor):
            raise ZooError(f"the paths of {one_line(path)!r} must lie below one folder; they share none")
    found = Found("csv", root)
    group_column = group_column or ("group" if "group" in rows[0] else None)
    splits = _filled(rows, "split", path) if "split" in rows[0] else [""] * len(rows)
    groups = _filled(rows, group_column, path) if group_column else [""] * len(rows)
    seen = set()
    for number, (row, place) in enumerate(zip(rows, places, strict=True)):
        split = SPLIT_OF.get(splits[number].lower(), "") if splits[number] else ""
        reason = ""
        if splits[number] and not split:
            reason = f"split must be one of train, val, test. Got {one_line(splits[number])!r}"
        elif not row[label_column]:
            reason = "its label is empty"
        elif not row[path_column] or "\0" in "".join(row.values()):
            reason = "its path is empty, or a field has a zero byte"
        elif place in seen:
            reason = "its path stands there twice"
        if reason:
            raise ZooError(f"{one_line(path)!r}, row {number + 1} ({one_line(row[path_column], 80)}): {reason}")
        seen.add(place)
        found.add(Path(place).relative_to(root).as_posix(), row[label_column], split, groups[number])
    if any(found.groups):
        found.grouped_by = {"group_column": group_column}
    if any(found.splits) and "train" not in found.splits:
        raise ZooError(f"{one_line(path)!r} has a column split, and no row of train; add some, or leave the column out")
    return found


def _csv_rows(path: Path, path_column: str, label_column: str, group_column: str | None) -> list[dict[str, str]]:
    """Return the rows as dicts, fields stripped of blanks at the ends."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ZooError(f"cannot read {one_line(path)!r}: {one_line(error.strerror or error)}") from error
    except UnicodeDecodeError as error:
        raise ZooError(f"{one_line(path)!r} is no text in UTF-8 ({one_line(error)}); save it as UTF-8") from error
    first = text.split("\n", 1)[0]
    separator = max((",", ";", "\t"), key=first.count)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        header = [name.strip() for name in next(reader, [])]
        for column in (path_column, label_column, group_column):
            if column is not None and column not in header:
                raise ZooError(
                    f"{one_line(path)!r} has no column {one_line(column)!r}{nearest(column, header)}. It has "
                    f"{one_line(', '.join(header)) or 'none'}; name others with --path-column, "
                    "--label-column, --group-column"
                )
        rows = []
        for cells in reader:
            if len(cells) != len(header) and any(cells):
                raise ZooError(
                    f"{one_line(path)!r} line {reader.line_num}: {len(cells)} fields where the header has {len(header)}"
                )
            if any(cells):
                rows.append({key: cell.strip() for key, cell in zip(header, cells, strict=True)})
    except csv.Error as error:
        raise ZooError(f"{one_line(path)!r} is no valid CSV: {one_line(error)}") from error
    if not rows:
        raise ZooError(f"{one_line(path)!r} has no rows; it must list images")
    return rows


def _filled(rows: list[dict[str, str]], column: str, path: Path) -> list[str]:
    """Return a column's cells; raises ZooError where some are empty and some are not."""
    cells = [row[column] for row in rows]
    empty = cells.count("")
    if 0 < empty < len(cells):
        raise ZooError(
            f"{one_line(path)!r}: column {one_line(column)!r} is empty in {empty} of {len(cells)} rows, "
            f"first in row {cells.index('') + 1}; fill all of it or none"
        )
    return cells
