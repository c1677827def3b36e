"""The runs of a benchmark, one after the other or side by side in processes; the results are in the plan's order."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait

import torch

from zoo.benchmark.worker import Outcome, train_and_score
from zoo.cores import cores
from zoo.errors import EXIT_SIGINT, Interrupted, ZooError, one_line
from zoo.files import digest_of
from zoo.models.spec import own_models
from zoo.runs import Run, RunRecord, run_lock
from zoo.training.derived import is_derived, sources
from zoo.training.loop import OnTick
from zoo.training.plan import Plan, finished_run

GRACE_S = 30.0  # for a process that was asked to stop; saving its state takes at most a third


@dataclass(frozen=True)
class Step:
    """What a benchmark tells of itself: run `number` of `total` begins, ends or fails."""

    number: int
    total: int
    run: str
    state: str
    detail: str = ""


OnStep = Callable[[Step], None]
Planned = Plan | RunRecord


def check_jobs(jobs: int) -> int:
    """Return the number of processes; raises ZooError for none, or more than this machine could bear."""
    most = max(16, 4 * cores())
    if isinstance(jobs, bool) or not isinstance(jobs, int) or not 1 <= jobs <= most:
        raise ZooError(f"jobs must be from 1 to {most} on this machine of {cores()} cores. Got {one_line(jobs)}")
    if jobs > 1 and os.name != "posix":
        raise ZooError("jobs must be 1 on this system; more are offered on Linux and macOS")
    return jobs


def run_all(
    steps: Sequence[Planned], jobs: int, bad_images: str | None, on_tick: OnTick | None, tell: OnStep
) -> list[Run | RunRecord]:
    """Train every planned run and score it on test, `jobs` at a time; a run that fails is the record of its failure.

    Raises Interrupted after Ctrl-C or SIGTERM, when every run has saved its state.
    """
    # Of all runs, not of those still open: a run's threads, and so its bits, do not hang on when it is trained.
    jobs = min(jobs, sum(not _only_here(step) for step in steps))
    if jobs < 2:
        return [_run_here(steps, number, bad_images, on_tick, tell) for number in range(len(steps))]
    return run_in_processes(steps, jobs, bad_images, on_tick, tell)


def _run_here(
    steps: Sequence[Planned], number: int, bad_images: str | None, on_tick: OnTick | None, tell: OnStep
) -> Run | RunRecord:
    step, place = steps[number], (number + 1, len(steps))
    if isinstance(step, RunRecord):
        tell(Step(*place, step.run, "failed", step.reason or ""))
        return step
    tell(Step(*place, step.run.name, "begins"))
    outcome = train_and_score(step, bad_images, on_tick)
    tell(Step(*place, step.run.name, outcome.state, outcome.detail))
    return outcome.result


def _is_done(plan: Plan) -> bool:
    return _is_finished(plan) and plan.run.scored("test")


def _is_finished(plan: Plan) -> bool:
    try:
        return finished_run(plan) is not None
    except ZooError:  # which is what its row will say
        return False


def _only_here(step: Planned) -> bool:
    """Return whether a run's network was registered in this Python and not by ZOO_PLUGINS, as for other processes."""
    if isinstance(step, RunRecord) or step.spec.origin != "own":
        return False
    own = own_models.get(step.spec.arch)
    return own is None or not str(getattr(own.build, "__module__", "")).startswith("zoo_plugin_")


# Side by side: what the parent does ----------------------------------------------------------------------------


def run_in_processes(
    steps: Sequence[Planned], jobs: int, bad_images: str | None, on_tick: OnTick | None, tell: OnStep
) -> list[Run | RunRecord]:
    """Train and score runs in `jobs` processes at a time; arguments and results as those of `run_all`.

    A process that dies is a failed run, and another takes its place. Runs whose network no other process can know
    come last, here. Each process has its share of the cores, which is the same however many runs are left, and of
    several CUDA devices one. A run that is made of others waits for those that are under way or still to come.
    """
    results: dict[int, Run | RunRecord] = {}
    here: list[int] = []
    for number, step in enumerate(steps):
        if isinstance(step, RunRecord) or _is_done(step):
            results[number] = _run_here(steps, number, bad_images, on_tick, tell)
        elif _only_here(step):
            here.append(number)
            why = "its network is registered in this Python alone: it is trained here, after the others"
            tell(Step(number + 1, len(steps), step.run.name, "waits", why))
    others = [number for number in range(len(steps)) if number not in results and number not in here]
    crew = _Crew(steps, others, jobs, bad_images, on_tick or (lambda _: None), tell, results)
    try:
        crew.work()
    except KeyboardInterrupt as stop:
        crew.stop()
        code = getattr(stop, "exit_code", EXIT_SIGINT)
        raise Interrupted("interrupted; every run has saved its state, the same command goes on", code) from None
    finally:
        crew.stop()
    for number in here:
        results[number] = _run_here(steps, number, bad_images, on_tick, tell)
    return [results[number] for number in range(len(steps))]


@dataclass
class _Worker:
    """A process that trains one run after another, and the one that it is at."""

    process: subprocess.Popen[bytes]
    connection: Connection
    ready: bool = False
    number: int | None = None


class _Parts:
    """What a run is, as its digest, and of which runs that were not finished yet it is made, to the last.

    Two names of one recipe are one digest: the one is taken for the other where that is a source.
    """

    def __init__(self, step: Planned) -> None:
        assert isinstance(step, Plan)
        self.own = step.digest
        self.sources: set[str] = set()
        above = [step]
        while above:
            plan = above.pop()
            found = [each for each in sources(plan) if not _is_finished(each)] if is_derived(plan.recipe) else []
            self.sources |= {each.digest for each in found}
            above += found


@dataclass
class _Crew:
    """The processes, and what is to be done."""

    steps: Sequence[Planned]
    waiting: list[int]
    jobs: int
    bad_images: str | None
    on_tick: OnTick
    tell: OnStep
    results: dict[int, Run | RunRecord]
    workers: list[_Worker] = field(default_factory=list)
    prepared: set[int] = field(default_factory=set)
    made: set[str] = field(default_factory=set)
    hired: int = 0

    def __post_init__(self) -> None:
        self.waiting = list(self.waiting)
        self.kinds = {number: _kind(self.steps[number]) for number in self.waiting}
        self.parts = {number: _Parts(self.steps[number]) for number in self.waiting}
        self.devices = _devices(self.steps)

    def work(self) -> None:
        """Return when every run has its result."""
        while self.waiting or any(worker.number is not None for worker in self.workers):
            while len(self.workers) < min(self.jobs, len(self.waiting) + self._busy()):
                self._hire()
            for worker in self.workers:
                if worker.ready and worker.number is None:
                    self._give_work(worker)
            heard = wait([worker.connection for worker in self.workers], timeout=0.5)
            for worker in list(self.workers):
                alive = worker.connection not in heard or self._hear(worker)
                # A killed process's own loading processes may hold its end of the connection for a while.
                if not alive or worker.process.poll() is not None:
                    self._bury(worker)
        for worker in self.workers:
            with suppress(OSError):
                worker.connection.send(None)

    def _busy(self) -> int:
        return sum(worker.number is not None for worker in self.workers)

    def _hire(self) -> None:
        device = self.devices[self.hired % len(self.devices)] if self.devices else None
        self.hired += 1
        self.workers.append(_start(max(1, cores() // self.jobs), device))

    def _give_work(self, worker: _Worker) -> None:
        """Give the next run for which no other process prepares just now what both need, and of which all is free."""
        at_work = [each.number for each in self.workers if each.number is not None]
        busy = {self.kinds[number] for number in at_work if number not in self.prepared}
        free = (each for each in self.waiting if self.kinds[each] not in busy and not self._is_held(each, at_work))
        number = next(free, None)
        if number is None:
            return
        with suppress(OSError):  # a process that has just died is found by the caller
            worker.connection.send(number)
            self.waiting.remove(number)
            worker.number = number
            self._tell(number, "begins")

    def _is_held(self, number: int, at_work: list[int]) -> bool:
        """Return whether a run's sources are still to come, or it or they are trained now as another one's sources."""
        parts = self.parts[number]
        needed = parts.sources - self.made
        theirs = {source for each in at_work for source in self.parts[each].sources}
        to_come = {self.parts[each].own for each in [*at_work, *self.waiting]}
        return bool(needed & (theirs | to_come)) or parts.own in theirs

    def _hear(self, worker: _Worker) -> bool:
        """Take in what a process says; return whether it may say more."""
        while True:
            try:
                if not worker.connection.poll(0):
                    return True
                kind, value = worker.connection.recv()
                if kind == "ready":
                    worker.connection.send((list(self.steps), self.bad_images))
            except (EOFError, OSError):
                return False
            if kind == "ready":
                worker.ready = True
            elif kind == "tick":
                if value.epoch >= 1 and worker.number is not None:
                    self.prepared.add(worker.number)
                self.on_tick(value)
            elif kind == "interrupted":
                raise Interrupted(*value)
            elif kind == "broken":
                raise RuntimeError(f"a process of the benchmark broke:\n{value}")
            elif worker.number is not None:
                self._settle(worker, value)

    def _settle(self, worker: _Worker, outcome: Outcome) -> None:
        assert worker.number is not None
        number, worker.number = worker.number, None
        self.results[number] = outcome.result
        if outcome.state != "failed":
            self.made |= {self.parts[number].own, *self.parts[number].sources}
        self._tell(number, outcome.state, outcome.detail)

    def _tell(self, number: int, state: str, detail: str = "") -> None:
        step = self.steps[number]
        name = step.run if isinstance(step, RunRecord) else step.run.name
        self.tell(Step(number + 1, len(self.steps), name, state, detail))

    def _bury(self, worker: _Worker) -> None:
        """A process has ended: what it was at failed."""
        self._hear(worker)
        code = _ended(worker.process, GRACE_S)
        worker.connection.close()
        self.workers.remove(worker)
        reason = _death(code)
        if worker.number is None and not worker.ready:
            raise ZooError(f"a process of the benchmark cannot start: {reason}; see what it says above, or use jobs=1")
        if worker.number is None:
            return
        plan = self.steps[worker.number]
        assert isinstance(plan, Plan)
        record = plan.record("failed", reason)
        if plan.run.path.is_dir() and not plan.run.finished:
            # Where another process is at the run by now, what becomes of it is that one's to say.
            with suppress(ZooError), run_lock(plan.home, plan.run.name):
                if not plan.run.finished:
                    plan.run.write_record(record)
        self._settle(worker, Outcome(record, "failed", reason))

    def stop(self) -> None:
        """Close every connection, by which the processes know that they must save and leave; kill what stays."""
        workers, self.workers = self.workers, []
        for worker in workers:
            worker.connection.close()
        until = time.monotonic() + GRACE_S
        try:
            for worker in workers:
                _ended(worker.process, until - time.monotonic())
        finally:  # a second Ctrl-C does not wait
            for worker in workers:
                _ended(worker.process, 0.0)


def _ended(process: subprocess.Popen[bytes], seconds: float) -> int:
    try:
        return process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _death(code: int) -> str:
    if code >= 0:
        return f"its process ended with exit code {code}"
    memory = ", perhaps out of memory" if -code == signal.SIGKILL else ""
    return f"its process was killed by signal {-code}{memory}"


def _kind(step: Planned) -> str:
    """Return what runs have in common of which the first measures or computes what the others find ready.

    That is the precision plan, and for a head the features; seeds of one recipe are of one kind.
    """
    assert isinstance(step, Plan)
    recipe = step.recipe
    facts = [step.spec.name, step.network, recipe.model.options, step.weights.sha256 if step.weights else None]
    return digest_of([*facts, step.preprocessing.identity, recipe.precision, recipe.finetune.batch_size])


def _devices(steps: Sequence[Planned]) -> list[str]:
    """Return the CUDA devices to deal out, none where there is one or a recipe names its own."""
    named = any(isinstance(step, Plan) and ":" in step.recipe.device for step in steps)
    count = 0 if named or not torch.cuda.is_available() else torch.cuda.device_count()
    given = [each.strip() for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each.strip()]
    names = (given or [str(number) for number in range(count)])[:count]
    return names if len(names) > 1 else []


def _start(threads: int, device: str | None) -> _Worker:
    """Start a process. Not by multiprocessing, which would import the caller's script and knows one environment."""
    import socket

    ours, theirs = socket.socketpair()
    own = os.environ.get("OMP_NUM_THREADS", "")
    threads = min(threads, int(own)) if own.isdecimal() and int(own) > 0 else threads
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, str(threads)), "NO_ALBUMENTATIONS_UPDATE": "1"}
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    code = "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from zoo.benchmark.worker import serve; "
    command = [sys.executable, "-P", "-c", f"{code}serve(int(sys.argv[1]), {threads})"]
    try:
        process = subprocess.Popen(
            [*command, str(theirs.fileno()), json.dumps(sys.path)],
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,  # standard output is the table's, or one JSON document's
        )
    except OSError as error:
        ours.close()
        raise ZooError(f"cannot start a process: {one_line(error.strerror or error)}; use fewer jobs") from error
    finally:
        theirs.close()
    return _Worker(process, Connection(ours.detach()))


# Side by side: what each process does --------------------------------------------------------------------------
