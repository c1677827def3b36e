"""A benchmark's files: table in four formats, and figures, all out of run folders."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from zoo.data.cache import open_pixels
from zoo.data.manifest import Dataset
from zoo.data.transforms import center_crop
from zoo.errors import ZooError
from zoo.evaluation.predictions import Predictions, read_predictions
from zoo.files import Home, write_text
from zoo.reporting import plots
from zoo.reporting.comparison import Comparison
from zoo.reporting.tables import ENDINGS, FORMATS, title
from zoo.runs import Run


def write_results(
    folder: Path, comparison: Comparison, dataset: Dataset, root: Home, bad_images: str | None = None
) -> list[Path]:
    """Write table.md, .csv, .json and .tex and the figures to a folder, and return the files."""
    name = title(comparison)
    files = [folder / f"table{ending}" for ending in ENDINGS]
    for file in files:
        write_text(file, FORMATS[ENDINGS[file.suffix]](comparison))
    rows = [row for row in comparison.rows if row["seeds"]]
    runs = {row["recipe"]: [Run(root.runs / run) for run in row["runs"]] for row in rows}
    # A seed that was trained but could not be scored on test is a failure.
    runs = {recipe: [run for run in each if run.finished and run.scored("test")] for recipe, each in runs.items()}
    scores = plots.plot_test_scores(comparison.rows, f"test_{comparison.metric}", comparison.floors, title=name)
    figures = {"test-scores": scores}
    if rows:
        histories = {recipe: [run.history() for run in each] for recipe, each in runs.items()}
        figures["learning-curves"] = plots.plot_learning_curves(histories, title=name)
        matrices = {recipe: [run.metrics("test")["confusion_matrix"] for run in each] for recipe, each in runs.items()}
        figures["confusion-matrices"] = plots.plot_confusion_matrices(matrices, comparison.classes, title=name)
        best = rows[0]["recipe"]
        with suppress(ZooError):  # images that are gone since they were scored: the table stands without them
            figures["samples"] = sample_page(runs[best][0], dataset, f"{best}: {name}", bad_images=bad_images)
    for key, figure in figures.items():
        files.append(folder / f"{key}.png")
        plots.save_figure(figure, files[-1])
    return files


def sample_page(run: Run, dataset: Dataset, title: str = "", count: int = 16, bad_images: str | None = None) -> Any:
    """Return a figure of a run's test predictions, right and wrong, with their scores.

    Raises ZooError where an image is gone or changed and the policy is `fail`.
    """
    record = run.record
    assert record.preprocessing is not None
    predictions = read_predictions(run.predictions_file("test"))
    pixels = open_pixels(dataset, "test", record.preprocessing, bad_images)
    place = {sample: number for number, sample in enumerate(pixels.sample_ids.tolist())}
    chosen = [each for each in plots.choose_samples(predictions, count) if predictions.sample_ids[each] in place]
    images = [
        center_crop(pixels[place[predictions.sample_ids[each]]], record.preprocessing.image_size) for each in chosen
    ]
    subset = Predictions(
        predictions.sample_ids[chosen],
        predictions.groups[chosen],
        predictions.y_true[chosen],
        predictions.logits[chosen],
    )
    return plots.plot_samples(images, subset, record.classes, title=title)
