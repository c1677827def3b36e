"""Running a benchmark: every recipe and seed on one test split; failures are rows, finished runs are reused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zoo.benchmark.definition import Benchmark, load_benchmark, results_folder
from zoo.benchmark.executors import OnStep, Step, check_jobs, run_all
from zoo.benchmark.results import write_results
from zoo.data.leaks import refuse_leaks
from zoo.data.manifest import Dataset, load_dataset, split_summary
from zoo.errors import Interrupted, ZooError, one_line
from zoo.evaluation.floors import dataset_floors
from zoo.evaluation.ledger import looks_at_test
from zoo.files import Home, check_name, check_writable, home
from zoo.recipe import load_recipe
from zoo.reporting.comparison import Comparison, make_comparison
from zoo.runs import RunRecord
from zoo.training.loop import OnTick
from zoo.training.parallel import refuse_torchrun
from zoo.training.plan import Plan, failed_record, make_plan

# Each process would score test, look at it in the ledger and write the table.
NO_TORCHRUN = ("zoo bench", ", with --jobs; a run that `torchrun -m zoo train` has trained is reused")


@dataclass(frozen=True)
class BenchResult:
    """A benchmark's outcome: its comparison, the folder of its files, and how many runs failed."""

    comparison: Comparison
    folder: Path
    failed: int


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
    jobs: int = 1,
    on_tick: OnTick | None = None,
    on_step: OnStep | None = None,
) -> BenchResult:
    """Run a benchmark, named or given by data and recipes, and write its table and figures.

    seeds: a number of seeds from 0 on, or the seeds themselves. Every run is planned, and its weights found,
    before the first is trained. Finished runs are reused; after an interruption the same call goes on. jobs: how many
    runs are trained at a time, each in a process of its own; each has the cores divided by it as its threads, and
    other bits with another number of threads. Files go to `benchmarks/<name>/`. Raises ZooError where the benchmark
    itself is wrong, or the dataset leaks and that is not accepted; a recipe that fails is a row.
    """
    refuse_torchrun(*NO_TORCHRUN)
    check_jobs(jobs)
    root = root or home()
    wanted = _wanted(name, data, recipes, seeds, root)
    if not wanted.dataset:
        raise ZooError(
            f"benchmark {wanted.name!r} has {len(wanted.datasets)} datasets and more: zoo.bench_all runs them all, "
            f"data={wanted.datasets[0]!r} one"
        )
    dataset = load_dataset(wanted.dataset, root)
    accepted = refuse_leaks(dataset, accept_leaks)
    folder = results_folder(wanted, root)
    check_writable(folder)
    check_writable(root.runs)
    tell = on_step or (lambda _: None)
    left_out: list[str] = []
    steps = _plan_all(wanted, dataset, root, overrides or {}, offline, bad_images, tell, left_out, accept_leaks)
    runs = run_all(steps, jobs, bad_images, on_tick, tell)
    failed = sum(1 for run in runs if isinstance(run, RunRecord) or not run.finished)
    try:
        floors, no_floors = dataset_floors(dataset, bad_images), []
    except ZooError as error:
        if not failed:
            raise
        floors, no_floors = [], [f"no floors: {error}"]  # images vanished: the failures are written all the same
    summary = split_summary(dataset)["splits"]
    comparison = make_comparison(
        runs,
        leaks_accepted=accepted,
        floors=floors,
        images={split: facts["images"] for split, facts in summary.items()},
        looks=looks_at_test(root, dataset.split_digest),
    )
    comparison = replace(comparison, notes=[*left_out, *no_floors, *comparison.notes])
    write_results(folder, comparison, dataset, root, bad_images)
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
        changes |= {"recipes": list(recipes), "optional_recipes": [], "contrasts": []}
    if seeds:
        changes["seeds"] = list(seeds)
    wanted = wanted.model_copy(update=changes)
    for what, values in (("recipe", [*wanted.recipes, *wanted.optional_recipes]), ("seed", wanted.seeds)):
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
    left_out: list[str],
    accept_leaks: bool,
) -> list[Plan | RunRecord]:
    """Plan every run; what cannot be planned is a failed record, and told before anything is trained.

    left_out: gets a sentence for each optional recipe that cannot be planned.
    """
    names = [*wanted.recipes, *wanted.optional_recipes]
    total = len(names) * len(wanted.seeds)
    planned: list[Plan | RunRecord] = []
    for name in names:
        first: Plan | None = None
        reason = ""
        recipe: Any = name
        try:
            recipe = load_recipe(name, {**wanted.overrides, **overrides}, root)
            first = make_plan(
                recipe,
                dataset,
                wanted.seeds[0],
                root,
                offline=offline,
                bad_images=bad_images,
                accept_leaks=accept_leaks,
            )
        except Interrupted:
            raise
        except ZooError as error:
            reason = str(error)
            if name in wanted.optional_recipes:
                left_out.append(f"left out: {name} ({one_line(reason, 120)})")
                tell(Step(len(planned) + 1, total, name, "left out", reason))
                continue
            tell(Step(len(planned) + 1, total, name, "refused", reason))
        for seed in wanted.seeds:
            # Only the seed differs: the network and its weights are looked for once per recipe.
            planned.append(first.with_seed(seed) if first else failed_record(recipe, dataset, seed, reason))
    return planned
