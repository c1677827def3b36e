"""The learning-rate range test: a few updates with a rate that grows, and where the loss falls fastest.

Smith 2017, arXiv 1506.01186. The network learns nothing that is kept: its weights are thrown away.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from zoo.data.cache import Pixels, open_pixels
from zoo.data.loader import Batch, TrainBatches, epoch_order
from zoo.data.transforms import make_augment
from zoo.errors import ZooError
from zoo.models.registry import classifier_of
from zoo.training import features as feature_cache
from zoo.training.head import HeadTrainer
from zoo.training.loop import OnTick, Tick
from zoo.training.loss import make_criterion
from zoo.training.memory import is_out_of_memory
from zoo.training.plan import Plan
from zoo.training.precision import PrecisionPlan, choose_device, choose_plan, choose_workers, set_threads
from zoo.training.step import NonFiniteLossError, Updater, step_seed
from zoo.training.strategy import (
    DEFAULT_HEAD_LR,
    Phase,
    image_size_of,
    make_optimizer,
    phases,
    set_trained,
    trained_names,
)

LOW, HIGH = 1e-6, 10.0
UPDATES = 100
_SMOOTH = 3.0  # updates: standard deviation of the weights of neighbours
_LEAST = 10  # updates before the test may stop
_RISE = 0.2  # of how far the loss had fallen: what is more than scatter
_BELOW_LOWEST = 10.0  # the rate of the lowest loss is about to diverge; a tenth of it is not


@dataclass(frozen=True)
class LrRange:
    """What a range test found; all rates are those of the top layer group.

    key: of the recipe, `optimizer.lr` or `finetune.head_lr`; own: its present value. lrs, losses, smoothed: of each
    update. steepest: where the smoothed loss falls fastest over the rate's logarithm; lowest: where it is lowest before
    its first clear rise. suggested: the smaller of `steepest` and a tenth of `lowest`; all three None where the loss
    never fell clearly. stopped: where the test ended.
    """

    key: str
    own: float
    lrs: list[float]
    losses: list[float]
    smoothed: list[float]
    steepest: float | None
    lowest: float | None
    suggested: float | None
    stopped: str

    def document(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return dict(vars(self))


def lr_range(plan: Plan, updates: int = UPDATES, on_tick: OnTick | None = None) -> LrRange:
    """Train so many updates from the plan's start, the learning rate growing from 1e-6 to 10, and return the losses.

    Optimiser, loss, augmentation and batch are the recipe's own; a head that the recipe trains first is trained first.
    A linear probe's rate is that of its head. Only training images are looked at, and nothing is written but caches.
    The same plan gives the same losses. Raises ZooError where the data cannot be read or the memory does not suffice,
    and NonFiniteLossError where the first loss already is no number.
    """
    if updates < 2 * _LEAST:
        raise ZooError(f"a range test needs at least {2 * _LEAST} updates. Got {updates}")
    tick = on_tick or (lambda _: None)
    try:
        return _Test(plan, updates, tick).run()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ZooError("the range test ran out of memory; lower finetune.batch_size or model.image_size") from error


class _Test:
    """One range test in progress."""

    def __init__(self, plan: Plan, updates: int, tick: OnTick) -> None:
        self.plan, self.recipe, self.updates, self.tick = plan, plan.recipe, updates, tick
        self.device = choose_device(plan.recipe.device)
        set_threads()
        self.precision: PrecisionPlan = choose_plan(plan.recipe.precision, self.device)
        self.pixels = self._pixels()
        self.counts = np.bincount(self.pixels.y_true, minlength=len(plan.dataset.classes))

    def _pixels(self) -> Pixels:
        def on_image(done: int, total: int) -> None:
            self.tick(Tick(self.plan.run.name, "decoding train", done, total))

        return open_pixels(self.plan.dataset, "train", self.plan.preprocessing, self.plan.bad_images, on_image)

    def run(self) -> LrRange:
        """Return what the test of the recipe's last phase found."""
        model, _ = self.plan.model()
        model = model.to(self.device).to(memory_format=self.precision.memory_format)
        head: HeadTrainer | None = None
        for phase in phases(self.recipe):
            if phase.name == "network":
                if head is not None:
                    state = [state for _, _, state in head.epochs()][-1]()
                    feature_cache.load_grown(model, {**model.state_dict(), **state})
                return self._network(model, phase)
            head = self._head_trainer(model, phase)
        assert head is not None  # every recipe has a phase
        return self._head(head)

    # The head on cached features ------------------------------------------------------------------------------

    def _head_trainer(self, model: nn.Module, phase: Phase) -> HeadTrainer:
        name, classifier = classifier_of(model)
        self.tick(Tick(self.plan.run.name, "features", 0, 1))
        features = feature_cache.split_features(model, self.pixels, "train", self.plan, self.precision, self.device)
        criterion = make_criterion(self.recipe.loss, self.counts, torch.device("cpu"))
        few = feature_cache.Features(features.values[:1], features.y_true[:1], 0.0, True)  # val plays no part here
        return HeadTrainer(self.recipe, self.plan.seed, phase, name, classifier, features, few, criterion)

    def _head(self, head: HeadTrainer) -> LrRange:
        head.head.train()
        places = self._places(head)

        def update(_: int) -> float:
            own = next(places)
            loss = head.criterion(head.head(head.train.values[own]), head.train.y_true[own])
            head.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            head.optimizer.step()
            return float(loss.detach())

        torch.manual_seed(step_seed(self.plan.seed, 0, 0))
        return self._sweep("finetune.head_lr", self.recipe.finetune.head_lr or DEFAULT_HEAD_LR, head.optimizer, update)

    def _places(self, head: HeadTrainer) -> Iterator[Any]:
        for epoch in itertools.count(1):
            yield from epoch_order(len(head.train.values), head.batch_size, self.plan.seed, epoch, head.labels)

    # The whole network on augmented images ----------------------------------------------------------------------

    def _network(self, model: nn.Module, phase: Phase) -> LrRange:
        set_trained(model, trained_names(model, self.recipe, phase, phase.first_epoch))
        updater = Updater(
            self.recipe,
            self.plan.preprocessing,
            self.plan.seed,
            self.device,
            self.precision,
            make_criterion(self.recipe.loss, self.counts, self.device),
            model,
            make_optimizer(model, self.recipe),
            len(self.plan.dataset.classes),
            scaler=self.precision.scaler(self.device),
        )
        size = image_size_of(self.recipe, phase, phase.first_epoch, self.plan.preprocessing.image_size)
        batches = self._batches()
        several = self._several(batches, phase.first_epoch)

        def update(number: int) -> float:
            return float(updater.update(next(several), 0, 1 + number * self.recipe.finetune.accumulate, size)[0])

        try:
            return self._sweep("optimizer.lr", self.recipe.optimizer.lr, updater.optimizer, update)
        finally:
            batches.close()

    def _batches(self) -> TrainBatches:
        recipe, plan = self.recipe, self.plan
        return TrainBatches(
            self.pixels,
            make_augment(recipe.policy, recipe.augment.transforms, plan.preprocessing.image_size, plan.seed),
            min(recipe.finetune.batch_size, len(self.pixels)),
            plan.seed,
            choose_workers(recipe.workers, self.device),
            pin_memory=self.device.type == "cuda",
            balanced=recipe.finetune.sampler == "balanced",
        )

    def _several(self, batches: TrainBatches, first: int) -> Iterator[list[Batch]]:
        """Yield the batches of each update, epoch after epoch."""
        for epoch in itertools.count(first):
            images = batches.epoch(epoch)
            while found := list(itertools.islice(images, self.recipe.finetune.accumulate)):
                yield found

    # What both share --------------------------------------------------------------------------------------------

    def _sweep(self, key: str, own: float, optimizer: torch.optim.Optimizer, update: Callable[[int], float]) -> LrRange:
        lrs: list[float] = []
        losses: list[float] = []
        stopped = f"the last, at {HIGH:g}"
        for number in range(self.updates):
            lr = LOW * (HIGH / LOW) ** (number / (self.updates - 1))
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            loss = update(number)
            if not number and not math.isfinite(loss):
                raise NonFiniteLossError(
                    f"the loss was not finite at the lowest learning rate of the test, {lr:.0e}, so that no rate mends "
                    "it; check model.mean, model.std and the weights, or set precision=float32"
                )
            if not math.isfinite(loss):
                stopped = f"the loss was no number at {lr:.2g}"
                break
            lrs.append(lr)
            losses.append(loss)
            self.tick(Tick(self.plan.run.name, f"lr {lr:.1e}", number + 1, self.updates, loss=loss))
            if _diverged(losses):
                stopped = f"the loss diverged at {lr:.2g}"
                break
        return _found(key, own, lrs, losses, stopped)


def _diverged(losses: list[float]) -> bool:
    """Return whether the last losses are far above those of the beginning: twice as high, and half a unit."""
    if len(losses) < 2 * _LEAST:
        return False
    first, last = float(np.median(losses[:_LEAST])), float(np.median(losses[-3:]))
    return last > first + max(first, 0.5)


def _found(key: str, own: float, lrs: list[float], losses: list[float], stopped: str) -> LrRange:
    smoothed = smooth(losses)
    least = _first_lowest(smoothed)
    # The loss must fall by more than twice what single batches scatter about the curve, or the fall is chance.
    scatter = 1.4826 * float(np.median(np.abs(np.subtract(losses, smoothed)))) if losses else 0.0
    if not least or smoothed[0] - smoothed[least] <= max(2 * scatter, 1e-6):
        return LrRange(key, own, lrs, losses, smoothed, None, None, None, stopped)
    slopes = np.gradient(smoothed[: least + 1], np.log(lrs[: least + 1]))
    steepest, lowest = lrs[int(np.argmin(slopes))], lrs[least]
    suggested = float(f"{min(steepest, lowest / _BELOW_LOWEST):.2g}")
    return LrRange(key, own, lrs, losses, smoothed, steepest, lowest, suggested, stopped)


def _first_lowest(smoothed: list[float]) -> int:
    """Return the place of the lowest loss before it first rises clearly, by a fifth of how far it had fallen."""
    least = 0
    for place, value in enumerate(smoothed):
        if value < smoothed[least]:
            least = place
        elif value - smoothed[least] > _RISE * (max(smoothed[: least + 1]) - smoothed[least]) and least >= _LEAST:
            break
    return least


def smooth(losses: list[float]) -> list[float]:
    """Return a curve without the scatter of single batches and without lag: medians of five, then Gaussian weights.

    >>> smooth([1.0, 1.0, 9.0, 1.0, 1.0])
    [1.0, 1.0, 1.0, 1.0, 1.0]
    """
    middle = [float(np.median(losses[max(0, place - 2) : place + 3])) for place in range(len(losses))]
    places = np.arange(len(losses))
    weights = np.exp(-0.5 * ((places[:, None] - places) / _SMOOTH) ** 2)
    return [round(float(value), 12) for value in (weights * middle).sum(1) / weights.sum(1)]
