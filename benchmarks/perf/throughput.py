"""Training end to end beside its compute floor: images per second from JPEGs, and of the same step on resident tensors.

Prints a table and, as its last line, one JSON object. 512 x 512 JPEGs are made from a seed, imported, and trained on by
`zoo.train` itself: augmentation, normalisation, update, checks and all. After every update of it the floor makes as
many: forward, backward and optimiser alone, on a batch that lies normalised in memory, with a copy of the network in
the same number format; so a drift of the machine hits both alike. `ratio` is the median time of a floor's step over
that of ours, `ratio_of_sums` the same of all steps together, `cpu_ratio` of the seconds that this process had a core.
Pixels are decoded once, before: `decode_s`; `images_per_s_first_epoch` includes it. Steps of ours during which, or
during the floor's after it, other processes took more than a twentieth of the machine are left out, `steps_disturbed`
of them; where that leaves fewer than ten, all count, and `disturbed` says so: measure again. On a CUDA card, where
loading is others' work, the turns are longer: see `on_cuda.py`.

With `--against transformers` (and accelerate, both importable) transformers' Trainer trains the same network on the
same files in processes of its own, in turns with ours; `trainer_ratio` is our images per second over its best.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Beside this file lies one with the name of a module of Python's own, which nobody must find there instead.
HERE = Path(__file__).resolve().parent
sys.path = [each for each in sys.path if Path(each).resolve() != HERE] + [str(HERE.parent)]

MODELS = ("resnet18", "resnet50", "efficientnet_b0", "mobilenetv3_small_100")
ALIASES = {"mobilenetv3_small": "mobilenetv3_small_100"}
SIDE = 512
WARM_UP = 3
DISTURBED = 0.05  # of the machine
FEWEST_STEPS = 10
TRAINER_STEPS = 8
TRAINER_WARM_UP = 4


def write_photos(folder: Path, count: int) -> Path:
    """Write JPEGs of two classes with the detail, and so the file size (about 90 KB), of photographs."""
    for label in "ab":
        (folder / label).mkdir(parents=True)
    with ProcessPoolExecutor() as pool:
        for _ in pool.map(partial(write_photo, folder), range(count), chunksize=64):
            pass
    return folder


def write_photo(folder: Path, number: int) -> None:
    """Write one of them, which follows from its number."""
    from PIL import Image

    draw = np.random.default_rng([0, number])
    pixels = np.zeros((SIDE, SIDE, 3), np.float32)
    for cells, height in ((4, 60), (16, 40), (64, 25), (256, 12)):
        coarse = draw.normal(0, height, (cells, cells, 3)).astype(np.float32)
        channels = [
            Image.fromarray(coarse[..., each]).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for each in range(3)
        ]
        pixels += np.stack(channels, axis=2)
    pixels[..., number % 2] += 30
    file = folder / "ab"[number % 2] / f"{number:05}.jpg"
    Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8)).save(file, quality=90)


def busy_s() -> float:
    """Return the seconds that all cores have worked for anybody; 0 where the system does not say it."""
    try:
        words = [int(each) for each in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    except OSError:
        return 0.0
    return (sum(words[:3]) + sum(words[5:8])) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Moment:
    """Seconds of the clock, of this process on a core, and of anybody on a core."""

    wall: float
    cpu: float
    busy: float

    @staticmethod
    def now() -> Moment:
        """Return the present one."""
        return Moment(time.perf_counter(), time.process_time(), busy_s())

    def __sub__(self, other: Moment) -> Moment:
        return Moment(self.wall - other.wall, self.cpu - other.cpu, self.busy - other.busy)

    @property
    def by_others(self) -> float:
        """Return the share of the machine that other processes took."""
        return max(0.0, (self.busy - self.cpu) / self.wall / (os.cpu_count() or 1))


@dataclass(frozen=True)
class Turn:
    """Some steps of ours and as many of the floor's after them: seconds of each, and on a core."""

    steps: int
    ours: Moment
    floor: Moment

    @property
    def by_others(self) -> float:
        """Return the share of the machine that other processes took."""
        return (self.ours - Moment(-self.floor.wall, -self.floor.cpu, -self.floor.busy)).by_others


class Floor:
    """The same step without its pipeline: forward, backward and optimiser on one resident batch."""

    def __init__(self, plan: Any, precision: Any, device: torch.device) -> None:
        from zoo.training.speed import made_up_batch, to_input
        from zoo.training.strategy import make_optimizer, set_trained

        self.precision, self.device = precision, device
        self.model = plan.model()[0].to(device).to(memory_format=precision.memory_format)
        set_trained(self.model, None)
        self.optimizer = make_optimizer(self.model, plan.recipe)
        size, classes = plan.preprocessing.image_size, len(plan.dataset.classes)
        pixels, labels, _ = made_up_batch(plan.recipe.finetune.batch_size, size, classes)
        self.images = to_input(pixels.numpy(), plan.preprocessing, precision, device)
        self.labels = labels.to(device)
        self.network = torch.compile(self.model) if precision.compiled else self.model

    def __call__(self, steps: int) -> None:
        """Make so many updates."""
        for _ in range(steps):
            with self.precision.autocast(self.device):
                logits = self.network(self.images)
            loss = torch.nn.functional.cross_entropy(logits.float(), self.labels)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Turns:
    """What `zoo.train` calls after each update: its own time stops there, and the floor takes its turn."""

    def __init__(self, floor: Floor, images: int, batch_size: int) -> None:
        self.floor, self.images, self.batch_size = floor, images, batch_size
        self.turns: list[Turn] = []
        self.seen, self.done, self.epoch = 0, 0, 0
        self.started = Moment.now()

    def __call__(self, tick: Any) -> None:
        """Take the time of the updates since the last call."""
        if tick.phase == "network" and (tick.epoch, tick.done) != (self.epoch, self.done):
            self._updates(tick)
        # The second tick of an epoch's last update comes when val is scored: the next step begins there.
        self.started = Moment.now()

    def _updates(self, tick: Any) -> None:
        if self.floor.device.type == "cuda":
            torch.cuda.synchronize(self.floor.device)
        ended = Moment.now()
        steps = tick.done - (self.done if tick.epoch == self.epoch else 0)
        self.epoch, self.done = tick.epoch, tick.done
        self.floor(steps)
        self.seen += steps
        whole = tick.done < tick.total or self.images % self.batch_size == 0
        if self.seen > WARM_UP and whole:
            self.turns.append(Turn(steps, ended - self.started, Moment.now() - ended))

    def counted(self) -> tuple[list[Turn], bool]:
        """Return the turns that nobody disturbed, or all where those are too few, and which of the two it is."""
        quiet = [turn for turn in self.turns if turn.by_others <= DISTURBED]
        return (quiet, True) if sum(turn.steps for turn in quiet) >= FEWEST_STEPS else (self.turns, False)


def make_recipe(model: str, chosen: argparse.Namespace) -> Any:
    """Return the recipe of one network: all of it is trained, from random weights, for as many epochs as rounds."""
    from zoo.recipe import parse_recipe

    table = {
        "model": {"name": model, "weights": "scratch", "image_size": chosen.size},
        "finetune": {"strategy": "full", "epochs": chosen.rounds, "batch_size": chosen.batch},
        "augment": {"policy": "light"},
        "optimizer": {"name": "adamw", "lr": 1e-4},
        "workers": "auto" if chosen.workers < 0 else chosen.workers,
        "precision": chosen.precision,
    }
    return parse_recipe(table, model)


def choose_precision(plan: Any, device: torch.device) -> Any:
    """Return the precision plan of the run: the one asked for, or the fastest of those measured now."""
    from zoo.training import precision
    from zoo.training.memory import freed_memory_kept
    from zoo.training.speed import plan_precision
    from zoo.training.strategy import set_trained

    model = plan.model()[0].to(device)
    set_trained(model, None)
    with freed_memory_kept():  # as training has it
        return plan_precision(plan, model, device, precision.FEWEST_STEPS, again=True)


def measure(model: str, dataset: Any, root: Any, chosen: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one network."""
    from zoo.data.cache import open_pixels
    from zoo.training.loop import train_plan
    from zoo.training.plan import make_plan
    from zoo.training.precision import choose_device

    plan = make_plan(make_recipe(model, chosen), dataset, 0, root, offline=True, accept_leaks=True)
    for file in (dataset.folder / ".cache").glob("pixels-*"):
        file.unlink()
    started = time.perf_counter()
    images = len(open_pixels(plan.dataset, "train", plan.preprocessing))
    decode_s = time.perf_counter() - started
    device = choose_device(plan.recipe.device)
    precision = choose_precision(plan, device)
    plan = make_plan(
        plan.recipe.model_copy(update={"precision": precision.name}), dataset, 0, root, offline=True, accept_leaks=True
    )
    if device.type == "cuda":
        from perf.on_cuda import measure_on_cuda

        row = measure_on_cuda(plan, Floor(plan, precision, device), precision, device, images, root.root / "kept")
        return {"model": model, **row, "decode_s": round(decode_s, 3), "precision": precision.name}
    turns = Turns(Floor(plan, precision, device), images, chosen.batch)
    train_plan(plan, turns)
    return {**figures(model, turns, images, decode_s), "precision": precision.name}


def figures(model: str, taken: Turns, images: int, decode_s: float) -> dict[str, Any]:
    """Return a row of the table from the seconds of both contestants."""
    turns, quiet = taken.counted()
    batch, steps = taken.batch_size, sum(turn.steps for turn in turns)
    ours, bare = (
        float(np.median(np.concatenate([[seconds / turn.steps] * turn.steps for turn, seconds in pairs])))
        for pairs in ([(turn, turn.ours.wall) for turn in turns], [(turn, turn.floor.wall) for turn in turns])
    )
    return {
        "model": model,
        "images_per_s": round(batch / ours, 2),
        "floor_images_per_s": round(batch / bare, 2),
        "ratio": round(bare / ours, 4),
        "ratio_of_sums": round(sum(turn.floor.wall for turn in turns) / sum(turn.ours.wall for turn in turns), 4),
        "cpu_ratio": round(sum(turn.floor.cpu for turn in turns) / sum(turn.ours.cpu for turn in turns), 4),
        "steps": steps,
        "steps_disturbed": sum(turn.steps for turn in taken.turns if turn.by_others > DISTURBED),
        "disturbed": not quiet,
        "batch": batch,
        "images": images,
        "decode_s": round(decode_s, 3),
        "images_per_s_first_epoch": round(images / (decode_s + images * ours / batch), 2),
    }


# transformers' Trainer --------------------------------------------------------------------------------------------


def trainer_alone(task: dict[str, Any]) -> dict[str, Any]:
    """Train a network by transformers' Trainer as its users do; return seconds of each step after the first few."""
    import timm
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = timm.create_model(task["model"], num_classes=2)

        def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.net(pixel_values)
            return {"loss": torch.nn.functional.cross_entropy(logits.float(), labels), "logits": logits}

    class Stamps(TrainerCallback):
        times: list[float] = []  # noqa: RUF012

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(time.perf_counter())

    steps = TRAINER_WARM_UP + TRAINER_STEPS
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=task["batch"], max_steps=steps, optim="adamw_torch",
            learning_rate=1e-4, dataloader_num_workers=task["workers"], bf16=task["bf16"], report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        stamps = Stamps()
        Trainer(Network(), arguments, train_dataset=Files(task), callbacks=[stamps]).train()
    return {"seconds": np.diff(stamps.times)[TRAINER_WARM_UP - 1 :].tolist()}


class Files(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """The files of train, decoded and augmented whenever one is asked for, by the fastest libraries there are."""

    def __init__(self, task: dict[str, Any]) -> None:
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
        import albumentations as a
        import cv2

        cv2.setNumThreads(0)
        size = (task["size"], task["size"])
        self.files, self.labels = task["files"], task["labels"]
        self.augment = a.Compose(
            [
                a.RandomResizedCrop(size, scale=(0.7, 1.0), ratio=(0.85, 1.18)),
                a.HorizontalFlip(p=0.5),
                a.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.15, brightness_by_max=False, p=0.5),
                a.Normalize(),
                a.ToTensorV2(),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: int) -> dict[str, Any]:
        import cv2

        pixels = cv2.cvtColor(cv2.imread(self.files[place]), cv2.COLOR_BGR2RGB)
        return {"pixel_values": self.augment(image=pixels)["image"], "labels": self.labels[place]}


def trainer_variants() -> list[dict[str, Any]]:
    """Return the ways in which the Trainer is tried: without and with loading processes, in float32 and in bf16."""
    return [{"workers": workers, "bf16": bf16} for bf16 in (False, True) for workers in (0, 2)]


def one_trainer(task: dict[str, Any], folder: Path) -> list[float]:
    """Return the seconds of each step of a Trainer in a process of its own; none where it cannot do it."""
    file = folder / "task.json"
    file.write_text(json.dumps(task))
    done = subprocess.run(
        [sys.executable, __file__, "--trainer-alone", str(file)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(f"Trainer {task['model']} bf16={task['bf16']}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return []
    seconds: list[float] = json.loads(done.stdout.splitlines()[-1])["seconds"]
    return seconds


def measure_against(model: str, dataset: Any, root: Any, chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the figures of one network, and of the Trainer in turns with ours."""
    rows = dataset.of_split("train")
    task = {
        "model": model,
        "batch": chosen.batch,
        "size": chosen.size,
        "files": [str(dataset.image_path(path)) for path in rows["path"]],
        "labels": [dataset.classes.index(label) for label in rows["label"]],
    }
    variants = trainer_variants()
    seconds: list[list[float]] = [[] for _ in variants]
    ours = []
    for number in range(2):
        again = copy.copy(chosen)
        again.rounds = max(1, chosen.rounds // 2)
        ours.append(measure(model, dataset, replace(root, root=root.root / f"turn-{model}-{number}"), again))
        for place, variant in enumerate(variants):
            seconds[place] += one_trainer({**task, **variant}, folder)
    row = max(ours, key=lambda each: each["images_per_s"])
    rates = {
        f"{'bf16' if each['bf16'] else 'float32'}, {each['workers']} workers": round(
            chosen.batch / float(np.median(found)), 2
        )
        for each, found in zip(variants, seconds, strict=True)
        if found
    }
    best = {
        name: max((rate for key, rate in rates.items() if key.startswith(name)), default=None)
        for name in ("float32", "bf16")
    }
    return {
        **row,
        "trainer": rates,
        "trainer_float32_images_per_s": best["float32"],
        "trainer_bf16_images_per_s": best["bf16"],
        "trainer_default_ratio": best["float32"] and round(row["images_per_s"] / best["float32"], 3),
        "trainer_ratio": rates and round(row["images_per_s"] / max(rates.values()), 3),
    }


# The command ------------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="timm's architectures, with commas between them")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224, help="pixels of each side")
    parser.add_argument("--images", type=int, default=512, help="images of the dataset, nine in ten of them for train")
    parser.add_argument("--rounds", type=int, default=3, help="epochs that are measured")
    parser.add_argument("--workers", type=int, default=-1, help="loading processes; left out: zoo's own choice")
    parser.add_argument("--precision", default="auto", help="auto measures; or a plan's name: bf16-channels-last, ...")
    parser.add_argument("--against", choices=["transformers"])
    parser.add_argument("--trainer-alone", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    missing = [name for name in ("transformers", "accelerate") if importlib.util.find_spec(name) is None]
    if chosen.against and missing:
        parser.error(
            f"--against transformers needs {' and '.join(missing)} beside zoo: pip install {' '.join(missing)}"
        )
    return chosen


def run(chosen: argparse.Namespace, report: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    """Make the data, measure each network and report its row; return all rows."""
    from zoo.data.sources import import_dataset
    from zoo.files import home

    rows = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.environ.update(ZOO_HOME=str(folder), HF_HUB_OFFLINE="1")
        root = home(folder)
        dataset = import_dataset(
            write_photos(folder / "photos", chosen.images), "photos", root, ratios=(0.9, 0.05, 0.05),
            near_duplicates=False,
        )  # fmt: skip
        for name in chosen.models.split(","):
            model = ALIASES.get(name, name)
            if chosen.against:
                rows.append(measure_against(model, dataset, root, chosen, folder))
            else:
                rows.append(measure(model, dataset, root, chosen))
            report(rows[-1])
    return rows


def main() -> None:
    """Measure, print a table, and end with one JSON line."""
    chosen = parse()
    if chosen.trainer_alone:
        print(json.dumps(trainer_alone(json.loads(chosen.trainer_alone.read_text()))))
        return
    print(
        f"{'network':24} {'plan':22} {'images/s':>9} {'floor':>9} {'ratio':>7} {'of sums':>8} {'first epoch':>12}",
        end="",
    )
    print(f" {'Trainer':>9} {'ratio':>7}" if chosen.against else "")

    def report(row: dict[str, Any]) -> None:
        print(
            f"{row['model']:24} {row['precision']:22} {row['images_per_s']:9.1f} {row['floor_images_per_s']:9.1f} "
            f"{row['ratio']:7.3f}",
            end="",
        )
        if "whole_ratio" in row:
            print(f" whole epochs {row['whole_ratio']:.3f}, loader alone {row['loader_images_per_s']:.1f}", flush=True)
            return
        print(f" {row['ratio_of_sums']:8.3f} {row['images_per_s_first_epoch']:12.1f}", end="")
        rates = row.get("trainer")
        print(f" {max(rates.values()):9.1f} {row['trainer_ratio']:7.2f}" if rates else "", flush=True)

    rows = run(chosen, report)
    from zoo.training.environment import device_name, versions
    from zoo.training.precision import choose_device

    found = versions()
    if chosen.against:
        found |= {name: importlib.metadata.version(name) for name in ("transformers", "accelerate")}
    environment = {"device": device_name(choose_device("auto")), "cores": os.cpu_count(), "versions": found}
    print(json.dumps({"rows": rows, "environment": environment}))


if __name__ == "__main__":
    main()
