"""Running a benchmark: every recipe and seed on one test split; failures are rows, finished runs are reused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from zoo.benchmark.results import dataset_floors, write_results
from zoo.data.leaks import refuse_leaks
from zoo.data.manifest import Dataset, load_dataset, split_summary
from zoo.errors import Interrupted, ZooError, nearest, one_line
from zoo.evaluation.ledger import looks_at_test
from zoo.evaluation.statistics import MARGIN
from zoo.files import Home, check_name, check_writable, find_toml, home, list_toml, read_toml
from zoo.recipe import load_recipe
from zoo.reporting.comparison import Comparison, make_comparison, refuse_different
from zoo.runs import Run, RunRecord, find_run
from zoo.training.loop import OnTick, train_plan
from zoo.training.plan import Plan, failed_record, make_plan, runs_of
from zoo.training.scoring import evaluate

if TYPE_CHECKING:
    import pandas as pd


class Benchmark(BaseModel):
    """`benchmarks/<name>.toml`: dataset, recipes, seeds, and keys set in every recipe alike."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str = Field(exclude=True)
    summary: str = ""
    dataset: Annotated[str, Field(min_length=1)]
    recipes: Annotated[list[str], Field(min_length=1)]
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)] = [0, 1, 2]
    overrides: dict[str, Any] = {}


@dataclass(frozen=True)
class Step:
    """What a benchmark tells of itself: run `number` of `total` begins, ends or fails."""

    number: int
    total: int
    run: str
    state: str
    detail: str = ""


@dataclass(frozen=True)
class BenchResult:
    """A benchmark's outcome: its comparison, the folder of its files, and how many runs failed."""

    comparison: Comparison
    folder: Path
    failed: int


OnStep = Callable[[Step], None]


def list_benchmarks(root: Home | None = None) -> dict[str, Path]:
    """Return name to file of every benchmark, the user's own before built-in ones of the same name."""
    return list_toml("benchmarks", (root or home()).benchmarks)


def load_benchmark(name: str, root: Home | None = None) -> Benchmark:
    """Return the benchmark of a name or of a .toml file; raises ZooError that names every fault at once."""
    path = find_toml(name, "benchmarks", (root or home()).benchmarks)
    table = read_toml(path)
    table.pop("schema_version", None)
    if isinstance(table.get("seeds"), int) and not isinstance(table["seeds"], bool):
        table["seeds"] = list(range(table["seeds"]))
    try:
        return Benchmark.model_validate({**table, "name": check_name(path.stem, "benchmark")})
    except ValidationError as error:
        keys = list(Benchmark.model_fields)
        faults = []
        for each in error.errors():
            key = ".".join(str(part) for part in each["loc"])
            if each["type"] == "extra_forbidden":
                faults.append(f"unknown key {one_line(key)!r}{nearest(key, keys)}")
            else:
                said = each["msg"].replace("Input should", "must")
                faults.append(f"{key}: {said}. Got {one_line(repr(each['input']), 60)}")
        raise ZooError(f"benchmark {path.stem!r} has {len(faults)} faults: " + "; ".join(faults)) from error


def bench(
    name: str | None = None,
    *,
    data: str | None = None,
    recipes: Sequence[str] | None = None,
    seeds: int | Sequence[int] | None = None,
    overrides: dict[str, Any] | None = None,
    root: Home | None = None,
    offline: bool = False,
    bad_images: str | None = None,
    accept_leaks: bool = False,
    on_tick: OnTick | None = None,
    on_step: OnStep | None = None,
) -> BenchResult:
    """Run a benchmark, named or given by data and recipes, and write its table and figures.

    seeds: a number of seeds from 0 on, or the seeds themselves. Every run is planned, and its weights found,
    before the first is trained. Finished runs are reused; after an interruption the same call goes on. Files go to
    `benchmarks/<name>/`. Raises ZooError where the benchmark itself is wrong, or the dataset leaks and that is not
    accepted; a recipe that fails is a row.
    """
    root = root or home()
    wanted = _wanted(name, data, recipes, seeds, root)
    dataset = load_dataset(wanted.dataset, root)
    accepted = refuse_leaks(dataset, accept_leaks)
    folder = root.benchmarks / wanted.name
    check_writable(folder)
    check_writable(root.runs)
    tell = on_step or (lambda _: None)
    steps = _plan_all(wanted, dataset, root, overrides or {}, offline, bad_images, tell)
    runs: list[Run | RunRecord] = []
    for number, step in enumerate(steps, 1):
        runs.append(_run_one(number, len(steps), step, bad_images, on_tick, tell))
    summary = split_summary(dataset)["splits"]
    comparison = make_comparison(
        runs,
        leaks_accepted=accepted,
        floors=dataset_floors(dataset, bad_images),
        images={split: facts["images"] for split, facts in summary.items()},
        looks=looks_at_test(root, dataset.split_digest),
    )
    write_results(folder, comparison, dataset, root, bad_images)
    failed = sum(1 for run in runs if isinstance(run, RunRecord) or not run.finished)
    return BenchResult(comparison, folder, failed)


def _wanted(
    name: str | None,
    data: str | None,
    recipes: Sequence[str] | None,
    seeds: int | Sequence[int] | None,
    root: Home,
) -> Benchmark:
    if isinstance(seeds, int):
        if seeds < 1:
            raise ZooError(f"seeds must be at least 1. Got {seeds}")
        seeds = list(range(seeds))
    if name is None:
        if not data or not recipes:
            raise ZooError("a benchmark needs a name of `zoo list benchmarks`, or --data N with --recipes A,B,C")
        wanted = Benchmark(name=check_name(data, "dataset"), dataset=data, recipes=list(recipes))
    else:
        wanted = load_benchmark(name, root)
    changes: dict[str, Any] = {}
    if name is not None and data:
        changes["dataset"] = data
    if name is not None and recipes:
        changes["recipes"] = list(recipes)
    if seeds:
        changes["seeds"] = list(seeds)
    wanted = wanted.model_copy(update=changes)
    for what, values in (("recipe", wanted.recipes), ("seed", wanted.seeds)):
        twice = sorted({str(value) for value in values if list(values).count(value) > 1})
        if twice:
            raise ZooError(f"benchmark {wanted.name!r} names {what} {', '.join(twice)} twice; name it once")
    return wanted


def _plan_all(
    wanted: Benchmark,
    dataset: Dataset,
    root: Home,
    overrides: dict[str, Any],
    offline: bool,
    bad_images: str | None,
    tell: OnStep,
) -> list[Plan | RunRecord]:
    """Plan every run; what cannot be planned is a failed record, and told before anything is trained."""
    total = len(wanted.recipes) * len(wanted.seeds)
    planned: list[Plan | RunRecord] = []
    for name in wanted.recipes:
        first: Plan | None = None
        reason = ""
        recipe: Any = name
        try:
            recipe = load_recipe(name, {**wanted.overrides, **overrides}, root)
            first = make_plan(
                recipe, dataset, wanted.seeds[0], root, offline=offline, bad_images=bad_images, accept_leaks=True
            )
        except Interrupted:
            raise
        except ZooError as error:
            reason = str(error)
            tell(Step(len(planned) + 1, total, name, "refused", reason))
        for seed in wanted.seeds:
            # Only the seed differs: the network and its weights are looked for once per recipe.
            planned.append(first.with_seed(seed) if first else failed_record(recipe, dataset, seed, reason))
    return planned


def _run_one(
    number: int,
    total: int,
    step: Plan | RunRecord,
    bad_images: str | None,
    on_tick: OnTick | None,
    tell: OnStep,
) -> Run | RunRecord:
    if isinstance(step, RunRecord):
        tell(Step(number, total, step.run, "failed", step.reason or ""))
        return step
    state = "reused" if step.run.finished else "finished"
    tell(Step(number, total, step.run.name, "begins"))
    try:
        run = train_plan(step, on_tick)
        metrics = evaluate(run, "test", step.home, bad_images=bad_images)
    except Interrupted:
        raise
    except ZooError as error:
        tell(Step(number, total, step.run.name, "failed", str(error)))
        return step.record("failed", str(error))
    tell(Step(number, total, run.name, state, f"test top1 {metrics['top1']:.3f}"))
    return run


def compare(
    runs: Iterable[Run | str] | None = None,
    *,
    data: str | None = None,
    root: Home | None = None,
    metric: str = "top1",
    margin: float = MARGIN,
) -> pd.DataFrame:
    """Return the comparison of runs as a tidy pandas DataFrame, one row per recipe, with letters of the metric.

    runs: the runs, or their names; left out, all on the present split of `data`. margin: of equivalence. Floors and
    pairs stand in the frame's `attrs`. Raises ZooError where the runs are of different datasets, splits or classes.
    """
    return comparison_of(runs, data=data, root=root, metric=metric, margin=margin).frame()


def comparison_of(
    runs: Iterable[Run | RunRecord | str] | None = None,
    *,
    data: str | None = None,
    root: Home | None = None,
    by: str | None = None,
    metric: str = "top1",
    margin: float = MARGIN,
) -> Comparison:
    """Return the comparison of runs, or of all runs on a dataset's present split, with its floors.

    by, metric, margin: as `make_comparison` takes them.
    """
    root = root or home()
    found = [find_run(run, root) if isinstance(run, str) else run for run in runs or []]
    if not found and data is None:
        raise ZooError("nothing to compare; name runs of `zoo list runs`, or a dataset with --data")
    dataset = load_dataset(data, root, make_builtin=False) if data else _dataset_of(found[0], root)
    if not found:
        assert dataset is not None
        found = list(runs_of(dataset, root))
        if not found:
            raise ZooError(f"there is no run on the present split of {data!r}; train one with `zoo train`")
    records = [run.record if isinstance(run, Run) else run for run in found]
    digest = records[0].split_digest
    known: dict[str, Any] = {"by": by, "metric": metric, "margin": margin, "looks": looks_at_test(root, digest)}
    if dataset is None or dataset.split_digest != digest:
        return make_comparison(found, **known)
    images = {split: facts["images"] for split, facts in split_summary(dataset)["splits"].items()}
    # Runs that left bad images out are compared with floors that do.
    policy = "skip" if any(record.bad_images == "skip" for record in records) else None
    refuse_different(records)
    return make_comparison(found, floors=dataset_floors(dataset, policy), images=images, **known)


def _dataset_of(run: Run | RunRecord, root: Home) -> Dataset | None:
    record = run.record if isinstance(run, Run) else run
    try:
        return load_dataset(record.dataset, root, make_builtin=False)
    except ZooError:
        return None  # the runs are all that is left; they are compared without floors


def score_missing(
    runs: Iterable[Run | str],
    *,
    data: str | None = None,
    root: Home | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Score on test those finished runs that are not scored yet; all on a dataset's split where none is named."""
    root = root or home()
    found = [find_run(run, root) if isinstance(run, str) else run for run in runs]
    if not found and data is not None:
        found = runs_of(load_dataset(data, root, make_builtin=False), root)
    for run in found:
        if run.finished and not run.metrics_file("test").is_file():
            evaluate(run, "test", root, progress=progress)
