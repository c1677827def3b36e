"""`zoo plan`, `zoo bench`, `zoo compare` and `zoo report`: many recipes, one test split, one table, one page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoo.cli.screen import AcceptLeaksOption, BadImagesOption, HomeOption, JsonOption, OfflineOption, SetOption

if TYPE_CHECKING:
    from zoo.benchmark.contrasts import ManyResults


def add_to(parent: typer.Typer) -> None:
    """Add the verbs to the command line."""
    parent.command()(bench)
    parent.command()(compare)
    parent.command()(report)
    parent.command()(plan)


def bench(
    benchmark: Annotated[str | None, typer.Argument(help="Name of `zoo list benchmarks`, or a .toml file.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Name of the dataset.")] = None,
    recipes: Annotated[str | None, typer.Option(help="Recipes, with commas between them.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds, from 0 on.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Runs side by side, each in a process of its own.")] = 1,
    set_: SetOption = None,
    bad_images: BadImagesOption = None,
    accept_leaks: AcceptLeaksOption = False,
    offline: OfflineOption = False,
    json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Train every recipe with every seed, score all on the same test split, and write the table and figures."""
    from zoo.benchmark.definition import load_benchmark
    from zoo.cli.screen import assignments, check_bad_images
    from zoo.errors import EXIT_SOME_RUNS_FAILED, ZooError

    bad_images = check_bad_images(bad_images)
    names = [name.strip() for name in recipes.split(",") if name.strip()] if recipes else None
    datasets = load_benchmark(benchmark).datasets if benchmark is not None and data is None else []
    if datasets and names:
        raise ZooError(f"--recipes goes with one dataset; name it, --data {datasets[0]}")
    options: dict[str, Any] = {
        "seeds": seeds,
        "overrides": assignments(set_),
        "offline": offline,
        "bad_images": bad_images,
        "accept_leaks": accept_leaks,
        "jobs": jobs,
    }
    if benchmark is not None and datasets:
        failed = _bench_all(benchmark, options, json)
    else:
        failed = _bench_one(benchmark, data, names, options, json)
    if failed:
        raise typer.Exit(EXIT_SOME_RUNS_FAILED)


def _bench_all(benchmark: str, options: dict[str, Any], json: bool) -> int:
    """Run a benchmark on all its datasets and show what came of it; return how many runs failed."""
    from zoo.benchmark.contrasts import bench_all
    from zoo.cli.screen import bars

    with bars(quiet=json) as shown:
        every = bench_all(benchmark, **options, on_tick=shown.tick, on_step=shown.step)
    _print_all(every, json)
    return every.failed


def _bench_one(
    benchmark: str | None, data: str | None, recipes: list[str] | None, options: dict[str, Any], json: bool
) -> int:
    """Run a benchmark on one dataset and show what came of it; return how many runs failed."""
    from zoo.benchmark.suite import bench as run_bench
    from zoo.cli.screen import bars, console, print_comparison, print_json

    with bars(quiet=json) as shown:
        result = run_bench(benchmark, data=data, recipes=recipes, **options, on_tick=shown.tick, on_step=shown.step)
    if json:
        print_json({**result.comparison.document(), "folder": str(result.folder)})
    else:
        print_comparison(result.comparison)
        console().print(f"table and figures: {result.folder}", markup=False, soft_wrap=True)
    return result.failed


def _print_all(every: ManyResults, json: bool) -> None:
    from zoo.cli.screen import console, print_comparison, print_contrasts, print_json

    if json:
        print_json({**every.document(), "folder": str(every.folder)})
        return
    for result in every.results.values():
        print_comparison(result.comparison)
    print_contrasts(every.contrasts, every.name)
    for dataset, reason in every.missing.items():
        console().print(f"left out: {dataset}: {reason}", markup=False, soft_wrap=True)
    console().print(f"tables and figures: {every.folder}", markup=False, soft_wrap=True)


def compare(
    runs: Annotated[list[str] | None, typer.Argument(metavar="[RUN]...", help="Names of `zoo list runs`.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="All runs on this dataset's present split.")] = None,
    metric: Annotated[str, typer.Option(help="What letters, floors and pairs are about, e.g. auroc.")] = "top1",
    by: Annotated[
        str | None, typer.Option(help="Column to sort by, e.g. test_macro_f1 or train_s; else the metric.")
    ] = None,
    folds: Annotated[bool, typer.Option("--folds", help="Compare over the folds of the dataset instead.")] = False,
    pairs: Annotated[bool, typer.Option("--pairs", help="Show every pair: difference, interval, p-values.")] = False,
    margin: Annotated[float, typer.Option(help="Difference below which two count as equivalent.")] = 0.02,
    format_: Annotated[
        str | None, typer.Option("--format", metavar="FORMAT", help="Print markdown, csv, json or latex instead.")
    ] = None,
    output: Annotated[
        list[Path] | None,
        typer.Option("--output", "-o", help="File to write: .md, .csv, .json or .tex; may be repeated."),
    ] = None,
    json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Compare finished runs on the same test split; those not scored on it yet are scored first."""
    from zoo.benchmark.comparisons import comparison_of, score_missing
    from zoo.cli.screen import bars, console, print_comparison
    from zoo.files import write_text
    from zoo.reporting.tables import FORMATS, format_of

    if folds:
        _compare_folds(data, metric, pairs, json, bool(runs or by or format_ or output))
        return
    wanted = "json" if json else format_
    write = None if wanted is None else FORMATS[format_of(wanted)]
    files = {path: FORMATS[format_of(path)] for path in output or []}
    with bars(quiet=wanted is not None) as shown:
        score_missing(runs or [], data=data, progress=shown.images("scoring test"))
    comparison = comparison_of(runs, data=data, by=by, metric=metric, margin=margin)
    for path, to_text in files.items():
        write_text(path, to_text(comparison))
    if write is not None:
        print(write(comparison), end="")
        return
    print_comparison(comparison, pairs)
    for path in files:
        console().print(f"written: {path}", markup=False, soft_wrap=True)


def _compare_folds(data: str | None, metric: str, pairs: bool, json: bool, others: bool) -> None:
    from zoo.benchmark.folds import compare_folds
    from zoo.cli.screen import bars, console, print_json, print_table
    from zoo.errors import ZooError
    from zoo.reporting.tables import p_value_text

    if data is None or others:
        raise ZooError("--folds needs --data N, and goes with --metric, --pairs and --json alone")
    with bars(quiet=json) as shown:
        found = compare_folds(data, metric=metric, progress=shown.images("scoring test"))
    if json:
        print_json(found)
        return
    rows = [
        [row["recipe"], f"{row['mean']:.3f} ±{row['sd']:.3f}", f"{row['ci'][0]:.3f}–{row['ci'][1]:.3f}", row["letters"]]
        for row in found["rows"]
    ]
    heads = ["recipe", f"test {metric}", "95% CI", "ties"]
    print_table(heads, rows, f"{data}, {len(found['folds'])} folds", numbers=heads[1:], folded=("recipe",))
    if pairs and found["pairs"]:
        heads = ["one", "two", "one − two", "95% CI", "p (Holm)"]
        rows = [
            [
                pair["one"],
                pair["two"],
                f"{pair['difference']:+.3f}",
                f"{pair['low']:+.3f} to {pair['high']:+.3f}",
                p_value_text(pair["p_holm"]),
            ]
            for pair in found["pairs"]
        ]
        print_table(heads, rows, f"difference of test {metric}", numbers=heads[2:], folded=("one", "two"))
    for name in found["missing"]:
        console().print(f"note: {name} was not run on every fold and is left out", markup=False)
    console().print(
        "Mean ±sd over folds; each fold the mean over seeds. 95% CI and ties: t-test corrected for the overlap of the "
        "folds' training sets (Nadeau and Bengio 2003), Holm.",
        markup=False,
        style="dim",
    )


def report(
    benchmark: Annotated[str | None, typer.Argument(help="A benchmark that was run.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="All runs on this dataset's present split.")] = None,
    metric: Annotated[str, typer.Option(help="What letters, floors and pairs are about, e.g. auroc.")] = "top1",
    margin: Annotated[float, typer.Option(help="Difference below which two count as equivalent.")] = 0.02,
    explain: Annotated[
        bool, typer.Option(help="Run the networks again: where they looked, and the shortcut probe.")
    ] = True,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The HTML file to write.")] = None,
    json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Write one self-contained HTML page: what the comparison says, and everything it rests on."""
    from zoo.benchmark.comparisons import score_missing
    from zoo.benchmark.reports import report as write
    from zoo.cli.screen import bars, console, print_json

    with bars(quiet=json) as shown:
        if data is not None and benchmark is None:
            score_missing([], data=data, progress=shown.images("scoring test"))
        file = write(
            benchmark,
            data=data,
            output=output,
            metric=metric,
            margin=margin,
            explain=explain,
            progress=shown.images("shortcut probe", "recipes"),
        )
    if json:
        print_json({"report": str(file), "bytes": file.stat().st_size})
        return
    console().print(f"report: {file}", markup=False, soft_wrap=True)


def plan(
    data: Annotated[str, typer.Option("--data", help="Name of the dataset.")],
    recipes: Annotated[str | None, typer.Option(help="Recipes, with commas between them.")] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3,
    json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Say before any training what this test split can show, how many seeds that takes, and how long."""
    from zoo.benchmark.outlook import plan as look_ahead
    from zoo.benchmark.outlook import sentences
    from zoo.cli.screen import bars, console, print_json, print_table

    names = [name.strip() for name in recipes.split(",") if name.strip()] if recipes else None
    with bars(quiet=json) as shown:
        found = look_ahead(data, names, seeds, progress=shown.images("measuring", "recipes"))
    if json:
        print_json(found)
        return
    out = console()
    for sentence in sentences(found):
        out.print(sentence, markup=False)
    print_table(
        ["models disagree on", "told apart from: images as the unit", "groups as the unit"],
        [
            [f"{100 * row['disagreement']:.0f} %", _in_points(row["by_images"]), _in_points(row["by_groups"])]
            for row in found["differences"]
        ],
        f"smallest difference of top1 shown at 80 % power, pairs tested together: {found['pairs']}",
        numbers=("models disagree on", "told apart from: images as the unit", "groups as the unit"),
    )
    rows = [
        [row["recipe"], _minutes(row["minutes"]), _rate(row.get("train_images_per_s")), row["reason"] or row["device"]]
        for row in found["recipes"]
    ]
    heads = ["recipe", "minutes", "training images/s", "measured on"]
    title = f"{seeds} seed{'s' if seeds != 1 else ''} of each, measured by a few steps"
    print_table(heads, rows, title, numbers=heads[1:3], folded=("recipe", "measured on"))
    out.print(f"in all about {_minutes(found['minutes'])} minutes, one run after the other", markup=False)


def _in_points(value: float | None) -> str:
    return "not at all" if value is None else f"{100 * value:.1f} points"


def _minutes(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"
