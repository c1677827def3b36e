"""The trials of a study, one after the other in this process: each a run in a folder of its own."""

from __future__ import annotations

import gc
import math
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zoo.benchmark.executors import OnStep, Step
from zoo.benchmark.study import MOST_DEATHS, Claim, Study
from zoo.data.manifest import Dataset
from zoo.errors import Hindered, Interrupted, ZooError
from zoo.files import Home, write_error
from zoo.recipe import Recipe
from zoo.training.loop import OnTick, StopRun, train_plan
from zoo.training.plan import Plan, make_plan

_POLL_S = 0.2  # while other processes have all trials that are left


@dataclass(frozen=True)
class Job:
    """What each process that works on a study has to know."""

    recipe: Recipe
    dataset: Dataset
    seed: int
    root: Home
    folder: Path
    trials: int
    pruner: str
    offline: bool
    bad_images: str | None
    accept_leaks: bool


def work(job: Job, study: Study, deadline: float | None, on_tick: OnTick, tell: OnStep) -> None:
    """Train trials until the study has as many as are wanted, all ended; after the deadline none begins."""
    begun = False
    while not begun or deadline is None or time.monotonic() < deadline:
        claim = study.claim(job.trials)
        if claim is None:
            if all(trial.state.is_finished() for trial in study.frozen()):
                return
            time.sleep(_POLL_S)  # another process has it; should that one die, the trial is to be had
            begun = True
            continue
        begun = True
        try:
            _Trial(job, study, claim, on_tick, tell).run()
        finally:
            claim.release()


class _Trial:
    """One trial in progress, held by this process."""

    def __init__(self, job: Job, study: Study, claim: Claim, on_tick: OnTick, tell: OnStep) -> None:
        self.job, self.study, self.claim, self.on_step = job, study, claim, tell
        dataset, recipe, digest = study.folder.name.split("--")
        self.label = f"{dataset}--{recipe}--t{claim.number}--{digest}"
        self.on_tick = lambda tick: on_tick(replace(tick, run=self.label))
        self.started = time.monotonic()
        begun = study.frozen()[claim.number]
        self.seconds_before = float(begun.user_attrs.get("seconds", 0.0))
        self.seen = set(begun.intermediate_values)

    def tell(self, state: str, detail: str = "") -> None:
        """Say what became of it."""
        self.on_step(Step(self.claim.number + 1, self.job.trials, self.label, state, detail))

    def run(self) -> None:
        """Train it, and end it as complete, pruned or failed; an interrupted or hindered one stays as it is.

        Raises Interrupted, and Hindered for what is no fault of the trial: an image that is gone, a full disk, ...
        """
        try:
            self._run()
        except (Hindered, OSError) as error:  # OSError: of the journal
            with suppress(OSError):
                self._leave()
            said = error if isinstance(error, Hindered) else write_error(self.study.folder, error)
            raise Hindered(f"{said}; once that is mended the study goes on with the same command") from error

    def _leave(self) -> None:
        """Note of a trial that goes on later how long it took, and that its process did not die of it."""
        self.study.note(self.claim.number, seconds=self._seconds(), died=[-1, len(self.seen)])

    def _run(self) -> None:
        study, number = self.study, self.claim.number
        self.tell("begins")
        if self.claim.deaths >= MOST_DEATHS:
            self._end("failed", reason="its processes died again and again in one epoch, for want of memory?")
            return
        plan = self._planned()
        if plan is None:
            return
        try:
            study.note(number, digest=plan.digest, run=plan.run.name)
            if not self._twin(plan.digest):
                self._train(plan)
        except StopRun:
            self._end("pruned", reason=f"not among the best after epoch {max(self.seen)}")
        except Interrupted:
            self._leave()
            raise
        except Hindered:
            raise
        except ZooError as error:
            self._end("failed", reason=str(error))
            gc.collect()  # of a trial that was out of memory

    def _planned(self) -> Plan | None:
        """Return the trial's plan; a combination of values that cannot be trained is given up, and None returned."""
        space = self.study.space
        try:
            recipe = space.recipe if self.claim.first else space.recipe_of(self.claim.params)
        except ZooError as error:
            self._end("pruned", reason=str(error).partition(": ")[2])
            return None
        try:
            return self._plan(recipe)
        except Hindered:
            raise
        except ZooError as error:
            self._end("pruned", reason=str(error))
            return None

    def _plan(self, recipe: Recipe) -> Plan:
        """Return the plan of a run that lies, with its lock, in the trial's folder: two trials may be of one recipe."""
        job = self.job
        plan = make_plan(
            recipe,
            job.dataset,
            job.seed,
            job.root,
            offline=job.offline,
            bad_images=job.bad_images,
            accept_leaks=job.accept_leaks,
        )
        return replace(plan, place=self.claim.folder, home=Home(self.claim.folder))

    def _twin(self, digest: str) -> bool:
        """End the trial as one of the same recipe did, where there is one; the same would come out again."""
        ended = [row for row in self.study.rows() if row["state"] in ("complete", "pruned")]
        twin = next((row for row in ended if row["digest"] == digest), None)
        if twin is None:
            return False
        for epoch, value in self.study.frozen()[twin["number"]].intermediate_values.items():
            self.study.report(self.claim.number, epoch, value)
        value = twin["value"] if twin["state"] == "complete" else None
        self._end(twin["state"], value, reason=f"the same recipe as trial {twin['number']}")
        return True

    def _train(self, plan: Plan) -> None:
        last = plan.recipe.finetune.epochs  # of this trial: they may be searched
        # What was killed between an epoch, the look at it and the pruner's answer is looked at now.
        self._look(plan.run.history(), last)
        self._ask(last)
        run = train_plan(plan, self.on_tick, lambda row: self._look([*plan.run.history(), row], last))
        self._look(run.history(), None)
        value = run.metrics("val").get(self.study.metric)
        if value is None or not math.isfinite(value):
            self._end("failed", reason=f"val cannot define {self.study.metric}; set another finetune.metric")
        else:
            self._end("complete", float(value))
            self.study.tidy()

    def _look(self, rows: list[dict[str, Any]], last: int | None) -> None:
        """Report epochs that are not reported yet; raises StopRun where the pruner gives the trial up.

        last: the trial's last epoch; None: the trial has ended, and the pruner is not asked.
        """
        for row in rows:
            value = row.get(f"val_{self.study.metric}")
            if row["epoch"] in self.seen or value is None or not math.isfinite(value):
                continue
            self.seen.add(row["epoch"])
            self.study.report(self.claim.number, row["epoch"], value)
            if last is not None:
                self._ask(last)

    def _ask(self, last: int) -> None:
        """Raise StopRun where the pruner gives the trial up; at its last epoch there is nothing left to give up.

        The recipe as it is goes on in any case; the pruner is asked so that it counts among the others.
        """
        if not self.seen or max(self.seen) >= last:
            return
        if self.study.should_prune(self.claim.number) and not self.claim.first:
            raise StopRun

    def _seconds(self) -> float:
        return round(self.seconds_before + time.monotonic() - self.started, 2)

    def _end(self, state: str, value: float | None = None, reason: str | None = None) -> None:
        before = self.study.best()
        self.study.end(self.claim.number, state, value, seconds=self._seconds(), reason=reason)
        shutil.rmtree(self.claim.folder / "models", ignore_errors=True)  # where the run's lock was
        if state != "complete":
            for checkpoint in self.claim.folder.glob("*/checkpoint"):
                shutil.rmtree(checkpoint, ignore_errors=True)
        shown = reason or ""
        if value is not None:
            sign = self.study.sign
            best = before is None or sign * value > sign * before["value"]
            shown = f"val {self.study.metric} {value:.4f}{', the best so far' if best else ''}"
        self.tell(state, shown)
