"""What is known of a run, its data and its artefact, gathered for the model card; test is not scored for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from zoo.data.leaks import declared_groups, find_leaks
from zoo.data.manifest import Dataset, split_summary
from zoo.deployment.bundle import BundleRecord
from zoo.deployment.facts import CardFacts
from zoo.deployment.rules import rules_on
from zoo.errors import ZooError
from zoo.evaluation.calibration import apply_temperature
from zoo.evaluation.calibration_error import reliability
from zoo.evaluation.dataset_floors import dataset_floors
from zoo.evaluation.ledger import looks_at_test
from zoo.evaluation.metrics import ece_of, log_loss_of
from zoo.evaluation.predictions import Predictions
from zoo.files import Home
from zoo.models.registry import find_model
from zoo.runs import RunRecord

_TRAINING = ("recipe", "strategy", "epochs", "best_epoch", "train_s", "device", "params", "params_trained", "made_of")


def card_facts(
    run: RunRecord,
    bundle: BundleRecord,
    dataset: Dataset,
    root: Home,
    val: Predictions,
    test: Predictions | None,
) -> CardFacts:
    """Return what the card of a bundle says.

    val: the artefact's predictions. test: those that the run left, where it was scored; nothing is scored here. Floors
    of test are only looked for then.
    """
    about, leaks = dataset.facts, _leaks(dataset)
    looks = looks_at_test(root, dataset.split_digest)["scorings"]
    return CardFacts(
        dataset=dataset.name,
        classes=list(bundle.classes),
        summary=str(about.get("summary") or ""),
        licence=str(about.get("licence") or ""),
        source=str(about.get("source") or ""),
        note=str(about.get("note") or ""),
        faults=_texts(about.get("faults")),
        medical=bundle.medical,
        negative_class=bundle.negative_class,
        splits=split_summary(dataset)["splits"],
        group_rule=_group_rule(about),
        audit_ok=leaks[0],
        leaks=leaks[1],
        leaks_accepted=run.leaks_accepted,
        images_skipped={split: len(each) for split, each in run.images_skipped.items() if each},
        floors=_floors(dataset, run, "val"),
        floors_test=_floors(dataset, run, "test") if test is not None else [],
        val=bundle.val,
        test=bundle.test,
        groups_val=group_spread(val),
        groups_test=group_spread(test) if test is not None else None,
        calibration={
            "temperature": bundle.rules.temperature,
            **_calibration(val, bundle.rules.temperature),
            "test": None if test is None else _calibration(test, bundle.rules.temperature),
        },
        rules_on_val=rules_on(val, bundle.rules),
        weights_licence=_licence(run),
        training={
            **{key: getattr(run, key) for key in _TRAINING},
            "precision": run.precision.get("name"),
            "notes": run.notes,
            "weights": run.weights,
        },
        versions=run.versions,
        exporter=bundle.exporter,
        looks_at_test=looks,
        intended_use=_intended_use(about, dataset.name, bundle.medical),
    )


def group_spread(predictions: Predictions) -> dict[str, Any] | None:
    """Return how top1 spreads over groups, as CardFacts has it; None where no group has more than one image."""
    codes = predictions.group_codes
    counts = np.bincount(codes)
    if counts.max() < 2:
        return None
    right = np.bincount(codes, weights=predictions.y_pred == predictions.y_true) / counts
    worst, q25, median, q75, best = (float(each) for each in np.quantile(right, [0, 0.25, 0.5, 0.75, 1]))
    return {
        "groups": len(counts),
        "worst": worst,
        "q25": q25,
        "median": median,
        "q75": q75,
        "best": best,
        "below_half": float((right < 0.5).mean()),
    }


def _calibration(predictions: Predictions, temperature: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, each in (("before", predictions), ("after", apply_temperature(predictions, temperature))):
        found[f"ece_{name}"] = ece_of(each.y_true, each.y_score)
        found[f"log_loss_{name}"] = log_loss_of(each.y_true, each.y_score)
        found[f"reliability_{name}"] = reliability(each.y_true, each.y_score, groups=each.group_codes)
    return found


def _floors(dataset: Dataset, run: RunRecord, split: str) -> list[dict[str, Any]]:
    try:
        return dataset_floors(dataset, run.bad_images, split)
    except ZooError:
        return []  # an image is gone: the card says that floors are not known


def _leaks(dataset: Dataset) -> tuple[bool | None, list[str]]:
    try:
        leaks = find_leaks(dataset)
    except ZooError:
        return None, []
    return leaks.ok, leaks.sentences()


def _group_rule(about: dict[str, Any]) -> str:
    if declared_groups(about):
        return "what the dataset declares to belong together, such as a patient"
    return "images that were found to be copies or near-copies of each other; nobody said which patient they are of"


def _intended_use(about: dict[str, Any], dataset: str, medical: bool) -> list[str]:
    stated = _texts(about.get("intended_use"))
    return stated or [
        f"Sorting images like those of {dataset} into its classes, with a person who decides wherever the rules refer.",
        *(["Research; no use on patients."] if medical else []),
    ]


def _licence(run: RunRecord) -> str:
    if run.weights.get("from") == "scratch":
        return "none: training began from random weights"
    try:
        return find_model(run.model).licence
    except ZooError:
        return ""


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [str(each) for each in value] if isinstance(value, Sequence) else []
