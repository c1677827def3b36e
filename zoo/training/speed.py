"""How fast a network is here: steps of training or scoring on made-up images, and the precision plan they decide."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from zoo.data.loader import Batch
from zoo.data.transforms import normalise_tensor
from zoo.runs import Preprocessing
from zoo.training.environment import device_name, versions
from zoo.training.loss import make_criterion
from zoo.training.parallel import expected_world
from zoo.training.plan import Plan
from zoo.training.precision import (
    FEWEST_STEPS,
    PrecisionPlan,
    candidates,
    choose_plan,
    fitting_plan,
    keep_plan,
    known_plan,
    measured_plan,
)
from zoo.training.step import Updater
from zoo.training.strategy import make_optimizer

_TINY_LR = 1e-6  # so that a few steps change nothing, and the losses of two plans can be held against each other


def plan_precision(
    plan: Plan, model: nn.Module, device: torch.device, steps: int, *, training: bool = True, again: bool = False
) -> PrecisionPlan:
    """Return the recipe's precision plan: the one asked for, else the fastest one measured on this machine.

    model: as it is trained, on the device. steps: of the whole run; for fewer than FEWEST_STEPS nothing is measured,
    and nothing looked up: what ran before must not decide the bits of a short run.
    training: else the plan is for forward passes alone. again: measure even where this machine has done so before.
    """
    if plan.recipe.precision != "auto":
        return choose_plan(plan.recipe.precision, device)
    usual = PrecisionPlan("float32", channels_last=True)
    if steps < FEWEST_STEPS and not again:
        return usual
    identity = plan_identity(plan, device, training)
    images = -(-plan.recipe.finetune.batch_size // expected_world()) if training else FORWARD_BATCH
    seconds_left = (lambda step_s: steps * step_s) if training else None
    timed = training_steps(plan, model, device) if training else forward_steps(plan, model, device)
    known = None if again else known_plan(identity)
    if known is None:
        found = measured_plan(timed, candidates(device), images, seconds_left)
    else:  # by a run of another length, for which torch.compile may have paid where here it does not
        found = fitting_plan(known, timed, usual, images, seconds_left)
    # Where no plan could be measured nothing is known, and nothing kept.
    if known is None and found.measured.get(found.name) is None:
        return usual
    if found.source == "measured":
        keep_plan(identity, found)
    return found


FORWARD_BATCH = 32  # smaller than that of scoring: the plans' order is the same


def plan_identity(plan: Plan, device: torch.device, training: bool) -> dict[str, Any]:
    """Return what the speed of a plan hangs on: network, image size, batch, what is trained, and this machine."""
    kept = ("torch", "timm", "python")
    recipe = plan.recipe
    return {
        "model": plan.spec.arch,
        "options": dict(recipe.model.options),
        "network": plan.network,
        "image_size": plan.preprocessing.image_size,
        "batch_size": -(-recipe.finetune.batch_size // expected_world()) if training else FORWARD_BATCH,
        "trained": [recipe.finetune.strategy, list(recipe.finetune.freeze)] if training else "nothing",
        "optimizer": recipe.optimizer.name if training else "",
        "device": device_name(device),
        "versions": {name: number for name, number in versions().items() if name in kept},
    }


def to_input(
    batch: np.ndarray[Any, np.dtype[np.uint8]],
    preprocessing: Preprocessing,
    precision: PrecisionPlan,
    device: torch.device,
) -> torch.Tensor:
    """Return uint8 images (B, S, S, 3) as the network takes them: normalised, on the device, in the plan's order."""
    return precision.place(normalise_tensor(torch.from_numpy(batch).to(device), preprocessing))


def made_up_batch(count: int, image_size: int, classes: int) -> Batch:
    """Return a batch of noise as the loader gives it: uint8 (count, size, size, 3), labels and places."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, image_size, image_size, 3), dtype=np.uint8)
    places = torch.arange(count)
    return torch.from_numpy(pixels), places % classes, places


Steps = Callable[[PrecisionPlan, int], list[tuple[float, float]]]


def training_steps(plan: Plan, model: nn.Module, device: torch.device) -> Steps:
    """Return what trains a copy of the model for so many steps, each update of one batch: seconds and loss of each."""
    classes, size = len(plan.dataset.classes), plan.preprocessing.image_size
    # Of several processes each computes its share.
    share = -(-plan.recipe.finetune.batch_size // expected_world())
    # There already: to copy it is the loader's work, and would make all plans look more alike than they are.
    pixels, labels, places = (each.to(device) for each in made_up_batch(share, size, classes))
    batch = (pixels, labels, places)
    criterion = make_criterion(plan.recipe.loss, np.ones(classes, np.int64), device)

    def steps(precision: PrecisionPlan, count: int) -> list[tuple[float, float]]:
        own = _with_a_say(copy.deepcopy(model)).to(memory_format=precision.memory_format)
        optimizer = make_optimizer(own, plan.recipe, _TINY_LR)
        updater = Updater(
            plan.recipe, plan.preprocessing, plan.seed, device, precision, criterion, own, optimizer, classes,
            scaler=precision.scaler(device), network=compiled(own, precision),
        )  # fmt: skip
        return _timed(lambda: float(updater.update([batch], 0, 1, size)[0]), count, device)

    return steps


def forward_steps(plan: Plan, model: nn.Module, device: torch.device) -> Steps:
    """Return what scores FORWARD_BATCH images so many times: seconds and cross-entropy of each."""
    classes, size = len(plan.dataset.classes), plan.preprocessing.image_size
    pixels, labels, _ = made_up_batch(FORWARD_BATCH, size, classes)

    def steps(precision: PrecisionPlan, count: int) -> list[tuple[float, float]]:
        own = _with_a_say(copy.deepcopy(model)).to(memory_format=precision.memory_format).eval()

        def score() -> float:
            with torch.inference_mode(), precision.autocast(device):
                logits = own(precision.place(normalise_tensor(pixels.to(device), plan.preprocessing)))
            return float(nn.functional.cross_entropy(logits.float().cpu(), labels))

        return _timed(score, count, device)

    return steps


def _with_a_say(model: nn.Module) -> nn.Module:
    """Make weights random that are all zero, as a fresh head's: behind it every format would have the same loss."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def compiled(model: nn.Module, precision: PrecisionPlan) -> Any:
    """Return what is called in training: the model, or what torch.compile makes of it, which shares its weights."""
    return torch.compile(model) if precision.compiled else model


def finish_work(device: torch.device) -> None:
    """Wait for what a GPU was told to do; a CPU has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(step: Callable[[], float], count: int, device: torch.device) -> list[tuple[float, float]]:
    found = []
    for _ in range(count):
        started = time.perf_counter()
        loss = step()
        finish_work(device)
        found.append((time.perf_counter() - started, loss))
    return found
