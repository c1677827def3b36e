"""How long a recipe will take here: a few of its steps on made-up images, times all that there will be."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from zoo.data.decode import BadImage, decode, resize
from zoo.data.manifest import Dataset
from zoo.data.transforms import make_augment, normalise_tensor
from zoo.data.window import windowing_of
from zoo.models.registry import classifier_of, find_model
from zoo.recipe import Recipe
from zoo.runs import Preprocessing
from zoo.training.features import FORWARD_BATCH
from zoo.training.plan import build_model, preprocessing_of
from zoo.training.precision import PrecisionPlan, choose_device, choose_plan, choose_workers, cores, set_threads
from zoo.training.strategy import make_optimizer, phases

_SECONDS = 1.5  # for each thing that is measured
_DECODED = 24  # images


@dataclass(frozen=True)
class Estimate:
    """Seconds that a recipe is expected to take: decoding once, features once where they are kept, and each seed."""

    decode_s: float
    features_s: float
    seed_s: float
    train_images_per_s: float | None
    score_images_per_s: float
    device: str

    def total_s(self, seeds: int) -> float:
        """Return the seconds of so many seeds, one after the other."""
        return self.decode_s + self.features_s + seeds * self.seed_s


def estimate(recipe: Recipe, dataset: Dataset, images: dict[str, int]) -> Estimate:
    """Measure a few steps of a recipe, with random weights on made-up images, and return what a run will take.

    images: of train, val and test. Nothing is downloaded or written, and only training images are read, some of them
    to time decoding. A recipe that stops early takes less. Raises ZooError where the recipe cannot be built.
    """
    spec = find_model(recipe.model.name)
    preprocessing = preprocessing_of(recipe, spec, None, dataset)
    device = choose_device(recipe.device)
    set_threads()
    precision = choose_plan(recipe.precision, device)
    model = build_model(recipe, spec, preprocessing, len(dataset.classes))
    model = model.to(device).to(memory_format=precision.memory_format)
    score_rate = _score_rate(model, preprocessing, precision, device, sum(images.values()))
    features_s = seed_s = 0.0
    train_rate = None
    for phase in phases(recipe):
        if phase.name == "head":
            once = (images["train"] + images["val"]) / score_rate
            if recipe.model.weights == "scratch":  # random features are another seed's too, and are not kept
                seed_s += once
            else:
                features_s += once
            seed_s += phase.epochs * _head_epoch_s(model, recipe, images["train"])
        else:
            train_rate = _train_rate(model, recipe, preprocessing, precision, device, images["train"])
            seed_s += phase.epochs * (images["train"] / train_rate + images["val"] / score_rate)
    seed_s += (images["val"] + images["test"]) / score_rate
    decode_s = _decode_s(dataset, preprocessing) * sum(images.values())
    return Estimate(decode_s, features_s, seed_s, train_rate, score_rate, str(device))


def _seconds_of(step: Callable[[], Any], device: torch.device, most: int) -> float:
    """Return the median seconds of a step after two to warm up; steps go on for some seconds."""
    taken: list[float] = []
    begun = time.perf_counter()
    while len(taken) < 2 + max(1, most) and (len(taken) < 4 or time.perf_counter() - begun < _SECONDS):
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
        if time.perf_counter() - begun > 10 * _SECONDS:  # one step of a huge network is enough
            break
    return float(np.median(taken[2:] or taken[-1:]))


def _score_rate(
    model: nn.Module, preprocessing: Preprocessing, precision: PrecisionPlan, device: torch.device, images: int
) -> float:
    """Return images per second of a forward pass, as scoring does it."""
    count = min(FORWARD_BATCH, max(1, images))
    batch = _made_up(count, preprocessing)
    model.eval()

    def step() -> None:
        with torch.inference_mode(), precision.autocast(device):
            model(precision.place(normalise_tensor(batch.to(device), preprocessing))).float().cpu()

    return count / _seconds_of(step, device, 10)


def _train_rate(
    model: nn.Module,
    recipe: Recipe,
    preprocessing: Preprocessing,
    precision: PrecisionPlan,
    device: torch.device,
    images: int,
) -> float:
    """Return images per second of training, augmentation and all."""
    count = max(1, min(recipe.finetune.batch_size, images))
    batch = _made_up(count, preprocessing)
    labels = torch.zeros(count, dtype=torch.int64, device=device)
    optimizer = make_optimizer(model, recipe)
    model.train()

    def step() -> None:
        with precision.autocast(device):
            logits = model(precision.place(normalise_tensor(batch.to(device), preprocessing)))
            loss = nn.functional.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    step_s = _seconds_of(step, device, 10)
    workers = choose_workers(recipe.workers, device)
    augment_s = count * _augment_s(recipe, preprocessing)
    # Workers augment beside the step; without them it adds to it.
    return count / (max(step_s, augment_s / workers) if workers else step_s + augment_s)


def _augment_s(recipe: Recipe, preprocessing: Preprocessing) -> float:
    augment = make_augment(recipe.policy, recipe.augment.transforms, preprocessing.image_size, 0)
    side = preprocessing.resize_size
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    numbers = iter(range(10**9))
    return _seconds_of(lambda: augment(image, 1, next(numbers)), torch.device("cpu"), 200)


def _head_epoch_s(model: nn.Module, recipe: Recipe, images: int) -> float:
    """Return seconds of an epoch of the head alone, on features of the right width."""
    _, classifier = classifier_of(model)
    if not isinstance(classifier, nn.Linear):
        return 0.0
    count = max(1, min(recipe.finetune.batch_size, images))
    head = nn.Linear(classifier.in_features, classifier.out_features)
    values, labels = torch.randn(count, classifier.in_features), torch.zeros(count, dtype=torch.int64)
    optimizer = make_optimizer(head, recipe, 1e-3)

    def step() -> None:
        loss = nn.functional.cross_entropy(head(values), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return _seconds_of(step, torch.device("cpu"), 100) * max(1, round(images / count))


def _made_up(count: int, preprocessing: Preprocessing) -> torch.Tensor:
    side = preprocessing.image_size
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8))


def _decode_s(dataset: Dataset, preprocessing: Preprocessing) -> float:
    """Return seconds for each image to be decoded and resized on all cores, out of some training images."""
    paths = dataset.of_split("train")["path"].tolist()
    begun, read = time.perf_counter(), 0
    for path in paths[:: max(1, len(paths) // _DECODED)][:_DECODED]:
        try:
            decoded = decode(dataset.image_path(path).read_bytes(), windowing_of(preprocessing))
            resize(decoded, preprocessing.resize_size, preprocessing.interpolation)
            read += 1
        except (OSError, BadImage):
            continue
    return (time.perf_counter() - begun) / read / cores() if read else 0.0
