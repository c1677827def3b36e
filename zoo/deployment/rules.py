"""The rules that turn logits into answers, all of them chosen on val, of the exported artefact's own logits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from zoo.deployment.bundle import Conformal, Refer, Rules
from zoo.evaluation.calibration import (
    apply_temperature,
    conformal_quantile,
    fit_temperature,
    operating_thresholds,
    refer_threshold,
)
from zoo.evaluation.conformal import prediction_sets
from zoo.evaluation.predictions import Predictions

COVERAGE, MAX_ERROR = 0.9, 0.05
METHOD = "aps"  # never an empty set, which nobody could act on


def fit_rules(val: Predictions, classes: list[str], negative_class: str | None = None) -> Rules:
    """Return temperature, conformal quantile, refer threshold and operating points of val's logits (N, C).

    All but the temperature are of the calibrated scores. Raises ZooError for logits that are not finite.
    """
    temperature = fit_temperature(val)
    scaled = apply_temperature(val, temperature)
    quantile = conformal_quantile(scaled.y_score, scaled.y_true, METHOD, COVERAGE)
    return Rules(
        temperature=temperature,
        conformal=Conformal(method="aps", coverage=COVERAGE, quantile=quantile if math.isfinite(quantile) else None),
        refer=Refer(threshold=refer_threshold(scaled, MAX_ERROR), max_error=MAX_ERROR),
        operating_points=operating_thresholds(scaled, classes, negative_class),
    )


def rules_on(predictions: Predictions, rules: Rules) -> dict[str, Any]:
    """Return what rules do with predictions: `set_coverage`, `mean_set_size`, `answered`, `error_answered` (or None).

    Fractions in [0, 1]; the set's size in classes. Of val, on which they were chosen, these are favourable.
    """
    scaled = apply_temperature(predictions, rules.temperature)
    found: dict[str, Any] = {}
    if rules.conformal is not None:
        quantile = math.inf if rules.conformal.quantile is None else rules.conformal.quantile
        sets = prediction_sets(scaled.y_score, quantile, rules.conformal.method)
        held = sets[np.arange(len(sets)), scaled.y_true]
        found |= {"set_coverage": float(held.mean()), "mean_set_size": float(sets.sum(axis=1).mean())}
    if rules.refer is not None:
        threshold = math.inf if rules.refer.threshold is None else rules.refer.threshold
        answered = scaled.y_score.max(axis=1) >= threshold
        wrong = (scaled.y_pred != scaled.y_true)[answered]
        found |= {"answered": float(answered.mean()), "error_answered": float(wrong.mean()) if len(wrong) else None}
    return found
