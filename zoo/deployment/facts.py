"""What a model card says of a run and its artefact: plain numbers and texts, gathered once, at the export."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.leaks import find_leaks
from zoo.data.manifest import Dataset, split_summary
from zoo.deployment.bundle import BundleRecord, Rules
from zoo.deployment.rules import rules_on
from zoo.errors import ZooError
from zoo.evaluation.calibration import apply_temperature
from zoo.evaluation.calibration_error import reliability
from zoo.evaluation.floors import dataset_floors
from zoo.evaluation.ledger import looks_at_test
from zoo.evaluation.metrics import ece_of, log_loss_of
from zoo.evaluation.predictions import Predictions
from zoo.files import Home
from zoo.models.registry import find_model
from zoo.runs import RunRecord


@dataclass(frozen=True)
class CardFacts:
    """All that a card says beyond `bundle.json`; no sample, file or group is named in it.

    Scores are fractions in [0, 1] with intervals of 95 % `[low, high]`; what is not known is None or empty. Texts are
    as the dataset's author wrote them, and are to be shown as foreign.

    - dataset: name. summary, licence, source, note: of `dataset.toml`. faults: what is known to be wrong with the data.
    - medical: the dataset says so. classes: in the order of the outputs. negative_class: that of the healthy.
    - splits: split to `images`, `groups`, `classes` (name to images). group_rule: what a group stands for, in words.
    - audit_ok: whether no leak between the splits is found now; None where the images are not there to be looked at.
      leaks: what leaks, in sentences. leaks_accepted: the run was trained in spite of them.
    - images_skipped: split to how many images were left out as unreadable.
    - floors: `name`, and for each of FLOOR_METRICS `val_<metric>` and `val_<metric>_ci`. floors_test: the same of test,
      `test_<metric>`, empty where the run was not scored on test.
    - val: the artefact's scores: `n`, `n_groups`, each metric of METRIC_SIGN (None where undefined) and `<metric>_ci`,
      `per_class` (name to precision, recall, f1, support), `confusion_matrix`. test: the same of the trained run, in
      its own number format, where it was scored; else None.
    - groups_val, groups_test: how top1 spreads over groups: `groups`, `worst`, `q25`, `median`, `q75`, `best`,
      `below_half` (share of the groups with a top1 under 0.5); None where no group has more than one image.
    - calibration: `temperature`, then of val `ece_before`, `ece_after` (fitted on it, hence favourable),
      `log_loss_before`, `log_loss_after`, `reliability_before`, `reliability_after` (bars of
      `zoo.evaluation.calibration_error.reliability`); `test`: the same keys of the run's test logits, or None.
    - rules_on_val: `set_coverage`, `mean_set_size`, `answered` (share not referred), `error_answered`: of val, on which
      the rules were chosen.
    - weights_licence: as the registry states it. training: `recipe`, `strategy`, `epochs`, `best_epoch`,
      `averaged_epochs`, `train_s`, `device`, `precision`, `params`, `params_trained`, `made_of`, `notes`, `weights`
      (what training began from).
    - versions: package to version, of training. exporter: as in `bundle.json`.
    - looks_at_test: how often any run was scored on this test split, None where the ledger does not say.
    - intended_use, limits: sentences.
    """

    dataset: str
    classes: list[str]
    summary: str = ""
    licence: str = ""
    source: str = ""
    note: str = ""
    faults: list[str] = field(default_factory=list)
    medical: bool = False
    negative_class: str | None = None
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    group_rule: str = ""
    audit_ok: bool | None = None
    leaks: list[str] = field(default_factory=list)
    leaks_accepted: bool = False
    images_skipped: dict[str, int] = field(default_factory=dict)
    floors: list[dict[str, Any]] = field(default_factory=list)
    floors_test: list[dict[str, Any]] = field(default_factory=list)
    val: dict[str, Any] = field(default_factory=dict)
    test: dict[str, Any] | None = None
    groups_val: dict[str, Any] | None = None
    groups_test: dict[str, Any] | None = None
    calibration: dict[str, Any] = field(default_factory=dict)
    rules_on_val: dict[str, Any] = field(default_factory=dict)
    weights_licence: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    exporter: dict[str, Any] = field(default_factory=dict)
    looks_at_test: int | None = None
    intended_use: list[str] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)


def gather_facts(
    record: BundleRecord,
    run: RunRecord,
    dataset: Dataset,
    val: Predictions,
    test: Predictions | None,
    root: Home,
) -> CardFacts:
    """Return what the card of a bundle says.

    val: the artefact's predictions. test: the run's, where it was scored; test images are not scored here. Floors and
    audit are left out where the images that they need are gone.
    """
    told = dataset.facts
    ok, leaks = _audit(dataset)
    floors_test = _floors(dataset, run, "test") if test is not None else []
    calibration: dict[str, Any] = {"temperature": record.rules.temperature, **_calibration(val, record.rules)}
    calibration["test"] = _calibration(test, record.rules) if test is not None else None
    return CardFacts(
        dataset=dataset.name,
        classes=list(record.classes),
        **{key: str(told.get(key, "")) for key in ("summary", "licence", "source", "note")},
        faults=[str(each) for each in told.get("faults", [])],
        medical=record.medical,
        negative_class=record.negative_class,
        splits=split_summary(dataset)["splits"],
        group_rule=group_rule(told.get("split", {})),
        audit_ok=ok,
        leaks=leaks,
        leaks_accepted=run.leaks_accepted,
        images_skipped={split: len(paths) for split, paths in run.images_skipped.items()},
        floors=_floors(dataset, run, "val"),
        floors_test=floors_test,
        val=record.val,
        test=record.test,
        groups_val=group_spread(val),
        groups_test=group_spread(test) if test is not None else None,
        calibration=calibration,
        rules_on_val=rules_on(val, record.rules),
        weights_licence=_licence(run),
        training=_training(run),
        versions=run.versions,
        exporter=record.exporter,
        looks_at_test=looks_at_test(root, run.split_digest)["scorings"],
        intended_use=[
            f"Sorting images like those of {dataset.name} into its {len(record.classes)} classes, where a human can "
            "check what it says."
        ],
        limits=_limits(record),
    )


def weights_told(run: RunRecord) -> dict[str, Any]:
    """Return what training began from, without the folders of the machine that trained."""
    told = dict(run.weights)
    place = str(told.get("location", ""))
    if place and "://" not in place:
        told["location"] = Path(place).name
    return told


def group_rule(split: dict[str, Any]) -> str:
    """Return in words what a group stands for, from the `split` table of `dataset.toml`.

    >>> group_rule({"group_blocks": 20, "near_duplicates": True})
    'blocks of 20 neighbouring file numbers, joined with near-duplicates'
    """
    found = []
    if "group_column" in split:
        found.append(f"what the column {split['group_column']} names")
    if split.get("group_patient"):
        found.append("the patient of the DICOM header")
    if "group_regex" in split:
        found.append(f"what {split['group_regex']} finds in the path")
    if "group_blocks" in split:
        found.append(f"blocks of {split['group_blocks']} neighbouring file numbers")
    rule = ", else ".join(found) or "each image by itself, joined with copies of the same pixels"
    return f"{rule}, joined with near-duplicates" if split.get("near_duplicates") else rule


def group_spread(predictions: Predictions) -> dict[str, Any] | None:
    """Return how top1 spreads over groups, as CardFacts has it; None where no group has more than one image."""
    groups = predictions.group_codes
    sizes = np.bincount(groups)
    if sizes.max() < 2:
        return None
    top1 = np.bincount(groups, weights=predictions.y_pred == predictions.y_true) / sizes
    names = ("worst", "q25", "median", "q75", "best")
    values = np.quantile(top1, [0, 0.25, 0.5, 0.75, 1])
    spread = {name: float(value) for name, value in zip(names, values, strict=True)}
    return {"groups": len(sizes), **spread, "below_half": float(np.mean(top1 < 0.5))}


def _audit(dataset: Dataset) -> tuple[bool | None, list[str]]:
    try:
        leaks = find_leaks(dataset)
    except (ZooError, OSError):
        return None, []
    return leaks.ok, leaks.sentences()


def _floors(dataset: Dataset, run: RunRecord, split: Any) -> list[dict[str, Any]]:
    with suppress(ZooError, OSError):
        return dataset_floors(dataset, run.bad_images, split)
    return []


def _calibration(predictions: Predictions, rules: Rules) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, each in (("before", predictions), ("after", apply_temperature(predictions, rules.temperature))):
        found |= {
            f"ece_{name}": ece_of(each.y_true, each.y_score),
            f"log_loss_{name}": log_loss_of(each.y_true, each.y_score),
            f"reliability_{name}": reliability(each.y_true, each.y_score, groups=each.group_codes),
        }
    return found


def _licence(run: RunRecord) -> str:
    source = run.weights.get("from")
    if source in (None, "", "scratch"):
        return "none needed: trained from scratch"
    if source in ("file", "run"):  # the registry's is of the weights that it names
        return ""
    try:
        return find_model(run.model).licence
    except ZooError:
        return ""


def _training(run: RunRecord) -> dict[str, Any]:
    names = ("recipe", "strategy", "epochs", "best_epoch", "averaged_epochs", "train_s", "device", "params")
    return {
        **{name: getattr(run, name) for name in (*names, "params_trained", "made_of")},
        "precision": run.precision.get("name", run.precision.get("dtype", "")),
        "notes": run.notes,
        "weights": weights_told(run),
    }


def _limits(record: BundleRecord) -> list[str]:
    found = ["The prediction sets and the referral hold for images drawn like val's: not for another source of images."]
    if record.precision != "float32":
        found.append(f"It computes in {record.precision}: its labels were compared on this kind of processor alone.")
    return found
