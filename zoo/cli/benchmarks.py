"""`zoo bench`, `zoo compare` and `zoo report`: many recipes, one test split, one table, one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zoo.cli.screen import AcceptLeaksOption, BadImagesOption, HomeOption, JsonOption, OfflineOption, SetOption


def add_to(parent: typer.Typer) -> None:
    """Add the verbs to the command line."""
    parent.command()(bench)
    parent.command()(compare)
    parent.command()(report)


def bench(
    benchmark: Annotated[str | None, typer.Argument(help="Name of `zoo list benchmarks`, or a .toml file.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Name of the dataset.")] = None,
    recipes: Annotated[str | None, typer.Option(help="Recipes, with commas between them.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds, from 0 on.")] = None,
    set_: SetOption = None,
    bad_images: BadImagesOption = None,
    accept_leaks: AcceptLeaksOption = False,
    offline: OfflineOption = False,
    json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Train every recipe with every seed, score all on the same test split, and write the table and figures."""
    from zoo.benchmark.suite import bench as run_bench
    from zoo.cli.screen import assignments, bars, check_bad_images, console, print_comparison, print_json
    from zoo.errors import EXIT_SOME_RUNS_FAILED

    bad_images = check_bad_images(bad_images)
    names = [name.strip() for name in recipes.split(",") if name.strip()] if recipes else None
    with bars(quiet=json) as shown:
        result = run_bench(
            benchmark,
            data=data,
            recipes=names,
            seeds=seeds,
            overrides=assignments(set_),
            offline=offline,
            bad_images=bad_images,
            accept_leaks=accept_leaks,
            on_tick=shown.tick,
            on_step=shown.step,
        )
    if json:
        print_json({**result.comparison.document(), "folder": str(result.folder)})
    else:
        print_comparison(result.comparison)
        console().print(f"table and figures: {result.folder}", markup=False, soft_wrap=True)
    if result.failed:
        raise typer.Exit(EXIT_SOME_RUNS_FAILED)


def compare(
    runs: Annotated[list[str] | None, typer.Argument(metavar="[RUN]...", help="Names of `zoo list runs`.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="All runs on this dataset's present split.")] = None,
    metric: Annotated[str, typer.Option(help="What letters, floors and pairs are about, e.g. auroc.")] = "top1",
    by: Annotated[
        str | None, typer.Option(help="Column to sort by, e.g. test_macro_f1 or train_s; else the metric.")
    ] = None,
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
    from zoo.benchmark.suite import comparison_of, score_missing
    from zoo.cli.screen import bars, console, print_comparison
    from zoo.files import write_text
    from zoo.reporting.tables import FORMATS, format_of

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
    from zoo.benchmark.reports import report as write
    from zoo.benchmark.suite import score_missing
    from zoo.cli.screen import bars, console, print_json

    with bars(quiet=json) as shown:
        if data is not None:
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
