"""The model card: what a bundle's model was made of, how good it was found to be, and what it must not be used for.

In Markdown, after Mitchell et al. 2019 (Model Cards for Model Reporting, arXiv 1810.03993). Every number is one of the
record's or of the facts; what is not known is said to be so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from zoo.deployment.bundle import RECORD, SUMS, TEST_OF, VAL_OF, BundleRecord
from zoo.deployment.facts import CardFacts
from zoo.errors import one_line
from zoo.runs import LEAKED_SOURCE

MISSING = "not known"
FEW_GROUPS, FEW_IMAGES = 20, 300
_MARKS = re.compile(r"([\\`*{}\[\]<>#|~!&$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")  # within a word, _ means nothing
_METRICS = {
    "top1": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "log_loss": "log loss (less is better)",
    "brier": "Brier score (less is better)",
    "ece": "calibration error, ECE (less is better)",
}
_POINTS = {
    "sensitivity_at_specificity": "most sensitive at a specificity of",
    "specificity_at_sensitivity": "most specific at a sensitivity of",
}
_CONFUSED = 12  # classes up to which the confusion matrix is shown

_COUNTS = (("images", "n"), ("groups", "n_groups"))

Scores = Mapping[str, Any]


def card_text(record: BundleRecord, facts: CardFacts) -> str:
    """Return the model card of a bundle, Markdown; foreign names and texts stand in it as text and never as markup."""
    val, test = facts.val or record.val, facts.test or record.test
    parts = [
        _top(record, facts),
        _use(record, facts, val, test),
        _data(record, facts),
        _scores(record, facts, val, test),
        _calibration(record, facts),
        _artefact(record, facts),
        _training(record, facts),
        _licences(facts),
        _verify(),
    ]
    return "\n\n".join("\n".join(part).strip() for part in parts) + "\n"


def plain(text: object, limit: int = 500) -> str:
    r"""Return foreign text as one line that Markdown shows as it is.

    >>> plain("a|b <b>\n`c`")
    'a\\|b \\<b\\> \\`c\\`'
    """
    return _MARKS.sub(r"\\\1", one_line(text, limit))


def _top(record: BundleRecord, facts: CardFacts) -> list[str]:
    params = f"{record.params:,} parameters" if record.params else f"parameters {MISSING}"
    lines = [f"# Model card: {plain(record.name)}", ""]
    if record.medical or facts.medical:
        lines += [
            "**Not a medical device.** It has no clearance or certificate of any authority, and nothing here was "
            "tested on patients in care. Never base a diagnosis or a treatment on it.",
            "",
        ]
    return [
        *lines,
        f"An image classifier of {len(record.classes)} classes ({_listed(record.classes)}): {plain(record.model)}, "
        f"{params}, trained on {plain(record.dataset)} by the recipe {plain(record.recipe)} (seed {record.seed}), "
        f"exported as {record.format} in {record.precision}.",
    ]


def _use(record: BundleRecord, facts: CardFacts, val: Scores, test: Scores | None) -> list[str]:
    limits = [*map(plain, facts.limits), *_data_limits(record, facts, val, test)]
    lines = [
        "## Intended use",
        "",
        *(_items(map(plain, facts.intended_use)) or ["The makers state no intended use."]),
        "",
    ]
    return [*lines, "## Limits", "", *_items(limits)]


def _data_limits(record: BundleRecord, facts: CardFacts, val: Scores, test: Scores | None) -> list[str]:
    """Return what the data at hand cannot support, each from a number of the record or of the facts."""
    found = []
    if facts.leaks_accepted:
        found.append("**The split leaks, and it was trained in spite of that: the scores may be too good.**")
    elif any(note.startswith(LEAKED_SOURCE) for note in facts.training.get("notes", ())):
        found.append("**A run that its weights come from had images of this test split: the scores are too good.**")
    elif facts.audit_ok is False:
        found.append("**The audit finds leaks between the splits: the scores may be too good.**")
    elif facts.audit_ok is None:
        found.append("Whether the splits leak was not looked at for this card.")
    if not test:
        found.append("It was not scored on test: validation chose its weights and rules, so its scores flatter it.")
    for split, scores in (("Validation", val), ("Test", test or {})):
        groups, images = scores.get("n_groups"), scores.get("n")
        if groups is not None and images is not None and groups < min(FEW_GROUPS, images):
            found.append(f"{split} has only {groups} groups: intervals of so few are rather too narrow.")
        if images is not None and images < FEW_IMAGES:
            found.append(f"{split} has only {images} images: small differences and rare mistakes cannot be seen in it.")
    if facts.looks_at_test is not None and facts.looks_at_test > 1:
        found.append(f"The test split was scored {facts.looks_at_test} times by all runs: the best of these flatters.")
    found.append(
        f"Every image is given one of the {len(record.classes)} classes, also one that shows none of them. Scores hold "
        "for images like those it was trained on: another device, place, population or preprocessing was not tested."
    )
    return found


def _data(record: BundleRecord, facts: CardFacts) -> list[str]:
    told = {"Dataset": facts.dataset, "What it is": facts.summary, "Source": facts.source, "Note": facts.note}
    lines = ["## Data", "", *_items(f"{name}: {plain(text) if text else MISSING}" for name, text in told.items())]
    lines += [f"- Known fault: {plain(fault)}" for fault in facts.faults]
    lines.append(f"- What a group is: {plain(facts.group_rule) if facts.group_rule else MISSING}")
    lines.append(f"- Split digest: {plain(record.split_digest)}")
    lines.append(f"- Audit: {_audit(facts)}")
    lines += [f"- Leak: {plain(leak)}" for leak in facts.leaks]
    skipped = {split: count for split, count in facts.images_skipped.items() if count}
    lines += [f"- Left out of {plain(split)} as unreadable: {count} images" for split, count in skipped.items()]
    if not facts.splits:
        return [*lines, "", f"Images and groups of each split: {MISSING}."]
    rows = [
        [split, _cell(part.get("images")), _cell(part.get("groups"))]
        + [_cell((part.get("classes") or {}).get(name)) for name in record.classes]
        for split, part in facts.splits.items()
    ]
    return [*lines, "", *_table(["split", "images", "groups", *record.classes], rows)]


def _audit(facts: CardFacts) -> str:
    accepted = "; it was trained with leaks accepted" if facts.leaks_accepted else ""
    if facts.audit_ok is None:
        return "not made for this card" + accepted
    return (
        "no leak between the splits was found" if facts.audit_ok else "**leaks between the splits were found**"
    ) + accepted


def _scores(record: BundleRecord, facts: CardFacts, val: Scores, test: Scores | None) -> list[str]:
    lines = ["## Scores", ""]
    if not val:
        lines += [f"Scores on validation: {MISSING}.", ""]
    of_test = f" Test: of {TEST_OF}." if test else ""
    lines.append(
        f"In brackets: intervals of 95 %. Validation: of {VAL_OF}.{of_test} Scores of probabilities are "
        "before the temperature; the section on calibration has both."
    )
    columns = {"validation": val, **({"test": test} if test else {})}
    shown = [name for name in _METRICS if any(name in each for each in columns.values())]
    counts = [[name, *(_cell(each.get(key)) for each in columns.values())] for name, key in _COUNTS]
    rows = [[_METRICS[name], *(_score(each, name) for each in columns.values())] for name in shown]
    lines += ["", *_table(["", *columns], [*counts, *rows])]
    if not test:
        lines += ["", "It was not scored on test."]
    lines += ["", *_floors(facts)]
    for name, scores in (("validation", val), ("test", test or {})):
        lines += _per_class(record, name, scores)
    for name, spread in (("validation", facts.groups_val), ("test", facts.groups_test)):
        if spread:
            lines += ["", _spread(name, spread)]
    if not facts.groups_val and not facts.groups_test:
        lines += ["", "How the accuracy spreads over groups: not known, or no group has more than one image."]
    return lines


def _floors(facts: CardFacts) -> list[str]:
    """Return the table of what trivial baselines score on the same split."""
    lines = ["### Floors", ""]
    if not facts.floors and not facts.floors_test:
        return [*lines, f"What trivial baselines score on this split: {MISSING}."]
    by_name: dict[str, dict[str, Any]] = {}
    for row in (*facts.floors, *facts.floors_test):
        by_name.setdefault(str(row.get("name")), {}).update(row)
    keys = [
        (split, metric)
        for metric in _METRICS
        for split in ("val", "test")
        if any(f"{split}_{metric}" in row for row in by_name.values())
    ]
    heads = ["floor", *(f"{_METRICS[metric]}, {'validation' if split == 'val' else split}" for split, metric in keys)]
    rows = [[name, *(_score(row, f"{split}_{metric}") for split, metric in keys)] for name, row in by_name.items()]
    return [
        "### Floors",
        "",
        "What trivial baselines score on the same images; a model must be well above.",
        "",
        *_table(heads, rows),
    ]


def _per_class(record: BundleRecord, split: str, scores: Scores) -> list[str]:
    found = scores.get("per_class")
    if not found:
        return []
    heads = ["class", "precision", "recall", "F1", "images"]
    rows = [
        [
            name,
            *(_number(found[name].get(key)) for key in ("precision", "recall", "f1")),
            _cell(found[name].get("support")),
        ]
        for name in record.classes
        if name in found
    ]
    lines = ["", f"### Each class on {split}", "", *_table(heads, rows)]
    matrix = scores.get("confusion_matrix")
    if matrix and len(matrix) == len(record.classes) <= _CONFUSED:
        rows = [[name, *map(_cell, row)] for name, row in zip(record.classes, matrix, strict=True)]
        lines += ["", f"Confusion on {split}; rows are the true classes:", ""]
        lines += _table(["true", *(f"said {name}" for name in record.classes)], rows)
    return lines


def _spread(split: str, spread: Scores) -> str:
    told = ", ".join(f"{name} {_number(spread.get(key))}" for name, key in _QUARTILES)
    return (
        f"Accuracy of the {_cell(spread.get('groups'))} groups of {split}: {told}; under 0.5 in "
        f"{_percent(spread.get('below_half'))} of them."
    )


_QUARTILES = (
    ("worst", "worst"),
    ("lower quartile", "q25"),
    ("median", "median"),
    ("upper quartile", "q75"),
    ("best", "best"),
)


def _calibration(record: BundleRecord, facts: CardFacts) -> list[str]:
    rules, of_val = record.rules, facts.rules_on_val
    lines = ["## Calibration and rules", "", f"- Temperature, fitted on validation: {rules.temperature:.3f}"]
    for split, found in (("validation", facts.calibration), ("test", facts.calibration.get("test") or {})):
        if "ece_before" in found:
            fitted = " (fitted on it, hence favourable)" if split == "validation" else ""
            lines.append(
                f"- ECE on {split}{fitted}: {_number(found['ece_before'])} before, {_number(found.get('ece_after'))} "
                f"after; log loss {_number(found.get('log_loss_before'))} before, "
                f"{_number(found.get('log_loss_after'))} after"
            )
    if "ece_before" not in facts.calibration:
        lines.append(f"- Calibration error before and after: {MISSING}")
    conformal, refer = rules.conformal, rules.refer
    if conformal is None:
        lines.append("- Prediction sets: no rule")
    else:
        state = (
            "no class is ever ruled out, for validation was too small"
            if conformal.quantile is None
            else (
                f"they held it in {_percent(of_val.get('set_coverage'))} of validation, on which they were chosen, "
                f"with {_number(of_val.get('mean_set_size'), 2)} classes on average"
            )
        )
        lines.append(
            f"- Prediction sets ({conformal.method}): made to hold the true class in {_percent(conformal.coverage)}; "
            f"{state}"
        )
    if refer is None:
        lines.append("- Referring to a human: no rule")
    elif refer.threshold is None:
        lines.append(
            "- Referring to a human: always, for validation has no 20 images that could be answered with an error of "
            f"at most {_percent(refer.max_error)}"
        )
    else:
        lines.append(
            f"- Referring to a human: below a calibrated score of {refer.threshold:.3f}, chosen for an error of at "
            f"most {_percent(refer.max_error)} on validation; there it answered {_percent(of_val.get('answered'))} "
            f"with {_percent(of_val.get('error_answered'))} wrong"
        )
    return [*lines, *_points(record)]


def _points(record: BundleRecord) -> list[str]:
    found = record.rules.operating_points
    if not found:
        return ["- Operating points: none, for there is no negative class or validation lacks a side"]
    return [
        f"- Operating point, {_POINTS.get(name, plain(name))} {_number(point.get('asked'), 2)}: anything but "
        f"{plain(record.negative_class or record.classes[0])} where the other classes score "
        f"{_number(point.get('threshold'))} or more together; on validation "
        f"sensitivity {_number(point.get('val_sensitivity'))}, specificity {_number(point.get('val_specificity'))}"
        for name, point in found.items()
    ]


def _artefact(record: BundleRecord, facts: CardFacts) -> list[str]:
    gate, exporter = record.parity, record.exporter or facts.exporter
    lines = ["## The artefact against the trained network", ""]
    if not gate:
        lines.append(f"- Gate: {MISSING}; this artefact was not compared with the network that was trained")
    else:
        state = "passed" if gate.get("passed") else f"**not passed**: {plain(gate.get('reason') or MISSING)}"
        flips = gate.get("flips") or {}
        lines += [
            f"- Gate: {state}; every one of {_cell(gate.get('images'))} validation images through both",
            f"- Same label: {_percent(gate.get('top1_agreement'), 2)}; flips "
            + ", ".join(f"{_cell(flips.get(kind))} {kind}" for kind in ("harmful", "beneficial", "neutral")),
            *([unseen] if (unseen := _unseen(gate)) else []),
            f"- Greatest difference of a logit: {_small(gate.get('max_abs_difference'))}, relative "
            f"{_small(gate.get('max_relative_difference'))}",
            f"- Change of {plain(gate.get('metric') or MISSING)}: {_number(gate.get('change'), signed=True)} "
            f"{_interval(gate.get('change_ci'), signed=True)}, margin {_number(gate.get('margin'))}",
        ]
    made = ", ".join(f"{plain(key)} {plain(value)}" for key, value in exporter.items())
    pre = record.preprocessing
    return [
        *lines,
        f"- Exporter: {made or MISSING}",
        f"- Input: {pre.image_size} x {pre.image_size} pixels, the centre of an image whose shorter side is resized to "
        f"{pre.resize_size} ({pre.interpolation}); window {plain(pre.window or 'none')}; "
        f"test-time views {plain(record.tta)}",
        f"- Activation map: {'in the model file' if record.activation_map else 'none'}",
    ]


def _unseen(gate: Mapping[str, Any]) -> str | None:
    share = gate.get("unseen_flips")
    if share is None:
        return None
    return (
        f"- No label flipped in {_cell(gate.get('groups'))} groups; that so many show none leaves room for up to "
        f"{_percent(share)} of new groups with a flip (95 %)"
    )


def _training(record: BundleRecord, facts: CardFacts) -> list[str]:
    rows = {
        key: value for key, value in {"run": record.run, **facts.training}.items() if value not in (None, "", [], {})
    }
    weights = rows.pop("weights", None) or record.weights
    lines = ["## Training", "", *_items(f"{plain(key)}: {_told(value)}" for key, value in rows.items())]
    lines.append(f"- began from: {_told(weights) if weights else MISSING}")
    versions = ", ".join(f"{plain(name)} {plain(version)}" for name, version in facts.versions.items())
    return [*lines, f"- versions: {versions or MISSING}"]


def _licences(facts: CardFacts) -> list[str]:
    weights, data = (plain(text) if text else MISSING for text in (facts.weights_licence, facts.licence))
    return ["## Licence", "", f"- Weights that training began from: {weights}", f"- Data: {data}"]


def _verify() -> list[str]:
    return [
        "## Verify",
        "",
        "In the bundle's folder; the zoo does the same at every load, and refuses a changed byte:",
        "",
        "```",
        f"sha256sum -c {SUMS}",
        "```",
        "",
        f"All numbers above for machines: {RECORD}.",
    ]


def _listed(names: Sequence[str], most: int = 20) -> str:
    shown = ", ".join(map(plain, names[:most]))
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def _items(texts: Iterable[str]) -> list[str]:
    return [f"- {text}" for text in texts]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a table; its cells are taken as foreign."""
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(cell if set(cell) == {"-"} else plain(cell) for cell in line) + " |" for line in lines]


def _told(value: object) -> str:
    """Return a value in words: a mapping and a list on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{plain(key)} {_told(each)}" for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return "; ".join(map(_told, value))
    return f"{value:.4g}" if isinstance(value, float) else plain(value)


def _cell(value: object) -> str:
    return MISSING if value is None else str(value)


def _number(value: object, places: int = 3, signed: bool = False) -> str:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return MISSING
    return f"{value:+.{places}f}" if signed else f"{value:.{places}f}"


def _small(value: object) -> str:
    return f"{value:.1e}" if isinstance(value, (int, float)) else MISSING


def _percent(value: object, places: int = 1) -> str:
    return f"{100 * value:.{places}f} %" if isinstance(value, (int, float)) else MISSING


def _interval(ends: object, signed: bool = False) -> str:
    if not isinstance(ends, (list, tuple)) or len(ends) != 2:
        return "(no interval)"
    return f"[{', '.join(_number(end, signed=signed) for end in ends)}]"


def _score(scores: Scores | None, name: str) -> str:
    """Return a score with its interval; a metric that is there as None is not defined on these data."""
    if not scores or name not in scores:
        return MISSING
    if scores[name] is None:
        return "not defined"
    return f"{_number(scores[name])} {_interval(scores.get(f'{name}_ci'))}"
