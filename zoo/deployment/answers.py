"""From logits to what a person is told: calibrated scores, the set of classes that may be true, and when to refer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zoo.deployment.bundle import Refer, Rules
from zoo.errors import ZooError
from zoo.evaluation.calibration import prediction_sets
from zoo.evaluation.metrics import negative_index

UNREADABLE = "the image could not be read"


@dataclass(frozen=True)
class Answer:
    """What is said of one image.

    label: the class of the highest logit. scores: class to calibrated score, softmax(logits / temperature), in [0, 1].
    prediction_set: the classes that hold the true one with the rules' coverage, in the order of classes; empty where
    the rules name none. refer: whether a human is asked, and the reason in words. points: name of an operating point
    to whether the image is called diseased there; None where there are none.
    """

    label: str
    scores: dict[str, float]
    prediction_set: list[str]
    refer: bool
    refer_reason: str | None
    points: dict[str, bool] | None


def answers_of(
    logits: np.ndarray[Any, Any], classes: Sequence[str], rules: Rules, negative_class: str | None = None
) -> list[Answer]:
    """Return the answer to each row of logits (B, C).

    Without a rule for it, nothing is referred, and without one for sets they are empty. Raises ZooError where a logit
    is not finite: such a row has no answer.
    """
    if not np.isfinite(logits).all():
        raise ZooError("the network gives logits that are not finite; export or train it again")
    scores = calibrated(logits, rules.temperature)
    members = _members(scores, rules)
    points = _points(scores, classes, rules, negative_class)
    found = []
    for place, row in enumerate(scores):
        reason = _refer_reason(float(row.max()), rules.refer)
        found.append(
            Answer(
                label=classes[int(logits[place].argmax())],
                scores={name: float(score) for name, score in zip(classes, row, strict=True)},
                prediction_set=[name for name, held in zip(classes, members[place], strict=True) if held],
                refer=reason is not None,
                refer_reason=reason,
                points=None if points is None else {name: bool(called[place]) for name, called in points.items()},
            )
        )
    return found


def calibrated(logits: np.ndarray[Any, Any], temperature: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return softmax(logits / temperature) of (B, C), in float64; rows sum to 1.

    >>> calibrated(np.array([[2.0, 0.0]]), 2.0).round(4).tolist()
    [[0.7311, 0.2689]]
    """
    scaled = logits.astype(np.float64) / temperature
    powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    found: np.ndarray[Any, np.dtype[np.float64]] = powers / powers.sum(axis=1, keepdims=True)
    return found


def _members(scores: np.ndarray[Any, Any], rules: Rules) -> np.ndarray[Any, Any]:
    rule = rules.conformal
    if rule is None:
        return np.zeros(scores.shape, bool)
    return prediction_sets(scores, math.inf if rule.quantile is None else rule.quantile, rule.method)


def _points(
    scores: np.ndarray[Any, Any], classes: Sequence[str], rules: Rules, negative_class: str | None
) -> dict[str, np.ndarray[Any, Any]] | None:
    negative = negative_index(list(classes), negative_class)
    if not rules.operating_points or negative is None:
        return None
    disease = 1 - scores[:, negative]
    return {name: disease >= float(facts["threshold"]) for name, facts in rules.operating_points.items()}


def _refer_reason(confidence: float, rule: Refer | None) -> str | None:
    """Return why a human is asked, or None; the words hold nothing of the image but its confidence.

    >>> _refer_reason(0.513, Refer(threshold=0.72, max_error=0.05))
    'confidence 0.513 is below 0.720, from which on val erred in at most 5 %'
    >>> _refer_reason(0.99, Refer(threshold=None, max_error=0.05))
    'every image is referred: val shows no confidence from which on it errs in at most 5 %'
    >>> _refer_reason(0.99, Refer(threshold=0.72, max_error=0.05))
    """
    if rule is None:
        return None
    promise = f"at most {100 * rule.max_error:.3g} %"
    if rule.threshold is None:
        return f"every image is referred: val shows no confidence from which on it errs in {promise}"
    if confidence >= rule.threshold:
        return None
    return f"confidence {_below(confidence, rule.threshold)}, from which on val erred in {promise}"


def _below(confidence: float, threshold: float) -> str:
    """Return `a is below b` with as many digits as tell the two apart."""
    for digits in (3, 4, 6, 9):
        texts = [f"{value:.{digits}f}" for value in (confidence, threshold)]
        if texts[0] != texts[1]:
            break
    return f"{texts[0]} is below {texts[1]}"
