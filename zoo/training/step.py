"""One epoch of the whole network: forward, backward and update over augmented batches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from zoo.data.loader import TrainBatches
from zoo.data.transforms import normalise_tensor
from zoo.errors import ZooError
from zoo.recipe import Recipe
from zoo.training.checkpoint import Progress
from zoo.training.plan import Plan
from zoo.training.precision import PrecisionPlan

FINITE_FIX = "lower optimizer.lr, or set finetune.clip_grad = 1.0"


class NonFiniteLossError(ZooError):
    """Training stopped because the loss was no number."""


@dataclass
class EpochTrainer:
    """Forward, backward and update over the batches of an epoch."""

    plan: Plan
    device: torch.device
    precision: PrecisionPlan
    criterion: nn.Module
    progress: Progress
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    ema: Any
    report: Callable[[int, int, dict[str, Any]], None]

    def __post_init__(self) -> None:
        self.mixup = _make_mixup(self.plan.recipe, len(self.plan.dataset.classes))
        # A GPU waits for each number that is asked of it; a CPU does not.
        self.check_every = 1 if self.device.type == "cpu" else 20

    def epoch(self, batches: TrainBatches, epoch: int) -> dict[str, Any]:
        """Train one epoch; return its row of the history."""
        losses: list[tuple[torch.Tensor, int]] = []
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        count, loss_sum, checked, started = 0, 0.0, 0, time.perf_counter()
        for number, (images, labels, _) in enumerate(batches.epoch(epoch), 1):
            loss, hits = self._step(images, labels, epoch, number)
            losses.append((loss, len(labels)))
            right += hits
            count += len(labels)
            if number % self.check_every == 0 or number == len(batches):
                for each, size in losses:
                    checked += 1
                    self._refuse_non_finite(float(each), epoch, checked)
                    loss_sum += float(each) * size
                losses.clear()
                rate = count / (time.perf_counter() - started)
                row = {"epoch": epoch, "train_loss": loss_sum / count, "images_per_s": rate}
                self.report(number, len(batches), row)
        seconds = time.perf_counter() - started
        self.progress.step_s += seconds
        self.progress.images_seen += count
        return {
            "epoch": epoch,
            "phase": "network",
            "lr": max(group["lr"] for group in self.optimizer.param_groups),
            "train_loss": loss_sum / count,
            "train_top1": float(right) / count,
            "images_per_s": round(count / seconds, 2),
        }

    def _step(
        self, images: torch.Tensor, labels: torch.Tensor, epoch: int, number: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Dropout, drop-path and mixing follow from (seed, epoch, step) alone: no random state to keep.
        seed = step_seed(self.plan.seed, epoch, number)
        torch.manual_seed(seed)
        labels = labels.to(self.device, non_blocking=True)
        batch = normalise_tensor(images.to(self.device, non_blocking=True), self.plan.preprocessing)
        target = labels
        if self.mixup is not None and len(labels) % 2 == 0:  # timm mixes a batch with its own reverse
            np.random.seed(seed % 2**32)
            batch, target = self.mixup(batch, labels)
        with self.precision.autocast(self.device):
            logits = self.model(self.precision.place(batch))
            loss = self.criterion(logits.float(), target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.plan.recipe.finetune.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.recipe.finetune.clip_grad)
        self.optimizer.step()
        self.progress.updates += 1
        self.scheduler.step_update(self.progress.updates)
        if self.ema is not None:
            self.ema.update(self.model, step=self.progress.updates)
        return loss.detach(), (logits.detach().argmax(1) == labels).sum()

    @staticmethod
    def _refuse_non_finite(loss: float, epoch: int, step: int) -> None:
        if not math.isfinite(loss):
            raise NonFiniteLossError(f"the loss was not finite in epoch {epoch}, step {step}; {FINITE_FIX}")


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
