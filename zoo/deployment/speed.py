"""What is found of a bundle's speed on this machine, as it is kept, and what machine this is."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from zoo.cores import core_quota, cores
from zoo.deployment.bundle import MODEL_FILES, Bundle
from zoo.files import digest_of
from zoo.runs import Run
from zoo.training.environment import processor

METHOD = 2  # raised where figures of the same bundle would mean something else
WARM_UP = 5  # calls, before all rounds; each turn has one more


class Latency(BaseModel):
    """`models/latency/<bundle>.json`: what was found of one bundle, or of eager torch, in one session of measuring.

    latency_p50_ms, latency_p95_ms, latency_p99_ms: of one image, over `calls` calls. rounds_p50_ms: the median of each
    round, which tells how steady the machine was. images_per_s: at `best_batch`. decode_ms: decoding and resizing the
    bundle's sample, median. peak_mib: the most memory of the process while it answers single images, all counted;
    empty_mib: before it opened anything; peak_batches_mib: with batches of up to `largest_batch`. size_mib: of the
    model's files. measured_together: the same for all that were asked in turns, and hence comparable. reason: why
    there is no figure; batches_ended: why its process was lost later, with larger batches.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_version: int = 1
    method: int = METHOD
    name: str
    run: str
    digest: str
    files: dict[str, str] = {}
    runtime: str | None = None
    threads: int
    machine: dict[str, Any]
    measured_together: str
    measured_at: str
    reason: str | None = None
    latency_p50_ms: float | None = None
    latency_p95_ms: float | None = None
    latency_p99_ms: float | None = None
    calls: int = 0
    warm_up: int = WARM_UP
    rounds_p50_ms: list[float] = []
    views: int = 1
    images_per_s: float | None = None
    best_batch: int | None = None
    largest_batch: int | None = None
    batches: dict[int, float] = {}
    batches_ended: str | None = None
    decode_ms: float | None = None
    open_ms: float | None = None
    peak_mib: float | None = None
    peak_batches_mib: float | None = None
    empty_mib: float | None = None
    size_mib: float | None = None
    environment: dict[str, Any] = {}
    eager: Latency | None = None


@dataclass(frozen=True)
class Subject:
    """What is to be measured: a bundle, or a run as eager torch has it; size_bytes: None where its weights are gone."""

    name: str
    run: str
    kind: str
    path: Path
    digest: str
    files: dict[str, str]
    size_bytes: int | None


def subject_of(it: Bundle | Run) -> Subject:
    """Return a bundle, or a run in eager torch, as something to be measured."""
    if isinstance(it, Run):
        digest = digest_of([it.record.weights_sha256, it.record.tta])
        size = None
        with suppress(OSError):  # the bundle can do without them
            size = it.weights_file.stat().st_size
        return Subject(f"{it.name}--eager", it.name, "run", it.path, digest, {}, size)
    record = it.record
    files = {name: record.files[name] for name in MODEL_FILES[record.format]}
    digest = digest_of([files, record.preprocessing.identity, record.tta])
    return Subject(it.path.name, record.run, "bundle", it.path, digest, files, it.size_bytes)


def release(version: str) -> str:
    """Return a version without what says how it was built: after a dash (OpenVINO's), or after a plus (torch's).

    >>> release("2026.1.0-123-abc"), release("2.14.1+cpu")
    ('2026.1.0', '2.14.1')
    """
    return version.split("-", maxsplit=1)[0].split("+", maxsplit=1)[0]


def installed(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return release(version(package)) if package else None
    except PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Return what makes two machines differ: processor, cores this process may use, their quota, memory, system."""
    memory = memory_kib("MemTotal")
    return {
        "processor": processor(),
        "cores": cores(),
        "core_quota": core_quota(),
        "memory_gib": None if memory is None else round(memory / (1 << 20), 1),
        "system": sys.platform,
    }


def environment() -> dict[str, Any]:
    """Return the machine with what changes on it from hour to hour: load, the processor's governor, versions."""
    governor = None
    with suppress(OSError):
        file = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
        governor = file.read_text(encoding="ascii").strip()
    names = ("zoo", "numpy", "onnxruntime", "openvino", "torch")
    return {
        **machine(),
        "load_average": [round(each, 2) for each in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "governor": governor,
        "versions": {
            "python": ".".join(map(str, sys.version_info[:3])),
            **{name: found for name in names if (found := installed(name)) is not None},
        },
    }


def memory_kib(key: str) -> int | None:
    """Return a number of Linux's memory table in KiB, or None."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1])
    return None
