"""The folder of a bundle: made aside by one process at a time, and put in its place whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from zoo.deployment.bundle import SUMS, open_bundle
from zoo.errors import ZooError
from zoo.files import Home, sha256_bytes, write_error


@contextmanager
def making(root: Home, name: str) -> Iterator[None]:
    """Let one process at a time make a bundle of a name; the operating system frees the lock when its holder dies.

    Raises ZooError where another does.
    """
    path = root.locks / f"export-{name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0)
        lock.acquire()
    except Timeout:
        raise ZooError(f"bundle {name!r} is being made by another process; wait for it, or stop it") from None
    except OSError as error:
        raise write_error(path, error) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def staged(root: Home, name: str) -> Iterator[Path]:
    """Give a folder beside a bundle's place, gone in the end; what a killed process left of one is removed first.

    Raises ZooError where it cannot be written.
    """
    prefix = f".new-{sha256_of(name)}-"
    try:
        root.bundles.mkdir(parents=True, exist_ok=True)
        for left in root.bundles.glob(f"{prefix}*"):
            _remove(left)
        folder = Path(tempfile.mkdtemp(dir=root.bundles, prefix=prefix))
        folder.chmod(0o755)
    except OSError as error:
        raise write_error(root.bundles / name, error) from error
    try:
        yield folder
    except OSError as error:
        raise write_error(root.bundles / name, error) from error
    finally:
        _remove(folder)


def sha256_of(text: str) -> str:
    """Return twelve digits that stand for a name, which may be too long for a file's with something before it."""
    return sha256_bytes(text.encode())[:12]


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def same_bundle(target: Path, folder: Path) -> bool:
    """Return whether a whole bundle with the same content is there; the sums name every other file."""
    try:
        open_bundle(target)
        return (target / SUMS).read_bytes() == (folder / SUMS).read_bytes()
    except (ZooError, OSError):
        return False


def put_in_place(folder: Path, target: Path) -> None:
    """Put a folder in another's place, which lies where the first was, or is gone, when it returns.

    Raises OSError where that fails; the other is then where it was.
    """
    if not os.path.lexists(target):
        folder.replace(target)
    elif not _exchange(folder, target):
        aside = folder.with_name(f"{folder.name}-old")
        target.rename(aside)
        try:
            folder.replace(target)
        except OSError:
            aside.rename(target)
            raise
        _remove(aside)


def _exchange(one: Path, two: Path) -> bool:
    """Swap two folders in one step, so that there is no moment without either; False where the system cannot."""
    import ctypes

    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return int(swap(here, os.fsencode(one), here, os.fsencode(two), exchange)) == 0
