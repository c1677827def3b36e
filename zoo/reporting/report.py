"""The report: one self-contained HTML page that says what a comparison is worth, out of run folders alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.decode import BadImage, decode, resize
from zoo.data.leaks import find_leaks
from zoo.data.manifest import Dataset, split_summary
from zoo.data.window import windowing_of_facts
from zoo.errors import ZooError, one_line
from zoo.evaluation.calibration import calibration_report
from zoo.evaluation.metrics import METRIC_SIGN
from zoo.evaluation.predictions import Predictions, read_predictions
from zoo.evaluation.statistics import top1_interval
from zoo.files import write_text
from zoo.reporting import curves, plots
from zoo.reporting.comparison import Comparison
from zoo.reporting.findings import findings
from zoo.reporting.html import figure, picture, render
from zoo.reporting.tables import cells, floor_cells, legend, pair_cells, pairs_legend, title
from zoo.runs import Run

_SHOWN_IMAGES = 12
_PER_CLASS_RECIPES = 7
_MOST_CLASSES = 40
_THUMBNAIL = 192  # pixels
Table = dict[str, Any]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Explain = Callable[[Run, Sequence[str]], Mapping[str, Pixels]]


@dataclass(frozen=True)
class Material:
    """What a report is made of: runs by recipe, scored on test; the first of each stands for it where one must.

    explain: given a run and sample ids, pictures of where the network looked; probes: recipe to `shortcut_probe`.
    """

    comparison: Comparison
    runs: Mapping[str, Sequence[Run]]
    dataset: Dataset | None = None
    explain: Explain | None = None
    probes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    said: Sequence[str] = ()


def write_report(file: Path, material: Material) -> Path:
    """Write the report to a file and return it; no script, nothing from outside, everything escaped.

    Raises ZooError where predictions are damaged or the file cannot be written. Images that are gone leave gaps.
    """
    write_text(file, report_page(material))
    return file


def report_page(material: Material) -> str:
    """Return the report as HTML."""
    comparison = material.comparison
    scored = _Scored(material)
    parts = [
        _table_part(comparison),
        _pairs_part(comparison),
        _split_part(material),
        _cost_part(comparison),
        _curves_part(material),
        _confusion_part(material, scored),
        _ranking_part(scored, comparison),
        _calibration_part(scored),
        _decision_part(scored),
        _errors_part(scored, material),
        _probe_part(material),
        _runs_part(material),
    ]
    return render(
        "report.html",
        title=title(comparison),
        findings=findings(comparison),
        leaks=comparison.leaks_accepted,
        parts=[part for part in parts if part is not None],
        facts=_facts(material),
        said=list(material.said),
    )


class _Scored:
    """The predictions of every scored run, and what is computed from them once."""

    def __init__(self, material: Material) -> None:
        self.comparison = material.comparison
        self.test: dict[str, list[Predictions]] = {}
        self.calibration: dict[str, dict[str, Any]] = {}
        self.scaled: dict[str, Predictions] = {}
        for name, runs in material.runs.items():
            known = [run for run in runs if run.predictions_file("test").is_file()]
            if not known:
                continue
            self.test[name] = [read_predictions(run.predictions_file("test")) for run in known]
            if known[0].predictions_file("val").is_file():
                val = read_predictions(known[0].predictions_file("val"))
                record = known[0].record
                self.calibration[name] = calibration_report(
                    val, self.test[name][0], record.classes, record.negative_class
                )

    @property
    def best(self) -> str | None:
        """Return the recipe with the best mean, if its predictions are here."""
        best = self.comparison.relative_to
        return best if best in self.test else next(iter(self.test), None)

    @property
    def positive(self) -> int | None:
        """Return the positive class of two."""
        classes, rows = self.comparison.classes, self.comparison
        if len(classes) != 2:
            return None
        return 0 if rows.negative_class == classes[1] else 1


def _part(name: str, *blocks: dict[str, Any] | None) -> dict[str, Any]:
    return {"title": name, "id": name.lower().replace(" ", "-"), "blocks": [block for block in blocks if block]}


def _grid(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> dict[str, Any]:
    """Return a table; the first `words` columns are text, the others numbers."""
    return {"kind": "table", "heads": list(heads), "rows": [list(row) for row in rows], "words": words, "folded": False}


def _text(text: str) -> dict[str, Any]:
    return {"kind": "text", "text": text}


def _figure(drawn: Any, alt: str) -> dict[str, Any]:
    return {"kind": "figure", "image": figure(drawn), "alt": alt}


# What is known of all recipes ---------------------------------------------------------------------------------------


def _table_part(comparison: Comparison) -> dict[str, Any]:
    metric = comparison.metric
    rows = [cells(row, metric) for row in comparison.rows]
    # The score stands first, where a phone shows it.
    names = [head for head in rows[0] if head.startswith(("test ", "val "))]
    first = ["recipe", names[1], "95% CI", "ties", names[0]]
    left_out = ("model", "images/s", "status", "epochs", "weights")
    heads = [*first, *(head for head in rows[0] if head not in (*first, *left_out)), "weights"]
    floors = [floor_cells(floor, metric) for floor in comparison.floors]
    table = _grid(heads, [[row.get(head, "") for head in heads] for row in [*floors, *rows]])
    failed = [row for row in comparison.rows if row["reason"]]
    reasons = [_text(f"{row['status']}: {row['recipe']}: {row['reason']}") for row in failed]
    forest = plots.plot_test_scores(comparison.rows, f"test_{metric}", comparison.floors)
    notes = [_text(f"Note: {note}.") for note in comparison.notes]
    alt = f"test {metric} of every recipe with its interval, and the floors"
    return _part("Table", table, _text(legend(comparison)), *reasons, *notes, _figure(forest, alt))


def _pairs_part(comparison: Comparison) -> dict[str, Any] | None:
    if not comparison.pairs or comparison.relative_to is None:
        return None
    reference = comparison.relative_to
    pairs = [pair_cells(pair) for pair in comparison.pairs]
    heads = [head for head in pairs[0] if any(pair[head] != "–" for pair in pairs)]
    table = _grid(heads, [[pair[head] for head in heads] for pair in pairs], words=2)
    drawn = curves.plot_differences(comparison.pairs, reference)
    alt = f"difference of every recipe to {reference}, with intervals"
    return _part("Pairs", _figure(drawn, alt), {**table, "folded": len(pairs) > 15}, _text(pairs_legend(comparison)))


def _split_part(material: Material) -> dict[str, Any]:
    comparison, dataset = material.comparison, material.dataset
    blocks: list[dict[str, Any] | None] = []
    if dataset is not None and dataset.split_digest == comparison.split_digest:
        summary = split_summary(dataset)["splits"]
        rows = [
            [name, *(str(each["classes"].get(name, 0)) for each in summary.values())] for name in comparison.classes
        ]
        rows.append(["images", *(str(each["images"]) for each in summary.values())])
        rows.append(["groups", *(str(each["groups"]) for each in summary.values())])
        blocks.append(_grid(["class", *summary], rows))
        blocks += [_text(sentence) for sentence in _audit(dataset)]
    else:
        blocks.append(_text("The dataset is not here, or has another split now: what is known of it is in the runs."))
    looks = comparison.looks
    if looks.get("scorings"):
        since = f", first {looks['first']}, last {looks['last']} (UTC)" if looks.get("first") else ""
        blocks.append(
            _text(
                f"This test split was scored {looks['scorings']} times, for {looks['recipes']} recipes{since}. The "
                "more often a test split is looked at, the more the best of its scores owes to luck."
            )
        )
    return _part("Split", *blocks)


def _audit(dataset: Dataset) -> list[str]:
    try:
        leaks = find_leaks(dataset)
    except ZooError as error:
        return [f"Audit: not possible here ({one_line(error, 160)})."]
    if leaks.ok:
        return ["Audit: no copy, near-copy or group lies across train, val and test, and no picture has two labels."]
    return ["Audit: this split leaks.", *(f"{sentence[0].upper()}{sentence[1:]}." for sentence in leaks.sentences())]


def _cost_part(comparison: Comparison) -> dict[str, Any]:
    metric = comparison.metric
    drawn = curves.plot_pareto(comparison.rows, metric, METRIC_SIGN[metric])
    return _part("Score against cost", _figure(drawn, f"test {metric} against parameters and seconds of training"))


def _curves_part(material: Material) -> dict[str, Any] | None:
    histories = {name: [run.history() for run in runs] for name, runs in material.runs.items() if runs}
    if not histories:
        return None
    alt = "loss and top1 of training and validation by epoch"
    return _part("Learning curves", _figure(plots.plot_learning_curves(histories), alt))


# What single samples say --------------------------------------------------------------------------------------------


def _confusion_part(material: Material, scored: _Scored) -> dict[str, Any] | None:
    if not scored.test:
        return None
    classes = material.comparison.classes
    c = len(classes)
    matrices = {
        name: [np.bincount(run.y_true * c + run.y_pred, minlength=c * c).reshape(c, c) for run in runs]
        for name, runs in scored.test.items()
    }
    drawn = _figure(plots.plot_confusion_matrices(matrices, classes), "confusion matrix of every recipe")
    rows = _class_rows(scored, classes, matrices)
    heads = ["class", "recipe", "n", "recall", "95% CI", "precision", "F1"]
    shown = rows[:_MOST_CLASSES] if c > 6 else rows
    more = (
        [_text(f"The {_MOST_CLASSES} classes with the lowest recall of {scored.best}.")]
        if len(rows) > len(shown)
        else []
    )
    return _part("Classes", drawn, _grid(heads, shown, words=2), *more)


def _class_rows(scored: _Scored, classes: Sequence[str], matrices: Mapping[str, list[np.ndarray]]) -> list[list[str]]:
    """Return a row for each class and recipe, or, of many classes, the best recipe's rows by rising recall."""
    many = len(classes) > 6
    names = [scored.best] if many and scored.best else list(scored.test)[:_PER_CLASS_RECIPES]
    rows = []
    for place, label in enumerate(classes):
        for name in names:
            total = np.sum(matrices[name], axis=0)
            hits, n, said = total[place, place], total[place].sum(), total[:, place].sum()
            interval = _class_interval(scored.test[name], place)
            both = n + said
            rows.append(
                (
                    hits / n if n else 2.0,
                    [
                        label,
                        name,
                        str(n // len(scored.test[name])),
                        f"{hits / n:.3f}" if n else "–",
                        f"{interval[0]:.3f}–{interval[1]:.3f}" if interval else "–",
                        f"{hits / said:.3f}" if said else "–",
                        f"{2 * hits / both:.3f}" if both else "–",
                    ],
                )
            )
    return [row for _, row in (sorted(rows, key=lambda row: row[0]) if many else rows)]


def _class_interval(runs: Sequence[Predictions], label: int) -> tuple[float, float] | None:
    """Return the interval of a class's recall: top1 among its samples."""
    inside = runs[0].y_true == label
    if not inside.any():
        return None
    return top1_interval(
        [
            Predictions(run.sample_ids[own], run.groups[own], run.y_true[own], run.logits[own])
            for run in runs
            for own in [run.y_true == label]
        ],
        replicates=1000,
    )


def _ranking_part(scored: _Scored, comparison: Comparison) -> dict[str, Any] | None:
    if not scored.test:
        return None
    roc = curves.plot_roc_pr(scored.test, scored.positive, "roc")
    pr = curves.plot_roc_pr(scored.test, scored.positive, "pr")
    rows = []
    for row in comparison.rows:
        if row["recipe"] in scored.test:
            shown = [_with_interval(row, f"test_{name}") for name in ("auroc", "auprc", "sensitivity", "specificity")]
            rows.append([row["recipe"], *shown])
    table = _grid(["recipe", "AUROC", "AUPRC", "sensitivity", "specificity"], rows)
    kept = [0, *(place for place in range(1, 5) if any(row[place] != "–" for row in rows))]
    table["heads"] = [table["heads"][place] for place in kept]
    table["rows"] = [[row[place] for place in kept] for row in rows]
    return _part(
        "ROC and precision-recall", table, _figure(roc, "ROC curves with bands"), _figure(pr, "precision-recall curves")
    )


def _with_interval(row: Mapping[str, Any], key: str) -> str:
    if row.get(key) is None:
        return "–"
    interval = row.get(f"{key}_ci")
    return f"{row[key]:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def _calibration_part(scored: _Scored) -> dict[str, Any] | None:
    if not scored.calibration:
        return None
    heads = ["recipe", "T", "ECE before", "ECE after", "adaptive ECE after", "log loss", "after", "Brier"]
    heads += ["= miscalibration", "− discrimination", "+ uncertainty"]
    rows = []
    for name, report in scored.calibration.items():
        before, after = report["before"], report["after"]
        parts = after["brier_decomposition"]
        rows.append(
            [
                name,
                f"{report['temperature']:.2f}",
                _error(before, "ece"),
                _error(after, "ece"),
                _error(after, "adaptive_ece"),
                f"{before['log_loss']:.3f}",
                f"{after['log_loss']:.3f}",
                *(f"{parts[key]:.3f}" for key in ("brier", "miscalibration", "discrimination", "uncertainty")),
            ]
        )
    drawn = curves.plot_reliability(scored.calibration)
    said = (
        "Of each recipe's first seed. The temperature T is fitted on val only; before and after are on test. Brier's "
        "parts are those after it (CORP: isotonic regression)."
    )
    return _part("Calibration", _text(said), _grid(heads, rows), _figure(drawn, "reliability diagrams"))


def _error(quality: Mapping[str, Any], key: str) -> str:
    low, high = quality[f"{key}_ci"]
    return f"{quality[key]:.3f} [{low:.3f}, {high:.3f}]"


def _decision_part(scored: _Scored) -> dict[str, Any] | None:
    """Prediction sets, when to refer to a human, and operating points: all chosen on val, told on test."""
    if not scored.calibration:
        return None
    sets, refer = [], []
    for name, report in scored.calibration.items():
        for method in ("lac", "aps"):
            found = report["conformal"][method]
            low, high = found["coverage_ci"]
            size = f"{found['mean_set_size']:.2f}"
            share = f"{found['coverage']:.3f} [{low:.3f}, {high:.3f}]"
            classes = _class_coverage(found["per_class"])
            sets.append([name, method.upper(), share, size, str(found["empty_sets"]), *classes.values()])
        refer.append([name, *_refer_cells(report["refer"])])
    heads = ["recipe", "sets", "coverage", "mean size", "empty", *(f"of {one_line(each, 24)}" for each in classes)]
    asked = next(iter(scored.calibration.values()))
    said = (
        f"Split-conformal sets that should hold the true class in {_percent(asked['conformal']['coverage_asked'])} of "
        "cases like those of val; by group and by class it is no promise. Referral: the lowest confidence on val at "
        f"which at most {_percent(asked['refer']['max_error'])} of what is answered is wrong; all below is for a human."
    )
    first = {name: runs[0] for name, runs in scored.test.items()}
    drawn = curves.plot_risk_coverage(first, {name: each["refer"] for name, each in scored.calibration.items()})
    refer_heads = ["recipe", "answers from", "answered on val", "answered on test", "error among these"]
    return _part(
        "Sets and referral",
        _text(said),
        _grid(heads, sets, words=2),
        _grid(refer_heads, refer),
        _figure(drawn, "error among the answered by share answered"),
        *_operating(scored),
    )


def _class_coverage(per_class: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the coverage of each class, or, of more than six, of the one with the lowest."""
    known = {name: each["coverage"] for name, each in per_class.items() if each["coverage"] is not None}
    if len(per_class) > 6:
        return {"the worst class": f"{min(known.values()):.3f}"}
    return {name: f"{known[name]:.3f}" if name in known else "–" for name in per_class}


def _refer_cells(report: Mapping[str, Any]) -> list[str]:
    if report["threshold"] is None:
        return ["refers all", "0 %", "0 %", "–"]
    error = "–"
    if report["test_error"] is not None:
        low, high = report["test_error_ci"]
        error = f"{report['test_error']:.3f} [{low:.3f}, {high:.3f}]"
    return [f"{report['threshold']:.3f}", _percent(report["val_coverage"]), _percent(report["test_coverage"]), error]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _operating(scored: _Scored) -> list[dict[str, Any]]:
    rows = []
    for name, report in scored.calibration.items():
        for key, point in (report["operating_points"] or {}).items():
            asked = key.split("_at_")[1]
            row = [name, f"{asked} ≥ {point['asked']:.2f} on val", f"{point['threshold']:.3f}"]
            rows.append([*row, *(_with_interval(point, f"test_{side}") for side in ("sensitivity", "specificity"))])
    if not rows:
        return []
    heads = ["recipe", "asked", "threshold", "sensitivity on test", "specificity on test"]
    return [_text("Operating points, their threshold chosen on val:"), _grid(heads, rows, words=2)]


# Errors that recipes share ------------------------------------------------------------------------------------------


def _errors_part(scored: _Scored, material: Material) -> dict[str, Any] | None:
    if not scored.test:
        return None
    missed = {
        name: np.mean([run.y_pred != run.y_true for run in runs], axis=0) >= 0.5 for name, runs in _sorted(scored)
    }
    all_missed = np.all(list(missed.values()), axis=0)
    said = [
        f"A recipe misses an image where at least half of its seeds do. {int(all_missed.sum())} of {len(all_missed)} "
        f"test images are missed by every recipe, {int((~np.any(list(missed.values()), axis=0)).sum())} by none."
    ]
    said += _complementary(missed)
    blocks = [_text(sentence) for sentence in said]
    if len(missed) > 1:
        blocks.append(_figure(curves.plot_error_overlap(missed), "how far recipes miss the same images"))
    return _part("Errors", *blocks, *_image_blocks(scored, material, all_missed))


def _sorted(scored: _Scored) -> list[tuple[str, list[Predictions]]]:
    """Return each recipe's runs with their samples in one order."""
    found = []
    for name, runs in scored.test.items():
        orders = [np.argsort(run.sample_ids) for run in runs]
        found.append(
            (
                name,
                [
                    Predictions(run.sample_ids[o], run.groups[o], run.y_true[o], run.logits[o])
                    for run, o in zip(runs, orders, strict=True)
                ],
            )
        )
    return found


def _complementary(missed: Mapping[str, np.ndarray]) -> list[str]:
    """Name the pair of which an oracle that always asks the right one would gain most over the better of the two."""
    names = list(missed)
    found = []
    for place, one in enumerate(names):
        for two in names[place + 1 :]:
            alone = min(missed[one].mean(), missed[two].mean())
            found.append((alone - (missed[one] & missed[two]).mean(), one, two))
    if not found:
        return []
    gain, one, two = max(found)
    return [
        f"The most complementary errors have {one} and {two}: who always asked the right one of the two would err on "
        f"{100 * gain:.1f} points fewer images than with the better one alone. No such oracle exists; a gain near 0 "
        "says that an ensemble cannot help."
    ]


def _image_blocks(scored: _Scored, material: Material, all_missed: np.ndarray) -> list[dict[str, Any]]:
    """Return cards of images that every recipe misses with confidence, and of the hardest of the others."""
    runs = [run for _, each in _sorted(scored) for run in each]
    looked = (
        "" if material.explain is None else f" Right: where {scored.best} looked for what it says, as finely as it can."
    )
    score = np.mean([run.y_score for run in runs], axis=0)
    y_true, ids = runs[0].y_true, runs[0].sample_ids
    of_true = score[np.arange(len(y_true)), y_true]
    order = np.argsort(of_true, kind="stable")
    suspects = [i for i in order if all_missed[i] and score[i].max() >= 0.5 and score[i].argmax() != y_true[i]]
    hardest = [i for i in order if i not in set(suspects[:_SHOWN_IMAGES])]
    blocks = []
    for name, text, chosen in (
        ("Suspects of a wrong label", "Missed by every recipe, which agree on another class.", suspects),
        ("Hardest images", "Least score of the true class, the mean over all runs.", hardest),
    ):
        shown = chosen[:_SHOWN_IMAGES]
        if not shown:
            continue
        cards = _cards(shown, ids, y_true, score, scored, material)
        more = (
            f" The first {len(shown)} of {len(chosen)}."
            if name.startswith("Suspects") and len(chosen) > len(shown)
            else ""
        )
        blocks.append({"kind": "cards", "title": name, "text": text + more + looked, "cards": cards})
    return blocks


def _cards(
    shown: Sequence[int], ids: np.ndarray, y_true: np.ndarray, score: np.ndarray, scored: _Scored, material: Material
) -> list[dict[str, Any]]:
    classes = material.comparison.classes
    names = [str(ids[i]) for i in shown]
    looked = _explained(scored, material, names)
    cards = []
    for i, sample in zip(shown, names, strict=True):
        best = np.argsort(-score[i], kind="stable")[:3]
        pictures = [(_thumbnail(material.dataset, sample), sample)]
        pictures += [(picture(looked[sample], _THUMBNAIL), f"where {scored.best} looked")] if sample in looked else []
        cards.append(
            {
                "images": [{"src": src, "alt": alt} for src, alt in pictures if src],
                "name": _path(material.dataset, sample),
                "true": classes[y_true[i]],
                "scores": ", ".join(f"{classes[c]} {score[i, c]:.2f}" for c in best),
            }
        )
    return cards


def _explained(scored: _Scored, material: Material, names: Sequence[str]) -> Mapping[str, Pixels]:
    runs = material.runs.get(scored.best or "", [])
    if material.explain is None or not runs:
        return {}
    with suppress(ZooError):  # images that are gone, or a network without a map: cards without one
        return material.explain(runs[0], names)
    return {}


def _path(dataset: Dataset | None, sample: str) -> str:
    if dataset is None:
        return sample
    rows = dataset.frame["path"][dataset.frame["sample_id"] == sample]
    return str(rows.iloc[0]) if len(rows) else sample


def _thumbnail(dataset: Dataset | None, sample: str) -> str | None:
    if dataset is None:
        return None
    try:
        data = dataset.image_path(_path(dataset, sample)).read_bytes()
        return picture(resize(decode(data, windowing_of_facts(dataset.facts)), _THUMBNAIL, "bilinear"), _THUMBNAIL)
    except (OSError, BadImage, ZooError):
        return None


# Runs and environment -----------------------------------------------------------------------------------------------


def _probe_part(material: Material) -> dict[str, Any] | None:
    if not material.probes:
        return None
    heads = ["recipe", "whole image", "centre masked", "border masked"]
    keys = ("whole", "centre_masked", "border_masked")
    rows = [[name, *(_with_interval(probe, key) for key in keys)] for name, probe in material.probes.items()]
    said = (
        "top1 on val of each recipe's first seed, with the middle half of the image, or all around it, painted over. A "
        "network that keeps its score without the centre does not look where the thing is: suspect a shortcut."
    )
    return _part("Shortcut probe", _text(said), _grid(heads, rows))


def _runs_part(material: Material) -> dict[str, Any]:
    comparison = material.comparison
    rows, recipes = [], []
    for row in comparison.rows:
        key = f"test_{comparison.metric}"
        parts = [
            f"{row[f'{key}_{part}']:.3f}" if row[f"{key}_{part}"] is not None else "–" for part in ("sd", "se_seeds")
        ]
        from_test = f"{row[f'{key}_se_test']:.3f}" if row[f"{key}_se_test"] is not None else "–"
        seeds = ", ".join(f"{value:.3f}" for value in row["test_top1_seeds"]) or "–"
        rows.append([row["recipe"], ", ".join(map(str, row["seed_list"])) or "–", seeds, parts[0], parts[1], from_test])
    for name, runs in material.runs.items():
        file = runs[0].path / "recipe.toml" if runs else None
        if file is not None and file.is_file():
            recipes.append({"name": name, "text": file.read_text(encoding="utf-8", errors="replace")})
    heads = ["recipe", "seeds", "top1 of each", "sd of seeds", "error by seeds", "error by test images"]
    said = (
        f"Two sources of error of test {comparison.metric}: which seeds were drawn (sd / √seeds), and which test "
        "images; the interval holds both. Scores are means over seeds, never the best of them."
    )
    return _part("Seeds and recipes", _text(said), _grid(heads, rows), {"kind": "recipes", "recipes": recipes})


def _facts(material: Material) -> list[tuple[str, str]]:
    comparison = material.comparison
    environment = comparison.environment
    known = [
        ("dataset", comparison.dataset),
        ("split digest", comparison.split_digest),
        ("classes", ", ".join(comparison.classes)),
        ("device", str(environment["device"])),
        ("precision", str(environment["precision"])),
        ("threads", str(environment["threads"])),
    ]
    return known + [(name, str(version)) for name, version in environment["versions"].items()]
