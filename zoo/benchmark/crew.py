"""Several processes on one study: each trains trials of its own; this one shows what they tell, and stops them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any, NoReturn

from zoo.benchmark.executors import OnStep, Step
from zoo.benchmark.space import space_of
from zoo.benchmark.study import Study, until
from zoo.benchmark.trials import Job, work
from zoo.benchmark.worker import noted_signals, stop_this_process
from zoo.errors import Interrupted, ZooError
from zoo.training.loop import OnTick, Tick

_TICK_S = 0.2  # between two signs of life of one process
_PATIENCE_S = 30.0  # for a process that was told to stop


def work_side_by_side(job: Job, study: Study, jobs: int, deadline: float | None, on_tick: OnTick, tell: OnStep) -> None:
    """Let `jobs` processes work on a study until it is done; cores, and graphics cards, are divided among them.

    A process that dies leaves its trial to the others. Raises ZooError with what went wrong where they could not end
    the study; all have stopped when this returns or raises, after Ctrl-C too.
    """
    context = multiprocessing.get_context("spawn")
    channels: dict[Connection, Any] = {}
    said: list[ZooError] = []
    try:
        for number in range(jobs):
            mine, theirs = context.Pipe()
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            process = context.Process(target=_work, args=(job, left, theirs))
            with _environment(number, jobs):
                process.start()
            theirs.close()
            channels[mine] = process
        _listen(study, dict(channels), on_tick, tell, said)
    finally:
        _stop(channels)
    codes = [process.exitcode for process in channels.values()]
    if study.ended() < job.trials and (said or all(codes)):
        if said:
            raise said[0]
        died = f"every process that worked on the study died (exit codes {', '.join(map(str, codes))})"
        raise ZooError(f"{died}; the same command goes on")


def _listen(study: Study, channels: dict[Connection, Any], on_tick: OnTick, tell: OnStep, said: list[ZooError]) -> None:
    """Show what the processes tell until the last has ended; note in which trial one died."""
    trials: dict[Connection, int] = {}
    while channels:
        for channel in wait(list(channels)):
            assert isinstance(channel, Connection)
            try:
                kind, value = channel.recv()
            except (EOFError, OSError):
                process = channels.pop(channel)
                process.join()
                if process.exitcode < 0 and channel in trials:  # a signal's number: killed, or for want of memory
                    study.crashed(trials[channel])
                channel.close()
                continue
            if kind == "tick":
                on_tick(value)
            elif kind == "step":
                trials[channel] = value.number - 1
                tell(value)
            else:
                said.append(value)


def _stop(channels: dict[Connection, Any]) -> None:
    """End what still runs: politely, so that it saves its state, then not.

    A process whose channel is closed stops by itself. A signal from here would be the second one where the whole group
    has got the first, and would give up the step that this one lets end.
    """
    processes = list(channels.values())
    for channel in channels:
        channel.close()
    for process in processes:
        if os.name != "posix" and process.is_alive():
            process.terminate()
    deadline = time.monotonic() + _PATIENCE_S
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


@contextmanager
def _environment(number: int, jobs: int) -> Iterator[None]:
    """Give the process that is started here its share of the cores, and a graphics card of its own."""
    import torch

    from zoo.cores import cores

    share = {"OMP_NUM_THREADS": str(max(1, min(torch.get_num_threads(), cores()) // jobs))}
    cards = [card for card in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if card]
    cards = cards or [str(card) for card in range(torch.cuda.device_count())]
    if len(cards) > 1:
        share["CUDA_VISIBLE_DEVICES"] = cards[number % len(cards)]
    before = {key: os.environ.get(key) for key in share}
    os.environ.update(share)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key)
            if value is not None:
                os.environ[key] = value


def _work(job: Job, seconds: float | None, channel: Connection) -> None:
    """Be one of the processes: train trials, and tell of them until there is nobody who listens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the first process passes it on
    signal.signal(signal.SIGTERM, _interrupt)
    deadline, last = until(seconds), [0.0]

    def send(kind: str, value: Any) -> None:
        try:
            channel.send((kind, value))
        except OSError:  # whoever started this is gone, which the other thread, where there is one, has seen too
            if os.name != "posix":
                raise KeyboardInterrupt from None

    def on_tick(tick: Tick) -> None:
        if time.monotonic() - last[0] > _TICK_S:
            last[0] = time.monotonic()
            send("tick", tick)

    def tell(step: Step) -> None:
        send("step", step)

    try:
        if os.name == "posix":
            threading.Thread(target=_heed, args=(channel, noted_signals()), daemon=True).start()
        study = Study(job.folder, space_of(job.recipe), job.seed, job.pruner)
        work(job, study, deadline, on_tick, tell)
    except (Interrupted, KeyboardInterrupt):
        return
    except ZooError as error:
        with suppress(OSError):
            channel.send(("error", error))
        raise SystemExit(1) from None


def _heed(channel: Connection, signals: int) -> None:
    """Stop this process once whoever started it has closed the channel, or is dead: nothing is left running alone."""
    try:
        while True:
            channel.recv()
    except (EOFError, OSError):
        stop_this_process(signals)


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
