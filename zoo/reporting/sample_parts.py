"""A report's parts on single test images: by class, by rank, the errors that recipes share, the hardest images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from zoo.data.decode import BadImage, decode, resize
from zoo.data.manifest import Dataset
from zoo.data.window import windowing_of_facts
from zoo.errors import ZooError
from zoo.evaluation.predictions import Predictions
from zoo.evaluation.statistics import top1_interval
from zoo.reporting import curves, plots
from zoo.reporting.blocks import Material, Pixels, Scored, chart, grid, part, sentence, with_interval
from zoo.reporting.comparison import Comparison
from zoo.reporting.html import picture

_SHOWN_IMAGES = 12
_PER_CLASS_RECIPES = 7
_MOST_CLASSES = 40
_THUMBNAIL = 192  # pixels


def classes_part(material: Material, scored: Scored) -> dict[str, Any] | None:
    """Return confusion matrices and each class's recall with its interval; None where nothing is scored."""
    if not scored.test:
        return None
    classes = material.comparison.classes
    c = len(classes)
    matrices = {
        name: [np.bincount(run.y_true * c + run.y_pred, minlength=c * c).reshape(c, c) for run in runs]
        for name, runs in scored.test.items()
    }
    drawn = chart(plots.plot_confusion_matrices(matrices, classes), "confusion matrix of every recipe")
    rows = _class_rows(scored, classes, matrices)
    heads = ["class", "recipe", "n", "recall", "95% CI", "precision", "F1"]
    shown = rows[:_MOST_CLASSES] if c > 6 else rows
    more = (
        [sentence(f"The {_MOST_CLASSES} classes with the lowest recall of {scored.best}.")]
        if len(rows) > len(shown)
        else []
    )
    return part("Classes", drawn, grid(heads, shown, words=2), *more)


def _class_rows(scored: Scored, classes: Sequence[str], matrices: Mapping[str, list[np.ndarray]]) -> list[list[str]]:
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


def ranking_part(scored: Scored, comparison: Comparison) -> dict[str, Any] | None:
    """Return ROC and precision-recall curves with bands, and the areas below them; None where nothing is scored."""
    if not scored.test:
        return None
    roc = curves.plot_roc_pr(scored.test, scored.positive, "roc")
    pr = curves.plot_roc_pr(scored.test, scored.positive, "pr")
    rows = []
    for row in comparison.rows:
        if row["recipe"] in scored.test:
            shown = [with_interval(row, f"test_{name}") for name in ("auroc", "auprc", "sensitivity", "specificity")]
            rows.append([row["recipe"], *shown])
    table = grid(["recipe", "AUROC", "AUPRC", "sensitivity", "specificity"], rows)
    kept = [0, *(place for place in range(1, 5) if any(row[place] != "–" for row in rows))]
    table["heads"] = [table["heads"][place] for place in kept]
    table["rows"] = [[row[place] for place in kept] for row in rows]
    return part(
        "ROC and precision-recall", table, chart(roc, "ROC curves with bands"), chart(pr, "precision-recall curves")
    )


# Errors that recipes share ------------------------------------------------------------------------------------------


def errors_part(scored: Scored, material: Material) -> dict[str, Any] | None:
    """Return the errors that recipes share, suspects of a wrong label, the hardest images; None without scores."""
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
    blocks = [sentence(each) for each in said]
    if len(missed) > 1:
        blocks.append(chart(curves.plot_error_overlap(missed), "how far recipes miss the same images"))
    return part("Errors", *blocks, *_image_blocks(scored, material, all_missed))


def _sorted(scored: Scored) -> list[tuple[str, list[Predictions]]]:
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
        f"{100 * gain:.1f} points fewer images than with the better one alone. No such oracle exists: it is a "
        "bound on choosing between them."
    ]


def _image_blocks(scored: Scored, material: Material, all_missed: np.ndarray) -> list[dict[str, Any]]:
    """Return cards of images that every recipe misses with confidence, and of the hardest of the others."""
    runs = [run for _, each in _sorted(scored) for run in each]
    looked = (
        "" if material.explain is None else f" Right: where {scored.best} looked for what it says, as finely as it can."
    )
    score = np.mean([run.y_score for run in runs], axis=0)
    y_true, ids = runs[0].y_true, runs[0].sample_ids
    of_true = score[np.arange(len(y_true)), y_true]
    order = np.argsort(of_true, kind="stable")
    said = np.stack([np.mean([run.y_score for run in each], axis=0).argmax(axis=1) for _, each in _sorted(scored)])
    agreed = (said == said[0]).all(axis=0) & (said[0] != y_true)
    suspects = [i for i in order if all_missed[i] and agreed[i]]
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
    shown: Sequence[int], ids: np.ndarray, y_true: np.ndarray, score: np.ndarray, scored: Scored, material: Material
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


def _explained(scored: Scored, material: Material, names: Sequence[str]) -> Mapping[str, Pixels]:
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
