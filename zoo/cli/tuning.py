"""`zoo tune`: the hyperparameter search of one recipe on one dataset."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoo.cli.screen import AcceptLeaksOption, BadImagesOption, HomeOption, JsonOption, OfflineOption, SetOption

if TYPE_CHECKING:
    from zoo.benchmark.executors import OnStep
    from zoo.benchmark.tuned import Tuned
    from zoo.cli.screen import Bars
    from zoo.recipe import Recipe
    from zoo.training.lr_range import LrRange


def add_to(parent: typer.Typer) -> None:
    """Add the verb to the command line."""
    parent.command()(tune)


def tune(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="Name of `zoo list recipes`, or a .toml file, with \\[search].")],
    data: Annotated[str, typer.Option("--data", help="Name of the dataset.")],
    trials: Annotated[int, typer.Option(help="Trials of the study in all, those of earlier calls included.")] = 20,
    timeout: Annotated[
        str | None, typer.Option(metavar="TIME", help="Begin no trial after so long, e.g. 90s, 30m or 2h.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes at once; another `zoo tune` may join from elsewhere, too.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the proposals and of every run.")] = 0,
    pruner: Annotated[
        str, typer.Option(metavar="halving|hyperband|none", help="What gives trials up early, by val.")
    ] = "halving",
    name: Annotated[str | None, typer.Option(help="Name of the recipe to write; else RECIPE-tuned.")] = None,
    set_: SetOption = None,
    bad_images: BadImagesOption = None,
    accept_leaks: AcceptLeaksOption = False,
    offline: OfflineOption = False,
    json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    r"""Search a recipe's \[search] space on train and val; write the best as a recipe, and what mattered."""
    from zoo.benchmark.tune import parse_duration
    from zoo.benchmark.tune import tune as search
    from zoo.cli.screen import assignments, bars, check_bad_images, print_json

    seconds = parse_duration(timeout) if timeout is not None else None
    with bars(quiet=json) as shown:
        found = search(
            recipe,
            data,
            trials,
            seed,
            overrides=assignments(set_),
            timeout=seconds,
            jobs=jobs,
            pruner=pruner,
            name=name,
            offline=offline,
            bad_images=check_bad_images(bad_images),
            accept_leaks=accept_leaks,
            on_tick=shown.tick,
            on_step=_lines(shown),
        )
    given = home or context.find_root().params.get("home")
    if given is not None:
        found = replace(found, next_command=f"{found.next_command} {shlex.join(['--home', str(given)])}")
    if json:
        print_json({**found.document(), "file": str(found.file), "folder": str(found.folder)})
    else:
        _print(found)


def _lines(shown: Bars) -> OnStep:
    """Return what prints a line for each trial that ended; its bar goes, so that many trials do not fill the screen."""

    def step(each: Any) -> None:
        if each.state == "begins" or shown.quiet:
            return
        task = shown.tasks.pop(each.run, None)
        if task is not None:
            shown.progress.remove_task(task)
        line = f"trial {each.number - 1}: {each.state} {each.detail}".rstrip()
        shown.console.print(line, markup=False, soft_wrap=True)

    return step


def _print(found: Tuned) -> None:
    from zoo.cli.screen import console, print_table
    from zoo.reporting import tuning

    out, document = console(), found.document()
    heads, rows = tuning.table(document, out.width)
    counts = ", ".join(f"{count} {state}" for state, count in document["counts"].items() if count)
    texts = ("state", "parameters")
    title = f"{found.base} on {found.dataset}, val {found.metric}; trials: {counts}"
    print_table(heads, rows, title, numbers=set(heads) - set(texts), folded=("parameters",))
    importance = tuning.importance_text(document)
    said = [tuning.comparison_text(document), f"importance: {importance}" if importance else ""]
    for text in (*said, *(f"note: {note}" for note in found.notes)):
        if text:
            out.print(text, markup=False)
    out.print(f"recipe: {found.file}", markup=False, soft_wrap=True)
    out.print(f"trials and figures: {found.folder}", markup=False, soft_wrap=True)
    out.print(f"next, tuned against default on test: {found.next_command}", markup=False, soft_wrap=True)


def find_lr(
    recipe: Recipe,
    data: str,
    seed: int = 0,
    *,
    offline: bool = False,
    bad_images: str | None = None,
    accept_leaks: bool = False,
    json: bool = False,
) -> LrRange:
    """Do what `zoo train --lr-find` does: test, print what it suggests and where the figure lies, and return it."""
    from zoo.cli.screen import bars, console, print_json
    from zoo.reporting.lr_range import find_lr as search
    from zoo.reporting.lr_range import lr_range_text

    with bars(quiet=json) as shown:
        found, file = search(
            recipe, data, seed, offline=offline, bad_images=bad_images, accept_leaks=accept_leaks, on_tick=shown.tick
        )
    if json:
        print_json({**found.document(), "figure": str(file)})
        return found
    console().print(lr_range_text(found), markup=False)
    console().print(f"figure: {file}", markup=False, soft_wrap=True)
    return found
