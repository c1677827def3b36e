"""Frozen-backbone features: computed once per network and split, and the head that is trained on them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from zoo.data.cache import Pixels
from zoo.data.loader import fixed_batches
from zoo.data.transforms import normalise_tensor
from zoo.errors import ZooError
from zoo.files import atomic_writer, digest_of
from zoo.models.registry import classifier_of
from zoo.runs import Preprocessing
from zoo.training.plan import Plan
from zoo.training.precision import PrecisionPlan

FORWARD_BATCH = 64


@dataclass(frozen=True)
class Features:
    """What reaches the classifier for each image of a split, and what computing it cost.

    values: (N, ...) float32. y_true: (N,) int64. seconds: of the forward pass that computed them.
    """

    values: torch.Tensor
    y_true: torch.Tensor
    seconds: float


def forward_pixels(
    model: nn.Module, pixels: Pixels, preprocessing: Preprocessing, plan: PrecisionPlan, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (features, logits) of a split, float32 on the CPU, in manifest order.

    Features are the input of the final classifier, caught on its way in.
    """
    caught: list[torch.Tensor] = []
    hook = None
    try:
        _, classifier = classifier_of(model)
        hook = classifier.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0].detach().float().cpu()))
    except ZooError:
        pass  # a network without one final classifier can still be scored
    logits = []
    model.eval()
    try:
        with torch.inference_mode(), plan.autocast(device):
            for batch in fixed_batches(pixels, preprocessing.image_size, FORWARD_BATCH):
                images = normalise_tensor(torch.from_numpy(batch).to(device), preprocessing)
                logits.append(model(plan.place(images)).float().cpu())
    finally:
        if hook is not None:
            hook.remove()
    return (torch.cat(caught) if caught else torch.empty(len(pixels), 0)), torch.cat(logits)


def split_features(
    model: nn.Module, pixels: Pixels, split: str, plan: Plan, precision: PrecisionPlan, device: torch.device
) -> Features:
    """Return a split's features from the cache beside the dataset, computing them once.

    Features of random weights differ for each seed and are not kept on disk.
    """
    key = digest_of(
        [
            plan.dataset.split_digest,
            split,
            pixels.skipped,
            plan.spec.name,
            plan.network,
            plan.recipe.model.options,
            plan.weights.sha256 if plan.weights else None,
            plan.preprocessing.identity,
            precision.facts(),
        ]
    )
    file = plan.dataset.folder / ".cache" / f"features-{split}-{key[:16]}.npz"
    y_true = torch.from_numpy(pixels.y_true.copy())
    stored = _read(file, len(pixels)) if plan.weights is not None else None
    if stored is not None:
        return Features(stored[0], y_true, stored[1])
    started = time.perf_counter()
    values, _ = forward_pixels(model, pixels, plan.preprocessing, precision, device)
    seconds = time.perf_counter() - started
    if plan.weights is not None:
        with atomic_writer(file) as stream:
            np.savez(stream, values=values.numpy(), seconds=np.float64(seconds))
    return Features(values, y_true, seconds)


def _read(file: Any, count: int) -> tuple[torch.Tensor, float] | None:
    import zipfile

    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            values, seconds = stored["values"], float(stored["seconds"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return (torch.from_numpy(values), seconds) if len(values) == count else None


class StandardisedHead(nn.Module):
    """A linear classifier on centred features of one common scale; it starts as the function that it was.

    One scale for all makes one learning rate fit all networks; a scale for each would blow up rarely active
    features. `fold` gives the same function as plain weights for the network's own classifier.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, classifier: nn.Module, values: torch.Tensor) -> None:
        super().__init__()
        self.classifier = classifier
        self.scaled = isinstance(classifier, nn.Linear) and values.ndim == 2
        if isinstance(classifier, nn.Linear) and self.scaled:
            scale, mean = values.var(0, correction=0).mean().sqrt(), values.mean(0)
            scale = scale if float(scale) > 1e-12 else torch.ones(())
            self.register_buffer("mean", mean)
            self.register_buffer("scale", scale)
            with torch.no_grad():
                bias = torch.zeros(classifier.out_features) if classifier.bias is None else classifier.bias
                classifier.bias = nn.Parameter(bias + classifier.weight @ mean)
                classifier.weight.mul_(scale)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Return logits (B, classes) of features (B, ...)."""
        scaled = (values - self.mean) / self.scale if self.scaled else values
        logits: torch.Tensor = self.classifier(scaled)
        return logits

    def fold(self) -> dict[str, torch.Tensor]:
        """Return the classifier's state dict for features that are not scaled."""
        state = {key: value.detach().clone() for key, value in self.classifier.state_dict().items()}
        if self.scaled:
            state["weight"] = state["weight"] / self.scale
            state["bias"] = state["bias"] - state["weight"] @ self.mean
        return state


def load_grown(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Load a state dict, giving a bias to a classifier that had none before its features were centred."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.bias is None and f"{name}.bias" in state:
            module.bias = nn.Parameter(module.weight.new_zeros(module.out_features))
    model.load_state_dict(state)
