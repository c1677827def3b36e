"""What a source holds before any image is read: class folders, ready splits, a CSV, an .npz."""

from __future__ import annotations

import csv
import io
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from zoo.data.dicom import maybe_dicom
from zoo.errors import ZooError, nearest, one_line
from zoo.files import write_error
from zoo.runs import SPLITS

IMAGE_SUFFIXES = frozenset(
    (
        ".png",
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".bmp",
        ".tif",
        ".tiff",
        ".webp",
        ".gif",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".dcm",
        ".dicom",
        ".ima",
    )
)
_IGNORED = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini"})
_SPLIT_OF = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


@dataclass
class Found:
    """One path, label, split and group per image, and where they are.

    paths are relative to root; splits are empty where the source ships none, groups where it names none.
    grouped_by: how it named them. left_out: what was not taken, and how often. described: of `dataset.toml`,
    in the source's words; options: given to a generator.
    """

    kind: str
    root: Path
    paths: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    grouped_by: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    described: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    negative_class: str | None = None
    renamed_classes: dict[str, str] = field(default_factory=dict)

    def add(self, path: str, label: str, split: str = "", group: str = "") -> None:
        """Take one image."""
        self.paths.append(path)
        self.labels.append(label)
        self.splits.append(split)
        self.groups.append(group)

    def leave_out(self, what: str, count: int = 1) -> None:
        """Count what is not taken."""
        if count:
            self.left_out[what] = self.left_out.get(what, 0) + count

    def only(self, kept: Sequence[bool]) -> Found:
        """Return the same with those images alone that are kept."""

        def chosen(values: list[str]) -> list[str]:
            return [value for value, keep in zip(values, kept, strict=True) if keep]

        return replace(
            self,
            paths=chosen(self.paths),
            labels=chosen(self.labels),
            splits=chosen(self.splits),
            groups=chosen(self.groups),
        )


def find_in_folder(root: Path, not_classes: Mapping[Path, str]) -> Found:
    """Return the images of a folder with a folder per class, or with train, val and test folders of such.

    The label is the folder's name; images may lie at any depth below it. Hidden files are passed over; files
    of no image suffix, and images outside the class folders, are left out and counted. not_classes: folders
    to pass over, with what they are. Raises ZooError for a class folder without images, and for classes that
    differ by split.
    """
    found = Found("folder", root)
    for path, what in not_classes.items():
        found.leave_out(what, int(path.parent == root and path.is_dir()))
    tops = [top for top in _folders(root) if top not in not_classes]
    splits = {top: _SPLIT_OF[top.name.lower()] for top in tops if top.name.lower() in _SPLIT_OF}
    if "train" in splits.values() and (len(splits) > 1 or len(tops) == 1):
        _add_splits(found, splits)
        for top in tops:
            if top not in splits:
                _leave_out(found, _files(top), "images outside the split folders")
    else:
        for top in tops:
            _add_class(found, top)
        if len(set(found.labels)) == 1 and len(_folders(tops[0])) > 1:
            raise ZooError(
                f"{one_line(root)!r} has one class folder, {one_line(tops[0].name)!r}, and folders in it; "
                f"did you mean {one_line(tops[0])!r}?"
            )
    _leave_out(found, _files(root, deep=False), "images outside any class folder")
    if not found.paths:
        rest = "; ".join(f"{count} {what}" for what, count in found.left_out.items()) or "nothing"
        raise ZooError(
            f"{one_line(root)!r} has no image in a class folder (found: {rest}); it must hold a folder per class"
        )
    return found


def _add_splits(found: Found, splits: dict[Path, str]) -> None:
    found.kind = "splits"
    for top, split in splits.items():
        doubles = [other.name for other, its in splits.items() if its == split]
        if len(doubles) > 1:
            raise ZooError(f"the folders {' and '.join(sorted(doubles))} are both the split {split}; keep one of them")
        for folder in _folders(top):
            _add_class(found, folder, split)
        _leave_out(found, _files(top, deep=False), "images outside any class folder")
    classes = {split: set[str]() for split in splits.values()}
    for label, split in zip(found.labels, found.splits, strict=True):
        classes[split].add(label)
    same = match_classes(list(classes.values()))
    if same is not None:
        renamed = {label: name for label, name in same.items() if label != name}
        found.labels = [same[label] for label in found.labels]
        found.renamed_classes = renamed
        return
    differences = [
        f"{split} has {_listed(of_split - classes['train'])} that train has not"
        for split, of_split in classes.items()
        if of_split - classes["train"]
    ] + [
        f"{split} lacks {_listed(classes['train'] - of_split)}"
        for split, of_split in classes.items()
        if classes["train"] - of_split
    ]
    if differences:
        raise ZooError(
            f"the class folders of the splits differ: {'; '.join(differences)}. Rename them, or give a CSV "
            "with path, label and split"
        )


def split_and_label(path: str) -> tuple[str, str]:
    """Return split and label that a file's folders name: the first folder, or the second below one named as a split.

    >>> split_and_label("valid/cat/1.png"), split_and_label("cat/old/1.png"), split_and_label("1.png")
    (('val', 'cat'), ('', 'cat'), ('', ''))
    """
    folders = PurePosixPath(path).parts[:-1]
    split = _SPLIT_OF.get(folders[0].lower(), "") if len(folders) > 1 else ""
    label = folders[1] if split else folders[0] if folders else ""
    return split, label


def match_classes(of_splits: Sequence[set[str]]) -> dict[str, str] | None:
    """Return each class name to the name that all splits share, or None where the splits' classes do not match.

    Names match that differ in case and separators alone, or where one goes on where the other ends, as
    `adenocarcinoma_left.lower.lobe` does; each name must have exactly one match in every split. The shortest of
    those that match is kept, the first split's among equals.

    >>> match_classes([{"a_left.lobe", "normal"}, {"a", "Normal"}])
    {'Normal': 'Normal', 'a': 'a', 'a_left.lobe': 'a', 'normal': 'Normal'}
    >>> match_classes([{"a_left", "a_right"}, {"a", "b"}]) is None
    True
    """
    mapping: dict[str, str] = {}
    shortest = min(of_splits, key=lambda names: sorted(map(len, names)))
    for name in sorted(shortest):
        words = _words(name)
        for names in of_splits:
            same = [each for each in names if _words(each) == words] or [
                each for each in names if _words(each)[: len(words)] == words
            ]
            if len(same) != 1 or mapping.get(same[0], name) != name:
                return None
            mapping[same[0]] = name
    if set[str]().union(*of_splits) - set(mapping):
        return None
    return dict(sorted(mapping.items()))


def _words(name: str) -> tuple[str, ...]:
    return tuple(word for word in re.split(r"[\W_]+", name.casefold()) if word)


def _listed(names: set[str]) -> str:
    shown = [repr(one_line(name, 80)) for name in sorted(names)]
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")


def _add_class(found: Found, folder: Path, split: str = "") -> None:
    before = len(found.paths)
    for path in _leave_out(found, _files(folder)):
        found.add(path.relative_to(found.root).as_posix(), folder.name, split)
    if len(found.paths) == before:
        raise ZooError(
            f"the class folder {one_line(folder.relative_to(found.root))!r} holds no image; fill or remove it"
        )
    try:
        folder.name.encode()
    except UnicodeEncodeError:
        raise ZooError(f"the name of the class folder {one_line(folder.name)!r} is no valid UTF-8; rename it") from None


def _leave_out(found: Found, files: Iterator[Path], images_are: str = "") -> list[Path]:
    """Return the images among files, and count the rest; where images_are says why, count the images too."""
    images = []
    for path in files:
        if path.suffix.lower() in IMAGE_SUFFIXES or (_unnamed(path) and maybe_dicom(path)):
            images.append(path)
        else:
            found.leave_out(_no_image(path))
    if images_are:
        found.leave_out(images_are, len(images))
    return images


def _unnamed(path: Path) -> bool:
    """Return whether a file's ending says nothing: none, or a number as in a UID."""
    return re.fullmatch(r"(\.[0-9]*)?", path.suffix) is not None


def _no_image(path: Path) -> str:
    """Return what a file that is left out is counted as; only a plain ending is named."""
    suffix = path.suffix.lower()
    named = (
        suffix
        if re.fullmatch(r"\.[a-z0-9]{1,6}", suffix) and not _unnamed(path)
        else "no suffix"
        if not suffix
        else "other"
    )
    return f"files that are no image ({named})"


def _entries(folder: Path) -> list[tuple[Path, bool]]:
    """Return the path of each entry that counts, sorted, and whether it is a folder or a link to one."""
    try:
        with os.scandir(folder) as entries:
            shown = [
                (Path(each.path), Path(each.path).is_dir() if each.is_symlink() else each.is_dir())
                for each in entries
                if not each.name.startswith(".") and each.name not in _IGNORED
            ]
    except OSError as error:
        reason = one_line(error.strerror or error)
        raise ZooError(f"cannot read the folder {one_line(folder)!r}: {reason}; check its rights") from error
    return sorted(shown)


def _folders(folder: Path) -> list[Path]:
    return [path for path, is_folder in _entries(folder) if is_folder]


def _files(folder: Path, deep: bool = True, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """Yield the files below a folder; links are followed, but not back to a folder that they lie in."""
    entries, facts = _entries(folder), folder.stat()
    here = (facts.st_dev, facts.st_ino)
    if here in above:
        return
    for path, is_folder in entries:
        if not is_folder:
            yield path
        elif deep:
            yield from _files(path, deep, above | {here})


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
    for file in _files(root):
        path = file.relative_to(root)
        subject = subject_of(file)
        if subject is None and file.suffix.lower() not in IMAGE_SUFFIXES:
            found.leave_out(_no_image(file))
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
        elif split and split.lower() not in _SPLIT_OF:
            reason = f"split must be one of train, val, test. Got {one_line(split)!r}"
        if reason:
            raise ZooError(f"{one_line(labels)!r}, row {number}: {reason}")
        if split:
            split_of[key] = _SPLIT_OF[split.lower()]
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
        split = _SPLIT_OF.get(splits[number].lower(), "") if splits[number] else ""
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
