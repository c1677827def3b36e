"""The run folder: what one trained result leaves on disk, how it is named, listed and read."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from zoo.errors import Hindered, ZooError, nearest, one_line
from zoo.files import Home, home, read_json, remove_half_written, user_path, write_error, write_json

if TYPE_CHECKING:
    from filelock import BaseFileLock

SPLITS = ("train", "val", "test")


class Preprocessing(BaseModel):
    """What turns a decoded image into a network's input; it travels with the weights.

    image_size: pixels of the square input. crop_pct: part of the resized image that the centre crop keeps,
    in (0, 1]. interpolation: `bilinear`, `bicubic` or `lanczos`. mean, std: of RGB in [0, 1]. window: how values
    of more than 8 bits become grey (`lung`, `-600/1500`, or three with commas); rescale_slope, rescale_intercept:
    what turns stored values into those of the window, where the file itself does not say.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: int
    crop_pct: float
    interpolation: Literal["bilinear", "bicubic", "lanczos", "nearest"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    window: str | None = None
    rescale_slope: float = 1.0
    rescale_intercept: float = 0.0

    @property
    def identity(self) -> dict[str, Any]:
        """Return what tells two preprocessings apart; what was added since with a default is left out."""
        facts = self.model_dump()
        defaults = {"window": None, "rescale_slope": 1.0, "rescale_intercept": 0.0}
        return {key: value for key, value in facts.items() if key not in defaults or value != defaults[key]}

    @property
    def resize_size(self) -> int:
        """Return the pixels of the shorter side before the centre crop (timm's floor of size / crop_pct)."""
        return max(self.image_size, int(self.image_size / self.crop_pct))


FRESH_HEAD = "the classifier of"  # how a note begins that says why a network starts with a new one
LEAKED_SOURCE = "LEAKS ACCEPTED"  # and one that says that a run it goes on from had images of this test split


class RunRecord(BaseModel):
    """`run.json`: written last, so that its presence with status `finished` means a whole run.

    best_epoch: of all epochs the best on val, whose weights are kept unless averaged_epochs names the epochs of which
    they are the mean. made_of: the runs of which a soup is the mean, or the one that is scored over views.
    """

    model_config = ConfigDict(extra="ignore")

    schema_version: int = 1
    run: str
    status: Literal["finished", "failed"]
    reason: str | None = None
    dataset: str
    recipe: str
    recipe_digest: str
    seed: int
    split_digest: str
    bad_images: str | None = None
    network: str | None = None
    classes: list[str]
    negative_class: str | None = None
    model: str
    preprocessing: Preprocessing | None = None
    model_options: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    strategy: str = ""
    params: int | None = None
    params_trained: int | None = None
    epochs: int | None = None
    best_epoch: int | None = None
    averaged_epochs: list[int] = []
    train_s: float | None = None
    images_per_s: float | None = None
    images: dict[str, int] = {}
    images_skipped: dict[str, list[str]] = {}
    device: str = ""
    precision: dict[str, Any] = {}
    threads: int | None = None
    processes: int = 1
    weights_sha256: str | None = None
    tta: str = "none"
    made_of: list[str] = []
    versions: dict[str, str] = {}
    notes: list[str] = []
    leaks_accepted: bool = False


@dataclass(frozen=True)
class Run:
    """One run folder below a home."""

    path: Path

    @property
    def name(self) -> str:
        """Return the folder's name, `<dataset>--<recipe>--s<seed>--<digest8>`."""
        return self.path.name

    @property
    def weights_file(self) -> Path:
        """Return the file of the weights that were best on val."""
        return self.path / "weights.safetensors"

    @property
    def history_file(self) -> Path:
        """Return the file with one JSON line per epoch."""
        return self.path / "history.jsonl"

    def predictions_file(self, split: str) -> Path:
        """Return the file of the predictions on a split."""
        return self.path / f"predictions-{split}.npz"

    def metrics_file(self, split: str) -> Path:
        """Return the file of the metrics on a split."""
        return self.path / f"metrics-{split}.json"

    def scored(self, split: str) -> bool:
        """Return whether predictions and metrics of a split are both there, and not of weights that were replaced."""
        if not (self.metrics_file(split).is_file() and self.predictions_file(split).is_file()):
            return False
        try:
            of, now = self.metrics(split).get("weights_sha256"), self.record.weights_sha256
        except ZooError:
            return True  # whoever reads them says what is wrong
        return of is None or now is None or of == now

    def clear(self) -> None:
        """Remove the record and every split's scores, before other weights take the place of those that they are of.

        What names its weights by digest stays (`exports/`, `probe-val.json`). Raises ZooError where that fails.
        """
        scores = [file for split in SPLITS for file in (self.metrics_file(split), self.predictions_file(split))]
        for file in (self.path / "run.json", self.path / "traceback.txt", *scores):
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                raise write_error(file, error) from error

    @property
    def record(self) -> RunRecord:
        """Return `run.json`; raises ZooError where it is missing or damaged."""
        raw = read_json(self.path / "run.json")
        try:
            return RunRecord.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise ZooError(
                f"{str(self.path / 'run.json')!r} is damaged at {key!r}: {first['msg']}; train the run again"
            ) from error

    @property
    def finished(self) -> bool:
        """Return whether the run ended well; a missing or damaged record counts as not."""
        try:
            return self.record.status == "finished"
        except ZooError:
            return False

    def metrics(self, split: str) -> dict[str, Any]:
        """Return `metrics-<split>.json`; raises ZooError where the split is not scored yet."""
        return read_json(self.metrics_file(split))

    def history(self) -> list[dict[str, Any]]:
        """Return one dict per epoch, in order; a line cut off by a crash is left out."""
        import json

        rows: list[dict[str, Any]] = []
        if self.history_file.is_file():
            for line in self.history_file.read_text(encoding="utf-8").splitlines():
                try:
                    rows.append(json.loads(line))
                except ValueError:
                    continue
        return rows

    def write_record(self, record: RunRecord) -> None:
        """Write `run.json` atomically."""
        write_json(self.path / "run.json", record.model_dump(mode="json"))


def run_name(dataset: str, recipe: str, seed: int, digest: str) -> str:
    """Return a run's folder name.

    >>> run_name("digits", "simple_cnn", 0, "0123456789abcdef")
    'digits--simple_cnn--s0--01234567'
    """
    return f"{dataset}--{recipe}--s{seed}--{digest[:8]}"


def find_run(name: str, root: Home | None = None) -> Run:
    """Return the run of a name below the home, or of a run folder's path.

    Raises ZooError with the nearest name where there is none.
    """
    root = root or home()
    for path in (root.runs / name, user_path(name)):
        with suppress(OSError):  # a name that is too long
            if (path / "run.json").is_file():
                return Run(path if path.name not in ("", "..") else path.resolve())
    if name in begun_runs(root):
        raise ZooError(f"run {name!r} has not ended; the same `zoo train` goes on with it")
    known = [run.name for run in list_runs(root)]
    hint = nearest(name, known) or "; train one with `zoo train`"
    raise ZooError(f"there is no run {one_line(name)!r}{hint} (`zoo list runs` shows all {len(known)})")


def list_runs(root: Home | None = None, dataset: str | None = None) -> list[Run]:
    """Return the runs below the home that have a record, sorted by name; of one dataset where it is given."""
    folder = (root or home()).runs
    if not folder.is_dir():
        return []
    pattern = re.compile(rf"{re.escape(dataset)}--") if dataset else re.compile("")
    return [
        Run(path) for path in sorted(folder.iterdir()) if pattern.match(path.name) and (path / "run.json").is_file()
    ]


def begun_runs(root: Home | None = None) -> list[str]:
    """Return the names of the runs below the home that were begun and have not ended: in training, or interrupted."""
    folder = (root or home()).runs
    if not folder.is_dir():
        return []
    return sorted(path.parent.name for path in folder.glob("*/recipe.toml") if not (path.parent / "run.json").is_file())


def runs_on_split(dataset: str, split_digest: str, root: Home) -> list[Run]:
    """Return a dataset's recorded runs on one split, failed ones only where none finished since."""
    runs = [run for run in list_runs(root, dataset) if on_split(run, split_digest)]
    done = {(run.record.recipe, run.record.seed) for run in runs if run.record.status == "finished"}
    return [run for run in runs if run.record.status == "finished" or (run.record.recipe, run.record.seed) not in done]


def on_split(run: Run, split_digest: str) -> bool:
    """Return whether a run was trained on this split; a run with a damaged record was on none."""
    try:
        return run.record.split_digest == split_digest
    except ZooError:
        return False  # `zoo list runs` names it


class RunHeld(Hindered):
    """Another process is at a run: nothing has failed, and nothing of it is recorded."""


@contextmanager
def run_lock(root: Home, name: str, wait: bool = False) -> Iterator[None]:
    """Hold the run for this process; raises RunHeld that says who holds it, or waits for that one to end.

    The operating system frees the lock when its holder dies, so no lock is ever stale. What a process that was
    killed left half written in the run's folder is removed.
    """
    import socket

    path, holder = root.locks / f"{name}.lock", root.locks / f"{name}.json"
    lock = _acquired(path, holder, name, wait)
    try:
        remove_half_written(root.runs / name)
        remove_half_written(root.locks, holder.name)
        write_json(holder, {"pid": os.getpid(), "host": socket.gethostname()})
        yield
    finally:
        with suppress(OSError):
            holder.unlink(missing_ok=True)
        lock.release()


_NOBODY_S = 60.0  # after which a lock that no living process is known to hold is waited for no longer


def _acquired(path: Path, holder: Path, name: str, wait: bool) -> BaseFileLock:
    """Return the lock, held; a holder that has only just come or gone cannot be told yet and is asked again."""
    from filelock import FileLock, Timeout

    tries, since = 0, time.monotonic()
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path, timeout=0)
            lock.acquire()
        except Timeout:
            tries += 1
            who = _living_holder(holder)
            since = since if who is None else time.monotonic()
            nobody = time.monotonic() - since > _NOBODY_S
            if nobody or (not wait and (who is not None or tries == 20)):
                who = who or "another process"
                raise RunHeld(f"run {name!r} is being trained by {who}; wait for it, or stop it") from None
            time.sleep(0.1)
        except OSError as error:
            raise write_error(path, error) from error
        else:
            return lock


def _living_holder(file: Path) -> str | None:
    """Return who holds a lock, or None where the file is not there yet, or of a process that is gone."""
    import socket

    try:
        facts = read_json(file)
        pid, host = int(facts["pid"]), str(facts["host"])
        if pid <= 0:
            return None
        if host == socket.gethostname():
            os.kill(pid, 0)
    except PermissionError:
        pass  # it lives, and is another user's
    except (ZooError, KeyError, TypeError, ValueError, OSError, OverflowError):
        return None
    return f"process {pid} on {one_line(host)}"
