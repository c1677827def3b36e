"""Fine-tuning strategies: what is trained when, by timm's optimisers and schedulers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from zoo.errors import ZooError, nearest, one_line
from zoo.models.registry import classifier_of, classifiers_of
from zoo.recipe import Recipe

DEFAULT_HEAD_LR = 3e-3


@dataclass(frozen=True)
class Phase:
    """Epochs that train the same thing: `head` on cached features, or `network` on augmented images."""

    name: str
    first_epoch: int
    epochs: int


def phases(recipe: Recipe) -> list[Phase]:
    """Return a recipe's phases in order; their epochs count on from one to the next.

    LP-FT (Kumar et al. 2022, arXiv 2202.10054) and gradual unfreezing (Howard and Ruder 2018, arXiv 1801.06146)
    train the head first, so that the first large gradients do not distort the pretrained features.
    """
    head = recipe.head_epochs
    rest = recipe.finetune.epochs - head
    found = [Phase("head", 1, head)] if head else []
    return [*found, Phase("network", head + 1, rest)] if rest else found


def make_optimizer(model: nn.Module, recipe: Recipe, lr: float | None = None) -> torch.optim.Optimizer:
    """Return timm's optimiser over all of the model's parameters, with layer-wise decay where asked for."""
    from timm.optim import create_optimizer_v2

    table = recipe.optimizer
    decay = recipe.finetune.layer_decay
    extra: dict[str, Any] = {"layer_decay": decay} if decay < 1 and lr is None else {}
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        model,
        opt=table.name,
        lr=table.lr if lr is None else lr,
        weight_decay=table.weight_decay,
        momentum=table.momentum,
        **extra,
    )
    return optimizer


def make_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, epochs: int, updates_per_epoch: int) -> Any:
    """Return timm's scheduler, stepped by `step_update(updates)`; it has no state but that number."""
    from timm.scheduler import create_scheduler_v2

    table = recipe.schedule
    lr = optimizer.defaults["lr"]  # that of the head; timm scales each layer's from it
    warmup = min(table.warmup_epochs, max(0.0, epochs - 1))
    common: dict[str, Any] = {
        "num_epochs": epochs,
        "warmup_epochs": warmup,
        "warmup_lr": lr * 0.01,
        "min_lr": lr * table.min_lr,
        "step_on_epochs": False,
        "updates_per_epoch": updates_per_epoch,
    }
    if table.name == "constant":
        common |= {"sched": "step", "decay_epochs": epochs * 10, "decay_rate": 1.0}
    elif table.name == "linear":
        common |= {"sched": "poly", "decay_rate": 1.0}
    else:
        common |= {"sched": "cosine"}
    scheduler, _ = create_scheduler_v2(optimizer, **common)
    return scheduler


def layer_groups(model: nn.Module) -> list[list[str]]:
    """Return the model's parameter names by coarse stage, from the head down to the stem."""
    from timm.models import group_parameters

    grouped: dict[Any, list[str]] = group_parameters(model, cast("Any", model).group_matcher(coarse=True))
    stages = [grouped[key] for key in sorted(grouped, reverse=True)]
    head_name, _ = classifier_of(model)
    head = [name for names in stages for name in names if name.startswith(f"{head_name}.")]
    rest = [[name for name in names if name not in set(head)] for names in stages]
    return [head, *[names for names in rest if names]]


def frozen_names(model: nn.Module, freeze: Sequence[str]) -> set[str]:
    """Return the parameters that `finetune.freeze` names: modules by name, or `stem`, the first of timm's stages.

    Raises ZooError for a name that is no module's, or when the classifier or every parameter would be frozen.

    >>> from zoo.models.nets import SimpleCNN
    >>> sorted(frozen_names(SimpleCNN(3), ["stem"]))
    ['stem.0.0.weight', 'stem.0.1.bias', 'stem.0.1.weight']
    """
    every = [name for name, _ in model.named_parameters()]
    found: set[str] = set()
    for wanted in freeze:
        names = {name for name in every if name == wanted or name.startswith(f"{wanted}.")}
        if not names and wanted == "stem" and hasattr(model, "group_matcher"):
            names = set(layer_groups(model)[-1])
        if not names:
            modules = [
                name for name, module in model.named_modules() if name and any(True for _ in module.parameters())
            ]
            shown = ", ".join(dict.fromkeys(name.partition(".")[0] for name in modules))
            raise ZooError(
                f"finetune.freeze names {one_line(wanted)!r}, which is no part of this network (it has {shown}, "
                f"and what lies in these){nearest(wanted, modules)}"
            )
        found |= names
    head = {name for each, _ in classifiers_of(model) for name in every if name.startswith(f"{each}.")}
    if found & head:
        raise ZooError(
            f"finetune.freeze must leave the classifier ({', '.join(sorted(found & head))}) to be trained. "
            f"Got {list(freeze)}"
        )
    return found


def image_size_of(recipe: Recipe, phase: Phase, epoch: int, final: int) -> int:
    """Return the pixels of an epoch's training images: `finetune.image_sizes` share the epochs alike, in order.

    Growing sizes: Howard 2018 (fast.ai in DAWNBench); Tan and Le 2021, arXiv 2104.00298. Val is always seen at `final`.
    """
    sizes = recipe.finetune.image_sizes
    return sizes[(epoch - phase.first_epoch) * len(sizes) // phase.epochs] if sizes else final


def set_trained(model: nn.Module, names: set[str] | None) -> None:
    """Let only the named parameters be trained (None: all); frozen layers keep their batch statistics too."""
    model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(names is None or name in names)
    if names is None:
        return
    for module in model.modules():
        # With all that lies in it: a frozen stage gives the same for the same image, without dropout of its own.
        inside = list(module.parameters())
        if inside and not any(parameter.requires_grad for parameter in inside):
            module.eval()


def trained_names(model: nn.Module, recipe: Recipe, phase: Phase, epoch: int) -> set[str] | None:
    """Return the parameters that an epoch trains, or None for all of them: without those that `freeze` names.

    Gradual unfreezing opens one more stage at even steps, from the head down; all are open for the last half.
    """
    if recipe.finetune.freeze:
        return {name for name, _ in model.named_parameters()} - frozen_names(model, recipe.finetune.freeze)
    if recipe.finetune.strategy != "gradual":
        return None
    groups = layer_groups(model)
    done = epoch - phase.first_epoch
    half = max(1, phase.epochs // 2)
    opened = 2 + (len(groups) - 2) * done // half
    return None if opened >= len(groups) else {name for names in groups[:opened] for name in names}
