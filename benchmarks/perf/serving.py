"""The server under load beside its own predictor: images per second, latency, and 500 clients for a minute.

Prints a table and, as its last line, one JSON object. `zoo serve` itself is started on a real bundle: the one that is
named, else one of each of `--models`, exported from a short training run on made-up pictures. JPEGs of 512 x 512 pixels
are posted over loopback by `--busy` connections, each of which asks anew as soon as it is answered, so that the server
is saturated; in turns with that, in a process of its own and on the same cores, the same predictor answers the same
bytes: decode, batch, compute, answer, at the best of some batch sizes, one image after the other and as `zoo predict`
does it, with threads that decode (`stream`). `ratio` is the median rate of the server over the median rate of the
predictor, `cpu_ratio` the same of the seconds that each had a core for an image, which a busy machine changes less. The
clients share the server's cores: `client_cores` is what they took.

Then `--clients` connections ask for `--seconds`; each waits as long as a 503's Retry-After says. `statuses` counts the
answers, `bad` those that are neither 200, 4xx, nor 503 with Retry-After, and connections that broke.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

# Beside this file lies one with the name of a module of Python's own, which nobody must find there instead.
HERE = Path(__file__).resolve().parent
sys.path = [each for each in sys.path if Path(each).resolve() != HERE]

MODELS = ("resnet18", "mobilenetv3_small_100")
SIDE = 512
BATCHES = (1, 4, 8)
STREAMED = (8, 32)
IMAGES = 16


# What is asked ----------------------------------------------------------------------------------------------------


def photos(count: int) -> list[bytes]:
    """Return JPEGs with the detail, and so the size (about 90 KB), of photographs."""
    from PIL import Image

    draw, found = np.random.default_rng(0), []
    for _number in range(count):
        pixels = np.zeros((SIDE, SIDE, 3), np.float32)
        for cells, height in ((4, 60), (16, 40), (64, 25), (256, 12)):
            coarse = draw.normal(0, height, (cells, cells, 3)).astype(np.float32)
            channels = [
                Image.fromarray(coarse[..., each]).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for each in range(3)
            ]
            pixels += np.stack(channels, axis=2)
        out = io.BytesIO()
        Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
        found.append(out.getvalue())
    return found


def make_bundle(model: str, folder: Path) -> str:
    """Return the folder of a bundle of an architecture with weights from one epoch on made-up pictures."""
    from zoo.data.sources import import_dataset
    from zoo.deployment.export import export
    from zoo.files import home
    from zoo.recipe import parse_recipe
    from zoo.training.loop import train

    root = home(folder)
    if not root.data.is_dir() or not (root.data / "photos").is_dir():
        for number, data in enumerate(photos(24)):
            file = folder / "pictures" / "ab"[number % 2] / f"{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        import_dataset(folder / "pictures", "photos", root, ratios=(0.5, 0.25, 0.25), near_duplicates=False)
    recipe = {
        "model": {"name": model, "weights": "scratch", "image_size": 224},
        "finetune": {"strategy": "full", "epochs": 1, "batch_size": 6},
        "augment": {"policy": "none"},
    }
    return str(export(train(parse_recipe(recipe, model), "photos", 0, root), root).path)


# The predictor alone ----------------------------------------------------------------------------------------------


def alone(task: dict[str, Any]) -> dict[str, list[float]]:
    """Return images per second of the predictor, and its milliseconds of a core for each, by batch size."""
    from zoo.deployment.images import Encoded
    from zoo.deployment.predictor import Predictor

    predictor = Predictor.load(task["bundle"])
    images = [Encoded(str(number), data) for number, data in enumerate(photos(IMAGES) * (2 * max(STREAMED) // IMAGES))]

    def one_by_one(batch: int) -> int:
        chosen = [predictor.prepare(each.data) for each in images[:batch]]
        predictor.answers(predictor.logits(chosen)[0])
        return batch

    def streamed(batch: int) -> int:
        return sum(each.error is None for each in predictor.stream(images, batch))

    calls: dict[str, Callable[[], int]] = {str(batch): partial(one_by_one, batch) for batch in BATCHES}
    calls |= {f"stream {batch}": partial(streamed, batch) for batch in STREAMED}
    rates = {}
    for name, call in calls.items():
        for _turn in range(2):
            call()  # warms up
        done, started, cpu = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() < started + task["seconds"] / len(calls):
            done += call()
        rate = done / (time.perf_counter() - started)
        rates[name] = [rate, (time.process_time() - cpu) / done * 1000]
    return rates


# The clients ------------------------------------------------------------------------------------------------------


class Client(asyncio.Protocol):
    """One connection that asks, waits for its answer, and asks again; a request is bytes made beforehand."""

    def __init__(self, load: Load, number: int) -> None:
        self.load, self.number, self.got = load, number, bytearray()
        self.asked = 0.0
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the first time."""
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        """Send the next request, unless the time is over."""
        if time.perf_counter() >= self.load.end or self.transport.is_closing():
            self.transport.close()
            return
        self.asked = time.perf_counter()
        self.transport.write(self.load.requests[self.number % len(self.load.requests)])
        self.number += 1

    def data_received(self, data: bytes) -> None:
        """Count an answer that is whole."""
        self.got += data
        head = self.got.find(b"\r\n\r\n")
        if head < 0:
            return
        lines = bytes(self.got[:head]).lower()
        length = int(lines.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        if len(self.got) < head + 4 + length:
            return
        status, wait = int(lines[9:12]), lines.partition(b"retry-after: ")[2].partition(b"\r\n")[0]
        self.got.clear()
        self.load.note(status, time.perf_counter() - self.asked, bool(wait))
        if wait and self.load.patient:
            asyncio.get_running_loop().call_later(float(wait), self.ask)
        else:
            self.ask()

    def connection_lost(self, exc: Exception | None) -> None:
        """Count a connection that broke before its time."""
        if time.perf_counter() < self.load.end:
            self.load.broken += 1
        self.load.left -= 1
        if self.load.left == 0:
            self.load.over.set()


class Load:
    """All connections together: statuses, and seconds of those that were answered with 200."""

    def __init__(self, task: dict[str, Any], requests: list[bytes]) -> None:
        self.requests, self.patient, self.left = requests, bool(task["patient"]), int(task["clients"])
        self.end, self.broken, self.over = time.perf_counter() + task["seconds"], 0, asyncio.Event()
        self.statuses: Counter[str] = Counter()
        self.seconds: list[float] = []

    def note(self, status: int, seconds: float, retry_after: bool) -> None:
        """Count one answer."""
        self.statuses[str(status) if status != 503 or retry_after else "503 without Retry-After"] += 1
        if status == 200:
            self.seconds.append(seconds)


async def ask(task: dict[str, Any]) -> dict[str, Any]:
    """Return what so many clients were answered."""
    head = "POST /predict HTTP/1.1\r\nHost: {}\r\nContent-Type: image/jpeg\r\nContent-Length: {}\r\n\r\n"
    host = f"127.0.0.1:{task['port']}"
    load = Load(task, [head.format(host, len(each)).encode() + each for each in photos(IMAGES)])
    loop, started = asyncio.get_running_loop(), time.perf_counter()
    load.end = started + task["seconds"]
    for number in range(task["clients"]):
        try:
            await loop.create_connection(lambda number=number: Client(load, number), "127.0.0.1", task["port"])
        except OSError:
            load.broken += 1
            load.left -= 1
    await asyncio.wait_for(load.over.wait(), task["seconds"] + 120)
    wall, cpu = time.perf_counter() - started, sum(os.times()[:2])
    good = sum(count for status, count in load.statuses.items() if status in ("200", "503") or status[0] == "4")
    p50, p99 = np.percentile(load.seconds or [0.0], (50, 99)) * 1000
    return {
        "images_per_s": load.statuses["200"] / wall,
        "latency_p50_ms": float(p50),
        "latency_p99_ms": float(p99),
        "statuses": dict(load.statuses),
        "bad": sum(load.statuses.values()) - good + load.broken,
        "client_cores": cpu / wall,
    }


# Processes --------------------------------------------------------------------------------------------------------


def in_process(kind: str, task: dict[str, Any]) -> dict[str, Any]:
    """Return what this script answers in a process of its own."""
    command = [sys.executable, __file__, kind, json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{kind}: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@contextmanager
def served(bundle: str) -> Iterator[tuple[int, int]]:
    """Yield port and process id of a ready `zoo serve`; it has to end in good order."""
    command = [sys.executable, "-m", "zoo", "serve", bundle, "--port", "0", "--json"]
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as process:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        for _turn in range(600):
            try:
                with urllib.request.urlopen(f"{url}/ready"):
                    break
            except OSError:
                time.sleep(0.1)
        yield int(url.rpartition(":")[2]), process.pid
        process.send_signal(signal.SIGTERM)
        if process.wait(60):
            raise SystemExit(f"zoo serve ended with {process.returncode}")


def cpu_s(process: int) -> float:
    """Return the seconds that a process and those that it started had a core."""
    words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    started = [each.read_text().split() for each in Path(f"/proc/{process}/task").glob("*/children")]
    own = (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
    return own + sum(cpu_s(int(each)) for some in started for each in some)


def measure(model: str, bundle: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Return the row of one bundle."""
    own: list[dict[str, list[float]]] = []
    busy: list[dict[str, Any]] = []
    with served(bundle) as (port, process):
        for _turn in range(chosen.turns):
            own.append(in_process("--alone", {"bundle": bundle, "seconds": chosen.turn_seconds}))
            task = {"port": port, "clients": chosen.busy, "seconds": chosen.turn_seconds, "patient": True}
            before, started = cpu_s(process), time.perf_counter()
            busy.append(in_process("--ask", task))
            used, answered = cpu_s(process) - before, max(1, busy[-1]["statuses"].get("200", 0))
            busy[-1]["server_cores"] = used / (time.perf_counter() - started)
            busy[-1]["server_cpu_ms"] = used / answered * 1000
        crowd = {}
        if chosen.clients:
            task = {"port": port, "clients": chosen.clients, "seconds": chosen.seconds, "patient": True}
            crowd = in_process("--ask", task)
    by_batch = {batch: np.median([each[batch] for each in own], axis=0).tolist() for batch in own[0]}
    best = max(by_batch, key=lambda batch: by_batch[batch][0])
    mine, mine_cpu = by_batch[best]
    middle = sorted(busy, key=lambda each: each["images_per_s"])[len(busy) // 2]
    return {
        "model": model,
        "bundle": Path(bundle).name,
        "clients": chosen.busy,
        **{key: value for key, value in middle.items() if key != "statuses"},
        "statuses": dict(sum((Counter(each["statuses"]) for each in busy), Counter())),
        "predictor_images_per_s": mine,
        "predictor_batch": best,
        "predictor_cpu_ms": mine_cpu,
        "predictor_images_per_s_by_batch": {batch: rate for batch, (rate, _) in by_batch.items()},
        "ratio": middle["images_per_s"] / mine,
        "cpu_ratio": mine_cpu / float(np.median([each["server_cpu_ms"] for each in busy])),
        "crowd": {"clients": chosen.clients, "seconds": chosen.seconds, **crowd} if crowd else None,
    }


# The command ------------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", help="folders of bundles; left out: one of each of --models is made")
    parser.add_argument("--models", default=",".join(MODELS), help="timm's architectures, with commas between them")
    parser.add_argument("--busy", type=int, default=16, help="connections that saturate the server")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--turn-seconds", type=float, default=6)
    parser.add_argument("--clients", type=int, default=500, help="connections of the crowd; 0: no crowd")
    parser.add_argument("--seconds", type=float, default=60, help="of the crowd")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    return parser.parse_args()


def run(chosen: argparse.Namespace, report: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    """Make the bundles, measure each and report its row; return all rows."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(ZOO_HOME=folder, HF_HUB_OFFLINE="1")
        for name in chosen.bundles or chosen.models.split(","):
            bundle = str(Path(name).resolve()) if chosen.bundles else make_bundle(name, Path(folder))
            rows.append(measure(Path(bundle).name if chosen.bundles else name, bundle, chosen))
            report(rows[-1])
    return rows


def main() -> None:
    """Measure, print a table, and end with one JSON line."""
    chosen = parse()
    if chosen.alone or chosen.ask:
        found = alone(json.loads(chosen.alone)) if chosen.alone else asyncio.run(ask(json.loads(chosen.ask)))
        print(json.dumps(found))
        return
    print(
        f"{'network':24} {'images/s':>9} {'predictor':>10} {'ratio':>6} {'of CPU':>7} {'p50 ms':>7} {'p99 ms':>7} "
        f"{'clients use':>12} crowd"
    )

    def report(row: dict[str, Any]) -> None:
        crowd = row["crowd"]
        said = f"{crowd['statuses']}, {crowd['bad']} bad, p99 {crowd['latency_p99_ms']:.0f} ms" if crowd else "-"
        print(
            f"{row['model'][:24]:24} {row['images_per_s']:9.1f} {row['predictor_images_per_s']:10.1f} "
            f"{row['ratio']:6.3f} {row['cpu_ratio']:7.3f} {row['latency_p50_ms']:7.1f} {row['latency_p99_ms']:7.1f} "
            f"{row['client_cores']:6.2f} cores {said}",
            flush=True,
        )

    rows = run(chosen, report)
    names = ("onnxruntime", "fastapi", "uvicorn", "h11", "numpy", "pillow")
    environment = {
        "cores": len(os.sched_getaffinity(0)),
        "python": sys.version.split()[0],
        "versions": {name: importlib.metadata.version(name) for name in names},
    }
    print(json.dumps({"rows": rows, "environment": environment}))


if __name__ == "__main__":
    main()
