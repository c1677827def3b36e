"""The model card: each statement is held against the record's numbers, and what is missing is said to be."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from zoo.deployment.bundle import BundleRecord
from zoo.deployment.card import MISSING, card_text, plain
from zoo.deployment.facts import CardFacts, _licence
from zoo.runs import list_runs

CLASSES = ["benign", "malignant", "normal"]
VAL = {
    "n": 189,
    "n_groups": 63,
    "top1": 0.9417,
    "top1_ci": [0.901, 0.971],
    "auroc": None,
    "per_class": {
        name: {"precision": 0.9, "recall": 0.811 + place / 100, "f1": 0.85, "support": 63}
        for place, name in enumerate(CLASSES)
    },
    "confusion_matrix": [[51, 7, 5], [4, 58, 1], [0, 0, 63]],
}
GATE = {
    "images": 189,
    "max_abs_difference": 3.07e-6,
    "max_relative_difference": 6.5e-7,
    "top1_agreement": 1.0,
    "flips": {"harmful": 2, "beneficial": 1, "neutral": 0},
    "metric": "top1",
    "change": -0.0042,
    "change_ci": [-0.0571, 0.0123],
    "margin": 0.01,
    "passed": True,
    "reason": None,
}
RULES = {
    "temperature": 0.627,
    "conformal": {"method": "aps", "coverage": 0.9, "quantile": 0.41},
    "refer": {"threshold": 0.473, "max_error": 0.05},
    "operating_points": {
        "sensitivity_at_specificity": {
            "asked": 0.95,
            "threshold": 0.432,
            "val_sensitivity": 0.96,
            "val_specificity": 0.952,
        }
    },
}


def _record(**changes: Any) -> BundleRecord:
    table: dict[str, Any] = {
        "name": "phantom--resnet--s0--1234abcd--onnx-float32",
        "run": "phantom--resnet--s0--1234abcd",
        "dataset": "phantom",
        "recipe": "test_resnet",
        "seed": 3,
        "model": "test_resnet.zoo",
        "params": 374_123,
        "classes": CLASSES,
        "negative_class": "normal",
        "preprocessing": {
            "image_size": 96,
            "crop_pct": 0.875,
            "interpolation": "bilinear",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "window": "lung",
        },
        "format": "onnx",
        "precision": "float32",
        "split_digest": "feedbeef00",
        "rules": RULES,
        "parity": GATE,
        "sample": {"logits": [1.0, 2.0, 3.0], "tolerance": 1e-3},
        "files": {},
    }
    return BundleRecord.model_validate({**table, **changes})


def _facts(**changes: Any) -> CardFacts:
    full = CardFacts(
        dataset="phantom",
        classes=CLASSES,
        summary="drawn chest slices",
        licence="CC0-1.0",
        source="drawn by a program",
        faults=["all patients are invented"],
        negative_class="normal",
        splits={
            split: {"images": images, "groups": images // 3, "classes": dict.fromkeys(CLASSES, images // 3)}
            for split, images in (("train", 882), ("val", 189), ("test", 189))
        },
        group_rule="one patient",
        audit_ok=True,
        floors=[{"name": "most frequent class", "val_top1": 0.333, "val_top1_ci": [0.22, 0.46]}],
        floors_test=[{"name": "most frequent class", "test_top1": 0.334, "test_top1_ci": [0.23, 0.45]}],
        val=VAL,
        test={**VAL, "top1": 0.8812, "top1_ci": [0.83, 0.92]},
        groups_val={
            "groups": 63,
            "worst": 0.0,
            "q25": 0.667,
            "median": 1.0,
            "q75": 1.0,
            "best": 1.0,
            "below_half": 0.079,
        },
        calibration={"temperature": 0.627, "ece_before": 0.123, "ece_after": 0.031, "log_loss_before": 0.3},
        rules_on_val={"set_coverage": 0.915, "mean_set_size": 1.27, "answered": 0.958, "error_answered": 0.048},
        weights_licence="Apache-2.0",
        training={"strategy": "full", "epochs": 12, "train_s": 41.26, "weights": {"source": "carried"}},
        versions={"torch": "2.14.1"},
        looks_at_test=7,
        intended_use=["To show how the zoo works."],
        limits=["Knows no contrast agent."],
    )
    return dataclasses.replace(full, **changes)


@pytest.mark.parametrize(
    "said",
    [
        "# Model card: phantom--resnet--s0--1234abcd--onnx-float32",
        "374,123 parameters",
        "(seed 3)",
        "- To show how the zoo works.",
        "- Knows no contrast agent.",
        "| accuracy | 0.942 \\[0.901, 0.971\\] | 0.881 \\[0.830, 0.920\\] |",
        "| AUROC | not defined | not defined |",
        "| images | 189 | 189 |",
        "| most frequent class | 0.333 \\[0.220, 0.460\\] | 0.334 \\[0.230, 0.450\\] |",
        "| malignant | 0.900 | 0.821 | 0.850 | 63 |",
        "| malignant | 4 | 58 | 1 |",
        "| train | 882 | 294 | 294 | 294 | 294 |",
        "Split digest: feedbeef00",
        "Audit: no leak between the splits was found",
        "Known fault: all patients are invented",
        "worst 0.000, lower quartile 0.667, median 1.000",
        "under 0.5 in 7.9 % of them",
        "Temperature, fitted on validation: 0.627",
        "0.123 before, 0.031 after; log loss 0.300 before, not known after",
        "hold the true class in 90.0 %; they held it in 91.5 % of validation",
        "with 1.27 classes on average",
        "below a calibrated score of 0.473",
        "it answered 95.8 % with 4.8 % wrong",
        "at a specificity of 0.95: anything but normal where the other classes score 0.432 or more",
        "Gate: passed; every one of 189 validation images",
        "flips 2 harmful, 1 beneficial, 0 neutral",
        "3.1e-06, relative 6.5e-07",
        "Change of top1: -0.004 [-0.057, +0.012], margin 0.010",
        "shorter side is resized to 109 (bilinear); window lung",
        "- train_s: 41.26",
        "- began from: source carried",
        "Weights that training began from: Apache-2.0",
        "Data: CC0-1.0",
        "scored 7 times by all runs",
        "sha256sum -c SHA256SUMS",
    ],
)
def test_a_card_says_the_numbers_of_its_record_and_facts(said: str) -> None:
    assert said in card_text(_record(), _facts())


@pytest.mark.parametrize(
    ("record", "facts", "said", "not_said"),
    [
        ({"medical": True}, {}, "**Not a medical device.**", None),
        ({}, {"medical": True}, "**Not a medical device.**", None),
        ({}, {}, "Limits", "medical device"),
        ({}, {"test": None}, "It was not scored on test", "0.881"),
        ({}, {"val": {}}, f"Scores on validation: {MISSING}", "0.942"),
        ({}, {"audit_ok": None}, "Audit: not made for this card", "no leak"),
        ({}, {"audit_ok": False, "leaks": ["46 of test"]}, "Leak: 46 of test", "no leak between"),
        ({}, {"leaks_accepted": True}, "trained in spite of that", None),
        ({}, {"floors": [], "floors_test": []}, f"baselines score on this split: {MISSING}", "most frequent"),
        ({}, {"calibration": {}}, f"Calibration error before and after: {MISSING}", "0.123"),
        ({}, {"groups_val": None}, "no group has more than one image", "quartile"),
        ({}, {"intended_use": []}, "state no intended use", "how the zoo works"),
        ({}, {"licence": ""}, f"Data: {MISSING}", "CC0"),
        ({}, {"weights_licence": ""}, f"training began from: {MISSING}", "Apache"),
        ({}, {"splits": {}}, f"Images and groups of each split: {MISSING}", "882"),
        ({}, {"looks_at_test": 1}, "Limits", "scored 1 times"),
        ({}, {"val": {**VAL, "n_groups": 12}}, "Validation has only 12 groups", None),
        ({}, {"val": {**VAL, "n": 5000}, "test": {**VAL, "n": 5000}}, "Limits", "small differences"),
        ({"parity": {}}, {}, f"Gate: {MISSING}", "harmful"),
        (
            {"parity": {**GATE, "passed": False, "reason": "too | far"}},
            {},
            "**not passed**: too \\| far",
            "Gate: passed",
        ),
        ({"parity": {**GATE, "change_ci": None}}, {}, "-0.004 (no interval)", None),
        ({"rules": {}}, {}, "Prediction sets: no rule\n- Referring to a human: no rule", "0.473"),
        (
            {"rules": {**RULES, "conformal": {"method": "lac", "coverage": 0.9, "quantile": None}}},
            {},
            "no class is ever ruled out",
            "91.5 %",
        ),
        (
            {"rules": {**RULES, "refer": {"threshold": None, "max_error": 0.05}}},
            {},
            "always, for validation has no 20 images",
            "0.473",
        ),
        ({"rules": {**RULES, "operating_points": None}}, {}, "Operating points: none", "0.432"),
        ({"params": None}, {}, f"parameters {MISSING}", "374"),
    ],
)
def test_what_is_missing_or_bad_is_said(
    record: dict[str, Any], facts: dict[str, Any], said: str, not_said: str
) -> None:
    text = card_text(_record(**record), _facts(**facts))
    assert said in text
    assert not_said is None or not_said not in text


def test_a_card_of_nothing_but_the_names_invents_no_number() -> None:
    text = card_text(_record(parity={}, rules={}, params=None), CardFacts("phantom", CLASSES))
    scores = text.partition("## Scores")[2].partition("## Calibration")[0]
    assert "0." not in scores
    assert text.count(MISSING) > 10


HOSTILE = "<img src=x onerror=alert(1)>|`x`\n# head **b** [a](javascript:1) \x1b[31m &lt; $x$ ~~s~~"


def test_foreign_names_and_texts_are_no_markup() -> None:
    record = _record(name=HOSTILE, dataset=HOSTILE, classes=[HOSTILE, "b", "c"], model=HOSTILE, negative_class=HOSTILE)
    per_class = {"per_class": {HOSTILE: {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 3}}}
    fields: dict[str, Any] = dict.fromkeys(
        ("dataset", "summary", "licence", "source", "note", "group_rule", "weights_licence"), HOSTILE
    )
    fields |= {name: [HOSTILE] for name in ("faults", "leaks", "intended_use", "limits")}
    fields |= {"training": {HOSTILE: {HOSTILE: [HOSTILE]}}, "versions": {HOSTILE: HOSTILE}}
    fields |= {"floors": [{"name": HOSTILE, "val_top1": 0.5}], "val": {**VAL, **per_class}}
    fields |= {"splits": {HOSTILE: {"images": 1}}, "images_skipped": {HOSTILE: 2}, "test": None}
    text = card_text(record, _facts(**fields))
    bare = text.replace("\\\\", "")
    for mark in "<>`[]":
        stripped = bare.replace(f"\\{mark}", "").replace("```", "")
        allowed = {"[": "[-0.057", "]": "+0.012]"}.get(mark)
        assert mark not in (stripped.replace(allowed, "") if allowed else stripped), mark
    assert "\x1b" not in text
    assert "\n# head" not in text
    rows = [line.replace("\\|", "") for line in text.splitlines() if line.startswith("|")]
    assert rows
    for line, after in itertools.pairwise(rows):
        if set(after) <= set("| -"):
            assert line.count("|") == after.count("|")


def test_an_escaped_text_keeps_its_words() -> None:
    assert plain("T_1 & _50_ %") == "T_1 \\& \\_50\\_ %"
    assert len(plain("x" * 10_000)) <= 500


@pytest.mark.parametrize(
    ("source", "said"),
    [("scratch", "none needed: trained from scratch"), ("pretrained", "Apache-2.0"), ("file", ""), ("run", "")],
)
def test_the_registrys_licence_is_of_the_weights_that_it_names(trained, source: str, said: str) -> None:
    record = list_runs(trained)[0].record.model_copy(update={"model": "resnet18", "weights": {"from": source}})
    assert _licence(record) == said
