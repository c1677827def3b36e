"""What a large manifest costs in memory: reading it, planning on it, training from it, each in its own process.

Prints a table and, as its last line, one JSON object. Rows are drawn: paths of about 60 characters, groups of 20
images, two digests of 64 digits; the images of `train` are a hundred tiny pictures under many names, and what the audit
remembers of each file is drawn too. `peak_mib` is the peak resident memory of the whole process, imports included.
`ratio` is a reference over ours: for reading, what `pandas.read_csv` adds to its imports over what we add to them; for
the rest, the 1.5 GiB that a million rows may take, whatever n is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

CLASSES = ("benign", "malignant", "normal")
SPLITS = ("train", "train", "train", "val", "test")
GOAL_MIB = 1536.0
IMAGES = 100  # a file system allows only some ten thousand names for one file


def rows_of(count: int, digests: list[str]) -> Iterator[tuple[str, str, str, str, str, str, str]]:
    """Yield the rows of a manifest: 20 images a group, three fifths of the groups in train."""
    for number in range(count):
        group, label = number // 20, CLASSES[number % 3]
        pixels = hashlib.sha256(str(number).encode()).hexdigest()
        path = f"hospital-{group % 100:03}/{label}/patient-{group:07}/slice-{number:08}.ppm"
        split = SPLITS[group * 7919 % 5]
        yield pixels[:16], path, label, f"patient-{group:07}", split, digests[number % IMAGES], pixels


def write_home(folder: Path, count: int, images: bool) -> None:
    """Write a dataset `big` of so many rows, its images (those of train) and what the audit would remember of them."""
    data = folder / "data" / "big"
    (data / "images").mkdir(parents=True)
    draw = np.random.default_rng(0)
    files, digests = [], []
    for number in range(IMAGES):
        files.append(data / f"{number:02}.ppm")
        files[-1].write_bytes(b"P6\n12 10\n255\n" + draw.integers(0, 256, 360, np.uint8).tobytes())
        digests.append(hashlib.sha256(files[-1].read_bytes()).hexdigest())
    known = ", ".join(f'"{each}"' for each in CLASSES)
    (data / "dataset.toml").write_text(
        f'schema_version = 1\nname = "big"\nroot = "images"\nclasses = [{known}]\nbad_images = "fail"\n'
        '[split]\ngroup_column = "patient"\n'
    )
    with (data / "manifest.csv").open("w") as stream:
        stream.write("sample_id,path,label,group,split,sha256,pixel_sha256\n")
        for number, row in enumerate(rows_of(count, digests)):
            stream.write(",".join(row) + "\n")
            if images and row[4] == "train":
                path = data / "images" / row[1]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.hardlink_to(files[number % IMAGES])


def remember_facts(folder: Path) -> None:
    """Write what the audit remembers of each file, without looking at any."""
    from zoo import load_dataset
    from zoo.data.facts import Facts, file_stats, write_facts
    from zoo.data.pictures import BLOCK, Pictures
    from zoo.files import home

    dataset, draw = load_dataset("big", home(folder)), np.random.default_rng(0)
    count = len(dataset.frame)
    with tempfile.TemporaryFile(dir=folder) as spool:
        for start in range(0, count, BLOCK):
            spool.write(draw.integers(0, 256, (min(BLOCK, count - start), 32, 32), np.uint8).tobytes())
        spool.flush()
        small = Pictures(spool, 0, count)
    facts = Facts(
        bytes=np.full(count, 373),
        formats=np.full(count, "PPM"),
        modes=np.full(count, "RGB"),
        size=np.full((count, 2), 12, np.int32),
        animated=np.zeros(count, bool),
        orientation=np.ones(count, np.int8),
        opaque=np.ones(count, bool),
        mean=np.full(count, 127, np.float32),
        phash=draw.integers(0, 2**63, count, np.uint64),
        small=small,
        reasons=np.full(count, "", object),
        changed=np.zeros(count, bool),
        stats=file_stats(dataset),
    )
    write_facts(dataset, facts)


def peak_mib() -> float:
    """Return the peak resident memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def alone(stage: str, folder: Path) -> dict[str, Any]:
    """Do one stage in this process; return its peak memory, that of its imports, and seconds."""
    import pandas as pd

    from zoo import load_dataset, split_summary
    from zoo.files import home

    if stage == "pandas":
        imports, started = peak_mib(), time.perf_counter()
        frame = pd.read_csv(folder / "data" / "big" / "manifest.csv", dtype="str")
        return _measured(imports, started, rows=len(frame))
    if stage == "load_dataset":
        imports, started = peak_mib(), time.perf_counter()
        dataset = load_dataset("big", home(folder))
        return _measured(imports, started, rows=len(dataset.frame))
    import zoo.training.plan  # noqa: F401 (what a training process imports anyway)
    from zoo.data.cache import open_pixels
    from zoo.data.leaks import refuse_leaks
    from zoo.data.loader import TrainBatches
    from zoo.data.transforms import center_crop
    from zoo.runs import Preprocessing

    imports, started = peak_mib(), time.perf_counter()
    dataset = load_dataset("big", home(folder))
    for split in ("train", "val", "test"):
        dataset.of_split(split)
    split_summary(dataset)
    if stage == "splits and leaks":
        refuse_leaks(dataset, accept=False)
        return _measured(imports, started, rows=len(dataset.frame))
    half = (0.5, 0.5, 0.5)
    seen = Preprocessing(image_size=8, crop_pct=1.0, interpolation="bilinear", mean=half, std=half)
    pixels = open_pixels(dataset, "train", seen)
    batches = TrainBatches(pixels, _Crop(center_crop), 256, 0, 2, False).epoch(0)
    images = sum(len(labels) for _, labels, *_ in islice(batches, 16))
    return _measured(imports, started, rows=len(dataset.frame), cached=pixels.cached, images=images)


class _Crop:
    """The plainest augmentation, which travels to workers."""

    def __init__(self, crop: Any) -> None:
        self.crop = crop

    def __call__(self, image: Any, _epoch: int, _place: int) -> Any:
        return self.crop(image, 8)


def _measured(imports: float, started: float, **facts: Any) -> dict[str, Any]:
    seconds = time.perf_counter() - started
    return {"peak_mib": peak_mib(), "imports_mib": imports, "seconds": seconds, **facts}


def measure(count: int, images: bool) -> list[dict[str, Any]]:
    """Return one row per stage for a manifest of so many rows."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_home(Path(folder), count, images)
        stages = ["pandas", "load_dataset", "splits and leaks"]
        stages += ["decode, then train", "cached, then train", "no cache, then train"] if images else []
        found: dict[str, dict[str, Any]] = {}
        for stage in stages:
            if stage == "splits and leaks":
                subprocess.run(
                    [sys.executable, __file__, "--alone", "facts", folder], stdout=subprocess.PIPE, check=True
                )
            if stage.startswith("no cache"):
                for file in (Path(folder) / "data" / "big" / ".cache").glob("pixels-*.bin"):
                    file.unlink()
            given = {**os.environ, "ZOO_CACHE_GB": "0" if stage.startswith("no cache") else "50"}
            command = [sys.executable, __file__, "--alone", stage, folder]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=given)
            found[stage] = json.loads(done.stdout.splitlines()[-1])
    plain = found.pop("pandas")
    for stage, row in found.items():
        reference = plain["peak_mib"] - plain["imports_mib"] if stage == "load_dataset" else GOAL_MIB
        ours = row["peak_mib"] - row["imports_mib"] if stage == "load_dataset" else row["peak_mib"]
        rows.append({"what": stage, "n": count, **row, "reference_mib": reference, "ratio": reference / ours})
    return rows


def main() -> None:
    """Measure, print a table, and end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="100000,1000000", help="rows of the manifests, with commas between them")
    parser.add_argument("--no-images", action="store_true", help="leave out the stages that decode images")
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.alone:
        stage, folder = chosen.alone[0], Path(chosen.alone[1])
        print(json.dumps(remember_facts(folder) if stage == "facts" else alone(stage, folder)))
        return
    rows = [row for count in chosen.rows.split(",") for row in measure(int(count), not chosen.no_images)]
    print(
        f"{'what':22} {'rows':>8} {'seconds':>8} {'imports MiB':>12} {'peak MiB':>9} {'reference MiB':>14} {'ratio':>6}"
    )
    for row in rows:
        print(
            f"{row['what']:22} {row['n']:8} {row['seconds']:8.1f} {row['imports_mib']:12.0f} {row['peak_mib']:9.0f} "
            f"{row['reference_mib']:14.0f} {row['ratio']:6.2f}"
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
