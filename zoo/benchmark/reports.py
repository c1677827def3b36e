"""The report of a benchmark or a dataset: its runs are looked up, compared, and written as one page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.benchmark.comparisons import comparison_of
from zoo.benchmark.definition import Benchmark, load_benchmark, results_folder
from zoo.data.manifest import Dataset, load_dataset
from zoo.errors import ZooError, one_line
from zoo.evaluation.statistics import MARGIN
from zoo.files import Home, check_writable, home, read_json, user_path
from zoo.reporting.blocks import Explain, Material
from zoo.reporting.report import write_report
from zoo.runs import Run, RunRecord, find_run


def report(
    name: str | None = None,
    *,
    data: str | None = None,
    runs: Iterable[Run | str] | None = None,
    output: str | Path | None = None,
    root: Home | None = None,
    metric: str = "top1",
    margin: float = MARGIN,
    explain: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the report of a benchmark that was run, of all runs on a dataset's present split, or of named runs.

    explain: run the networks again, on val with the centre and with the border painted over (the shortcut probe), and
    on the hardest test images to show where the best one looked; this changes no score. output: the HTML file; left
    out, below `benchmarks/`: `<benchmark>/report.html`, or `<dataset>/all-runs.html`. progress: called with recipes
    probed and in all. Raises ZooError where nothing was run, runs cannot be compared, or the file cannot be written.
    """
    root = root or home()
    named = load_benchmark(name, root) if name is not None else None
    one_of_many = named is not None and named.datasets and data is not None
    if one_of_many and named is not None:
        named, data = named.model_copy(update={"dataset": data}), None
    if sum(each is not None for each in (name, data, runs)) != 1:
        raise ZooError("a report is of a benchmark, or of --data N; name one of `zoo list benchmarks`")
    if named is not None and not named.dataset:
        raise ZooError(
            f"benchmark {named.name!r} has several datasets; name one: zoo report {named.name} --data "
            f"{named.datasets[0]}"
        )
    found: list[Run | RunRecord] | None = None
    if named is not None:
        found = _benchmark_runs(named, root)
    elif runs is not None:
        found = [find_run(run, root) if isinstance(run, str) else run for run in runs]
    folder = results_folder(named, root).relative_to(root.benchmarks) if named else None
    file = _output(output, root, f"{folder}/report" if folder else f"{data}/all-runs" if data else "report")
    comparison = comparison_of(found, data=data, root=root, metric=metric, margin=margin)
    by_recipe: dict[str, list[Run]] = {}
    known = {run.record.run: run for run in found or [] if isinstance(run, Run)}  # which may lie anywhere
    for row in comparison.rows:
        folders = [known.get(run, Run(root.runs / run)) for run in row["runs"]]
        by_recipe[row["recipe"]] = [run for run in folders if run.finished]
    dataset = _dataset(comparison.dataset, root)
    if not explain or dataset is None or dataset.split_digest != comparison.split_digest:
        return write_report(file, Material(comparison, by_recipe, dataset))
    probes, said = _probes(by_recipe, root, progress or (lambda done, total: None))
    material = Material(comparison, by_recipe, dataset, _explainer(root), probes, said)
    return write_report(file, material)


def _explainer(root: Home) -> Explain:
    def pictures(run: Run, sample_ids: Sequence[str]) -> Mapping[str, Any]:
        from zoo.training.probe import explain_images

        return explain_images(run, sample_ids, "test", root)

    return pictures


def _probes(
    by_recipe: Mapping[str, Sequence[Run]], root: Home, progress: Callable[[int, int], None]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return each recipe's probe, by its first run, and why a recipe has none."""
    from zoo.training.probe import shortcut_probe

    probes, said = {}, []
    first = {name: each[0] for name, each in by_recipe.items() if each}
    for number, (name, run) in enumerate(first.items(), 1):
        try:
            probes[name] = shortcut_probe(run, root)
        except ZooError as error:
            said.append(f"No shortcut probe of {one_line(name)}: {one_line(error, 200)}")
        progress(number, len(first))
    return probes, said


def _output(output: str | Path | None, root: Home, name: str) -> Path:
    if output is None:
        file = root.benchmarks / f"{name}.html"
    else:
        file = user_path(output)
        if file.suffix.lower() not in (".html", ".htm") or file.is_dir():
            raise ZooError(f"a report is written to a file that ends in .html. Got {one_line(output)!r}")
    check_writable(file.parent)  # before minutes of work
    return file


def _benchmark_runs(wanted: Benchmark, root: Home) -> list[Run | RunRecord]:
    """Return the runs that a benchmark's table names; what failed before it had a folder as a record."""
    file = results_folder(wanted, root) / "table.json"
    if not file.is_file():
        raise ZooError(f"benchmark {wanted.name!r} has no table yet; run it with `zoo bench {wanted.name}`")
    table = read_json(file)
    if not all(isinstance(row, dict) and {"runs", "status", "recipe"} <= set(row) for row in table.get("rows") or [0]):
        raise ZooError(f"{str(file)!r} is no table of a benchmark; run `zoo bench {wanted.name}` again")
    found: list[Run | RunRecord] = []
    for row in table["rows"]:
        folders = [Run(root.runs / run) for run in row["runs"]]
        known = [run for run in folders if (run.path / "run.json").is_file()]
        found += known
        if row["status"] == "finished" and len(known) < len(folders):
            missing = next(run.name for run in folders if run not in known)
            raise ZooError(f"run {missing!r} of the table is gone; run `zoo bench {wanted.name}` again")
        found += [_failed(table, row, run.name) for run in folders if run not in known]
    return found


def _failed(table: dict[str, Any], row: dict[str, Any], run: str) -> RunRecord:
    seed = next((int(part[1:]) for part in run.split("--") if part[:1] == "s" and part[1:].isdigit()), 0)
    return RunRecord(
        run=run,
        status="failed",
        reason=row["reason"],
        dataset=table["dataset"],
        recipe=row["recipe"],
        recipe_digest=run.rsplit("--", 1)[-1],
        seed=seed,
        split_digest=table["split_digest"],
        classes=table["classes"],
        model=row["model"],
    )


def _dataset(name: str, root: Home) -> Dataset | None:
    try:
        return load_dataset(name, root, make_builtin=False)
    except ZooError:
        return None
