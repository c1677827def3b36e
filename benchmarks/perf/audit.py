"""How the audit's cost grows: looking at images beside bare decoding, and finding pairs beside comparing all with all.

Prints two tables and, as its last line, one JSON object. Images are generated; everything is measured in turns, and
`ratio` is ours over the stated reference in the same run: seconds of bare decoding per second of looking (1 is the
ceiling), and how many times faster than all-with-all the pairs are found.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Beside this file lies one with the name of a module of Python's own, which nobody must find there instead.
sys.path = [each for each in sys.path if Path(each).resolve() != Path(__file__).resolve().parent]

# ruff: noqa: E402
import numpy as np
from PIL import Image

from zoo.data.decode import decode
from zoo.data.duplicates import HASH_RADIUS, candidate_pairs
from zoo.data.manifest import map_files
from zoo.data.sources import import_dataset
from zoo.files import home
from zoo.reporting.audit import audit_dataset


def write_photos(folder: Path, count: int, side: int = 224) -> Path:
    """Write smooth random JPEGs of two classes, a few in a hundred of them copied anew."""
    draw = np.random.default_rng(0)
    for number in range(count):
        label = folder / "ab"[number % 2]
        label.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(draw.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        image = small.resize((side, side), Image.Resampling.BICUBIC)
        image.save(label / f"{number:06}.jpg", quality=85)
        if number % 50 == 0:
            image.save(label / f"{number:06}-copy.jpg", quality=60)
    return folder


def time_images(counts: list[int]) -> list[dict[str, float]]:
    """Return seconds of bare decoding, of the import's look and of the audit, for growing numbers of images."""
    rows = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            source = write_photos(Path(folder) / "photos", count)
            files = sorted(source.rglob("*.jpg"))
            started = time.perf_counter()
            for _ in map_files(lambda file: decode(file.read_bytes()), files):
                pass
            decoding = time.perf_counter() - started
            root = home(folder)
            dataset = import_dataset(source, "photos", root)
            for file in (dataset.folder / ".cache").iterdir():
                file.unlink()
            started = time.perf_counter()
            audit = audit_dataset("photos", root)
            seconds = time.perf_counter() - started
        rows.append(
            {
                "what": "audit of 224 px images",
                "n": len(files),
                "seconds": seconds,
                "images_per_s": len(files) / seconds,
                "reference_s": decoding,
                "ratio": decoding / seconds,
                "near_duplicate_pairs": audit.document["near_duplicate_pairs"],
            }
        )
    return rows


def time_hashes(counts: list[int]) -> list[dict[str, float]]:
    """Return seconds and memory of finding near hashes in processes of their own, beside all-with-all on a part."""
    rows = []
    for count in counts:
        done = subprocess.run([sys.executable, __file__, "--hashes-alone", str(count)], capture_output=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    return rows


def hashes_alone(count: int) -> dict[str, float]:
    """Find the pairs among random hashes of which one in ten is a near copy."""
    draw = np.random.default_rng(0)
    hashes = draw.integers(0, 2**63, count, dtype=np.uint64)
    copies = count // 10
    hashes[:copies] = hashes[-copies:] ^ (np.uint64(1) << draw.integers(0, 63, copies).astype(np.uint64))
    started = time.perf_counter()
    pairs = candidate_pairs(hashes)
    seconds = time.perf_counter() - started
    part = min(count, 2000)
    started = time.perf_counter()
    for start in range(0, part, 100):
        (np.bitwise_count(hashes[start : start + 100, None] ^ hashes[None]) <= HASH_RADIUS).sum()
    all_with_all = (time.perf_counter() - started) * count / part / 2
    return {
        "what": "pairs of hashes",
        "n": count,
        "seconds": seconds,
        "reference_s": all_with_all,
        "ratio": all_with_all / seconds,
        "pairs": len(pairs),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    """Measure, print tables, and end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", default="1000,3000,10000", help="numbers of images, with commas between them")
    parser.add_argument("--hashes", default="10000,30000,100000,300000", help="numbers of hashes")
    parser.add_argument("--hashes-alone", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.hashes_alone:
        print(json.dumps(hashes_alone(chosen.hashes_alone)))
        return
    rows = time_hashes([int(each) for each in chosen.hashes.split(",")])
    rows += time_images([int(each) for each in chosen.images.split(",")])
    print(f"{'what':24} {'n':>8} {'seconds':>9} {'us each':>9} {'reference s':>12} {'ratio':>7} {'peak MiB':>9}")
    for row in rows:
        peak = f"{row['peak_mib']:.0f}" if "peak_mib" in row else ""
        each = 1e6 * row["seconds"] / row["n"]
        print(
            f"{row['what']:24} {row['n']:8} {row['seconds']:9.2f} {each:9.1f} {row['reference_s']:12.2f} "
            f"{row['ratio']:7.2f} {peak:>9}"
        )
    environment = {
        "machine": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    print(json.dumps({"rows": rows, "environment": environment}))


if __name__ == "__main__":
    main()
