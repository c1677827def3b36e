"""The first phase of LP-FT, and all of a linear probe: the classifier alone, on features computed once."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zoo.data.loader import epoch_order
from zoo.recipe import Recipe
from zoo.training.features import Features, StandardisedHead
from zoo.training.loss import Criterion
from zoo.training.step import NonFiniteLossError, step_seed
from zoo.training.strategy import DEFAULT_HEAD_LR, Phase, make_optimizer, make_scheduler

_VAL_CHUNK = 8192  # images: of all of a large val at once there would be several copies


@dataclass
class HeadTrainer:
    """A classifier on centred features of one scale, with optimiser and schedule of its own.

    criterion: on the CPU, where features are. name: of the classifier within its network.
    """

    recipe: Recipe
    seed: int
    phase: Phase
    name: str
    classifier: nn.Module
    train: Features
    val: Features
    criterion: Criterion

    def __post_init__(self) -> None:
        recipe, count = self.recipe, len(self.train.values)
        self.head = StandardisedHead(copy.deepcopy(self.classifier).cpu().float(), self.train.values)
        self.batch_size = min(recipe.finetune.batch_size, count)
        self.labels = self.train.y_true.numpy() if recipe.finetune.sampler == "balanced" else None
        self.optimizer = make_optimizer(self.head, recipe, recipe.finetune.head_lr or DEFAULT_HEAD_LR)
        updates = len(epoch_order(count, self.batch_size, self.seed, 0, self.labels))
        self.scheduler = make_scheduler(self.optimizer, recipe, self.phase.epochs, updates)
        self.updates = 0

    def epochs(self) -> Iterator[tuple[dict[str, Any], torch.Tensor, Callable[[], dict[str, torch.Tensor]]]]:
        """Yield each epoch's row, val's logits, and what returns the classifier's state dict as it is then."""
        for epoch in range(self.phase.first_epoch, self.phase.first_epoch + self.phase.epochs):
            row = self._epoch(epoch)
            self.head.eval()
            with torch.inference_mode():
                logits = torch.cat([self.head(part) for part in torch.split(self.val.values, _VAL_CHUNK)])
            yield row, logits, self._state

    def _state(self) -> dict[str, torch.Tensor]:
        return {f"{self.name}.{key}": value for key, value in self.head.fold().items()}

    def _epoch(self, epoch: int) -> dict[str, Any]:
        torch.manual_seed(step_seed(self.seed, epoch, 0))
        loss_sum, right, count = 0.0, 0, 0
        self.head.train()
        for places in epoch_order(len(self.train.values), self.batch_size, self.seed, epoch, self.labels):
            labels = self.train.y_true[places]
            logits = self.head(self.train.values[places])
            loss = self.criterion(logits, labels)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            self.updates += 1
            self.scheduler.step_update(self.updates)
            loss_sum += float(loss.detach()) * len(places)
            right += int((logits.argmax(1) == labels).sum())
            count += len(places)
        if not math.isfinite(loss_sum):
            raise NonFiniteLossError(f"the loss was not finite in epoch {epoch}; lower finetune.head_lr")
        return {"epoch": epoch, "phase": "head", "train_loss": loss_sum / count, "train_top1": right / count}
