"""A finished run's network, computed by torch: what a predictor of a run asks, and where it looked."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import nn

from zoo.data.transforms import normalise_tensor
from zoo.deployment.bundle import Rules
from zoo.deployment.rules import fit_rules
from zoo.errors import ZooError
from zoo.evaluation.explain import activation_maps
from zoo.evaluation.predictions import read_predictions
from zoo.files import Home
from zoo.runs import Preprocessing, Run, RunRecord
from zoo.training.precision import PrecisionPlan, choose_device, recorded_plan, set_threads
from zoo.training.scoring import finished_record, load_model

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Floats = np.ndarray[Any, np.dtype[np.float32]]

_EXPLAINED = 16  # images at once: gradients need more memory than scores


class RunNetwork:
    """uint8 images (B, S, S, 3) in, logits (B, C) out, in the number format of a precision plan; no class maps."""

    explains = False

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, precision: PrecisionPlan) -> None:
        self.model, self.preprocessing, self.precision = model, preprocessing, precision
        self.device = next(model.parameters()).device

    @property
    def threads(self) -> int:
        """Return the cores of one call."""
        return torch.get_num_threads()

    def __call__(self, batch: Pixels) -> tuple[Floats, None]:
        """Return float32 logits, and None for the maps that it does not give."""
        with torch.inference_mode(), self.precision.autocast(self.device):
            images = normalise_tensor(torch.from_numpy(batch).to(self.device), self.preprocessing)
            logits = self.model(self.precision.place(images)).float().cpu()
        return logits.numpy(), None

    def heat(self, batch: Pixels) -> Floats:
        """Return where evidence for each predicted class was found (B, h, w), in [0, 1]: Grad-CAM.

        Raises ZooError where the network keeps no map of its image.
        """
        return np.concatenate([self._heat(batch[at : at + _EXPLAINED]) for at in range(0, len(batch), _EXPLAINED)])

    def _heat(self, batch: Pixels) -> Floats:
        images = normalise_tensor(torch.from_numpy(batch).to(self.device), self.preprocessing)
        with torch.no_grad():
            targets = self.model(images).argmax(dim=1)
        maps: Floats = activation_maps(self.model, images, targets).numpy()
        return maps


def open_run(run: Run, root: Home | None, device: str, threads: int | None) -> tuple[RunNetwork, RunRecord]:
    """Return a finished run's network on a device, and its record.

    threads: cores of one call for the whole process, which torch shares; left out, all that it may use. Raises ZooError
    where the run did not finish or the device is not there.
    """
    record = finished_record(run)
    assert record.preprocessing is not None
    set_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    chosen = choose_device(device)
    same = chosen.type == record.device.split(":")[0]
    plan = recorded_plan(record.precision) if same else PrecisionPlan("float32", channels_last=True)
    model = load_model(run, root, str(chosen)).to(memory_format=plan.memory_format)
    return RunNetwork(model, record.preprocessing, plan), record


def rules_of_run(run: Run, record: RunRecord) -> Rules:
    """Return the rules that the run's stored predictions on val give, as an export finds them.

    None of them where these predictions are gone, damaged or not finite: then scores are the plain softmax, sets are
    empty, and nothing is referred.
    """
    with suppress(ZooError):
        return fit_rules(read_predictions(run.predictions_file("val")), record.classes, record.negative_class)
    return Rules()
