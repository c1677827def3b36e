"""How fast bundles are on this machine: each in a process of its own, all of them asked in turns.

What a latency counts: one image that is decoded and resized already (uint8, H x W x 3) is scaled to the network's
input, runs through the network, and its logits are there; as many views as the bundle's test-time views ask for. What
decoding and resizing a small picture takes is a number of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from zoo.cores import cores
from zoo.deployment.bundle import Bundle
from zoo.deployment.speed import METHOD, Latency, Subject, installed, machine, release, subject_of
from zoo.deployment.turns import Progress, measure
from zoo.errors import ZooError
from zoo.files import Home, read_json, write_json
from zoo.runs import Run


def latencies(
    bundles: Sequence[Bundle],
    root: Home,
    *,
    eager: Sequence[Run] = (),
    threads: int | None = None,
    seconds: float = 3.0,
    again: bool = False,
    progress: Progress | None = None,
) -> dict[str, Latency]:
    """Return bundle to its figures on this machine: stored ones, where all are of one session, else all measured anew.

    eager: runs that are measured as eager torch beside them. threads: cores of one call, all where left out. seconds:
    of single calls for each. again: measure in any case. What could not be measured has a `reason`. A stored figure
    holds as long as the model's files, threads, the runtime's version and the machine are the same. Raises ZooError
    for numbers out of range, or where another process measures in this home.
    """
    check_threads(threads)
    if not 0 < seconds <= 600:
        raise ZooError(f"seconds of measuring must be above 0 and at most 600. Got {seconds}; 3 is usual")
    threads = threads or cores()
    wanted = [subject_of(each) for each in bundles]
    beside = {run.name: subject_of(run) for run in eager}
    if not again:
        stored = {each.name: _stored(each, beside.get(each.run), root, threads) for each in wanted}
        found = {name: each for name, each in stored.items() if each is not None}
        if len(found) == len(wanted) and len({each.measured_together for each in found.values()}) <= 1:
            return found
    measured = measure([*wanted, *beside.values()], root, threads=threads, seconds=seconds, progress=progress)
    for each in wanted:
        own = measured[each.name]
        if each.run in beside:
            own = measured[each.name] = own.model_copy(update={"eager": measured[beside[each.run].name]})
        if own.reason is None:
            write_json(root.latency / f"{each.name}.json", own.model_dump(mode="json"))
    return {each.name: measured[each.name] for each in wanted}


def _stored(subject: Subject, beside: Subject | None, root: Home, threads: int) -> Latency | None:
    """Return the figures that were kept of just this bundle, runtime, machine and threads, else None."""
    try:
        found = Latency.model_validate(read_json(root.latency / f"{subject.name}.json"))
    except (ZooError, ValidationError):
        return None
    runtime = (found.runtime or "none").split()
    own = (found.method, found.digest, found.threads, found.machine, installed(runtime[0]))
    if own != (METHOD, subject.digest, threads, machine(), release(runtime[-1])) or found.reason is not None:
        return None
    if beside is not None:
        with_torch = found.eager
        if with_torch is None or with_torch.digest != beside.digest:
            return None
        if with_torch.size_mib is None and beside.size_bytes is not None:
            return None  # weights that were gone are back
        if with_torch.reason is None and release(with_torch.runtime or "") != f"torch {installed('torch')}":
            return None
    return found


def check_threads(threads: int | None) -> None:
    """Raise ZooError unless threads is None or a number of cores that this process has."""
    if threads is not None and not 1 <= threads <= cores():
        raise ZooError(f"threads must be 1 to {cores()}, the cores of this process. Got {threads}")
