"""The import of a source as a dataset: find, check, group, split, and write down."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zoo.data.canonical import (
    canonical_record,
    check_original,
    find_original,
    is_canonical,
    published_rows,
    stage_published,
    unpacked,
)
from zoo.data.dicom import pseudonym
from zoo.data.duplicates import Ints, components, near_pairs
from zoo.data.facts import ImageFacts, collect, file_stats, write_facts
from zoo.data.find import DESCRIBED, find_source
from zoo.data.layouts import Found
from zoo.data.leaks import describe_leaks, find_leaks
from zoo.data.look import Look, default_window, write_salt
from zoo.data.manifest import (
    BAD_IMAGES,
    Dataset,
    Progress,
    Row,
    check_dataset,
    load_dataset,
    manifest_bytes,
    map_files,
    write_dataset,
)
from zoo.data.rows import Grouping, check_classes, count_rows, join_groups, repair_rows, split_rows
from zoo.data.split import DEFAULT_RATIOS, check_ratios, check_seed
from zoo.data.window import parse_rescale, parse_window
from zoo.errors import ZooError, nearest, one_line
from zoo.files import FULL, Home, check_name, home, read_toml, user_path, write_error

_SUFFIX = re.compile(r"files that are no image \(.*")
_NEGATIVE = re.compile(r"(?<![a-z])(normal|healthy|negative|controls?|no[ _-]*findings?)(?![a-z])")


def import_dataset(
    source: str | Path,
    name: str,
    root: Home | None = None,
    *,
    copy: bool | None = None,
    ratios: Sequence[float] | None = None,
    seed: int = 0,
    bad_images: str = "fail",
    group_column: str | None = None,
    group_regex: str | None = None,
    group_blocks: int | None = None,
    near_duplicates: bool | None = None,
    negative_class: str | None = None,
    label_column: str = "label",
    path_column: str = "path",
    labels: str | Path | None = None,
    window: str | None = None,
    rescale: str | None = None,
    from_: str | Path | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
    **builtin_options: Any,
) -> Dataset:
    """Read a source, write `data/<name>/dataset.toml` and `manifest.csv`, and return the dataset.

    source: a folder with a folder per class; one with train, val and test folders of such; a CSV with the columns
    path, label and, if wanted, split and group; a folder with `labels`, a CSV that names its files, folders or
    DICOM patients; a MedMNIST-style .npz; a Hugging Face dataset on disk; `torchvision:NAME`; a public data set of
    `zoo list datasets` with `from_`, its download; or the name of built-in data, which alone takes builtin_options.
    ratios: of train, val and test; left out, 0.7, 0.15 and 0.15, or what built-in data without options have as
    their own. Shipped splits are kept; val or test that is missing is cut from train. Images stay where they are
    unless `copy`; those out of an archive or a generator are written to `data/<name>/images/`. DICOMs are written
    there too unless `copy` is False, as copies without the patient's data; the patient is their group, by a salted
    pseudonym. Images that decode to the same pixels, or nearly (unless near_duplicates is False), are put into one
    group. window, rescale: how values of more than 8 bits become grey (`zoo.data.window`); CT gets `lung` where
    none is named. A `sample_id` is the first 16 hexadecimal digits of the SHA-256 of the path below the root: the
    same as long as the file keeps its name, and not the name itself.

    The same import again writes the same bytes. Raises ZooError, and leaves what stands as it was, for a
    source that cannot be used, for a dataset of this name and other content unless `overwrite`, and, by the
    policy `fail`, for an image that cannot be decoded.
    """
    root = root or home()
    folder = root.data / check_name(name, "dataset")
    grouping = Grouping(group_column, group_regex, group_blocks, None, near_duplicates)
    check_ratios(DEFAULT_RATIOS if ratios is None else ratios)
    check_seed(seed)
    if bad_images not in BAD_IMAGES:
        raise ZooError(f"bad_images must be fail or skip. Got {one_line(repr(bad_images))}")
    parse_window(window or "lung")
    parse_rescale(rescale or "1,0")
    with _stage(root, name) as stage:
        if is_canonical(source):
            asked = (copy, window, rescale, labels, negative_class, *vars(grouping).values())
            _refuse_changes(str(source), asked, builtin_options)
            held = _import_canonical(str(source), stage, folder, from_, progress, overwrite)
        else:
            columns = (path_column, label_column, group_column)
            held = find_source(source, folder, root, stage, columns, labels, from_, builtin_options)
        if held is None:
            return load_dataset(name, root)
        found = held
        check_classes(found.labels)
        negative = _negative_class(_class_order(set(found.labels)), negative_class or found.negative_class)
        seen_through = window or default_window(found.root, found.paths)
        look = Look(found.root, stage / "images", folder / ".salt", seen_through, rescale, copy)
        grouping.apply(found)
        kept, facts, skipped, originals = _examine_all(found, look, bad_images, progress)
        wanted = ratios if ratios is not None else found.ratios or DEFAULT_RATIOS
        rows, split_facts = _split(kept, facts, wanted, seed, near_duplicates)
        if look.copied or (copy and not kept.root.is_relative_to(stage)):
            _copy({new: old for new, old in originals.items() if new not in look.copied}, kept.root, stage / "images")
        record = {
            "name": name,
            **_described(kept, look, window, bad_images),
            "root": "images" if (stage / "images").is_dir() else _root_text(found.root, source, folder),
            "negative_class": negative,
            "rescale": rescale,
            **split_facts,
            "skipped": skipped,
        }
        if look.found_dicom:
            write_salt(folder / ".salt", look.salt)
        _write(folder, rows, _filled(record), stage, overwrite)
    dataset = load_dataset(name, root)
    _remember(dataset, kept.paths, facts)
    return dataset


def _split(
    kept: Found, facts: Sequence[ImageFacts], ratios: Sequence[float], seed: int, near_duplicates: bool | None
) -> tuple[list[Row], dict[str, Any]]:
    """Return the manifest's rows and what is said of them; near-duplicates are kept together unless forbidden."""
    pairs = None if near_duplicates is False else _near(kept, facts)
    near = None if pairs is None else components(len(facts), pairs)
    digests = [(each.sha256, each.pixel_sha256) for each in facts]
    rows, said = split_rows(kept, digests, ratios, seed, near, near_required=near_duplicates is True)
    if kept.kind == "canonical" and pairs is not None:
        # What is known of a public data set is mended at once: no copy in test, none with two labels.
        rows, said["dropped"] = repair_rows(rows, pairs, drop_duplicates=True)
        said["counts"] = count_rows(rows)
    return rows, said


def _described(kept: Found, look: Look, window: str | None, bad_images: str) -> dict[str, Any]:
    """Return what `dataset.toml` says of the source and of how its images are seen."""
    classes = _class_order(set(kept.labels))
    return {
        "summary": f"{len(kept.paths)} images of {len(classes)} classes",
        **kept.described,
        "classes": classes,
        "bad_images": bad_images,
        "window": window or (look.window if look.found_dicom or look.found_deep else None),
        "renamed_classes": kept.renamed_classes,
        "import": {"kind": kept.kind, **kept.options},
        "left_out": kept.left_out,
    }


def _near(kept: Found, facts: Sequence[ImageFacts]) -> Ints:
    columns = collect(facts, [each.sha256 for each in facts])
    return near_pairs(columns.phash, columns.small, kept.labels, [each.pixel_sha256 for each in facts])


def _remember(dataset: Dataset, paths: Sequence[str], facts: Sequence[ImageFacts]) -> None:
    """Keep what the import saw of each image, so that nothing has to be read again to look for leaks."""
    of_path = dict(zip(paths, facts, strict=True))
    rows = [of_path[path] for path in dataset.frame["path"]]
    write_facts(dataset, collect(rows, dataset.frame["sha256"].tolist(), file_stats(dataset)))


def _filled(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if value not in (None, {})}


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
    for old, new in dataset.facts.get("renamed_classes", {}).items():
        said.append(f"class {one_line(old, 80)!r} is called {one_line(new, 80)!r} here")
    if window := dataset.facts.get("window"):
        said.append(f"values of more than 8 bits are seen through the window {window}; another with --window")
    if copies := counts.get("pixel_copies"):
        said.append(f"{copies} images have the same pixels as another image; within a split such images share a group")
    if torn := split.get("near_duplicates_torn"):
        said.append(f"near-duplicates are not kept together: {torn}")
    if dropped := dataset.facts.get("dropped", {}):
        said.append(f"left out as copies or leaks: {len(dropped)} images, listed in dataset.toml")
    if (error := split.get("stratification_error")) is not None:
        said.append(f"stratified: a class's share in a split is at most {100 * error:.1f} points from its share in all")
    said += describe_leaks(find_leaks(dataset))
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


def _refuse_changes(source: str, asked: Sequence[Any], options: dict[str, Any]) -> None:
    """Raise ZooError for options that would make another data set of a public one."""
    if options or any(each is not None for each in asked):
        raise ZooError(
            f"{source} is imported as it is published, without options of its own; import its folder under another "
            "--name to group, label, window or copy it otherwise"
        )


def _import_canonical(
    source: str, stage: Path, folder: Path, from_: str | Path | None, progress: Progress | None, overwrite: bool
) -> Found | None:
    """Write a public data set whose manifest is published; of another return what its download holds."""
    original = check_original(source, from_)
    rows = published_rows(source)
    if rows is None:
        found = find_original(source, original, stage)
        if found.root.is_relative_to(stage):
            unpacked(stage, stage / "images")
            found.root = stage / "images" / found.root.relative_to(stage / "unpacked")
        return found
    stage_published(source, rows, original, stage / "images", progress)
    _write(folder, rows, {**canonical_record(source), "name": folder.name}, stage, overwrite)
    return None


def _examine_all(
    found: Found, look: Look, bad_images: str, progress: Progress | None
) -> tuple[Found, list[ImageFacts], dict[str, str], dict[str, str]]:
    """Look at all; return those kept, their facts, path to reason of those skipped, and new to old path.

    What was never to be an image, as a DICOM of a report, is left out and counted by kind.
    """
    results: list[tuple[str, str, ImageFacts]] = []
    for result in map_files(look, found.paths):
        results.append(result)
        if progress:
            progress(len(results), len(found.paths))
    bad = [
        (path, each.reason)
        for path, (_, _, each) in zip(found.paths, results, strict=True)
        if each.reason and not each.no_image
    ]
    if bad and (bad_images == "fail" or len(bad) == len(results)):
        path, reason = min(bad)
        remedy = "mend it" if len(bad) == 1 else "mend them"
        raise ZooError(
            f"{len(bad)} of {len(results)} images cannot be used; the first is {one_line(path)!r}: {reason}; "
            f"{remedy}, or leave such images out with --bad-images skip"
        )
    for _, _, each in results:
        if each.no_image:
            found.leave_out(each.reason)
    good = [not each.reason for _, _, each in results]
    kept = found.only(good)
    if lost := sorted(set(found.labels) - set(kept.labels)):
        raise ZooError(f"no image of class {one_line(lost[0])!r} can be used; mend some, or leave the class out")
    left = [each for each, fine in zip(results, good, strict=True) if fine]
    old_paths, kept.paths = kept.paths, [path for path, _, _ in left]
    if look.hides_names:
        kept.paths = [path if path in look.copied else look.new_name(path) for path in kept.paths]
        kept.groups = [group and f"group-{pseudonym(group, look.salt)}" for group in kept.groups]
        kept.left_out = {_SUFFIX.sub("files that are no image", what): count for what, count in kept.left_out.items()}
    if look.found_patients:
        named = sum(bool(patient) for _, patient, _ in left) / len(left)
        kept.grouped_by = {**kept.grouped_by, "group_patient": True, "group_patient_share": round(named, 3)}
        kept.groups = join_groups([[patient for _, patient, _ in left], kept.groups], kept.paths)
    # A name that is no UTF-8 cannot stand in a file of UTF-8 as it is, nor one that may name a patient.
    skipped = {
        look.new_name(path) if look.hides_names else path.encode(errors="backslashreplace").decode(): reason
        for path, reason in sorted(bad)
    }
    originals = dict(zip(kept.paths, old_paths, strict=True))
    return kept, [each for _, _, each in left], skipped, originals


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
    if user_path(source).is_absolute():
        return str(images)
    return Path(os.path.relpath(images, folder.resolve())).as_posix()


def _copy(originals: dict[str, str], root: Path, images: Path) -> None:
    """Copy images; originals: the new path of each to the one below root."""
    for path, original in originals.items():
        target = images / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / original, target)
        except OSError as error:
            raise write_error(target, error) from error


def _write(folder: Path, rows: Sequence[Row], record: dict[str, Any], stage: Path, overwrite: bool) -> None:
    """Put images, manifest and `dataset.toml` in place; an equal dataset comes out as it was."""
    if (folder / "dataset.toml").is_file() and not overwrite:
        try:
            old = read_toml(folder / "dataset.toml")
        except ZooError as error:
            raise ZooError(f"{error}; replace the dataset with --overwrite") from error
        record |= {key: old[key] for key in DESCRIBED if key in old}
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
    check_dataset(folder, rows, record)  # before anything that stands is moved
    if (stage / "images").is_dir():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / "images").exists():
                (folder / "images").replace(stage / "replaced")
            (stage / "images").replace(folder / "images")
        except OSError as error:
            raise write_error(folder / "images", error) from error
    elif (folder / "images").is_dir() and overwrite:
        (folder / "images").replace(stage / "replaced")
    if overwrite:
        for stale in ("audit.html", "audit.json"):
            (folder / stale).unlink(missing_ok=True)
        shutil.rmtree(folder / "show", ignore_errors=True)
    write_dataset(folder, rows, record)
