"""`zoo pick`: which of a dataset's runs to deploy, and as what."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoo.cli.screen import HomeOption, JsonOption

if TYPE_CHECKING:
    from zoo.benchmark.picking import Outcome


def add_to(parent: typer.Typer) -> None:
    """Add the verb to the command line."""
    parent.command()(pick)


def pick(
    data: Annotated[str, typer.Option("--data", help="Name of the dataset; all runs on its present split take part.")],
    max_latency_ms: Annotated[
        float | None, typer.Option(metavar="X", help="The most that one image may take on this machine, in ms.")
    ] = None,
    max_size_mb: Annotated[
        float | None, typer.Option(metavar="X", help="The most that the model's files may hold, in 10^6 bytes.")
    ] = None,
    max_memory_mb: Annotated[
        float | None, typer.Option(metavar="X", help="The most memory of a process that answers, in 10^6 bytes.")
    ] = None,
    min_: Annotated[
        list[str] | None,
        typer.Option("--min", metavar="METRIC=V", help="The least on val, e.g. sensitivity=0.95 or recall:CLASS=0.9."),
    ] = None,
    margin: Annotated[float, typer.Option(help="How much worse than the best is still not worse, on val.")] = 0.01,
    metric: Annotated[str, typer.Option(help="What ranks on val, e.g. auroc.")] = "top1",
    cost: Annotated[str, typer.Option(metavar="latency|size|memory", help="What is made small.")] = "latency",
    percentile: Annotated[str, typer.Option(metavar="p50|p95|p99", help="Which latency is meant.")] = "p50",
    threads: Annotated[int | None, typer.Option(help="Cores of one answer; else all of this process.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure latencies anew, even where they are kept.")] = False,
    test: Annotated[bool, typer.Option(help="Score what was chosen on test, once; the ledger notes it.")] = True,
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE", help="PNG of scores over costs; else models/picks/<dataset>.png.")
    ] = None,
    json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Choose what to deploy: what keeps the limits, is not worse than the best on val, and costs the least."""
    from zoo.benchmark.picking import Wish, outcome
    from zoo.cli.screen import bars, print_json
    from zoo.errors import ZooError
    from zoo.files import home as home_of
    from zoo.reporting.pick import parse_minimums

    wish = Wish(
        max_latency_ms, max_size_mb, max_memory_mb, parse_minimums(min_ or []), margin, metric, cost, percentile
    )
    root = home_of()
    _check_figure(figure)  # before the look at test
    with bars(quiet=json) as shown:

        def progress(what: str, done: int, total: int) -> None:
            shown.images(what, "images" if what == "scoring test" else "steps")(done, total)

        found = outcome(data, wish, root, threads=threads, again=again, test=test, progress=progress)
    file = figure or root.picks / f"{found.document['dataset']}.png"
    fault: ZooError | None = None
    try:
        found.save_figure(file)
    except ZooError as error:  # the choice is told all the same
        fault = error
    if json:
        print_json({**found.document, "figure": None if fault else str(file)})
    else:
        _print(found, None if fault else file)
    if fault is not None:
        raise fault
    if found.pick is None:
        raise ZooError(found.failure() if json else found.document["reason"])


def _check_figure(figure: Path | None) -> None:
    from zoo.errors import ZooError, one_line

    # os.path's, for Path's raises where a folder above may not be entered
    if figure is not None and (figure.suffix.lower() != ".png" or os.path.isdir(figure)):  # noqa: PTH112
        raise ZooError(f"--figure must be a file that ends in .png. Got {one_line(figure)!r}")


_HEADS = ("bundle", "val", "95% CI", "p50 ms", "p95 ms", "p99 ms", "images/s", "MB", "memory MB", "what of it")


def _print(found: Outcome, file: Path | None) -> None:
    from zoo.cli.screen import console, print_table
    from zoo.reporting.picked import miss_words, short_name, words_of_test

    document, out = found.document, console()
    metric = document["metric"]
    rows = [cells for row in document["candidates"] for cells in _rows(row, metric)]
    place = document["environment"]
    title = (
        f"{document['dataset']}: {len(document['candidates'])} candidates, the chosen first, then by {document['cost']}"
    )
    title += f"; {place['threads']} threads of {place['processor']}" if place else ""
    kept = _that_fit(rows, out.width)
    print_table(
        [_HEADS[each] for each in kept],
        [[row[each] for each in kept] for row in rows],
        title,
        numbers=_HEADS[1:9],
        folded=("bundle", "what of it"),
    )
    said = [f"chosen: {document['reason']}"] if found.pick else []
    if document["runner_up"]:
        said.append(f"runner-up: {short_name(document['runner_up'])}")
    said += [f"what would change the choice: {each['text']}" for each in document["would_change"]]
    if found.pick is None:
        said += [f"nearest miss: {miss_words(row)}" for row in document["nearest_misses"][:3]]
    if document["test"]:
        said.append(words_of_test(document["test"], metric))
    said += [f"note: {note}" for note in document["notes"]]
    if found.pick:
        said.append(f"run: {document['run']}")
        said.append(f"bundle: {document['bundle']}")
        said.append(f"next: zoo serve {document['bundle']}")
    for text in (*said, *([f"figure: {file}"] if file else [])):
        out.print(text, markup=False, soft_wrap=text.startswith(("run: ", "bundle: ", "next: ", "figure: ")))


def _rows(row: dict[str, Any], metric: str) -> list[list[str]]:
    """Return a candidate's cells, and those of its run in eager torch where it is float32."""
    from zoo.reporting.picked import short_name

    interval = row[f"val_{metric}_ci"]
    score = [_number(row[f"val_{metric}"], ".3f"), f"{interval[0]:.3f}–{interval[1]:.3f}" if interval else ""]
    what = [row["role"] or "", "best on val" if row["best_on_val"] else ""]
    what += [f"breaks {each}" for each in row["breaks"]]
    what += ["below the floor" if row["beats_floor"] is False else "", row["reason"] or ""]
    words = "; ".join(each for each in what if each)
    rows = [[short_name(row["name"]), *score, *_speed(row, row["size_mb"]), words]]
    eager = row.get("eager")
    if eager and row.get("precision") == "float32" and row.get("format") == "onnx":
        size = None if eager["size_mib"] is None else eager["size_mib"] * (1 << 20) / 1e6
        note = f"for comparison{'; ' + eager['reason'] if eager['reason'] else ''}"
        rows.append(
            [f"  the same in eager {(eager['runtime'] or 'torch').split('+')[0]}", "", "", *_speed(eager, size), note]
        )
    return rows


def _speed(row: dict[str, Any], size_mb: float | None) -> list[str]:
    latencies = [_number(row.get(f"latency_p{each}_ms"), ".2f") for each in (50, 95, 99)]
    rate, batch = row.get("images_per_s"), row.get("best_batch")
    peak = row.get("peak_mib")
    return [
        *latencies,
        f"{rate:.0f} at {batch}" if rate is not None else "",
        _number(size_mb, ".2f"),
        _number(None if peak is None else peak * (1 << 20) / 1e6, ".0f"),
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _that_fit(rows: list[list[str]], width: int) -> list[int]:
    """Return the columns that there is room for; percentiles, rate and memory are given up first, in this order."""
    kept = list(range(len(_HEADS)))
    for given_up in (5, 4, 2, 8, 6):
        widths = [max(len(_HEADS[each]), *(len(row[each]) for row in rows)) for each in kept]
        last = min(widths[-1], 24)
        if sum(widths[:-1]) + last + 3 * len(kept) <= width or not rows:
            break
        kept.remove(given_up)
    return kept
