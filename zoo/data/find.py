"""Which source is meant: a folder, a CSV, an archive, a library's data set, built-in data; and what it holds."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from zoo.data.canonical import canonical_names
from zoo.data.ecosystem import find_in_huggingface, find_in_medmnist, find_in_npz, find_in_torchvision, is_huggingface
from zoo.data.layouts import Found, find_in_folder
from zoo.data.listings import find_in_csv, find_with_labels
from zoo.data.look import subject_of
from zoo.errors import ZooError, nearest, one_line
from zoo.files import Home, user_path

# What a person may write into dataset.toml by hand; importing the same again leaves it as it is.
DESCRIBED = ("summary", "licence", "source", "note", "medical")


def find_source(
    source: str | Path,
    folder: Path,
    root: Home,
    stage: Path,
    columns: tuple[str, str, str | None],
    labels: str | Path | None,
    from_: str | Path | None,
    options: dict[str, Any],
) -> Found:
    """Return what a source holds, before any image is read, but for those of an archive or a generator.

    folder: the dataset's own; stage: where images are written that are no files yet. columns: of path, label and group
    in a CSV. Raises ZooError for what is no source, and for options that would have no effect on it.
    """
    known = builtin_names()
    if columns[2] is not None and Path(source).suffix.lower() != ".csv":
        raise ZooError("group_column is for a CSV; group other sources by a regex or by blocks")
    _refuse_idle_options(source, known, labels, from_)
    if isinstance(source, str) and source in known:
        return _find_builtin(source, stage / "images", options)
    if options:
        raise ZooError(f"the option {one_line(next(iter(options)))!r} is for built-in data alone ({', '.join(known)})")
    if (named := _find_by_library(str(source), from_, stage / "images")) is not None:
        return named
    path = _existing(source, known)
    if path.is_relative_to(folder.resolve()):
        raise ZooError(
            f"the source {one_line(source)!r} lies in the dataset's own folder, {str(folder)!r}; move it "
            "elsewhere, or choose another --name"
        )
    if labels is not None:
        if not path.is_dir():
            raise ZooError(
                f"labels go with a folder of images. Got {one_line(source)!r}; name the folder as the source"
            )
        return find_with_labels(path, _existing(labels, {}), columns[0], columns[1], subject_of)
    if path.is_dir() and is_huggingface(path):
        return find_in_huggingface(path, stage / "images")
    if path.is_dir():
        own = (root.data, root.runs.parent, root.recipes, root.benchmarks)
        return find_in_folder(path, {each.resolve(): "folders of the zoo itself" for each in own})
    if path.suffix.lower() == ".csv":
        return find_in_csv(path, *columns)
    if path.suffix.lower() == ".npz":
        return find_in_npz(path, stage / "images")
    raise ZooError(
        f"the source must be a folder, a .csv or .npz file, or built-in data ({', '.join(known)}). Got "
        f"{one_line(source)!r}; unpack an archive first"
    )


def _refuse_idle_options(
    source: str | Path, known: dict[str, str], labels: str | Path | None, from_: str | Path | None
) -> None:
    """Raise ZooError for options that would have no effect on this source."""
    library = str(source).partition(":")[0] in ("torchvision", "medmnist")
    if labels is not None and (str(source) in known or library):
        raise ZooError(f"labels go with a folder of images. Got {one_line(source)!r}; leave --labels out")
    if from_ is not None and not library:
        names = ", ".join([*canonical_names(), "torchvision:NAME", "medmnist:NAME"])
        raise ZooError(f"--from goes with a public data set ({names}). Got the source {one_line(source)!r}")


def _find_by_library(source: str, from_: str | Path | None, images: Path) -> Found | None:
    """Return the images of `torchvision:NAME` or `medmnist:NAME`, None for another source."""
    kind, _, name = source.partition(":")
    place = user_path(from_) if from_ else None
    if kind == "medmnist" and name:
        return find_in_medmnist(name, place, images)
    if kind == "torchvision" and name:
        return find_in_torchvision(name, place, images, os.environ.get("HF_HUB_OFFLINE", "0") == "1")
    return None


def _existing(source: str | Path, known: Iterable[str]) -> Path:
    path = user_path(source)
    try:
        there = path.exists()
    except OSError:  # a name too long, a folder on the way that cannot be read
        there = False
    if not there:
        names = [*known, *canonical_names()]
        raise ZooError(
            f"there is nothing at {one_line(source)!r}{nearest(str(source), names)}; give a folder, a .csv "
            f"or .npz file, or built-in data ({', '.join(names)})"
        )
    return path.resolve()


def _find_builtin(name: str, images: Path, options: dict[str, Any]) -> Found:
    from zoo.data.builtin import BUILTIN

    builtin = BUILTIN[name]
    found = Found("built-in", images, negative_class=builtin.negative_class)
    found.options = {"name": name, **options}
    found.described = {
        key: value for key in DESCRIBED if (value := getattr(builtin, key, None)) is not None and value != ""
    }
    found.ratios = None if options else builtin.ratios
    images.mkdir()
    # `seed` alone means the split's everywhere.
    renamed = {"seed" if key == "data_seed" else key: value for key, value in options.items()}
    for row in builtin.make(images, renamed):
        found.add(row["path"], row["label"], "", row["group"])
    if any(found.groups):
        found.grouped_by = {"group_column": "group"}
    return found


def builtin_names() -> dict[str, str]:
    """Return the built-in data: name to summary."""
    from zoo.data.builtin import BUILTIN

    return {name: each.summary for name, each in BUILTIN.items()}
