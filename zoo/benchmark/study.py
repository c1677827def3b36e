"""A study on disk: Optuna's journal, and who works on which trial; every process that joins sees the same.

Trials are begun and taken over under one lock of the study. Each running trial is held by a lock of its own, which the
operating system frees when its holder dies: what a killed process had begun is then known at once, and gone on with.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout

from zoo.benchmark.space import Space
from zoo.errors import ZooError, nearest, one_line
from zoo.evaluation.metrics import METRIC_SIGN
from zoo.files import write_error
from zoo.runs import Run

if TYPE_CHECKING:
    from optuna.storages import JournalStorage
    from optuna.trial import FrozenTrial

PRUNERS = ("halving", "hyperband", "none")
_REDUCTION = 3  # of successive halving: one of so many goes on


@dataclass(frozen=True)
class Claim:
    """A trial that this process holds: its number, its parameters, and in which folder it is trained.

    first: the recipe as it is, which is never pruned. deaths: processes that died in this trial since its last epoch.
    """

    number: int
    params: dict[str, Any]
    folder: Path
    deaths: int
    _lock: FileLock

    @property
    def first(self) -> bool:
        """Return whether this is the recipe as it is."""
        return self.number == 0

    def release(self) -> None:
        """Let others have the trial, unless it has ended."""
        self._lock.release()


class Study:
    """A study of one search space below its folder; made where there is none.

    Raises ZooError where Optuna is not installed, or the folder's journal cannot be read or written.
    """

    def __init__(self, folder: Path, space: Space, seed: int, pruner: str) -> None:
        need_optuna()
        self.folder, self.space, self.seed = folder, space, seed
        self.metric = space.recipe.finetune.metric
        self.sign = METRIC_SIGN[self.metric]
        self._distributions = space.distributions()
        (folder / ".locks").mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / ".locks" / "study.lock")
        with self.locked():
            self._open(pruner)

    def _open(self, pruner: str) -> None:
        import optuna
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        journal = self.folder / "journal.log"
        lock: Any = _JournalLock(journal, self.folder / ".locks" / "journal.lock")
        try:
            backend = JournalFileBackend(str(journal), lock)
            self._storage: JournalStorage = optuna.storages.JournalStorage(backend)
            self._study = optuna.create_study(
                storage=self._storage,
                study_name=self.folder.name,
                direction="maximize" if self.sign > 0 else "minimize",
                pruner=_pruner(pruner, self.space),
                load_if_exists=True,
            )
        except (ValueError, KeyError, AssertionError) as error:
            raise ZooError(
                f"{str(journal)!r} is damaged: {one_line(error, 120)}; remove {str(self.folder)!r} to start anew"
            ) from error
        self._id = self._storage.get_study_id_from_name(self.folder.name)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the whole study; raises ZooError where the disk takes no more."""
        try:
            with self._lock:
                yield
        except OSError as error:
            raise write_error(self.folder, error) from error

    # Beginning, taking over, and ending of trials ---------------------------------------------------------------------

    def claim(self, most: int) -> Claim | None:
        """Return a trial for this process: one whose process died, else a new one; None where there is none to have.

        most: trials that the study may have in all. None means that all are begun, not that all have ended.
        """
        with self.locked():
            trials = self.frozen()
            for trial in trials:
                lock = None if trial.state.is_finished() else self._hold(trial.number)
                if lock is not None:
                    return self._take_over(trial, lock)
            return self._begin(len(trials)) if len(trials) < most else None

    def _begin(self, number: int) -> Claim:
        from optuna.trial import TrialState, create_trial

        lock = self._hold(number)
        if lock is None:
            raise ZooError(f"trial {number} of {str(self.folder)!r} is held, but not in its journal; try again")
        params = self._proposed(number) if number else self.space.own_params()
        known = {key: self._distributions[key] for key in params}
        # One line of the journal: a process that dies leaves a whole trial, or none.
        self._study.add_trial(create_trial(state=TrialState.RUNNING, params=params, distributions=known))
        return Claim(number, params, self.trial_folder(number), 0, lock)

    def _proposed(self, number: int) -> dict[str, Any]:
        """Return what TPE proposes (Bergstra et al. 2011; several keys at once: Falkner et al. 2018, arXiv 1807.01774).

        It follows from the seed, the trial's number and the journal alone, so that a study that was interrupted goes
        on as if it had not been. Trials that still run count as bad ones, so that no two processes get the same.
        """
        import optuna

        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        copy = optuna.create_study(
            study_name=self.folder.name,  # Hyperband's brackets hang on it
            direction=self._study.direction,
            sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True),
            pruner=self._study.pruner,
        )
        copy.add_trials(self.frozen())
        return dict(copy.ask(self._distributions).params)

    def _take_over(self, trial: FrozenTrial, lock: FileLock) -> Claim:
        epochs = len(trial.intermediate_values)
        before = trial.user_attrs.get("died", [0, -1])
        deaths = 1 + (before[0] if before[1] == epochs else 0)
        self.note(trial.number, died=[deaths, epochs])
        return Claim(trial.number, dict(trial.params), self.trial_folder(trial.number), deaths, lock)

    def _hold(self, number: int) -> FileLock | None:
        lock = FileLock(self.folder / ".locks" / f"trial-{number:04d}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return None
        return lock

    def _trial_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._id, number)

    def trial_folder(self, number: int) -> Path:
        """Return the folder that a trial's run lies in."""
        return self.folder / "trials" / f"t{number:04d}"

    def run(self, number: int) -> Run:
        """Return the run of a trial that was begun."""
        return Run(self.trial_folder(number) / self.frozen()[number].user_attrs["run"])

    def report(self, number: int, epoch: int, value: float) -> None:
        """Note the val metric of an epoch; an epoch that is noted already stays as it is."""
        if epoch not in self._storage.get_trial(self._trial_id(number)).intermediate_values:
            self._storage.set_trial_intermediate_value(self._trial_id(number), epoch, value)

    def should_prune(self, number: int) -> bool:
        """Return whether the pruner gives a trial up after the last epoch that it reported."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return bool(self._study.pruner.prune(self._study, self._storage.get_trial(self._trial_id(number))))

    def note(self, number: int, **facts: Any) -> None:
        """Keep facts of a running trial."""
        for key, value in facts.items():
            self._storage.set_trial_user_attr(self._trial_id(number), key, value)

    def end(self, number: int, state: str, value: float | None = None, **facts: Any) -> None:
        """End a trial as `complete` with its value, `pruned` or `failed`."""
        from optuna.trial import TrialState

        self.note(number, **facts)
        states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
        self._study.tell(number, value, state=states[state])

    # What there is ----------------------------------------------------------------------------------------------------

    def frozen(self) -> list[FrozenTrial]:
        """Return Optuna's record of every trial, by number."""
        return self._storage.get_all_trials(self._id, deepcopy=False)

    def ended(self) -> int:
        """Return how many trials have ended."""
        return sum(trial.state.is_finished() for trial in self.frozen())

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each trial: number, state, value, params, epochs, seconds, reason, digest."""
        return [
            {
                "number": trial.number,
                "state": {"fail": "failed"}.get(trial.state.name.lower(), trial.state.name.lower()),
                "value": trial.value if trial.state.is_finished() else None,
                "params": self.space.values(trial.params),
                "epochs": max(trial.intermediate_values, default=0),
                "seconds": trial.user_attrs.get("seconds"),
                "reason": trial.user_attrs.get("reason"),
                "digest": trial.user_attrs.get("digest"),
            }
            for trial in self.frozen()
        ]

    def best(self) -> dict[str, Any] | None:
        """Return the row of the best complete trial, the first of those that are equal; None where there is none."""
        complete = [row for row in self.rows() if row["state"] == "complete"]
        return min(complete, key=lambda row: (-self.sign * row["value"], row["number"]), default=None)

    def tidy(self) -> None:
        """Remove the weights of trials that are complete, but for the best and the recipe as it is."""
        with self.locked():
            best = self.best()
            kept = {0, best["number"] if best else 0}
            for row in self.rows():
                if row["state"] == "complete" and row["number"] not in kept:
                    self.run(row["number"]).weights_file.unlink(missing_ok=True)

    def facts(self, key: str) -> Any:
        """Return a fact of the study itself, or None."""
        return self._storage.get_study_user_attrs(self._id).get(key)

    def set_facts(self, key: str, value: Any) -> None:
        """Keep a fact of the study itself."""
        self._storage.set_study_user_attr(self._id, key, value)


def need_optuna() -> None:
    """Raise ZooError where Optuna is not installed."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise ZooError("zoo tune needs the extra: pip install 'zoo[tune]'") from None


def check_pruner(name: str) -> str:
    """Return the name of a pruner; raises ZooError for one that does not exist."""
    if name not in PRUNERS:
        raise ZooError(
            f"the pruner must be one of {', '.join(PRUNERS)}. Got {one_line(name)!r}{nearest(name, PRUNERS)}"
        )
    return name


def _pruner(name: str, space: Space) -> Any:
    """Return successive halving (Li et al. 2020, arXiv 1810.05934) or Hyperband (Li et al. 2018, arXiv 1603.06560).

    The first look comes one epoch after the head's own epochs and the warm-up: before, all trials look alike.
    """
    import optuna

    recipe = space.recipe
    epochs = max([recipe.finetune.epochs, *_ends(space, "finetune.epochs")])
    if name == "none":
        return optuna.pruners.NopPruner()
    probe = recipe.finetune.strategy == "linear-probe"
    still = 0 if probe else recipe.head_epochs + math.ceil(recipe.schedule.warmup_epochs)
    least = min(epochs, max(still + 1, epochs // _REDUCTION**2))
    if name == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=least, reduction_factor=_REDUCTION)
    return optuna.pruners.HyperbandPruner(min_resource=least, max_resource=epochs, reduction_factor=_REDUCTION)


def _ends(space: Space, key: str) -> list[int]:
    inner = space.spaces.get(key, {})
    return list(inner.get("choices") or [inner[end] for end in ("low", "high") if end in inner])


class _JournalLock:
    """The journal's lock, freed when its holder dies; Optuna's own would stand in the way for half a minute.

    A line that a crash or a full disk cut off is dropped before the next is written, which would else be joined to it.
    """

    def __init__(self, journal: Path, lock: Path) -> None:
        self._journal, self._lock = journal, FileLock(lock)

    def acquire(self) -> bool:
        self._lock.acquire()
        with self._journal.open("r+b") as stream:
            size = stream.seek(0, os.SEEK_END)
            if size:
                stream.seek(size - 1)
                if stream.read(1) != b"\n":
                    stream.seek(0)
                    stream.truncate(stream.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self._lock.release()


def until(seconds: float | None) -> float | None:
    """Return the monotonic time at which so many seconds are over."""
    return None if seconds is None else time.monotonic() + seconds
