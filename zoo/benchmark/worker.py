"""The life of a benchmark's process: it trains and scores the runs that it is asked for, and ends with its parent."""

from __future__ import annotations

import os
import queue
import select
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any, NoReturn

import torch

from zoo.errors import EXIT_SIGTERM, Interrupted, ZooError, one_line
from zoo.files import write_text
from zoo.models.spec import load_plugins
from zoo.runs import Run, RunRecord
from zoo.training.loop import OnTick, Tick, train_plan
from zoo.training.memory import give_back
from zoo.training.plan import Plan
from zoo.training.scoring import evaluate

ORPHAN_S = 12.0  # for a process whose parent is gone
TICK_S = 0.1  # between two signs of life of one epoch


@dataclass(frozen=True)
class Outcome:
    """What came of a run: itself, or the record of its failure, and how that is told."""

    result: Run | RunRecord
    state: str
    detail: str


def train_and_score(plan: Plan, bad_images: str | None, on_tick: OnTick | None) -> Outcome:
    """Train a run and score it on test; whatever fails is a failed record, and Interrupted is raised."""
    try:
        before = plan.run.record if plan.run.finished else None
        run = train_plan(plan, on_tick)
        state = "reused" if run.record == before else "finished"
        try:
            metrics = evaluate(run, "test", plan.home, bad_images=bad_images)
        except (Interrupted, ZooError):
            raise
        except Exception as error:  # memory that does not suffice, or a network that breaks: the other runs go on
            raise ZooError(_scoring_failed(run, error)) from error
        (run.path / "traceback.txt").unlink(missing_ok=True)  # of an attempt to score it before
        return Outcome(run, state, f"test top1 {metrics['top1']:.3f}")
    except Interrupted:
        raise
    except ZooError as error:
        said = str(error)
    give_back()  # so that the next run has it
    return Outcome(plan.record("failed", said), "failed", said)


def _scoring_failed(run: Run, error: Exception) -> str:
    """Return in a line why a run that is trained could not be scored, and keep the traceback where that can be."""
    said = f"scoring run {run.name!r} on test failed: {type(error).__name__}: {one_line(error, 200)}"
    file = run.path / "traceback.txt"
    try:
        write_text(file, "".join(traceback.format_exception(error)))
    except ZooError:
        return f"{said}; its traceback cannot be written"
    return f"{said}; the traceback is in {str(file)!r}"


class _Stopped(KeyboardInterrupt):
    """The benchmark ends: as SIGTERM to the process."""

    exit_code = EXIT_SIGTERM


def _stop(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise _Stopped


def serve(descriptor: int, threads: int) -> None:
    """Train and score the runs whose numbers come over a connection until it closes; a process's whole life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent tells when to stop
    signal.signal(signal.SIGTERM, _stop)
    read_signals = noted_signals()
    connection = Connection(descriptor)
    orders: queue.Queue[Any] = queue.Queue()
    try:
        torch.set_num_threads(threads)
        load_plugins()
        connection.send(("ready", None))
        threading.Thread(target=_listen, args=(connection, orders, read_signals), daemon=True).start()
        steps, bad_images = orders.get()
        while (number := orders.get()) is not None:
            _serve_one(connection, steps[number], bad_images)
    except ConnectionError:
        _leave(EXIT_SIGTERM)  # the parent was gone before the other thread could see it
    except (KeyboardInterrupt, Interrupted) as stop:
        _send(connection, "interrupted", (str(stop) or "interrupted", EXIT_SIGTERM))
        _leave(EXIT_SIGTERM)
    except Exception:
        _send(connection, "broken", traceback.format_exc())
        _leave(1)


def _leave(code: int) -> NoReturn:
    """End this process at once: all is saved, and taking torch down would take seconds of the ten that there are."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def _serve_one(connection: Connection, plan: Plan, bad_images: str | None) -> None:
    last = (0.0, "", 0)

    def on_tick(tick: Tick) -> None:
        nonlocal last
        now = time.monotonic()
        if tick.done >= tick.total or (tick.phase, tick.epoch) != last[1:] or now - last[0] >= TICK_S:
            last = (now, tick.phase, tick.epoch)
            _send(connection, "tick", tick)

    _send(connection, "done", train_and_score(plan, bad_images, on_tick))


def _send(connection: Connection, kind: str, value: Any) -> None:
    with suppress(OSError):  # the parent is gone, which the other thread has seen too
        connection.send((kind, value))


def _listen(connection: Connection, orders: queue.Queue[Any], signals: int) -> None:
    """Pass orders on; where the parent has closed the connection, or is dead, stop this process within 12 s."""
    try:
        while True:
            order = connection.recv()
            orders.put(order)
            if order is None:
                return
    except (EOFError, OSError):
        stop_this_process(signals)


def noted_signals() -> int:
    """Return what `stop_this_process` reads the signals from that come to this process from now on."""
    read_signals, write_signals = os.pipe()
    os.set_blocking(write_signals, False)
    signal.set_wakeup_fd(write_signals, warn_on_full_buffer=False)
    return read_signals


def stop_this_process(signals: int) -> NoReturn:
    """Stop this process from another thread than its first, as SIGTERM does, within 12 s."""
    # A second signal would give up the step that the first one, to the whole group, lets end. (Not every byte is
    # one: the ends of loading processes are noted too.)
    came = os.read(signals, 65_536) if select.select([signals], [], [], 0)[0] else b""
    if signal.SIGTERM not in came:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_S)
    os._exit(EXIT_SIGTERM)
