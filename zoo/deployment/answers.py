"""From logits to an answer that can be acted on: calibrated scores, the prediction set, and when to ask a human."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zoo.deployment.bundle import Rules
from zoo.errors import ZooError, one_line
from zoo.evaluation.conformal import prediction_sets

Floats = np.ndarray[Any, np.dtype[Any]]
UNBOUNDED = math.inf


@dataclass(frozen=True)
class Answer:
    """What is said of one image.

    scores: calibrated, by class, in [0, 1], their sum 1. prediction_set: the classes among which the true one is as
    often as the rules say; empty where there is no such rule. refer: whether a human should decide, and why. points:
    of each operating point that the rules have, whether the image is called positive; None without any.
    """

    label: str
    scores: dict[str, float]
    prediction_set: list[str]
    refer: bool
    refer_reason: str | None
    points: dict[str, bool] | None = None


def answers_of(logits: Floats, classes: Sequence[str], rules: Rules, negative_class: str | None = None) -> list[Answer]:
    """Return an answer for each row of logits (B, C).

    Raises ZooError where a logit is not finite: of such an image nothing can be said.

    >>> one, two = answers_of(np.array([[2.0, 0.0], [0.1, 0.0]]), ["a", "b"], Rules())
    >>> one.label, round(one.scores["a"], 3), one.refer
    ('a', 0.881, False)
    """
    if not np.isfinite(logits).all():
        raise ZooError("the network's answer is not finite; nothing can be said of this image")
    scores = _softmax(logits.astype(np.float64) / rules.temperature)
    sets = _sets(scores, rules)
    return [
        _answer(
            classes[int(highest)],
            row,
            [name for name, held in zip(classes, among, strict=True) if held],
            classes,
            rules,
            negative_class,
        )
        for highest, row, among in zip(logits.argmax(axis=1), scores, sets, strict=True)
    ]


def _softmax(logits: Floats) -> Floats:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def _sets(scores: Floats, rules: Rules) -> np.ndarray[Any, Any]:
    if rules.conformal is None:
        return np.zeros(scores.shape, bool)
    quantile = UNBOUNDED if rules.conformal.quantile is None else rules.conformal.quantile
    return prediction_sets(scores, quantile, rules.conformal.method)


def _answer(
    label: str, scores: Floats, among: list[str], classes: Sequence[str], rules: Rules, negative_class: str | None
) -> Answer:
    named = {name: float(value) for name, value in zip(classes, scores, strict=True)}
    reason = _refer_reason(float(scores.max()), rules)
    return Answer(label, named, among, reason is not None, reason, _points(named, classes, rules, negative_class))


def _refer_reason(confidence: float, rules: Rules) -> str | None:
    if rules.refer is None:
        return None
    threshold, share = rules.refer.threshold, f"{100 * rules.refer.max_error:.3g} %"
    if threshold is None:
        return f"val has no 20 images that could be answered with an error of {share} or less: every image is referred"
    if confidence >= threshold:
        return None
    digits = next((each for each in (3, 4, 6, 9) if f"{confidence:.{each}f}" != f"{threshold:.{each}f}"), 12)
    return (
        f"confidence {confidence:.{digits}f} is below {threshold:.{digits}f}, from which on val's error was {share} or "
        "less"
    )


def _points(
    scores: dict[str, float], classes: Sequence[str], rules: Rules, negative_class: str | None
) -> dict[str, bool] | None:
    if not rules.operating_points:
        return None
    # Of two classes the first is negative unless one is named, as in `zoo.evaluation.metrics.negative_index`.
    positive = 1 - scores[negative_class if negative_class in scores else classes[0]]
    return {name: bool(positive >= point["threshold"]) for name, point in rules.operating_points.items()}


def mean_of_views(logits: Floats) -> Floats:
    """Return one row of logits for each image from those of its views, (V, B, C): the log of the mean softmax.

    The same as `zoo.training.views.combine`, up to rounding; those of a single view are returned as they are.
    """
    if len(logits) == 1:
        return np.asarray(logits[0])
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=2, keepdims=True)
    log_p = wide - np.log(np.exp(wide).sum(axis=2, keepdims=True))
    highest = log_p.max(axis=0)
    mean = highest + np.log(np.exp(log_p - highest).sum(axis=0)) - math.log(len(logits))
    return np.asarray(mean, dtype=logits.dtype)


def heat_of(maps: Floats, targets: Sequence[int]) -> Floats:
    """Return where evidence for one class of each image was found: (B, h, w) in [0, 1], all 0 without any.

    maps: (B, C, h, w), what each place adds to each class's logit (Zhou et al. 2016, arXiv 1512.04150). What it adds to
    all of them changes no score, so evidence is what it adds to this class beyond the mean of the classes.
    """
    chosen = np.maximum(maps[np.arange(len(maps)), list(targets)] - maps.mean(axis=1), 0)
    highest = chosen.max(axis=(1, 2), keepdims=True)
    return np.asarray(np.divide(chosen, highest, out=np.zeros_like(chosen), where=highest > 0))


def check_sample(logits: Floats, expected: Sequence[float], tolerance: float, name: str) -> None:
    """Raise ZooError unless a bundle's network says of its sample what it said when it was exported.

    logits, expected: (C,). tolerance: a part of the greatest expected logit, or of 1 where that is less.
    """
    wanted = np.asarray(expected, np.float64)
    if logits.shape != wanted.shape:
        raise ZooError(
            f"bundle {one_line(name)!r} is refused: {wanted.size} logits of its sample stand in bundle.json and its "
            f"network gives {logits.size}; export it again"
        )
    apart = float(np.abs(logits - wanted).max())
    allowed = tolerance * max(1.0, float(np.abs(wanted).max()))
    if not apart <= allowed:  # what is no number is wrong too
        raise ZooError(
            f"bundle {one_line(name)!r} says something else of its sample here than where it was exported: logits "
            f"differ by {apart:.3g}, at most {allowed:.3g} is rounding; export it on a machine like this one, or "
            "compare the versions in bundle.json"
        )
