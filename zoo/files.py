"""Folders, and reading and writing of small files: whole or not at all, and never silently changed."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import tomli_w

from zoo.errors import Hindered, ZooError, nearest, one_line

SCHEMA_VERSION = 1
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})  # a disk that takes no more
_BARE = re.compile(r"[A-Za-z0-9_-]+")  # a key of TOML that needs no quotes
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,79}")


@dataclass(frozen=True)
class Home:
    """The folder that the zoo works in: `data/`, `models/`, `recipes/` and `benchmarks/` lie below it."""

    root: Path

    @property
    def data(self) -> Path:
        """Return the folder of the datasets."""
        return self.root / "data"

    @property
    def runs(self) -> Path:
        """Return the folder of the runs."""
        return self.root / "models" / "runs"

    @property
    def bundles(self) -> Path:
        """Return the folder of the bundles, what is deployed."""
        return self.root / "models" / "bundles"

    @property
    def latency(self) -> Path:
        """Return the folder of how fast each bundle was found to be on this machine."""
        return self.root / "models" / "latency"

    @property
    def picks(self) -> Path:
        """Return the folder of the figures of what was picked, one for each dataset."""
        return self.root / "models" / "picks"

    @property
    def locks(self) -> Path:
        """Return the folder of the locks that keep two processes from training one run."""
        return self.root / "models" / ".locks"

    @property
    def ledger(self) -> Path:
        """Return the file with one line for every scoring of a test split."""
        return self.root / "models" / "ledger.jsonl"

    @property
    def recipes(self) -> Path:
        """Return the folder of the user's recipes."""
        return self.root / "recipes"

    @property
    def benchmarks(self) -> Path:
        """Return the folder of the user's benchmarks and of every benchmark's results."""
        return self.root / "benchmarks"


def home(root: str | os.PathLike[str] | None = None) -> Home:
    """Return the home folder: `root`, else the environment's `ZOO_HOME`, else the current folder.

    Raises ZooError where that is no folder.
    """
    path = user_path(root or os.environ.get("ZOO_HOME") or ".").absolute()
    if not os.path.isdir(path):  # noqa: PTH112  # Path's raises where a folder above may not be entered
        raise ZooError(f"the home folder {str(path)!r} is no folder; make it, or name another with --home")
    return Home(path)


def user_path(text: str | os.PathLike[str]) -> Path:
    """Return the path that a user means, `~` and `~name` replaced; raises ZooError for a user who is not there."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ZooError(f"there is no home folder for {one_line(text)!r}; write the path in full") from None


def builtin_folder(kind: str) -> Path:
    """Return the folder of the built-in files of a kind (`recipes` or `benchmarks`)."""
    package = Path(__file__).parent
    installed = package / "builtin" / kind
    return installed if installed.is_dir() else package.parent / kind


def find_toml(name: str, kind: str, own: Path) -> Path:
    """Return the TOML file of a recipe or benchmark: a path, else the user's own by name, else a built-in.

    kind is `recipes` or `benchmarks`. Raises ZooError with the nearest name where there is none.
    """
    if name.endswith(".toml") or os.sep in name:
        path = Path(name).expanduser()
        if path.is_file():
            return path
        raise ZooError(f"there is no file {name!r}; give the path of a .toml file or a name of `zoo list {kind}`")
    known = list_toml(kind, own)
    if name not in known:
        raise ZooError(
            f"unknown {kind[:-1]} {one_line(name)!r}{nearest(name, known)}; `zoo list {kind}` shows all {len(known)}"
        )
    return known[name]


def list_toml(kind: str, own: Path) -> dict[str, Path]:
    """Return name to file of every recipe or benchmark, the user's own before the built-in of one name."""
    found: dict[str, Path] = {}
    for folder in (builtin_folder(kind), own):
        if folder.is_dir():
            found.update({path.stem: path for path in sorted(folder.glob("*.toml"))})
    return dict(sorted(found.items()))


def check_name(name: str, what: str) -> str:
    """Return name if it can stand in a folder name; raise ZooError otherwise.

    >>> check_name("iq_othnccd", "dataset")
    'iq_othnccd'
    """
    if not _NAME.fullmatch(name) or "--" in name:
        raise ZooError(
            f"{what} name must be 1 to 80 letters, digits, '.', '_', '+' or single '-', starting with a letter or "
            f"digit. Got {one_line(name)!r}; choose another name"
        )
    return name


def sha256_bytes(data: bytes | memoryview) -> str:
    """Return the SHA-256 of data as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's content as 64 hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def atomic_writer(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside path; on success sync it and put it in path's place.

    Raises ZooError, and leaves an old file as it was, where the disk is full or the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{_begun(path.name)}.")
    except OSError as error:
        raise write_error(path, error) from error
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def _begun(name: str) -> str:
    """Return what a file's temporary one is called, short and no other file's: long names often begin alike."""
    return name if len(name) <= 40 else f"{name[:40]}.{sha256_bytes(name.encode(errors='surrogateescape'))[:8]}"


def remove_half_written(folder: Path, name: str = "*") -> None:
    """Remove below folder what `atomic_writer` had begun, of files called so, when its process was killed.

    Only for files that no living process writes: whoever calls it holds the lock on them.
    """
    for path in folder.rglob(f".{_begun(name)}.????????"):
        if re.fullmatch(r"\..+\.[a-z0-9_]{8}", path.name):
            with suppress(OSError):
                path.unlink()


def write_error(path: Path, error: OSError) -> Hindered:
    """Return the error that says why path cannot be written and what to do."""
    fixes = {
        errno.ENOSPC: "free space on that disk, or work elsewhere with --home",
        errno.EDQUOT: "free space in your quota, or work elsewhere with --home",
        errno.EROFS: "choose a folder that can be written with --home",
        errno.EACCES: "choose a folder that can be written with --home",
    }
    reason = one_line(error.strerror or error)
    return Hindered(f"cannot write {str(path)!r}: {reason}; {fixes.get(error.errno or 0, 'check the path')}")


def check_writable(folder: Path, needed_bytes: int = 2 << 20) -> None:
    """Raise ZooError unless `needed_bytes` can be written below folder; found before work, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A file without a name, of which a process that is killed leaves nothing.
        with tempfile.TemporaryFile(dir=folder, prefix=".zoo-write-test.") as stream:
            if hasattr(os, "posix_fallocate"):
                try:
                    os.posix_fallocate(stream.fileno(), 0, needed_bytes)
                except OSError as error:
                    if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                        raise
    except OSError as error:
        raise write_error(folder, error) from error


def write_new(path: Path, data: bytes) -> None:
    """Write bytes to a file of a folder that is still being put together: not atomic, the folder itself is."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise write_error(path, error) from error


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, atomically."""
    with atomic_writer(path) as stream:
        stream.write(text.encode("utf-8"))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a record as JSON with its `schema_version`, atomically; not-a-number becomes null."""
    write_text(path, to_json({"schema_version": SCHEMA_VERSION, **value}, indent=2) + "\n")


def to_json(value: Any, indent: int | None = None) -> str:
    """Return value as strict JSON: floats that are not finite become null.

    >>> to_json({"auroc": float("nan"), "top1": 0.5})
    '{"auroc": null, "top1": 0.5}'
    """
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    if hasattr(value, "tolist"):
        return _finite(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> dict[str, Any]:
    """Return a record that `write_json` wrote.

    Raises ZooError where the file is missing, no JSON object, or of a newer schema.
    """
    return _read(path, json.loads, "JSON")


def read_toml(path: Path) -> dict[str, Any]:
    """Return the table of a TOML file; raises ZooError with the line where it cannot be read."""
    return _read(path, tomllib.loads, "TOML")


def _read(path: Path, parse: Callable[[str], Any], kind: str) -> dict[str, Any]:
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ZooError(f"there is no file {str(path)!r}") from None
    except OSError as error:
        raise Hindered(f"cannot read {str(path)!r}: {one_line(error.strerror or error)}") from error
    except (ValueError, RecursionError) as error:
        raise ZooError(f"{str(path)!r} is no valid {kind}: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise ZooError(f"{str(path)!r} must hold one {kind} table. Got a {type(value).__name__} instead")
    version = value.get("schema_version", SCHEMA_VERSION)
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ZooError(
            f"{str(path)!r} has schema_version {version!r}; this zoo reads up to {SCHEMA_VERSION}: update the zoo"
        )
    return value


def write_toml(path: Path, value: dict[str, Any]) -> None:
    """Write a table as TOML, atomically; keys whose value is None are left out."""
    write_text(path, tomli_w.dumps(_without_none(value), multiline_strings=False))


def to_toml(value: Any) -> str:
    """Return a value as TOML has it, on one line; what is None within it is left out.

    >>> to_toml({"optimizer.lr": {"low": 1e-4, "log": True}, "freeze": ["stem"]})
    '{"optimizer.lr" = {low = 0.0001, log = true}, freeze = ["stem"]}'
    """
    if isinstance(value, dict):
        pairs = [(str(key), each) for key, each in value.items() if each is not None]
        shown = [f"{key if _BARE.fullmatch(key) else to_toml(key)} = {to_toml(each)}" for key, each in pairs]
        return "{" + ", ".join(shown) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(to_toml(each) for each in value if each is not None) + "]"
    return tomli_w.dumps({"value": value}, multiline_strings=False).removeprefix("value = ").rstrip("\n")


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    if isinstance(value, (list, tuple)):
        return [_without_none(each) for each in value]
    return value


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON: the same for the same content in any key order."""
    return sha256_bytes(json.dumps(_finite(value), sort_keys=True, separators=(",", ":")).encode())
