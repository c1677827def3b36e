"""The import of a source as a dataset: find, check, group, split, and write down."""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zoo.data.decode import BadImage, decode, pixel_sha256
from zoo.data.layouts import Found, find_in_csv, find_in_folder, find_in_npz
from zoo.data.manifest import (
    BAD_IMAGES,
    Dataset,
    Progress,
    Row,
    load_dataset,
    manifest_bytes,
    map_files,
    write_dataset,
)
from zoo.data.rows import Grouping, check_classes, split_rows
from zoo.data.split import DEFAULT_RATIOS, check_ratios, check_seed
from zoo.errors import ZooError, nearest, one_line
from zoo.files import FULL, Home, check_name, home, read_toml, sha256_bytes, write_error
from zoo.runs import SPLITS

MAX_FILE_BYTES = 1 << 30
_NEGATIVE = re.compile(r"(?<![a-z])(normal|healthy|negative|controls?|no[ _-]*findings?)(?![a-z])")
# What a person may write into dataset.toml by hand; importing the same again leaves it as it is.
_DESCRIBED = ("summary", "licence", "source", "note", "medical")


def import_dataset(
    source: str | Path,
    name: str,
    root: Home | None = None,
    *,
    copy: bool = False,
    ratios: Sequence[float] = DEFAULT_RATIOS,
    seed: int = 0,
    bad_images: str = "fail",
    group_column: str | None = None,
    group_regex: str | None = None,
    group_blocks: int | None = None,
    negative_class: str | None = None,
    label_column: str = "label",
    path_column: str = "path",
    progress: Progress | None = None,
    overwrite: bool = False,
    **builtin_options: Any,
) -> Dataset:
    """Read a source, write `data/<name>/dataset.toml` and `manifest.csv`, and return the dataset.

    source: a folder with a folder per class; one with train, val and test folders of such; a CSV with the
    columns path, label and, if wanted, split and group; a MedMNIST-style .npz; or the name of built-in data,
    which alone takes builtin_options. Shipped splits are kept; val or test that is missing is cut from train.
    Images stay where they are unless `copy`; those out of an .npz or a generator are written to
    `data/<name>/images/`. Images that decode to the same pixels are put into one group. A `sample_id` is the
    first 16 hexadecimal digits of the SHA-256 of the path below the root: the same as long as the file keeps
    its name, and not the name itself.

    The same import again writes the same bytes. Raises ZooError, and leaves what stands as it was, for a
    source that cannot be used, for a dataset of this name and other content unless `overwrite`, and, by the
    policy `fail`, for an image that cannot be decoded.
    """
    root = root or home()
    folder = root.data / check_name(name, "dataset")
    grouping = Grouping(group_column, group_regex, group_blocks)
    grouping.record()
    check_ratios(ratios)
    check_seed(seed)
    if bad_images not in BAD_IMAGES:
        raise ZooError(f"bad_images must be fail or skip. Got {one_line(repr(bad_images))}")
    with _stage(root, name) as stage:
        columns = (path_column, label_column, group_column)
        found = _find(source, folder, root, stage, columns=columns, options=builtin_options)
        grouping.apply(found)
        check_classes(found.labels)
        classes = _class_order(set(found.labels))
        negative = _negative_class(classes, negative_class or found.negative_class)
        kept, digests, skipped = _examine_all(found, bad_images, progress)
        rows, facts = split_rows(kept, digests, ratios, seed)
        if copy and not found.root.is_relative_to(stage):
            _copy(kept, stage / "images")
        record = {
            "name": name,
            "summary": f"{len(rows)} images of {len(classes)} classes",
            **found.described,
            "root": "images" if (stage / "images").is_dir() else _root_text(found.root, source, folder),
            "classes": classes,
            "negative_class": negative,
            "bad_images": bad_images,
            "import": {"kind": found.kind, **found.options},
            **facts,
            "left_out": found.left_out,
            "skipped": skipped,
        }
        _write(folder, rows, _filled(record), stage, overwrite)
    return load_dataset(name, root)


def _filled(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if value not in (None, {})}


def resplit_dataset(
    name: str,
    root: Home | None = None,
    *,
    ratios: Sequence[float] | None = None,
    seed: int | None = None,
    group_regex: str | None = None,
    group_blocks: int | None = None,
    force: bool = False,
) -> Dataset:
    """Split a dataset again and return it; options left out are those recorded in its `dataset.toml`.

    With no option the recorded split is drawn once more, with the same bytes. Splits that were shipped are
    kept, and only those cut from train are drawn again; `force` draws all of them. Raises ZooError where
    options are given and every split was shipped, and for options out of range.
    """
    dataset = load_dataset(name, root)
    old: dict[str, Any] = dataset.facts.get("split", {})
    grouping = Grouping(group_regex=group_regex, group_blocks=group_blocks)
    shipped = [] if force else list(old.get("shipped", []))
    if len(shipped) == len(SPLITS):
        if ratios is not None or seed is not None or grouping.record():
            raise ZooError(f"the splits of {name!r} were shipped with the data and are kept; --force draws others")
        return dataset
    frame = dataset.frame
    splits = [split if split in shipped else "train" if shipped else "" for split in frame["split"]]
    found = Found("", dataset.root, frame["path"].tolist(), frame["label"].tolist(), splits, frame["group"].tolist())
    found.grouped_by = {key: value for key, value in old.items() if key.startswith("group_")}
    grouping.apply(found)
    rows, facts = split_rows(
        found,
        list(zip(frame["sha256"], frame["pixel_sha256"], strict=True)),
        ratios if ratios is not None else old.get("ratios", DEFAULT_RATIOS),
        seed if seed is not None else old.get("seed", 0),
    )
    record = read_toml(dataset.folder / "dataset.toml") | facts
    write_dataset(dataset.folder, rows, record)
    return load_dataset(name, root)


def builtin_names() -> dict[str, str]:
    """Return the built-in data: name to summary."""
    from zoo.data.builtin import BUILTIN

    return {name: each.summary for name, each in BUILTIN.items()}


def describe_import(dataset: Dataset) -> list[str]:
    """Return in sentences what a reader of the dataset's scores should know of its import."""
    split, counts = dataset.facts.get("split", {}), dataset.facts.get("counts", {})
    said = [f"left out: {what}: {count}" for what, count in dataset.facts.get("left_out", {}).items()]
    if skipped := dataset.facts.get("skipped", {}):
        path, reason = next(iter(skipped.items()))
        said.append(f"skipped: {len(skipped)} images that cannot be used; the first: {one_line(path)}: {reason}")
    if split.get("shipped"):
        kept = f"kept as shipped: {', '.join(split['shipped'])}"
        said.append(kept + (f"; cut from train: {', '.join(split['drawn'])}" if split.get("drawn") else ""))
    if copies := counts.get("pixel_copies"):
        said.append(f"{copies} images have the same pixels as another image; such images share a group")
    if copies := counts.get("copies_across_splits"):
        said.append(f"{copies} pictures stand in more than one shipped split, so test scores are too good")
    if torn := counts.get("groups_across_splits"):
        said.append(f"{torn} groups stand in more than one shipped split")
    return said


@contextmanager
def _stage(root: Home, name: str) -> Iterator[Path]:
    """Give a temporary folder on the datasets' disk, while no other process imports this name."""
    from filelock import FileLock

    try:
        root.data.mkdir(parents=True, exist_ok=True)
        root.locks.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=root.data, prefix=".import-"))
    except OSError as error:
        raise write_error(root.data, error) from error
    try:
        with FileLock(root.locks / f"dataset-{name}.lock"):
            yield stage
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise write_error(Path(error.filename or root.data), error) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _find(
    source: str | Path,
    folder: Path,
    root: Home,
    stage: Path,
    *,
    columns: tuple[str, str, str | None],
    options: dict[str, Any],
) -> Found:
    known = builtin_names()
    if columns[2] is not None and Path(source).suffix.lower() != ".csv":
        raise ZooError("group_column is for a CSV; group other sources by a regex or by blocks")
    if isinstance(source, str) and source in known:
        return _find_builtin(source, stage / "images", options)
    if options:
        raise ZooError(f"the option {one_line(next(iter(options)))!r} is for built-in data alone ({', '.join(known)})")
    path = Path(source).expanduser()
    try:
        there = path.exists()
    except OSError:  # a name too long, a folder on the way that cannot be read
        there = False
    if not there:
        raise ZooError(
            f"there is nothing at {one_line(source)!r}{nearest(str(source), known)}; give a folder, a .csv "
            f"or .npz file, or built-in data ({', '.join(known)})"
        )
    path = path.resolve()
    if path.is_relative_to(folder.resolve()):
        raise ZooError(
            f"the source {one_line(source)!r} lies in the dataset's own folder, {str(folder)!r}; move it "
            "elsewhere, or choose another --name"
        )
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


def _find_builtin(name: str, images: Path, options: dict[str, Any]) -> Found:
    from zoo.data.builtin import BUILTIN

    builtin = BUILTIN[name]
    found = Found("built-in", images, negative_class=builtin.negative_class)
    found.options = {"name": name, **options}
    found.described = {
        key: value for key in _DESCRIBED if (value := getattr(builtin, key, None)) is not None and value != ""
    }
    images.mkdir()
    # `seed` alone means the split's everywhere.
    renamed = {"seed" if key == "data_seed" else key: value for key, value in options.items()}
    for row in builtin.make(images, renamed):
        found.add(row["path"], row["label"], "", row["group"])
    if any(found.groups):
        found.grouped_by = {"group_column": "group"}
    return found


def _examine_all(
    found: Found, bad_images: str, progress: Progress | None
) -> tuple[Found, list[tuple[str, str]], dict[str, str]]:
    """Decode all; return those kept, their (sha256, pixel_sha256), and path to reason of those skipped."""
    results: list[tuple[str, str, str]] = []
    for result in map_files(lambda path: _examine(found.root, path), found.paths):
        results.append(result)
        if progress:
            progress(len(results), len(found.paths))
    bad = [(path, reason) for path, (_, _, reason) in zip(found.paths, results, strict=True) if reason]
    if bad and (bad_images == "fail" or len(bad) == len(results)):
        path, reason = min(bad)
        remedy = "mend it" if len(bad) == 1 else "mend them"
        raise ZooError(
            f"{len(bad)} of {len(results)} images cannot be used; the first is {one_line(path)!r}: {reason}; "
            f"{remedy}, or leave such images out with --bad-images skip"
        )
    kept = found.only([not reason for _, _, reason in results])
    if lost := sorted(set(found.labels) - set(kept.labels)):
        raise ZooError(f"no image of class {one_line(lost[0])!r} can be used; mend some, or leave the class out")
    digests = [(sha256, pixels) for sha256, pixels, reason in results if not reason]
    # A name that is no UTF-8 cannot stand in a file of UTF-8 as it is.
    return (
        kept,
        digests,
        {path.encode(errors="backslashreplace").decode(): reason for path, reason in sorted(bad)},
    )


def _examine(root: Path, path: str) -> tuple[str, str, str]:
    """Return (sha256, pixel_sha256, "") of an image file, or ("", "", why it cannot be used)."""
    try:
        path.encode()
        facts = (root / path).stat()
        if not stat.S_ISREG(facts.st_mode):
            return "", "", "no regular file"
        if facts.st_size > MAX_FILE_BYTES:
            return "", "", f"too large: {facts.st_size >> 20} MiB"
        data = (root / path).read_bytes()
        return sha256_bytes(data), pixel_sha256(decode(data)), ""
    except UnicodeEncodeError:
        return "", "", "its name is no valid UTF-8"
    except BadImage as error:
        return "", "", str(error)
    except FileNotFoundError:
        return "", "", "gone"
    except OSError as error:
        return "", "", one_line(error.strerror or error)


def _class_order(labels: set[str]) -> list[str]:
    """Return the classes in the order to be stored: by number where all are numbers, else by name.

    >>> _class_order({"10", "9", "0"})
    ['0', '9', '10']
    """
    if all(re.fullmatch(r"-?[0-9]{1,18}", label) for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)


def _negative_class(classes: Sequence[str], given: str | None) -> str | None:
    """Return the given class, else the only one whose name says that nothing was found.

    >>> _negative_class(["Bengin cases", "Malignant cases", "Normal cases"], None)
    'Normal cases'
    """
    if given is not None:
        if given not in classes:
            raise ZooError(
                f"negative_class must be one of the classes ({one_line(', '.join(classes))}). Got "
                f"{one_line(given)!r}{nearest(given, classes)}"
            )
        return given
    named = [label for label in classes if _NEGATIVE.search(label.lower())]
    return named[0] if len(named) == 1 else None


def _root_text(images: Path, source: str | Path, folder: Path) -> str:
    """Return the root as `dataset.toml` has it: relative to its folder if the source was given so."""
    if Path(source).expanduser().is_absolute():
        return str(images)
    return Path(os.path.relpath(images, folder.resolve())).as_posix()


def _copy(found: Found, images: Path) -> None:
    for path in found.paths:
        target = images / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found.root / path, target)
        except OSError as error:
            raise write_error(target, error) from error


def _write(folder: Path, rows: Sequence[Row], record: dict[str, Any], stage: Path, overwrite: bool) -> None:
    """Put images, manifest and `dataset.toml` in place; an equal dataset comes out as it was."""
    if (folder / "dataset.toml").is_file() and not overwrite:
        try:
            old = read_toml(folder / "dataset.toml")
        except ZooError as error:
            raise ZooError(f"{error}; replace the dataset with --overwrite") from error
        record |= {key: old[key] for key in _DESCRIBED if key in old}
        # The same data may lie elsewhere by now; that alone makes no other dataset.
        differing = [
            key
            for key in sorted(record.keys() | old.keys() - {"schema_version"})
            if key != "root" and record.get(key) != old.get(key)
        ]
        manifest = folder / "manifest.csv"
        if manifest.is_file() and manifest.read_bytes() != manifest_bytes(sorted(rows, key=lambda row: row[1])):
            differing.append("manifest")
        if differing:
            raise ZooError(
                f"the dataset {record['name']!r} is there already with other content ({', '.join(differing)} "
                "differ); choose another --name, or replace it with --overwrite"
            )
    if (stage / "images").is_dir():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / "images").exists():
                (folder / "images").replace(stage / "replaced")
            (stage / "images").replace(folder / "images")
        except OSError as error:
            raise write_error(folder / "images", error) from error
    write_dataset(folder, rows, record)
