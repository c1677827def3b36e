"""What a folder holds before any image is read: class folders, ready splits, and classes that must match."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from zoo.data.dicom import maybe_dicom
from zoo.errors import ZooError, one_line

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
SPLIT_OF = {
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
    in the source's words; options: given to a generator; ratios: of the splits, where the source wants its own.
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
    ratios: tuple[float, float, float] | None = None

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
    splits = {top: SPLIT_OF[top.name.lower()] for top in tops if top.name.lower() in SPLIT_OF}
    if "train" in splits.values() and (len(splits) > 1 or len(tops) == 1):
        _add_splits(found, splits)
        for top in tops:
            if top not in splits:
                _leave_out(found, files_below(top), "images outside the split folders")
    else:
        for top in tops:
            _add_class(found, top)
        if len(set(found.labels)) == 1 and len(_folders(tops[0])) > 1:
            raise ZooError(
                f"{one_line(root)!r} has one class folder, {one_line(tops[0].name)!r}, and folders in it; "
                f"did you mean {one_line(tops[0])!r}?"
            )
    _leave_out(found, files_below(root, deep=False), "images outside any class folder")
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
        _leave_out(found, files_below(top, deep=False), "images outside any class folder")
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
    split = SPLIT_OF.get(folders[0].lower(), "") if len(folders) > 1 else ""
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
    for path in _leave_out(found, files_below(folder)):
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
        if may_be_image(path):
            images.append(path)
        else:
            found.leave_out(no_image(path))
    if images_are:
        found.leave_out(images_are, len(images))
    return images


def may_be_image(path: Path) -> bool:
    """Return whether a file is taken for an image: by its ending or, where that says nothing, as a DICOM."""
    return path.suffix.lower() in IMAGE_SUFFIXES or (_unnamed(path) and maybe_dicom(path))


def _unnamed(path: Path) -> bool:
    """Return whether a file's ending says nothing: none, or a number as in a UID."""
    return re.fullmatch(r"(\.[0-9]*)?", path.suffix) is not None


def no_image(path: Path) -> str:
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
    """Return the path of each entry that counts, sorted, and whether it is a folder or a link to one.

    A link that cannot be followed, into a folder without rights too, is none.
    """
    try:
        with os.scandir(folder) as entries:
            shown = [
                (Path(each.path), os.path.isdir(each.path) if each.is_symlink() else each.is_dir())  # noqa: PTH112
                for each in entries
                if not each.name.startswith(".") and each.name not in _IGNORED
            ]
    except OSError as error:
        reason = one_line(error.strerror or error)
        raise ZooError(f"cannot read the folder {one_line(folder)!r}: {reason}; check its rights") from error
    return sorted(shown)


def _folders(folder: Path) -> list[Path]:
    return [path for path, is_folder in _entries(folder) if is_folder]


def files_below(folder: Path, deep: bool = True, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """Yield the files below a folder; links are followed, but not back to a folder that they lie in."""
    entries, facts = _entries(folder), folder.stat()
    here = (facts.st_dev, facts.st_ino)
    if here in above:
        return
    for path, is_folder in entries:
        if not is_folder:
            yield path
        elif deep:
            yield from files_below(path, deep, above | {here})
