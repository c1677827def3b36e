"""The ledger: every scoring of a test split, so that a table can say how often its test was looked at."""

from __future__ import annotations

import errno
import json
import os
import sys
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from zoo.files import Home, write_error
from zoo.runs import RunRecord, list_runs, on_split

if sys.platform != "win32":
    import fcntl


def record_look(root: Home, record: RunRecord) -> None:
    """Note that a run is about to be scored on test; written before, so that no look is lost.

    One line of JSON in `models/ledger.jsonl`: time (UTC), dataset, split_digest, run, recipe, recipe_digest, seed.
    Raises ZooError where it cannot be written.
    """
    line = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "dataset": record.dataset,
        "split_digest": record.split_digest,
        "run": record.run,
        "recipe": record.recipe,
        "recipe_digest": record.recipe_digest,
        "seed": record.seed,
    }
    data = (json.dumps(line, ensure_ascii=True) + "\n").encode()
    try:
        root.ledger.parent.mkdir(parents=True, exist_ok=True)
        # One short write at the end of the file: lines of several processes do not mix.
        descriptor = os.open(root.ledger, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            _wait_for(descriptor)  # who looks while another writes may take that line for torn
            size = os.fstat(descriptor).st_size
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"  # by a full disk or a crash
            data = b"\n" + data if torn else data
            if os.write(descriptor, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise write_error(root.ledger, error) from error


def _wait_for(descriptor: int) -> None:
    """Lock a file until it is closed; where the system cannot, its lines are whole all the same."""
    if sys.platform != "win32":
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)


def looks_at_test(root: Home, split_digest: str) -> dict[str, Any]:
    """Return how often a test split was scored: `scorings`, `recipes` (by digest), `first` and `last` (UTC, or None).

    A line that a crash cut off is left out; scored runs that have no line, older than the ledger, count too.
    """
    found, noted = [], set()
    if root.ledger.is_file():
        for line in root.ledger.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                if entry["split_digest"] == split_digest:
                    time, recipe, run = (str(entry[key]) for key in ("time", "recipe_digest", "run"))
                    found.append((time, recipe))
                    noted.add(run)
            except (ValueError, KeyError, TypeError):
                continue
    times = sorted(time for time, _ in found)
    older = [
        run.record.recipe_digest
        for run in list_runs(root)
        if run.name not in noted and run.metrics_file("test").is_file() and on_split(run, split_digest)
    ]
    return {
        "scorings": len(found) + len(older),
        "recipes": len({recipe for _, recipe in found} | set(older)),
        "first": times[0] if times else None,
        "last": times[-1] if times else None,
    }
