"""Is the exported artefact the network that was trained? Both are asked about every val image, and compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zoo.data.cache import Pixels
from zoo.data.transforms import normalise_tensor
from zoo.deployment.bundle import Bundle
from zoo.deployment.predictor import Predictor
from zoo.errors import ZooError, one_line
from zoo.evaluation.metrics import METRIC_SIGN, negative_index
from zoo.evaluation.predictions import Predictions
from zoo.evaluation.statistics import paired_comparisons
from zoo.runs import Preprocessing, Run, RunRecord
from zoo.training.scoring import predictions_of
from zoo.training.views import logits_of_views

MARGIN = 0.01  # one point
FLOAT32_DIFFERENCE = 1e-3
"""The greatest difference of float32 logits, as a part of the greatest absolute logit. Runtimes that add in another
order differ by 1e-6 or so; a wrong step of preprocessing by 1e-2 and more."""
TIE = 2.0**-17
"""Two classes whose reference logits are nearer than this part of the image's greatest absolute logit are a tie: which
of them is highest is rounding, and either is the reference's label."""
_BATCH = 32
OF_LABELS = ("top1", "balanced_accuracy", "macro_f1", "macro_precision", "macro_recall", "sensitivity", "specificity")
Progress = Callable[[int, int], None]


def reference_predictions(
    model: torch.nn.Module, record: RunRecord, pixels: Pixels, progress: Progress | None = None
) -> Predictions:
    """Return what a run's network says of a split by the way of training: cached pixels, eager torch, float32.

    model: on the CPU, in evaluation mode. Raises ZooError where a logit is not finite.
    """
    assert record.preprocessing is not None
    preprocessing: Preprocessing = record.preprocessing

    def forward(batch: Any) -> torch.Tensor:
        found: torch.Tensor = model(normalise_tensor(torch.from_numpy(batch), preprocessing)).float()
        return found

    parts = []
    with torch.inference_mode():
        for start in range(0, len(pixels), _BATCH):
            images = [pixels[place] for place in range(start, min(start + _BATCH, len(pixels)))]
            parts.append(logits_of_views(images, preprocessing, record.tta, forward))
            if progress:
                progress(min(start + _BATCH, len(pixels)), len(pixels))
    logits = torch.cat(parts).numpy()
    wrong = ~np.isfinite(logits).all(axis=1)
    if wrong.any():
        raise ZooError(
            f"run {record.run!r} cannot be exported: its logits of {int(wrong.sum())} of {len(logits)} val images are "
            "not finite; train it again with a lower optimizer.lr or precision float32"
        )
    return Predictions(pixels.sample_ids, pixels.groups, pixels.y_true, logits)


def artefact_predictions(
    bundle: Bundle, classes: Sequence[str], pixels: Pixels, progress: Progress | None = None
) -> Predictions:
    """Return what a bundle says of a split by its own way alone: the files' bytes in, logits out.

    classes: those of the run; the bundle's outputs are put in their order by name, so that a bundle whose names stand
    in another order is seen to be wrong. pixels: whose files are read; their cached values are not looked at. Raises
    ZooError where the class names are others, or a file is gone or changed.
    """
    if sorted(bundle.record.classes) != sorted(classes):
        raise ZooError(f"bundle {bundle.name!r} has other classes than its run; export it again")
    order = [bundle.record.classes.index(each) for each in classes]
    predictor, parts = Predictor.load(bundle), []
    for start in range(0, len(pixels), _BATCH):
        images = [
            predictor.prepare(_bytes_of(pixels, place)) for place in range(start, min(start + _BATCH, len(pixels)))
        ]
        parts.append(predictor.logits(images)[0])
        if progress:
            progress(min(start + _BATCH, len(pixels)), len(pixels))
    logits = np.concatenate(parts)[:, order]
    return Predictions(pixels.sample_ids, pixels.groups, pixels.y_true, logits)


def _bytes_of(pixels: Pixels, place: int) -> bytes:
    try:
        return Path(pixels.source.file(place)).read_bytes()
    except OSError as error:
        raise pixels.source.fault(place, one_line(error.strerror or error)) from error


def judge(
    reference: Predictions,
    artefact: Predictions,
    precision: str,
    *,
    metric: str = "top1",
    margin: float = MARGIN,
    classes: Sequence[str] = (),
    negative_class: str | None = None,
) -> dict[str, Any]:
    """Return how far an artefact (float32 or another precision) is from its network on the same images, and a verdict.

    - `images`, `groups`; `max_abs_difference` of logits, `max_relative_difference` (as a part of the greatest absolute
      logit of the reference); `top1_agreement` in [0, 1], ties counted as agreeing; `ties`: labels that differ where
      the reference is undecided (TIE).
    - `flips`: labels that differ and are no tie: `harmful` (the reference is right), `beneficial` (the artefact is),
      `neutral` (neither).
    - `metric`, and of it `reference`, `artefact`, `change` (artefact less reference) and `change_ci` [low, high], the
      paired interval over groups of `zoo.evaluation.statistics.paired_comparisons`, [0, 0] for a metric of labels where
      no label differs (of top1: where the same images are right); `unseen_flips`: how many of new groups may hold a
      flip all the same (`unseen_flips`); `margin`.
    - `passed`, and `reason`, a sentence where it did not. float32 passes where all labels agree and logits differ by
      FLOAT32_DIFFERENCE at most; another precision where the interval's worse end is no worse than the margin.

    Raises ZooError for an unknown metric and a margin outside [0, 1].
    """
    check_gate(metric, margin)
    found: dict[str, Any] = {"images": len(reference.y_true), "groups": int(reference.group_codes.max()) + 1}
    if not np.isfinite(artefact.logits).all():
        bad = int((~np.isfinite(artefact.logits).all(axis=1)).sum())
        reason = f"its logits of {bad} of {found['images']} val images are not finite, where the network's are"
        return {**found, "metric": metric, "margin": margin, "passed": False, "reason": reason}
    found |= _differences(reference, artefact)
    negative = negative_index(list(classes), negative_class) if classes else None
    pair = paired_comparisons({"artefact": [artefact], "reference": [reference]}, metric, negative=negative)[0]
    values = {name: _value(each, metric, negative) for name, each in (("reference", reference), ("artefact", artefact))}
    ends = [pair.low, pair.high]
    if _same_score(reference, artefact, metric) and math.isfinite(pair.difference):
        # The same score whichever groups are drawn; what so few cannot show is told beside it.
        ends = [0.0, 0.0]
    found["unseen_flips"] = unseen_flips(found["groups"]) if not any(found["flips"].values()) else None
    found |= {
        "metric": metric,
        **values,
        "change": _known(pair.difference),
        "change_ci": ends if all(map(math.isfinite, ends)) else None,
        "margin": margin,
    }
    fault = _float32_fault(found) if precision == "float32" else _margin_fault(found)
    return {**found, "passed": fault is None, "reason": fault}


def _same_score(reference: Predictions, artefact: Predictions, metric: str) -> bool:
    """Return whether no drawing of groups can tell the two apart by a metric of labels."""
    if metric == "top1":
        y_true = reference.y_true
        return bool(np.array_equal(reference.y_pred == y_true, artefact.y_pred == y_true))
    return metric in OF_LABELS and bool(np.array_equal(reference.y_pred, artefact.y_pred))


def unseen_flips(groups: int) -> float:
    """Return how many of new groups may hold a flipped label, in [0, 1], where none of `groups` does: 95 % bound.

    The exact one-sided bound of no event among n, near 3 / n (Hanley and Lippman-Hand 1983,
    doi 10.1001/jama.1983.03330370053031).

    >>> round(unseen_flips(100), 4)
    0.0295
    """
    return float(1 - 0.05 ** (1 / groups))


def check_gate(metric: str, margin: float) -> None:
    """Raise ZooError for an unknown metric and a margin outside [0, 1]."""
    from zoo.errors import nearest

    if metric not in METRIC_SIGN:
        raise ZooError(
            f"metric must be one of {', '.join(METRIC_SIGN)}. Got {one_line(metric)!r}{nearest(metric, METRIC_SIGN)}"
        )
    if not 0 <= margin <= 1:
        raise ZooError(f"margin must lie in [0, 1], a part of the metric. Got {margin}; 0.01 is one point")


def _differences(reference: Predictions, artefact: Predictions) -> dict[str, Any]:
    apart = float(np.abs(artefact.logits.astype(np.float64) - reference.logits).max())
    greatest = float(np.abs(reference.logits).max())
    rows = np.arange(len(reference.y_true))
    gap = reference.logits[rows, reference.y_pred] - reference.logits[rows, artefact.y_pred]
    differ = artefact.y_pred != reference.y_pred
    tied = differ & (gap <= TIE * np.abs(reference.logits).max(axis=1))
    flipped = differ & ~tied
    was_right, is_right = reference.y_pred == reference.y_true, artefact.y_pred == reference.y_true
    return {
        "max_abs_difference": apart,
        "max_relative_difference": apart / greatest if greatest > 0 else apart,
        "top1_agreement": 1.0 - float(flipped.mean()),
        "ties": int(tied.sum()),
        "flips": {
            "harmful": int((flipped & was_right).sum()),
            "beneficial": int((flipped & is_right).sum()),
            "neutral": int((flipped & ~was_right & ~is_right).sum()),
        },
    }


def _value(predictions: Predictions, metric: str, negative: int | None) -> float | None:
    from zoo.evaluation.resampling import Aligned

    return _known(float(Aligned({"": [predictions]}, negative).values(metric)[""].mean()))


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _float32_fault(found: dict[str, Any]) -> str | None:
    flips, images = sum(found["flips"].values()), found["images"]
    if flips:
        return (
            f"{flips} of {images} val images get another label than the network gives ({_flips(found['flips'])}), and "
            f"logits differ by up to {found['max_relative_difference']:.2g} of the greatest; float32 must agree on all"
        )
    if found["max_relative_difference"] > FLOAT32_DIFFERENCE:
        return (
            f"labels agree on {images} val images, but logits differ by up to {found['max_relative_difference']:.2g} "
            f"of the greatest; of float32 at most {FLOAT32_DIFFERENCE:g} is rounding"
        )
    return None


def _margin_fault(found: dict[str, Any]) -> str | None:
    metric, ends, margin = found["metric"], found["change_ci"], found["margin"]
    if ends is None:
        return f"{metric} is not defined on val, so that nothing bounds its change; name another metric"
    worst = ends[0] if METRIC_SIGN[metric] > 0 else -ends[1]
    if worst >= -margin:
        return None
    few = ", which so few cannot bound closer" if not any(found["flips"].values()) else ""
    return (
        f"{metric} changes by {found['change']:+.4f} with interval [{ends[0]:+.4f}, {ends[1]:+.4f}] on "
        f"{found['images']} val images in {found['groups']} groups{few}; its worse end must be within the margin of "
        f"{margin:g} ({_flips(found['flips'])} labels flipped)"
    )


def _flips(flips: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in flips.items())


def against_recorded(run: Run, reference: Predictions, precision: dict[str, Any]) -> dict[str, Any] | None:
    """Return how the float32 reference agrees with the predictions that the run itself left, in its own precision.

    `precision`, `images`, `agreement` of labels in [0, 1], `max_abs_difference` of logits; None where the run left
    none, or of other images.
    """
    try:
        own = predictions_of(run, "val")
    except ZooError:
        return None
    if not np.array_equal(own.sample_ids, reference.sample_ids) or own.logits.shape != reference.logits.shape:
        return None
    return {
        "precision": precision.get("dtype", "float32"),
        "images": len(own.y_true),
        "agreement": float(np.mean(own.y_pred == reference.y_pred)),
        "max_abs_difference": float(np.abs(own.logits - reference.logits).max()),
    }
