"""Metrics of one run's predictions, by scikit-learn's functions; fractions in [0, 1], never NaN."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from zoo.errors import ZooError, nearest, one_line
from zoo.evaluation.predictions import Predictions

METRIC_SIGN = {
    "top1": 1,
    "balanced_accuracy": 1,
    "macro_precision": 1,
    "macro_recall": 1,
    "macro_f1": 1,
    "auroc": 1,
    "auprc": 1,
    "sensitivity": 1,
    "specificity": 1,
    "log_loss": -1,
    "brier": -1,
    "ece": -1,
}
"""The metrics that are one number, and whether more (1) or less (-1) of it is better."""

ECE_BINS = 15  # Guo et al. 2017, arXiv 1706.04599


def compute_metrics(predictions: Predictions, classes: list[str], negative_class: str | None = None) -> dict[str, Any]:
    """Return every metric of the predictions; one that is not defined on them is None.

    - `n`, `n_groups`; `top1`; `balanced_accuracy`, the mean recall of the classes that occur in y_true.
    - `macro_precision`, `macro_recall`, `macro_f1`: over the classes that occur in y_true or y_pred, 0/0 counted
      as 0 (scikit-learn's default). `per_class`: class name to `precision`, `recall`, `f1` (None for 0/0), `support`.
    - `auroc`, `auprc` (average precision): two classes: of the positive class; else the mean of one-vs-rest over
      the classes that have samples in and out of them; None where there is none.
    - `log_loss` in nats. `brier`: two classes: mean of (p - y)^2 of the positive class, in [0, 1] (scikit-learn's);
      else mean over samples of the sum over classes of (p - y)^2, in [0, 2] (Brier 1950). `ece`: `ece_of`.
    - `confusion_matrix`: list of C lists of C counts, rows true, columns predicted.
    - `sensitivity`, `specificity` of y_pred, where disease is every class but `negative_class`; of two classes
      without a negative class the second is the positive one; None with more classes and no negative class.

    Raises ZooError for no samples, fewer than two classes, logits of another width or that are not finite, and an
    unknown negative class.
    """
    check_predictions(predictions, classes, negative_class)
    y_true, y_pred, y_score = predictions.y_true, predictions.y_pred, predictions.y_score
    positive = positive_class(classes, negative_class)
    return {
        "n": len(y_true),
        "n_groups": int(predictions.group_codes.max()) + 1,
        "top1": _top1(y_true, y_pred),
        "balanced_accuracy": _balanced_accuracy(y_true, y_pred),
        **_macro(y_true, y_pred),
        "auroc": _auroc(y_true, y_score, positive),
        "auprc": _auprc(y_true, y_score, positive),
        "log_loss": log_loss_of(y_true, y_score),
        "brier": brier_of(y_true, y_score, positive),
        "ece": ece_of(y_true, y_score),
        **_sensitivity_specificity(y_true, y_pred, negative_index(classes, negative_class)),
        "per_class": _per_class(y_true, y_pred, classes),
        "confusion_matrix": _confusion(y_true, y_pred, len(classes)),
    }


def selection_score(name: str, logits: np.ndarray, y_true: np.ndarray) -> float:
    """Return one metric of logits (N, C) and y_true (N,), as `compute_metrics` has it; NaN where undefined.

    name: one of top1, balanced_accuracy, macro_f1, auroc, log_loss; cheap enough for every epoch.
    """
    ids = np.arange(len(y_true)).astype(str)
    predictions = Predictions(ids, ids, y_true, logits)
    check_predictions(predictions, [str(index) for index in range(predictions.logits.shape[1])], None)
    y_true = predictions.y_true
    if name in ("auroc", "log_loss"):
        y_score = predictions.y_score
        positive = 1 if y_score.shape[1] == 2 else None
        value = _auroc(y_true, y_score, positive) if name == "auroc" else log_loss_of(y_true, y_score)
        return math.nan if value is None else value
    if name == "macro_f1":
        return _macro(y_true, predictions.y_pred)["macro_f1"]
    by_name = {"top1": _top1, "balanced_accuracy": _balanced_accuracy}
    if name not in by_name:
        allowed = [*by_name, "macro_f1", "auroc", "log_loss"]
        raise ZooError(
            f"a metric to select by must be one of {', '.join(allowed)}. Got {one_line(name)!r}{nearest(name, allowed)}"
        )
    return by_name[name](y_true, predictions.y_pred)


def score(name: str, metrics: dict[str, Any]) -> float:
    """Return a metric turned so that more is better; minus infinity where it is not defined.

    Raises ZooError for a name that is no metric.

    >>> score("top1", {"top1": 0.75}), score("log_loss", {"log_loss": 0.5}), score("auroc", {"auroc": None})
    (0.75, -0.5, -inf)
    """
    if name not in METRIC_SIGN:
        raise ZooError(
            f"metric must be one of {', '.join(METRIC_SIGN)}. Got {one_line(name)!r}{nearest(name, METRIC_SIGN)}"
        )
    value = metrics.get(name)
    return -math.inf if value is None else METRIC_SIGN[name] * float(value)


def ece_of(y_true: np.ndarray, y_score: np.ndarray) -> float:
    """Return the expected calibration error of y_score (N, C) in [0, 1].

    The confidence of the predicted class falls in one of 15 equal bins (low, high]; the gaps between a bin's mean
    confidence and its accuracy are averaged by samples (Guo et al. 2017, arXiv 1706.04599).
    """
    confidence = y_score.max(axis=1)
    right = y_score.argmax(axis=1) == y_true
    bins = np.clip(np.ceil(confidence * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
    gaps = np.bincount(bins, weights=right - confidence, minlength=ECE_BINS)
    return float(np.abs(gaps).sum() / len(y_true))


def check_predictions(predictions: Predictions, classes: list[str], negative_class: str | None) -> None:
    """Raise ZooError unless there is a sample, and one finite logit for each of two classes or more."""
    n, width = predictions.logits.shape
    if n == 0:
        raise ZooError("metrics need at least one sample. Got none; check the dataset's split")
    if len(classes) < 2 or width != len(classes):
        raise ZooError(
            f"metrics need two classes or more and one logit for each. Got {len(classes)} classes and {width} logits; "
            "train the run again on this dataset"
        )
    if negative_class is not None and negative_class not in classes:
        raise ZooError(
            f"negative_class must be one of the classes {', '.join(map(one_line, classes))}. "
            f"Got {one_line(negative_class)!r}{nearest(negative_class, classes)}"
        )
    finite = np.isfinite(predictions.logits).all(axis=1)
    if not finite.all():
        first = one_line(predictions.sample_ids[~finite][0])
        raise ZooError(
            f"logits must be finite. Got {int((~finite).sum())} of {n} samples that are not, first {first!r}; "
            "train the run again with a lower optimizer.lr or precision float32"
        )


def negative_index(classes: list[str], negative_class: str | None) -> int | None:
    """Return the class that is no disease: the one named, else the first of two, else None."""
    if negative_class is not None:
        return classes.index(negative_class)
    return 0 if len(classes) == 2 else None


def positive_class(classes: list[str], negative_class: str | None) -> int | None:
    """Return the positive class of two; None where there are more."""
    negative = negative_index(classes, negative_class)
    return 1 - negative if len(classes) == 2 and negative is not None else None


def _top1(y_true: np.ndarray, y_pred: np.ndarray) -> float:
    return float(np.mean(y_true == y_pred))


def _balanced_accuracy(y_true: np.ndarray, y_pred: np.ndarray) -> float:
    # scikit-learn's number to the last bit, in a fiftieth of its time: a linear probe asks for it every few ms.
    _, place, counts = np.unique(y_true, return_inverse=True, return_counts=True)
    return float(np.mean(np.bincount(place, weights=y_true == y_pred) / counts))


def _macro(y_true: np.ndarray, y_pred: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import precision_recall_fscore_support

    values = precision_recall_fscore_support(y_true, y_pred, average="macro", zero_division=0)
    return dict(zip(("macro_precision", "macro_recall", "macro_f1"), map(float, values[:3]), strict=True))


def _per_class(y_true: np.ndarray, y_pred: np.ndarray, classes: list[str]) -> dict[str, dict[str, Any]]:
    from sklearn.metrics import precision_recall_fscore_support

    columns = precision_recall_fscore_support(y_true, y_pred, labels=range(len(classes)), zero_division=np.nan)
    table = {}
    for index, name in enumerate(classes):
        precision, recall, f1, support = (column[index] for column in columns)
        table[name] = {
            "precision": _defined(precision),
            "recall": _defined(recall),
            "f1": _defined(f1),
            "support": int(support),
        }
    return table


def _defined(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _one_vs_rest(y_true: np.ndarray, y_score: np.ndarray, positive: int | None, metric: Any) -> float | None:
    members = [positive] if positive is not None else range(y_score.shape[1])
    counts = np.bincount(y_true, minlength=y_score.shape[1])
    defined = [member for member in members if 0 < counts[member] < len(y_true)]
    values = [metric(y_true == member, y_score[:, member]) for member in defined]
    return float(np.mean(values)) if values else None


def _auroc(y_true: np.ndarray, y_score: np.ndarray, positive: int | None) -> float | None:
    from sklearn.metrics import roc_auc_score

    return _one_vs_rest(y_true, y_score, positive, roc_auc_score)


def _auprc(y_true: np.ndarray, y_score: np.ndarray, positive: int | None) -> float | None:
    from sklearn.metrics import average_precision_score

    return _one_vs_rest(y_true, y_score, positive, average_precision_score)


def log_loss_of(y_true: np.ndarray, y_score: np.ndarray) -> float:
    """Return the mean negative log of the true class's score, in nats; y_score: (N, C) in [0, 1]."""
    from sklearn.metrics import log_loss

    return float(log_loss(y_true, y_score, labels=range(y_score.shape[1])))


def brier_of(y_true: np.ndarray, y_score: np.ndarray, positive: int | None) -> float:
    """Return the Brier score as `compute_metrics` defines it; positive: of two classes, the only one that counts."""
    from sklearn.metrics import mean_squared_error

    # brier_score_loss knows more than two classes only from scikit-learn 1.7 on; this is its definition.
    if positive is not None:
        return float(mean_squared_error(y_true == positive, y_score[:, positive]))
    return float(mean_squared_error(np.eye(y_score.shape[1])[y_true], y_score) * y_score.shape[1])


def _sensitivity_specificity(y_true: np.ndarray, y_pred: np.ndarray, negative: int | None) -> dict[str, float | None]:
    from sklearn.metrics import recall_score

    if negative is None:
        return {"sensitivity": None, "specificity": None}
    disease, called = y_true != negative, y_pred != negative
    recalls = recall_score(disease, called, labels=[False, True], average=None, zero_division=np.nan)
    return {"sensitivity": _defined(recalls[1]), "specificity": _defined(recalls[0])}


def _confusion(y_true: np.ndarray, y_pred: np.ndarray, n_classes: int) -> list[list[int]]:
    from sklearn.metrics import confusion_matrix

    table: list[list[int]] = confusion_matrix(y_true, y_pred, labels=range(n_classes)).tolist()
    return table


def check_scores(y_true: np.ndarray, y_score: np.ndarray, bins: int = 1) -> None:
    """Raise ZooError unless y_score (N, C) is finite and fits y_true (N,), with a sample or more."""
    if y_score.ndim != 2 or y_true.shape != y_score.shape[:1] or not y_score.size:
        raise ZooError(
            f"scores must be (N, C) and y_true (N,), with a sample or more. Got {y_score.shape} and {y_true.shape}; "
            "score the run again"
        )
    if not (y_true.min() >= 0 and y_true.max() < y_score.shape[1] and np.isfinite(y_score).all()):
        raise ZooError(
            f"scores must be finite and y_true in [0, {y_score.shape[1]}). Got y_true of {y_true.min()} to "
            f"{y_true.max()} and {int((~np.isfinite(y_score)).sum())} scores that are not; score the run again"
        )
    if bins < 1:
        raise ZooError(f"bins must be 1 or more. Got {bins}; leave it out for {ECE_BINS}")


def check_logits(predictions: Predictions) -> None:
    """Raise ZooError unless there is a sample and every logit is finite, whatever the classes are called."""
    check_predictions(predictions, [str(index) for index in range(predictions.logits.shape[1])], None)
