"""The loss of a recipe: cross-entropy or focal loss, weighted by class, whole or as the sums of a batch's parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from zoo.recipe import LossTable

DEFAULT_GAMMA = 2.0  # the best of Lin et al. 2017


class Criterion(nn.Module):
    """Cross-entropy, or for gamma above 0 the focal loss of its softmax, with class weights and smoothed labels.

    logits: (B, C), a floating type. target: (B,) int64 places of the classes, or (B, C) shares of each class.
    The mean is PyTorch's (`torch.nn.CrossEntropyLoss`): with class weights over hard labels, the weighted one.

    Focal loss: Lin et al. 2017 (arXiv 1708.02002), sum over classes of w t (1 - p)^gamma (-log p), t being the share of
    the class after smoothing. For a hard label that is the paper's; with gamma 0 it is the cross-entropy.
    """

    weight: torch.Tensor | None

    def __init__(
        self, weight: torch.Tensor | None = None, label_smoothing: float = 0.0, gamma: float | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.label_smoothing = label_smoothing
        self.gamma = gamma or 0.0

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of a batch; of cross-entropy, bit for bit what `torch.nn.CrossEntropyLoss` gives."""
        if not self.gamma:
            return self._cross_entropy(logits, target, "mean")
        total, denominator = self.sums(logits, target)
        return total / denominator

    def sums(self, logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weighted sum of the losses and what the mean divides it by.

        Over the parts of a batch, wherever they are computed, the sum of the first over the sum of the second is the
        mean of the whole.
        """
        total = self._focal(logits, target) if self.gamma else self._cross_entropy(logits, target, "sum")
        return total, self.denominator(target)

    def denominator(self, target: torch.Tensor) -> torch.Tensor:
        """Return what the mean over these targets divides by: the sum of hard labels' class weights, else their count.

        A 0-dimensional tensor on the target's device.
        """
        if self.weight is None or target.is_floating_point():
            dtype = target.dtype if target.is_floating_point() else torch.float32
            return torch.tensor(float(len(target)), dtype=dtype, device=target.device)
        return self.weight[target].sum()

    def _cross_entropy(self, logits: torch.Tensor, target: torch.Tensor, reduction: str) -> torch.Tensor:
        return functional.cross_entropy(
            logits, target, weight=self.weight, label_smoothing=self.label_smoothing, reduction=reduction
        )

    def _focal(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        classes = logits.shape[1]
        shares = target if target.is_floating_point() else functional.one_hot(target, classes)
        shares = shares.to(logits.dtype) * (1 - self.label_smoothing) + self.label_smoothing / classes
        if self.weight is not None:
            shares = shares * self.weight
        log_p = torch.log_softmax(logits, 1)
        # 1 - p without cancellation; never 0, where the power's slope is infinite for a gamma below 1.
        wrong = (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny)
        return -(shares * wrong.pow(self.gamma) * log_p).sum()


def make_criterion(loss: LossTable, counts: np.ndarray[Any, np.dtype[np.int64]], device: torch.device) -> Criterion:
    """Return the criterion of a recipe's `[loss]` on a device.

    counts: (C,) training images of each class, each above 0 where the classes are to be balanced.
    """
    weight = None
    if loss.class_weights == "balanced":
        if not (counts > 0).all():
            raise ValueError(f"balanced class weights need an image of every class; the counts are {counts.tolist()}")
        # scikit-learn's "balanced": n / (classes * count), so that the mean weight of an image is 1.
        weight = torch.tensor(counts.sum() / (len(counts) * counts), dtype=torch.float32, device=device)
    gamma = None
    if loss.name == "focal":
        gamma = DEFAULT_GAMMA if loss.gamma is None else loss.gamma
    return Criterion(weight, loss.label_smoothing, gamma)
