"""What a leaderboard of linear probes costs beside bare forward passes: 8 backbones x 3 seeds through `zoo.bench`.

Prints a table of the networks, what the total is made of and, as its last line, one JSON object. Images (512 x 512
JPEGs) and weights are made from a seed in a folder of their own, and nothing is downloaded; the weights lie in files,
as pretrained ones do, so that what is kept on disk for those is kept here. `ratio` is the seconds of the whole
benchmark, from the plan to the figures, over the sum of the bare forward passes: each network once over the images of
train, val and test, as tensors in memory, in batches of 64 and in the same number format, in the mean of a pass before
and a pass after the benchmark. Importing the images is told, but is no part of either. `cpu_ratio` is the same of the
seconds that this process had a core to itself: what the ratio would be on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Beside this file lies one with the name of a module of Python's own, which nobody must find there instead.
sys.path = [each for each in sys.path if Path(each).resolve() != Path(__file__).resolve().parent]

MODELS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "efficientnet_b0",
    "regnety_004",
    "convnext_atto",
    "mobilenetv3_large_100",
    "vit_tiny_patch16_224",
)
TAG = "made"
SIDE = 512


def write_photos(folder: Path, count: int) -> Path:
    """Write smooth random JPEGs of three classes, which a colour tells apart."""
    from PIL import Image

    draw = np.random.default_rng(0)
    for number in range(count):
        place = number % 3
        label = folder / "abc"[place]
        label.mkdir(parents=True, exist_ok=True)
        coarse = draw.integers(0, 200, (24, 24, 3), dtype=np.uint8)
        coarse[..., place] += 55
        image = Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        image.save(label / f"{number:05}.jpg", quality=85)
    return folder


def write_weights(folder: Path, models: list[str]) -> None:
    """Write each network's random weights as a file that ZOO_WEIGHTS offers as pretrained."""
    import timm
    from safetensors.torch import save_file

    folder.mkdir()
    for name in models:
        torch.manual_seed(0)
        save_file(timm.create_model(name).state_dict(), folder / f"{name}.{TAG}.safetensors")


def write_recipes(folder: Path, models: list[str], epochs: int) -> None:
    """Write a linear probe for each network: the built-in one of resnet18, with this network in it."""
    from zoo.files import builtin_folder, read_toml, write_toml

    table = read_toml(builtin_folder("recipes") / "resnet18-lp.toml")
    for name in models:
        table["model"] = {"name": f"{name}.{TAG}", "weights": "pretrained"}
        table["finetune"]["epochs"] = epochs
        write_toml(folder / f"{name}-lp.toml", table)


class Forward:
    """One network and all images of the dataset as it wants them; each call is a bare forward pass, in seconds."""

    def __init__(self, model: str) -> None:
        from zoo import load_recipe
        from zoo.training.plan import make_plan
        from zoo.training.precision import choose_device

        self.name = model
        self.plan = make_plan(load_recipe(f"{model}-lp"), "photos")
        self.device = choose_device(self.plan.recipe.device)
        self.seconds: list[float] = []
        self.cpu: list[float] = []
        self.images = 0

    def __call__(self) -> None:
        """Time the forward passes alone: reading, cropping and scaling of a batch stand outside of the clock."""
        from zoo.training.speed import FORWARD_BATCH, plan_precision

        net = self.plan.model()[0].eval().to(self.device)
        steps = sum(len(self.plan.dataset.of_split(split)) for split in ("train", "val")) // FORWARD_BATCH
        self.precision = plan_precision(self.plan, net, self.device, steps, training=False)  # as the probes choose it
        net = net.to(memory_format=self.precision.memory_format)
        seconds, cpu, self.images = 0.0, 0.0, 0
        with torch.inference_mode(), self.precision.autocast(self.device):
            for batch in self._batches():
                started, used = time.perf_counter(), time.process_time()
                net(batch).float().cpu()
                seconds += time.perf_counter() - started
                cpu += time.process_time() - used
                self.images += len(batch)
        self.seconds.append(seconds)
        self.cpu.append(cpu)

    def _batches(self) -> Iterator[torch.Tensor]:
        from zoo.data.cache import open_pixels
        from zoo.data.loader import fixed_batches
        from zoo.data.transforms import normalise_tensor

        made = self.plan.preprocessing
        for split in ("train", "val", "test"):
            for batch in fixed_batches(open_pixels(self.plan.dataset, split, made), made.image_size, 64):
                images = normalise_tensor(torch.from_numpy(batch).to(self.device), made)
                yield self.precision.place(images)


@contextmanager
def clocks(parts: dict[str, float]) -> Iterator[None]:
    """Let the functions that a benchmark spends its time in add their seconds to parts; a part may hold another."""
    from zoo.benchmark import suite, worker
    from zoo.data import cache
    from zoo.training import features, trainer

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started, used = time.perf_counter(), time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                parts[name] += time.perf_counter() - started
                parts[name.replace("_s", "_cpu_s")] += time.process_time() - used

        return call

    watched = [
        ("plan_s", suite, "_plan_all"),
        ("train_s", worker, "train_plan"),
        ("score_s", worker, "evaluate"),
        ("floors_s", suite, "dataset_floors"),
        ("compare_s", suite, "make_comparison"),
        ("write_s", suite, "write_results"),
        ("precision_s", trainer, "plan_precision"),
        ("forward_s", features, "_each_batch"),
        ("decode_s", cache, "_build"),
    ]
    kept = [(module, name, getattr(module, name)) for _, module, name in watched]
    for label, module, name in watched:
        setattr(module, name, timed(label, getattr(module, name)))
    try:
        yield
    finally:
        for module, name, function in kept:
            setattr(module, name, function)


def measure(folder: Path, models: list[str], images: int, seeds: int, epochs: int) -> dict[str, Any]:
    """Return the figures of one benchmark on images made for it, and each network's forward passes."""
    from zoo import bench
    from zoo.data.sources import import_dataset
    from zoo.files import home

    os.environ.update(ZOO_HOME=str(folder), ZOO_WEIGHTS=str(folder / "weights"), HF_HUB_OFFLINE="1")
    write_weights(folder / "weights", models)
    write_recipes(folder / "recipes", models, epochs)
    started = time.perf_counter()
    dataset = import_dataset(write_photos(folder / "photos", images), "photos", home(folder))
    importing = time.perf_counter() - started
    passes = [Forward(name) for name in models]
    for each in passes:
        each()
    for file in (dataset.folder / ".cache").glob("pixels-*"):
        file.unlink()  # the benchmark decodes for itself
    parts: dict[str, float] = defaultdict(float)
    with clocks(parts):
        started, used = time.perf_counter(), time.process_time()
        result = bench(data="photos", recipes=[f"{name}-lp" for name in models], seeds=seeds)
        total, cpu = time.perf_counter() - started, time.process_time() - used
    for each in passes:
        each()
    if result.failed:
        raise SystemExit(f"{result.failed} runs failed: {[row['reason'] for row in result.comparison.rows]}")
    return {"import_s": importing, "total_s": total, "cpu_s": cpu, "parts": dict(parts), "passes": passes}


def main() -> None:
    """Measure, print tables, and end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=900, help="images of the dataset, all splits together")
    parser.add_argument("--models", default=",".join(MODELS), help="timm's architectures, with commas between them")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=80, help="epochs of each linear probe")
    chosen = parser.parse_args()
    models = chosen.models.split(",")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), models, chosen.images, chosen.seeds, chosen.epochs)
    print(f"{'network':26} {'images':>7} {'forward s':>10} {'images/s':>9}")
    for each in found["passes"]:
        mean = float(np.mean(each.seconds))
        print(f"{each.name:26} {each.images:7} {mean:10.2f} {each.images / mean:9.1f}")
    reference = sum(float(np.mean(each.seconds)) for each in found["passes"])
    reference_cpu = sum(float(np.mean(each.cpu)) for each in found["passes"])
    row = {
        "what": f"{len(models)} backbones x {chosen.seeds} seeds",
        "images": chosen.images,
        "epochs": chosen.epochs,
        "total_s": round(found["total_s"], 2),
        "reference_s": round(reference, 2),
        "reference_passes_s": [round(sum(each.seconds[i] for each in found["passes"]), 2) for i in (0, 1)],
        "import_s": round(found["import_s"], 2),
        **{name: round(seconds, 2) for name, seconds in found["parts"].items()},
        "cpu_s": round(found["cpu_s"], 2),
        "reference_cpu_s": round(reference_cpu, 2),
        "cpu_ratio": round(found["cpu_s"] / reference_cpu, 3),
        "ratio": round(found["total_s"] / reference, 3),
    }
    for key, value in row.items():
        print(f"{key:20} {value}")
    from zoo.training.environment import device_name, versions

    environment = {
        "device": device_name(found["passes"][0].device),
        "cores": len(os.sched_getaffinity(0)),
        **versions(),
    }
    print(json.dumps({"rows": [row], "environment": environment}))


if __name__ == "__main__":
    main()
