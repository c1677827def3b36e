"""One epoch of the whole network: forward, backward and update over augmented batches."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from zoo.data.loader import Batch, share
from zoo.data.transforms import normalise_tensor
from zoo.errors import ZooError
from zoo.recipe import Recipe
from zoo.runs import Preprocessing
from zoo.training.boundary import Boundary
from zoo.training.checkpoint import Progress
from zoo.training.interruption import Interruption
from zoo.training.loss import Criterion
from zoo.training.parallel import ALONE, Group
from zoo.training.precision import PrecisionPlan

FINITE_FIX = "lower optimizer.lr, or set finetune.clip_grad = 1.0"
CHECK_EVERY = 20  # updates, on a GPU, which waits for each number that is asked of it
VOTE_S = 1.0  # in which several processes ask each other at least once whether to stop, if an update takes no longer


class NonFiniteLossError(ZooError):
    """Training stopped because the loss was no number."""


@dataclass
class Updater:
    """Forward, backward and update: what one step of a recipe is, whoever asks for it.

    network: what is called in place of the model, compiled or in several processes. boundary: where the network goes on
    from activations that take the images' place.
    """

    recipe: Recipe
    preprocessing: Preprocessing
    seed: int
    device: torch.device
    precision: PrecisionPlan
    criterion: Criterion
    model: nn.Module
    optimizer: torch.optim.Optimizer
    classes: int
    group: Group = ALONE
    parts: int = 1
    scaler: torch.amp.GradScaler | None = None
    network: Callable[[torch.Tensor], torch.Tensor] | None = None
    boundary: Boundary | None = None

    def __post_init__(self) -> None:
        self.mixup = _make_mixup(self.recipe, self.classes)
        self.applying = False  # whether weights may have been changed by an update that is not done

    def update(
        self, batches: list[Batch], epoch: int, number: int, image_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Make one update from one or several batches; the gradients are those of the batches as one.

        number: of the first batch within its epoch, from 1. Returns loss and hits of this process's images: summed
        over all processes, the mean loss of the update and the number of images that were right.
        """
        self.applying = False
        self.optimizer.zero_grad(set_to_none=True)
        counts = [len(labels) for _, labels, _ in batches]
        if self.group.world > 1:
            counts = [int(count) for count in self.group.total([float(each) for each in counts], self.device)]
        mixed = [self.mixup is not None and count > 1 for count in counts]
        alone = self.group.world == 1 and len(batches) == 1 and self.parts == 1
        whole = None if alone else self._denominator(batches, mixed)
        loss_sum = torch.zeros((), device=self.device)
        hits = torch.zeros((), dtype=torch.int64, device=self.device)
        for place, (pixels, true, _) in enumerate(batches):
            inputs = self._inputs(pixels, true, step_seed(self.seed, epoch, number + place), image_size, mixed[place])
            sizes = piece_sizes(len(true), self.parts, self.recipe.finetune.batch_size)
            pieces = list(zip(*(torch.split(each, sizes) for each in inputs), strict=True))
            noise = self.group.noise(share(counts[place], self.group.rank, self.group.world), counts[place])
            for piece, (images, targets, labels) in enumerate(pieces, 1):
                with noise, self._unsynced(last=place == len(batches) - 1 and piece == len(pieces)):
                    loss, right = self._backward(images, targets, labels, whole)
                loss_sum += loss
                hits += right
        self._apply()
        return loss_sum, hits

    def _inputs(
        self, pixels: torch.Tensor, labels: torch.Tensor, seed: int, image_size: int, mixed: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # Dropout, drop-path and mixing follow from (seed, epoch, step) alone: no random state to keep.
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        labels = labels.to(self.device, non_blocking=True)
        if self.boundary is not None:  # activations, kept where the frozen stages end
            return pixels.to(self.device, non_blocking=True), labels, labels
        images = normalise_tensor(pixels.to(self.device, non_blocking=True), self.preprocessing)
        if image_size != images.shape[-1]:
            size = (image_size, image_size)
            images = functional.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
        targets = labels
        if mixed:
            images, targets = self._mix(images, labels)
        return images, targets, labels

    def _mix(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix a batch with its own reverse, as timm's `Mixup` does; the middle one of an odd number with itself."""
        if len(images) % 2 == 0:
            mixed: tuple[torch.Tensor, torch.Tensor] = self.mixup(images, labels)
            return mixed
        middle = len(images) // 2  # twice, for timm refuses odd numbers
        images, targets = self.mixup(*(torch.cat((each[: middle + 1], each[middle:])) for each in (images, labels)))
        images, targets = (torch.cat((each[: middle + 1], each[middle + 2 :])) for each in (images, targets))
        return images, targets

    def _denominator(self, batches: list[Batch], mixed: list[bool]) -> float:
        """Return what the sum of losses is divided by to be the mean over all batches and processes."""
        own = 0.0
        for (_, labels, _), soft in zip(batches, mixed, strict=True):
            own += len(labels) if soft else float(self.criterion.denominator(labels.to(self.device)))
        return self.group.total([own], self.device)[0]

    def _unsynced(self, last: bool) -> AbstractContextManager[Any]:
        """Return the context in which gradients stay within their process until the last part is done."""
        skip = getattr(self.network, "no_sync", None)
        return nullcontext() if last or skip is None else skip()

    def _backward(
        self, images: torch.Tensor, target: torch.Tensor, labels: torch.Tensor, whole: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self._logits(self.model if self.network is None else self.network, images)
        if whole is None:
            loss = self.criterion(logits.float(), target)
        else:
            loss = self.criterion.sums(logits.float(), target)[0] / whole
        # Gradients are averaged over processes: times their number they are the sum's.
        scaled = loss if self.group.world == 1 else loss * self.group.world
        scaled = scaled if self.scaler is None else self.scaler.scale(scaled)
        scaled.backward()
        return loss.detach(), (logits.detach().argmax(1) == labels).sum()

    def _logits(self, network: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        starts = self.boundary.replay(self.model) if self.boundary is not None else nullcontext()
        with self.precision.autocast(self.device), starts:
            return network(self.precision.place(images) if self.boundary is None else images)

    def dry_logits(self, image_size: int) -> torch.Tensor:
        """Return the model's own logits (2, classes) of two blank images, with their gradients' past."""
        images = torch.zeros(2, 3, image_size, image_size, device=self.device)
        if self.boundary is not None:
            images = images.new_zeros((2, *self.boundary.shape), dtype=self.boundary.dtype)
        return self._logits(self.model, images)

    def _apply(self) -> None:
        self.applying = True
        clip = self.recipe.finetune.clip_grad
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()


class Batches(Protocol):
    """What an epoch's batches come from."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from number `start` on."""
        ...


@dataclass
class EpochTrainer:
    """The updates of an epoch: counted, checked, told of, and saved now and then."""

    updater: Updater
    progress: Progress
    scheduler: Any
    ema: Any
    interruption: Interruption
    report: Callable[[int, int, dict[str, Any]], None]
    save: Callable[[], None]
    checkpoint_s: float

    def __post_init__(self) -> None:
        self.check_every = 1 if self.updater.device.type == "cpu" else CHECK_EVERY
        self.saved_at = self.voted_at = time.perf_counter()
        self.voted = self.next_vote = 0  # updates, at the last vote of several processes and at the next
        self.whole = True  # whether model, optimiser and counters belong to the same moment
        self.updating = False  # stays where an error ends an update
        # Until the optimiser's step only these have changed: with them as they were, an update was not begun.
        self.buffers = list(self.updater.model.buffers())
        self.before = [buffer.clone() for buffer in self.buffers]
        self.pending: list[tuple[torch.Tensor, torch.Tensor, int]] = []

    def epoch(self, batches: Batches, epoch: int, image_size: int) -> dict[str, Any]:
        """Train what is left of an epoch; return its row of the history. The sums stay until the epoch is scored."""
        sums = {"loss": 0.0, "hits": 0.0, "images": 0.0, "seconds": 0.0, **self.progress.partial}
        self.progress.partial = sums
        # One of several processes may not leave by itself: all do, by a vote.
        together = self.interruption.step() if self.updater.group.world > 1 else nullcontext()
        try:
            with together:
                self._updates(batches, epoch, image_size)
        except KeyboardInterrupt:
            self._settle(epoch)
            raise
        return self._row(epoch)

    def _updates(self, batches: Batches, epoch: int, image_size: int) -> None:
        """Make the updates that are left of an epoch, and look up from them now and then."""
        progress, sums = self.progress, self.progress.partial
        accumulate = self.updater.recipe.finetune.accumulate
        started, before, begun_with = time.perf_counter(), sums["seconds"], sums["images"]
        # An epoch's images may be larger than those before it.
        self.voted_at, self.voted, self.next_vote = started, progress.updates, progress.updates + 1
        for number, several in _several(batches.epoch(epoch, progress.step), accumulate, progress.step + 1):
            with self.interruption.step():
                self._update(several, epoch, number, image_size)
                ended = progress.step == len(batches)
                checked = ended or self._is_time
                if checked:
                    self._flush(epoch)
                    sums["seconds"] = before + time.perf_counter() - started
            if checked:
                rate = (sums["images"] - begun_with) / max(1e-9, sums["seconds"] - before)
                row = {"epoch": epoch, "train_loss": sums["loss"] / sums["images"], "images_per_s": rate}
                self.report(progress.step, len(batches), row)
                self._pause(ended)

    @property
    def _is_time(self) -> bool:
        """Whether to look at losses, clock and signals now; of several processes, whether they have agreed to."""
        if self.updater.group.world > 1:
            return self.progress.updates >= self.next_vote
        return self.progress.updates % self.check_every == 0 or self.interruption.requested is not None

    def _update(self, several: list[Batch], epoch: int, number: int, image_size: int) -> None:
        """Make one update and count it."""
        _copy_all(self.before, self.buffers)
        self.whole, self.updating = False, True
        progress = self.progress
        loss, hits = self.updater.update(several, epoch, number, image_size)
        progress.step = number + len(several) - 1
        progress.updates += 1
        self.scheduler.step_update(progress.updates)
        if self.ema is not None:
            self.ema.update(self.updater.model, step=progress.updates)
        self.pending.append((loss, hits, sum(len(labels) for _, labels, _ in several)))
        self.whole, self.updating = True, False

    def _settle(self, epoch: int) -> None:
        """Make whole what an interruption has left, where that can be done: before the optimiser's step."""
        if self.updater.group.world > 1:  # the others are at another place, unless all have agreed to stop
            self.whole = self.whole and not self.pending
            return
        if not self.whole and not self.updater.applying:
            _copy_all(self.buffers, self.before)
            self.whole = True
        if self.whole:
            self._flush(epoch)

    def _flush(self, epoch: int) -> None:
        """Add the updates since the last time to the epoch's sums; refuse a loss that is no number."""
        pending = self.pending
        if not pending:
            return
        group, device, sums = self.updater.group, self.updater.device, self.progress.partial
        losses = torch.stack([loss for loss, _, _ in pending]).tolist()  # asked for at once: a GPU is waited for
        hits = float(torch.stack([right for _, right, _ in pending]).sum())
        counts = [float(count) for _, _, count in pending]
        totals = group.total([*losses, *counts, hits], device)
        losses, counts = totals[: len(pending)], totals[len(pending) : -1]
        accumulate = self.updater.recipe.finetune.accumulate
        for back, (loss, count) in enumerate(zip(losses, counts, strict=True)):
            if not math.isfinite(loss):
                step = self.progress.step - (len(pending) - 1 - back) * accumulate
                raise NonFiniteLossError(f"the loss was not finite in epoch {epoch}, step {max(1, step)}; {FINITE_FIX}")
            sums["loss"] += loss * count
            sums["images"] += count
        sums["hits"] += totals[-1]
        pending.clear()

    def _pause(self, ended: bool) -> None:
        """Save where it is time, and stop where a signal has come to any of the processes."""
        group = self.updater.group
        stop = self.interruption.requested or 0
        due = not ended and time.perf_counter() - self.saved_at >= self.checkpoint_s
        if group.world > 1:
            updates = self.progress.updates
            took = (time.perf_counter() - self.voted_at) / max(1, updates - self.voted)
            wish = updates_in(VOTE_S, took, self.check_every)
            stop, due, wish = group.agreed(stop, due, wish, self.updater.device)
            self.voted, self.next_vote = updates, updates + wish
        if due:
            self.save()
            self.saved_at = time.perf_counter()
        self.voted_at = time.perf_counter()
        self.interruption.check(stop)

    def _row(self, epoch: int) -> dict[str, Any]:
        sums = self.progress.partial
        return {
            "epoch": epoch,
            "phase": "network",
            "lr": max(group["lr"] for group in self.updater.optimizer.param_groups),
            "train_loss": sums["loss"] / sums["images"],
            "train_top1": sums["hits"] / sums["images"],
            "images_per_s": round(sums["images"] / max(1e-9, sums["seconds"]), 2),
        }


@torch.no_grad()
def _copy_all(into: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    """Copy tensors of the same shapes and types, those of one type at once: a network has hundreds of small buffers."""
    for dtype in {each.dtype for each in values}:
        places = [place for place, each in enumerate(values) if each.dtype == dtype]
        torch._foreach_copy_([into[place] for place in places], [values[place] for place in places])


def _several(batches: Iterator[Batch], accumulate: int, first: int) -> Iterator[tuple[int, list[Batch]]]:
    """Yield the number of the first batch and the batches of each update."""
    number = first
    while several := list(itertools.islice(batches, accumulate)):
        yield number, several
        number += len(several)


def updates_in(seconds: float, each_s: float, most: int) -> int:
    """Return how many updates of each_s seconds there are in a time: at least one.

    >>> updates_in(1.0, 0.3, 20), updates_in(1.0, 4.0, 20), updates_in(1.0, 0.001, 20)
    (3, 1, 20)
    """
    return max(1, min(most, int(seconds / max(1e-9, each_s))))


def piece_sizes(count: int, parts: int, batch_size: int) -> list[int]:
    """Return the sizes of the pieces in which a batch of count images is computed.

    Of one image there is no piece, which batch normalisation could not do, as long as a whole batch in so many parts
    has larger ones: the last takes one more of its neighbour, or joins it.

    >>> piece_sizes(8, 4, 8), piece_sizes(7, 3, 8), piece_sizes(7, 4, 8), piece_sizes(3, 4, 8), piece_sizes(3, 8, 8)
    ([2, 2, 2, 2], [3, 2, 2], [2, 2, 3], [3], [1, 1, 1])
    """
    size = -(-count // min(parts, count))
    if size == 1 and parts < batch_size:
        size = 2
    sizes = [size] * (count // size) + [count % size] * (count % size > 0)
    if size > 1 and len(sizes) > 1 and sizes[-1] == 1:
        sizes[-2:] = [size - 1, 2] if size > 2 else [3]
    return sizes


def step_seed(seed: int, epoch: int, step: int) -> int:
    """Return the seed of a step: what is drawn in it follows from these three numbers alone."""
    return int(np.random.SeedSequence([seed, epoch, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def make_ema(model: nn.Module, decay: float | None) -> Any:
    """Return timm's moving average of the weights, or None where the recipe wants none."""
    if decay is None:
        return None
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, decay=decay, use_warmup=True)


def _make_mixup(recipe: Recipe, classes: int) -> Any:
    if not recipe.augment.mixup and not recipe.augment.cutmix:
        return None
    from timm.data import Mixup

    # The criterion smooths labels itself, so that mixed and unmixed batches are treated alike.
    return Mixup(
        mixup_alpha=recipe.augment.mixup, cutmix_alpha=recipe.augment.cutmix, label_smoothing=0.0, num_classes=classes
    )
