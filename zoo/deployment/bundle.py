"""The deployable folder: what it holds, how it is proven whole, and how it is found. Needs neither torch nor timm."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from zoo.errors import ZooError, nearest, one_line
from zoo.files import Home, home, read_json, sha256_file, to_json, user_path
from zoo.runs import Preprocessing

RECORD, CARD, SUMS, SAMPLE = "bundle.json", "card.md", "SHA256SUMS", "sample.png"
MODEL_FILES = {"onnx": ("model.onnx",), "openvino": ("model.xml", "model.bin")}
FORMATS = tuple(MODEL_FILES)
PRECISIONS = ("float32", "fp16", "bf16", "int8")
MAX_RECORD_BYTES = 16 << 20
VAL_OF, TEST_OF = "the artefact itself", "the run that it was made from"
"""Whose scores a record's `val` and `test` are: the artefact is compared with its network on val alone."""


class Conformal(BaseModel):
    """How prediction sets are made: `quantile` None where val was too small, and every class is in."""

    model_config = ConfigDict(frozen=True)

    method: Literal["lac", "aps"]
    coverage: float
    quantile: float | None


class Refer(BaseModel):
    """When a human is asked: below this calibrated confidence in [0, 1]; None: always."""

    model_config = ConfigDict(frozen=True)

    threshold: float | None
    max_error: float


class Rules(BaseModel):
    """What turns logits into an answer; all of it chosen on val, of the exported artefact.

    temperature: logits are divided by it. operating_points: as `zoo.evaluation.calibration.operating_points` gives
    them, less what is of test; None where there is no negative class.
    """

    model_config = ConfigDict(frozen=True)

    temperature: float = 1.0
    conformal: Conformal | None = None
    refer: Refer | None = None
    operating_points: dict[str, Any] | None = None


class Sample(BaseModel):
    """One image of the bundle and what the network says of it: checked at every load.

    logits: (C,) of `sample.png`. tolerance: the greatest difference, as a part of the greatest absolute logit (at
    least 1), that other hardware may make.
    """

    model_config = ConfigDict(frozen=True)

    logits: list[float]
    tolerance: float


class BundleRecord(BaseModel):
    """`bundle.json`: all that is needed to predict, and where the model came from."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    schema_version: int = 1
    name: str
    run: str
    dataset: str
    recipe: str
    seed: int
    model: str
    params: int | None = None
    weights: dict[str, Any] = {}
    classes: list[str]
    negative_class: str | None = None
    medical: bool = False
    preprocessing: Preprocessing
    tta: str = "none"
    format: Literal["onnx", "openvino"]
    precision: Literal["float32", "fp16", "bf16", "int8"]
    activation_map: bool = False
    exporter: dict[str, Any] = {}
    split_digest: str
    weights_sha256: str | None = None
    rules: Rules = Rules()
    parity: dict[str, Any] = {}
    val: dict[str, Any] = {}
    test: dict[str, Any] | None = None
    sample: Sample
    files: dict[str, str]


@dataclass(frozen=True)
class Bundle:
    """A bundle whose every byte was found to be as it was written."""

    path: Path
    record: BundleRecord

    @property
    def name(self) -> str:
        """Return the bundle's name."""
        return self.record.name

    @property
    def model_file(self) -> Path:
        """Return the file that a runtime opens."""
        return self.path / MODEL_FILES[self.record.format][0]

    @property
    def size_bytes(self) -> int:
        """Return the bytes of the model's files."""
        return sum((self.path / name).stat().st_size for name in MODEL_FILES[self.record.format])

    @property
    def card(self) -> str:
        """Return the model card, Markdown; raises ZooError where it cannot be read."""
        with _readable(self.path):
            return (self.path / CARD).read_text(encoding="utf-8")


def open_bundle(name: str | os.PathLike[str], root: Home | None = None) -> Bundle:
    """Return the bundle of a name below the home, or of a folder, after verifying the SHA-256 of every file.

    Raises ZooError where there is none, a byte was changed, a file cannot be read, or the folder holds anything else: a
    foreign file, a link, a folder.
    """
    folder = find_bundle(name, root)
    with _readable(folder):
        listed = _check_sums(folder)
    record = read_record(folder)
    expected = {*MODEL_FILES[record.format], CARD, SAMPLE}
    if set(record.files) != expected or set(listed) != expected | {RECORD}:
        raise _refused(folder, f"it must hold {', '.join(sorted(expected))}. Got {', '.join(sorted(listed))}")
    if any(listed[each] != digest for each, digest in record.files.items()):
        raise _refused(folder, f"{RECORD} and {SUMS} name different digests")
    return Bundle(folder, record)


def read_record(folder: Path) -> BundleRecord:
    """Return what a bundle's folder says of itself, unverified: for a listing; raises ZooError where it is damaged."""
    with _readable(folder):
        size = (folder / RECORD).stat().st_size
    if size > MAX_RECORD_BYTES:
        raise _refused(folder, f"{RECORD} is larger than {MAX_RECORD_BYTES >> 20} MiB")
    try:
        record = BundleRecord.model_validate(read_json(folder / RECORD))
    except ValidationError as error:
        first = error.errors()[0]
        key = one_line(".".join(str(part) for part in first["loc"]), 80)
        raise _refused(folder, f"{RECORD} is damaged at {key!r}: {one_line(first['msg'])}") from error
    if re.fullmatch(r"[^./\\][^/\\]{0,250}", record.name) is None or not record.name.isprintable():
        raise _refused(folder, f"{RECORD} has a name that no folder may have")
    return record


def seal(folder: Path, record: BundleRecord) -> BundleRecord:
    """Write `bundle.json` and `SHA256SUMS` of a folder that holds the other files; return the record with digests.

    Every file is on the disk when it returns. For folders that are still being put together; raises OSError.
    """
    names = (*MODEL_FILES[record.format], CARD, SAMPLE)
    record = record.model_copy(update={"files": {name: sha256_file(folder / name) for name in names}})
    (folder / RECORD).write_text(to_json(record.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
    digests = {name: sha256_file(folder / name) for name in (*names, RECORD)}
    (folder / SUMS).write_text(sums_text(digests), encoding="ascii")
    for name in (*digests, SUMS):
        with (folder / name).open("rb") as stream:
            os.fsync(stream.fileno())
    return record


def find_bundle(name: str | os.PathLike[str], root: Home | None = None) -> Path:
    """Return the folder of a bundle by name below the home, or by path; raises ZooError where there is none."""
    root, text = root or home(), os.fspath(name)
    for path in (root.bundles / text, user_path(text)):
        with suppress(OSError, ValueError):  # a name that is too long, or holds a zero byte
            if text and (path / RECORD).is_file():
                return path
    known = list_bundles(root)
    hint = nearest(text, known) or "; make one with `zoo export`"
    raise ZooError(f"there is no bundle {one_line(text)!r}{hint} (`zoo list bundles` shows all {len(known)})")


def list_bundles(root: Home | None = None) -> list[str]:
    """Return the names of the bundles below the home, sorted; none of them is verified yet."""
    folder = (root or home()).bundles
    try:
        names = [path.name for path in folder.iterdir() if path.name[0] != "."]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        reason = one_line(error.strerror or error)
        raise ZooError(f"cannot read the folder {one_line(folder)!r}: {reason}; check its rights") from error
    return sorted(name for name in names if os.path.isfile(folder / name / RECORD))  # noqa: PTH113


def sums_text(digests: dict[str, str]) -> str:
    """Return the text of `SHA256SUMS`, which `sha256sum -c` reads too.

    >>> print(sums_text({"b": "22", "a": "11"}), end="")
    11  a
    22  b
    """
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def _check_sums(folder: Path) -> dict[str, str]:
    """Return name to digest of every file of a folder, once they are found to be those of `SHA256SUMS`."""
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        mode = (folder / name).lstat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a link" if stat.S_ISLNK(mode) else "no regular file"
            raise _refused(folder, f"{one_line(name)!r} is {kind}")
    if SUMS not in names:
        raise _refused(folder, f"{SUMS} is missing")
    allowed = {RECORD, CARD, SAMPLE, SUMS, *(each for files in MODEL_FILES.values() for each in files)}
    foreign = [name for name in names if name not in allowed]
    if foreign:
        raise _refused(folder, f"{one_line(foreign[0])!r} does not belong to a bundle and is never opened")
    digests = {name: sha256_file(folder / name) for name in names if name != SUMS}
    try:
        said = (folder / SUMS).read_bytes()[: 1 << 16].decode("ascii")
    except UnicodeDecodeError:
        raise _refused(folder, f"{SUMS} is no text") from None
    if said != sums_text(digests):
        lines = dict(line.split("  ", 1)[::-1] for line in said.splitlines() if "  " in line)
        changed = [name for name in digests if lines.get(name) != digests[name]]
        missing = sorted(set(lines) - set(digests))
        what = f"{changed[0]} was changed" if changed else f"{one_line(missing[0])} is missing" if missing else ""
        raise _refused(folder, what or f"{SUMS} was changed")
    return digests


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        file = one_line(Path(error.filename or folder).name)
        raise _refused(folder, f"{file!r} cannot be read: {one_line(error.strerror or error)}") from error


def _refused(folder: Path, why: str) -> ZooError:
    return ZooError(f"bundle {one_line(folder)!r} is refused: {why}; export it again, or copy it anew")
