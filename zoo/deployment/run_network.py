"""The network of a finished run, asked as a bundle's is: torch, the run's own number format, its own device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from zoo.data.manifest import present_classes
from zoo.data.transforms import normalise_tensor
from zoo.deployment.bundle import Rules
from zoo.deployment.rules import fit_rules
from zoo.errors import ZooError
from zoo.evaluation.explain import activation_maps
from zoo.evaluation.heat import overlay
from zoo.files import Home
from zoo.runs import Preprocessing, Run, RunRecord
from zoo.training.precision import PrecisionPlan, choose_device, recorded_plan, set_threads
from zoo.training.scoring import finished_record, load_model, predictions_of

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Floats = np.ndarray[Any, np.dtype[np.float32]]


class RunNetwork:
    """A network in torch: uint8 images (B, S, S, 3) in, logits (B, C) out; it gives no class maps with them."""

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, precision: PrecisionPlan) -> None:
        self.model, self.preprocessing, self.precision = model, preprocessing, precision
        self.device = next(model.parameters()).device

    def __call__(self, images: Pixels | Sequence[Pixels]) -> tuple[Floats, None]:
        """Return the logits of uint8 images (S, S, 3)."""
        batch = torch.from_numpy(np.stack(list(images))).to(self.device)
        with torch.inference_mode(), self.precision.autocast(self.device):
            values = normalise_tensor(batch, self.preprocessing)
            logits: torch.Tensor = self.model(self.precision.place(values)).float().cpu()
        return logits.numpy(), None

    def explain(self, batch: Pixels, targets: Sequence[int]) -> Pixels:
        """Return each image with where the network looked for its class of `targets`: uint8 (B, S, S, 3).

        Raises ZooError where the network keeps no map of its image.
        """
        images = normalise_tensor(torch.from_numpy(batch).to(self.device), self.preprocessing)
        maps = activation_maps(self.model, images, torch.tensor(targets, device=self.device)).numpy()
        return np.stack([overlay(image, heat) for image, heat in zip(batch, maps, strict=True)])


def open_run(run: Run, root: Home | None, device: str, threads: int | None) -> tuple[RunNetwork, RunRecord, Rules]:
    """Return a run's network, its record, and the rules that a bundle of it would have: chosen on its val logits.

    The class of the healthy is the dataset's present one, as an export would take it. A run that was never scored on
    val has no rules but the plain softmax. Raises ZooError where the run did not finish
    or its weights were changed.
    """
    record = finished_record(run)
    record = record.model_copy(update={"negative_class": _healthy_now(record, root)})
    assert record.preprocessing is not None
    if threads is not None:
        torch.set_num_threads(threads)
    set_threads()
    chosen = choose_device(device)
    same = chosen.type == record.device.split(":")[0]
    plan = recorded_plan(record.precision) if same else PrecisionPlan("float32", channels_last=True)
    model = load_model(run, root, str(chosen)).to(memory_format=plan.memory_format)
    rules = Rules()
    if run.scored("val"):
        rules = fit_rules(predictions_of(run, "val"), record.classes, record.negative_class)
    return RunNetwork(model, record.preprocessing, plan), record, rules


def _healthy_now(record: RunRecord, root: Home | None) -> str | None:
    """Return the class of the healthy that the dataset names now; the run's own where the dataset is gone."""
    try:
        classes, negative = present_classes(record.dataset, root)
    except ZooError:
        return record.negative_class
    return negative if classes == record.classes else record.negative_class
