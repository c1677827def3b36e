"""Measuring: one process for each network, all alive at once, asked in turns so that a drift hits all alike."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import numpy as np

from zoo.deployment.speed import WARM_UP, Latency, Subject, environment, machine, memory_kib
from zoo.errors import ZooError, one_line
from zoo.files import Home, write_error

ROUNDS = 10
BATCHES = (2, 4, 8, 16, 32, 64)
GAIN = 1.02  # of images/s; a larger batch that gains less, twice, is the last one tried
LONGEST_S = 4.0  # one call of a batch that would take longer is not tried
OPEN_S, ANSWER_S = 180.0, 120.0  # a process that is silent for longer is given up
EAGER_GIB = 0.7  # what a process with torch needs, or it is not started beside the others
Progress = Callable[[int, int], None]


class _Lost(Exception):
    """A process that cannot be measured any more, and why."""


@dataclass
class _Process:
    """One process that is measured, and what it has told."""

    subject: Subject
    child: subprocess.Popen[bytes]
    connection: Connection
    log: IO[bytes]
    facts: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None
    seconds: list[list[float]] = field(default_factory=list)  # of single images, round by round
    rates: dict[int, list[float]] = field(default_factory=dict)  # batch to images/s of each call
    decode_s: list[float] = field(default_factory=list)
    peak_mib: float | None = None
    peak_batches_mib: float | None = None

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to an order; None of the rest is asked where the process is lost."""
        with suppress(OSError):  # whoever is dead is heard of below
            self.connection.send_bytes(json.dumps(order).encode())
        return self.hear(ANSWER_S)

    def hear(self, seconds: float) -> dict[str, Any]:
        """Return what the process tells next; raises _Lost where it died, is silent, or tells of an error."""
        try:
            if not self.connection.poll(seconds):
                raise _Lost(f"its process gave no answer for {seconds:.0f} s")
            told: dict[str, Any] = json.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            raise _Lost(self._ended()) from None
        if "error" in told:
            raise _Lost(told["error"])
        return told

    def _ended(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self.child.wait(5)
        code = self.child.returncode
        if code is not None and code < 0:
            return f"its process was ended by signal {-code}" + (" (out of memory?)" if code == -9 else "")
        self.log.seek(0)
        lines = self.log.read()[-4000:].decode("utf-8", "replace").strip().splitlines()
        return f"its process ended with code {code}" + (f": {one_line(lines[-1], 160)}" if lines else "")

    def end(self) -> None:
        """End the process: it goes when the connection closes, and is killed where it does not within 2 s."""
        self.connection.close()
        try:
            self.child.wait(2)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        finally:
            self.log.close()


def measure(
    subjects: Sequence[Subject], root: Home, *, threads: int, seconds: float = 3.0, progress: Progress | None = None
) -> dict[str, Latency]:
    """Return name to figures of all subjects, measured together: every one lives at once and they take turns.

    Ten rounds of single images, every second one backwards, so that a drift of the machine hits all alike; then batches
    of 2, 4, ... 64 for those that still gain, and the best batch of each twice more, for a figure that was not chosen
    for being high.
    """
    before = environment()
    together = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"
    at_work: list[_Process] = []
    steps = _Steps(progress, len(subjects) * (1 + ROUNDS + len(BATCHES) + 2))
    with _alone(root):
        try:
            for each in subjects:
                at_work.append(_start(each, threads))
                _open(at_work[-1], root, threads)
                steps.done(1)
            _single_images(at_work, seconds, steps)
            _batches(at_work, seconds, steps)
        finally:
            for process in at_work:
                process.end()
    known = {
        "threads": threads,
        "machine": machine(),
        "measured_together": together,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": {**before, "load_average_after": environment()["load_average"], "beside": len(subjects)},
    }
    steps.done(steps.total)
    return {process.subject.name: _figures(process, known) for process in at_work}


@dataclass
class _Steps:
    """How much of the measuring is done."""

    progress: Progress | None
    total: int
    count: int = 0

    def done(self, steps: int) -> None:
        self.count = min(self.total, self.count + steps)
        if self.progress is not None:
            self.progress(self.count, self.total)


@contextmanager
def _alone(root: Home) -> Iterator[None]:
    """Hold off other measuring in this home: two at once would measure each other."""
    from filelock import FileLock, Timeout

    lock = FileLock(root.locks / "latency.lock", timeout=0)
    try:
        root.locks.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ZooError(
            "another process measures latencies in this home, and two at once would disturb each other; wait for it"
        ) from None
    except OSError as error:
        raise write_error(root.locks, error) from error
    try:
        yield
    finally:
        lock.release()


def _start(subject: Subject, threads: int) -> _Process:
    """Start a process. Not by multiprocessing, which would import the caller's script, torch and all."""
    import socket

    try:
        log = tempfile.TemporaryFile()  # noqa: SIM115
    except OSError as error:
        raise write_error(Path(tempfile.gettempdir()), error) from error
    ours, theirs = socket.socketpair()
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    settings = {**os.environ, **dict.fromkeys(names, str(threads)), "NO_ALBUMENTATIONS_UPDATE": "1"}
    code = "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from zoo.deployment.timing import serve; "
    try:
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", f"{code}serve(int(sys.argv[1]))", str(theirs.fileno()), json.dumps(sys.path)],
            env=settings,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    except OSError as error:
        ours.close()
        log.close()
        raise ZooError(f"cannot start a process: {one_line(error.strerror or error)}; measure fewer at once") from error
    finally:
        theirs.close()
    return _Process(subject, child, Connection(ours.detach()), log)


def _open(process: _Process, root: Home, threads: int) -> None:
    """Have a process open its network and warm up."""
    subject = process.subject
    if subject.size_bytes is None:
        process.reason = "the run's weights are gone, so that there is nothing to compare with"
        return
    free = memory_kib("MemAvailable")
    if subject.kind == "run" and free is not None and free < EAGER_GIB * (1 << 20):
        process.reason = f"eager torch needs about {EAGER_GIB} GiB of memory beside the others; there is less"
        return
    order = {"kind": subject.kind, "path": str(subject.path), "home": str(root.root), "threads": threads}
    try:
        process.connection.send_bytes(json.dumps(order).encode())
        process.facts = process.hear(OPEN_S)
        process.facts["first_s"] = process.ask({"batch": 1, "calls": WARM_UP})["seconds"]
    except (_Lost, OSError) as lost:
        process.reason = str(lost)


def _asked(process: _Process, order: dict[str, Any]) -> dict[str, Any] | None:
    """Return the answer, or None where the process is lost, now or before."""
    if process.reason is not None:
        return None
    try:
        return process.ask(order)
    except _Lost as lost:
        process.reason = str(lost)
        return None


def _single_images(processes: list[_Process], seconds: float, steps: _Steps) -> None:
    for number in range(ROUNDS):
        for process in processes if number % 2 == 0 else reversed(processes):
            guess = float(np.median(process.facts.get("first_s", [1.0])))
            calls = max(2, min(500, round(seconds / ROUNDS / max(guess, 1e-6))))
            told = _asked(process, {"batch": 1, "calls": calls})
            if told is not None:
                process.seconds.append(told["seconds"])
                process.peak_mib = process.peak_batches_mib = told["peak_mib"]
            steps.done(1)
    for process in processes:
        told = _asked(process, {"decode": 15})
        process.decode_s = told["seconds"] if told else []


def _batches(processes: list[_Process], seconds: float, steps: _Steps) -> None:
    for process in processes:
        if len(process.seconds) == ROUNDS:
            process.rates[1] = [1 / each for turn in process.seconds for each in turn]
    for batch in BATCHES:
        for process in processes:
            if process.reason is None and _gains(process, batch):
                _batch(process, batch, seconds / ROUNDS)
            steps.done(1)
    best = [(process, _best(process.rates)) for process in processes if process.reason is None]
    for number in range(2):
        for process, batch in best:
            if number == 0 and process.reason is None and batch > 1:
                process.rates[batch] = []
            if process.reason is None and batch > 1:
                _batch(process, batch, seconds / ROUNDS)
            steps.done(1)


def _gains(process: _Process, batch: int) -> bool:
    """Return whether a batch is worth a try: it takes no longer than LONGEST_S, and the last two did not both fail."""
    one = 1 / float(np.median(process.rates[1]))
    medians = [float(np.median(each)) for each in process.rates.values()]
    if one * batch > LONGEST_S or 2 * max(process.rates) < batch:
        return False
    return len(medians) < 3 or max(medians[-2:]) > GAIN * max(medians[:-2])


def _batch(process: _Process, batch: int, seconds: float) -> None:
    one = 1 / float(np.median(process.rates[1]))
    calls = max(2, min(100, round(seconds / (one * batch))))
    told = _asked(process, {"batch": batch, "calls": calls})
    if told is not None:
        process.rates.setdefault(batch, []).extend(batch / each for each in told["seconds"])
        process.peak_batches_mib = told["peak_mib"]


def _best(rates: dict[int, list[float]]) -> int:
    """Return the batch with the most images/s, a smaller one where a larger gains next to nothing."""
    medians = {batch: float(np.median(each)) for batch, each in rates.items() if each}
    most = max(medians.values())
    return min(batch for batch, rate in medians.items() if rate * GAIN >= most)


def _figures(process: _Process, known: dict[str, Any]) -> Latency:
    subject, facts = process.subject, process.facts
    found: dict[str, Any] = {"name": subject.name, "run": subject.run, "digest": subject.digest, "files": subject.files}
    size_mib = None if subject.size_bytes is None else subject.size_bytes / (1 << 20)
    found |= {"runtime": facts.get("runtime"), "size_mib": size_mib, **known}
    if len(process.seconds) < ROUNDS:
        return Latency(**found, reason=process.reason)
    every = np.concatenate(process.seconds) * 1e3
    p50, p95, p99 = (float(each) for each in np.percentile(every, [50, 95, 99]))
    rates = {batch: float(np.median(each)) for batch, each in process.rates.items() if each}
    best = _best(process.rates)
    return Latency(
        **found,
        latency_p50_ms=p50,
        latency_p95_ms=p95,
        latency_p99_ms=p99,
        calls=len(every),
        rounds_p50_ms=[1e3 * float(np.median(turn)) for turn in process.seconds],
        views=facts["views"],
        images_per_s=rates[best],
        best_batch=best,
        largest_batch=max(rates),
        batches=rates,
        batches_ended=process.reason,
        decode_ms=1e3 * float(np.median(process.decode_s)) if process.decode_s else None,
        open_ms=1e3 * facts["open_s"],
        peak_mib=process.peak_mib,
        peak_batches_mib=process.peak_batches_mib,
        empty_mib=facts["empty_mib"],
    )
