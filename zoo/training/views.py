"""Test-time augmentation: the mean of what a network says of several views of one image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from zoo.data.views import views_of
from zoo.runs import Preprocessing

Image = np.ndarray[Any, np.dtype[np.uint8]]


def combine(logits: torch.Tensor) -> torch.Tensor:
    """Return one row of logits for each image: the log of the mean over views of the softmax.

    logits: (V, B, C) of V views; returned: (B, C) of the same type, whose softmax is the mean probability. Those of a
    single view are returned as they are.
    """
    if len(logits) == 1:
        return logits[0]
    log_p = torch.log_softmax(logits.double(), 2)
    mean: torch.Tensor = torch.logsumexp(log_p, 0) - math.log(len(logits))
    return mean.to(logits.dtype)


def logits_of_views(
    images: Sequence[Image], preprocessing: Preprocessing, tta: str, forward: Callable[[Image], torch.Tensor]
) -> torch.Tensor:
    """Return the logits (B, C) of resized images over all their views, one forward pass for each.

    images: uint8 (H, W, 3) each, of any shapes. forward: from uint8 (B, size, size, 3) to logits (B, C); it is called
    with the plain centre crops first.
    """
    views = zip(*(views_of(pixels, preprocessing, tta) for pixels in images), strict=True)
    return combine(torch.stack([forward(np.stack(view)) for view in views]))
