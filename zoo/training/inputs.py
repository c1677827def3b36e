"""What the network is trained and scored on: augmented images, or activations kept where its frozen stages end."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from zoo.data.cache import Pixels
from zoo.data.loader import Batch, TrainBatches, epoch_order, fixed_batches
from zoo.data.transforms import make_augment
from zoo.recipe import Recipe
from zoo.training.boundary import Activations, Boundary, find_boundary
from zoo.training.features import OnBatch, pixels_logits
from zoo.training.parallel import Group
from zoo.training.plan import Plan
from zoo.training.precision import PrecisionPlan, choose_workers
from zoo.training.speed import to_input
from zoo.training.strategy import Phase

_EXAMPLES = 4  # images on which a boundary is proved
_LEFT_FREE = 8  # times the weights: two checkpoints with an optimiser's moments, the best so far, the run's own


class ActivationBatches:
    """Kept activations in the order in which images would come: the same batches of the same images."""

    def __init__(self, activations: Activations, batch_size: int, seed: int, balanced: bool) -> None:
        self.activations, self.batch_size, self.seed = activations, batch_size, seed
        self.labels = activations.y_true.numpy() if balanced else None
        self._count = len(self._order(0))

    def __len__(self) -> int:
        return self._count

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield activations (B, ...), labels and places of an epoch's batches from number `start` on."""
        return self.activations.batches(self._order(epoch)[start:])

    def _order(self, epoch: int) -> list[list[int]]:
        found = epoch_order(len(self.activations), self.batch_size, self.seed, epoch, self.labels)
        return [list(map(int, places)) for places in found]

    def close(self) -> None:
        """Do nothing: there are no processes to end."""


@dataclass
class Inputs:
    """The batches of a run's network phase, and how val is scored.

    boundary: where the frozen stages end, where that pays; val's activations are then kept, and train's too where
    images do not change from epoch to epoch. train_boundary: the same where train's are kept. uncached: the splits
    whose activations would have paid, but had no room.
    """

    batches: TrainBatches | ActivationBatches
    val_pixels: Pixels
    plan: Plan
    precision: PrecisionPlan
    device: torch.device
    boundary: Boundary | None = None
    train_boundary: Boundary | None = None
    val: Activations | None = None
    uncached: list[str] = field(default_factory=list)

    def val_logits(self, model: nn.Module) -> torch.Tensor:
        """Return val's logits (N, C), float32 on the CPU, of the model or of a moving average of it."""
        if self.boundary is not None and self.val is not None:
            return self.boundary.logits(model, self.val, self.precision, self.device)
        return pixels_logits(model, self.val_pixels, self.plan.preprocessing, self.precision, self.device)


def make_inputs(
    plan: Plan,
    model: nn.Module,
    train_pixels: Pixels,
    val_pixels: Pixels,
    precision: PrecisionPlan,
    device: torch.device,
    group: Group,
    folder: Path,
    phase: Phase,
    on_batch: OnBatch | None = None,
    uncached: Sequence[str] | None = None,
) -> Inputs:
    """Return what a run's network phase works on.

    model: frozen as it will be trained. folder: of the run's checkpoint, which keeps activations until the run ends.
    uncached: of a run that goes on, what it began with; its bits hang on it. Left out, the room on the disk decides.
    """
    recipe, epochs = plan.recipe, phase.epochs
    boundary = None
    if recipe.finetune.freeze and group.world == 1 and not precision.compiled:
        example = next(fixed_batches(val_pixels, plan.preprocessing.image_size, _EXAMPLES))
        if len(example) > 1:
            boundary = find_boundary(model, to_input(example, plan.preprocessing, precision, device), precision, device)
    inputs = Inputs(_augmented(plan, train_pixels, device, group, phase), val_pixels, plan, precision, device)
    splits = {"val": val_pixels} | ({"train": train_pixels} if _unchanging(recipe) else {})
    for split, pixels in splits.items():
        if boundary is None or not boundary.pays(len(pixels), epochs, device):
            continue
        if split in uncached if uncached is not None else not _has_room(boundary, model, pixels, split, folder):
            inputs.uncached.append(split)
            continue
        kept = boundary.activations(model, pixels, split, plan, precision, device, folder, on_batch)
        if split == "val":
            inputs.boundary, inputs.val = boundary, kept
            continue
        inputs.batches.close()
        balanced = recipe.finetune.sampler == "balanced"
        inputs.batches = ActivationBatches(kept, _batch_size(plan, pixels), plan.seed, balanced)
        inputs.train_boundary = boundary
    return inputs


def _has_room(boundary: Boundary, model: nn.Module, pixels: Pixels, split: str, folder: Path) -> bool:
    """Return whether a split's activations are there, or fit on the disk beside what the run itself will write."""
    if any(folder.glob(f"boundary-{split}-*.npy")):
        return True
    weights = sum(each.numel() * each.element_size() for each in model.state_dict().values())
    there = next(each for each in (folder, *folder.parents) if each.exists())
    needed = len(pixels) * boundary.bytes_per_image + _LEFT_FREE * weights
    return bool(shutil.disk_usage(there).free >= needed)


def _unchanging(recipe: Recipe) -> bool:
    """Return whether training images are the same in every epoch."""
    mixes = recipe.augment.mixup or recipe.augment.cutmix
    return recipe.policy == "none" and not mixes and not recipe.finetune.image_sizes


def _batch_size(plan: Plan, pixels: Pixels) -> int:
    return min(plan.recipe.finetune.batch_size, len(pixels))


def _augmented(plan: Plan, pixels: Pixels, device: torch.device, group: Group, phase: Phase) -> TrainBatches:
    recipe = plan.recipe
    augment = make_augment(recipe.policy, recipe.augment.transforms, plan.preprocessing.image_size, plan.seed)
    return TrainBatches(
        pixels,
        augment,
        _batch_size(plan, pixels),
        plan.seed,
        choose_workers(recipe.workers, device),
        pin_memory=device.type == "cuda",
        balanced=recipe.finetune.sampler == "balanced",
        rank=group.rank,
        world=group.world,
        last_epoch=phase.first_epoch + phase.epochs - 1,
    )
