"""How long a recipe will take here: a few of its steps on made-up images, times all that there will be."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from zoo.cores import cores
from zoo.data.decode import BadImage, decode, resize
from zoo.data.manifest import Dataset
from zoo.data.transforms import make_augment
from zoo.data.window import windowing_of
from zoo.files import home
from zoo.models.registry import classifier_of, find_model, own_network_digest
from zoo.recipe import Recipe
from zoo.runs import Preprocessing
from zoo.training.memory import freed_memory_kept
from zoo.training.plan import Plan, build_model, preprocessing_of
from zoo.training.precision import PrecisionPlan, choose_device, choose_workers, set_threads
from zoo.training.speed import FORWARD_BATCH, Steps, forward_steps, plan_precision, training_steps
from zoo.training.strategy import Phase, make_optimizer, phases, set_trained, trained_names

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

    images: of train, val and test. The steps are training's own, under the precision plan that it would have here,
    which is measured and kept where this machine does not know it yet. Nothing is downloaded, and only training images
    are read, some of them to time decoding. A recipe that stops early takes less. Raises ZooError where the recipe
    cannot be built.
    """
    plan = _plan(recipe, dataset)
    device = choose_device(recipe.device)
    set_threads()
    model = build_model(recipe, plan.spec, plan.preprocessing, len(dataset.classes)).to(device)
    steps = {phase.name: phase for phase in phases(recipe)}
    with freed_memory_kept():
        precision, train_rate = _network_rate(plan, model, steps.get("network"), device, images)
        score_rate = FORWARD_BATCH / _median_s(forward_steps(plan, model, device), precision)
    features_s = seed_s = 0.0
    if "head" in steps:
        once = (images["train"] + images["val"]) / score_rate
        if recipe.model.weights == "scratch":  # random features are another seed's too, and are not kept
            seed_s += once
        else:
            features_s += once
        seed_s += steps["head"].epochs * _head_epoch_s(model, recipe, images["train"])
    if train_rate is not None:
        seed_s += steps["network"].epochs * (images["train"] / train_rate + images["val"] / score_rate)
    seed_s += images["test"] / score_rate
    decode_s = _decode_s(dataset, plan.preprocessing) * sum(images.values())
    return Estimate(decode_s, features_s, seed_s, train_rate, score_rate, f"{device}, {precision.name}")


def _plan(recipe: Recipe, dataset: Dataset) -> Plan:
    """Return a plan of the recipe from random weights, which need not be there to be timed."""
    spec = find_model(recipe.model.name)
    preprocessing = preprocessing_of(recipe, spec, None, dataset)
    with torch.device("meta"):
        network = own_network_digest(spec, build_model(recipe, spec, preprocessing, len(dataset.classes)))
    return Plan(recipe, dataset, 0, home(), spec, preprocessing, None, "scratch", "", "", None, network)


def _network_rate(
    plan: Plan, model: nn.Module, phase: Phase | None, device: torch.device, images: dict[str, int]
) -> tuple[PrecisionPlan, float | None]:
    """Return the precision plan, and images per second of training, augmentation and all; None for a probe."""
    recipe = plan.recipe
    batch = recipe.finetune.batch_size
    if phase is None:
        steps = (images["train"] + images["val"]) // FORWARD_BATCH
        return plan_precision(plan, model, device, steps, training=False), None
    set_trained(model, trained_names(model, recipe, phase, phase.first_epoch))
    precision = plan_precision(plan, model, device, phase.epochs * -(-images["train"] // batch))
    step_s = _median_s(training_steps(plan, model, device), precision)
    workers = choose_workers(recipe.workers, device)
    augment_s = batch * _augment_s(recipe, plan.preprocessing)
    # Workers augment beside the step; without them as many threads as torch has do so before it.
    taken = max(step_s, augment_s / workers) if workers else step_s + augment_s / torch.get_num_threads()
    return precision, batch / taken


def _median_s(steps: Steps, precision: PrecisionPlan) -> float:
    """Return the median seconds of a step after one to warm up; steps go on for some seconds."""
    first = steps(replace(precision, compiled=False), 2)[-1][0]
    count = max(1, min(10, int(_SECONDS / max(first, 1e-6))))
    return float(np.median([seconds for seconds, _ in steps(replace(precision, compiled=False), 1 + count)[1:]]))


def _seconds_of(step: Callable[[], Any], most: int) -> float:
    """Return the median seconds of something small after two to warm up; it goes on for some seconds."""
    taken: list[float] = []
    begun = time.perf_counter()
    while len(taken) < 2 + most and (len(taken) < 4 or time.perf_counter() - begun < _SECONDS):
        started = time.perf_counter()
        step()
        taken.append(time.perf_counter() - started)
    return float(np.median(taken[2:]))


def _augment_s(recipe: Recipe, preprocessing: Preprocessing) -> float:
    augment = make_augment(recipe.policy, recipe.augment.transforms, preprocessing.image_size, 0)
    side = preprocessing.resize_size
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    numbers = iter(range(10**9))
    return _seconds_of(lambda: augment(image, 1, next(numbers)), 200)


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

    return _seconds_of(step, 100) * max(1, round(images / count))


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
