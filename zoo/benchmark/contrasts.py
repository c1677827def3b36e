"""A benchmark of several datasets: a table for each, and the differences that were asked for in advance over all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.benchmark.definition import load_benchmark
from zoo.benchmark.executors import OnStep, Step, check_jobs
from zoo.benchmark.suite import NO_TORCHRUN, BenchResult, bench
from zoo.data.leaks import refuse_leaks
from zoo.data.manifest import load_dataset
from zoo.errors import ZooError
from zoo.evaluation.exact_tests import holm
from zoo.files import Home, home, write_json, write_text
from zoo.reporting.comparison import Comparison
from zoo.reporting.contrasts import contrasts_csv, contrasts_markdown, plot_contrasts
from zoo.reporting.plots import save_figure
from zoo.training.loop import OnTick
from zoo.training.parallel import refuse_torchrun


@dataclass(frozen=True)
class ManyResults:
    """What came of a benchmark of several datasets.

    results: by dataset. missing: why an optional dataset was left out, by its name. contrasts: as `contrast_rows`
    has them. folder: of the files over all datasets; each dataset's lie below it.
    """

    name: str
    results: dict[str, BenchResult]
    missing: dict[str, str]
    contrasts: list[dict[str, Any]]
    folder: Path

    @property
    def failed(self) -> int:
        """Return how many runs failed."""
        return sum(result.failed for result in self.results.values())

    def document(self) -> dict[str, Any]:
        """Return everything as `zoo bench --json` prints it."""
        return {
            "benchmark": self.name,
            "results": [result.comparison.document() for result in self.results.values()],
            "missing": [{"dataset": name, "reason": reason} for name, reason in self.missing.items()],
            "contrasts": self.contrasts,
        }


def bench_all(
    name: str,
    *,
    seeds: int | Sequence[int] | None = None,
    overrides: dict[str, Any] | None = None,
    root: Home | None = None,
    offline: bool = False,
    bad_images: str | None = None,
    accept_leaks: bool = False,
    jobs: int = 1,
    on_tick: OnTick | None = None,
    on_step: OnStep | None = None,
) -> ManyResults:
    """Run a benchmark on each of its datasets, and write `contrasts.md`, `.csv`, `.json` and `.png` beside the tables.

    An optional dataset that is not here, or whose splits leak, is left out with the reason. Finished runs are reused,
    so that after an interruption, or once a dataset has come, the same call goes on. Raises ZooError, before any
    training, where a dataset that is not optional cannot be had, else as `bench` does.
    """
    refuse_torchrun(*NO_TORCHRUN)
    check_jobs(jobs)
    root = root or home()
    wanted = load_benchmark(name, root)
    tell = on_step or (lambda _: None)
    missing: dict[str, str] = {}
    for dataset in (*wanted.datasets, *wanted.optional_datasets):
        try:
            refuse_leaks(load_dataset(dataset, root), accept_leaks)
        except ZooError as error:
            if dataset not in wanted.optional_datasets:
                raise
            missing[dataset] = str(error)
            tell(Step(0, 0, dataset, "left out", str(error)))
    results = {
        dataset: bench(
            name,
            data=dataset,
            seeds=seeds,
            overrides=overrides,
            root=root,
            offline=offline,
            bad_images=bad_images,
            accept_leaks=accept_leaks,
            jobs=jobs,
            on_tick=on_tick,
            on_step=on_step,
        )
        for dataset in (*wanted.datasets, *wanted.optional_datasets)
        if dataset not in missing
    }
    rows = contrast_rows([result.comparison for result in results.values()], wanted.contrasts)
    folder = root.benchmarks / wanted.name
    if rows:
        write_json(folder / "contrasts.json", {"contrasts": rows, "missing": missing})
        write_text(folder / "contrasts.md", contrasts_markdown(wanted.name, rows, missing))
        write_text(folder / "contrasts.csv", contrasts_csv(rows))
        save_figure(plot_contrasts(rows, wanted.summary or wanted.name), folder / "contrasts.png")
    return ManyResults(wanted.name, results, missing, rows, folder)


def contrast_rows(comparisons: Iterable[Comparison], wanted: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Return the difference one minus two of each wanted pair on each dataset, with its paired interval.

    p_holm is adjusted over the rows returned: they were asked for in advance, all other pairs were not. A pair that
    could not be compared, as one of the two failed, has None in place of numbers.
    """
    rows = [_contrast(comparison, one, two) for comparison in comparisons for one, two in wanted]
    known = [row for row in rows if row["p"] is not None]
    for row, adjusted in zip(known, holm([row["p"] for row in known]), strict=True):
        row["p_holm"] = adjusted
    return rows


def _contrast(comparison: Comparison, one: str, two: str) -> dict[str, Any]:
    scores = {row["recipe"]: row[f"test_{comparison.metric}"] for row in comparison.rows}
    row = {
        "dataset": comparison.dataset,
        "metric": comparison.metric,
        "test_images": comparison.images.get("test"),
        "train_images": comparison.images.get("train"),
        "one": one,
        "two": two,
        "score_one": scores.get(one),
        "score_two": scores.get(two),
        "seeds": min((each["seeds"] for each in comparison.rows if each["recipe"] in (one, two)), default=0),
    }
    numbers = dict.fromkeys(("difference", "low", "high", "p", "p_holm"))
    pair = next((each for each in comparison.pairs if {each["one"], each["two"]} == {one, two}), None)
    if pair is None:
        return {**row, **numbers}
    sign = 1 if pair["one"] == one else -1
    low, high = sorted((sign * pair["low"], sign * pair["high"]))
    return {**row, "difference": sign * pair["difference"], "low": low, "high": high, "p": pair["p"], "p_holm": None}
