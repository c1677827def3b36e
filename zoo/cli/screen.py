"""What every verb prints with: options that verbs share, JSON, tables that fit the terminal, progress bars."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from zoo.benchmark.executors import Step
    from zoo.reporting.comparison import Comparison
    from zoo.training.loop import Tick


def _set_home(value: Path | None) -> Path | None:
    if value is not None:
        os.environ["ZOO_HOME"] = str(value)
    return value


HomeOption = Annotated[
    Path | None,
    typer.Option("--home", callback=_set_home, help="Folder to work in; else $ZOO_HOME, else the current one."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Open no connection; as HF_HUB_OFFLINE=1.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe, e.g. optimizer.lr=3e-4."),
]
BadImagesOption = Annotated[
    str | None,
    typer.Option("--bad-images", metavar="fail|skip", help="What to do with images that cannot be read."),
]


AcceptLeaksOption = Annotated[
    bool, typer.Option("--accept-leaks", help="Go on where train, val and test leak; every table then says so.")
]


def check_bad_images(value: str | None) -> str | None:
    """Return the policy; raises ZooError for one that does not exist."""
    from zoo.errors import ZooError, nearest, one_line

    if value not in (None, "fail", "skip"):
        raise ZooError(f"--bad-images must be fail or skip. Got {one_line(value)!r}{nearest(value, ('fail', 'skip'))}")
    return value


def assignments(pairs: Iterable[str] | None) -> dict[str, Any]:
    """Return what `--set` gave, key to value."""
    from zoo.recipe import parse_assignment

    return dict(parse_assignment(pair) for pair in pairs or [])


def console(stderr: bool = False) -> Console:
    """Return a console for standard output, or standard error; colours only on a terminal."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else int(os.environ.get("COLUMNS", "0")) or 120
    return Console(stderr=stderr, highlight=False, width=width, soft_wrap=False)


def print_json(value: Any) -> None:
    """Print one JSON document."""
    from zoo.files import to_json

    print(to_json(value, indent=2))


def print_table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    title: str = "",
    numbers: Iterable[str] = (),
    folded: Iterable[str] = (),
    cut: Iterable[str] = (),
    least: Sequence[str] = (),
) -> None:
    """Print a table; `numbers` are the heads aligned right, `folded` those that may wrap, `cut` be cut short.

    least: heads that are left out, the first first, while the others have not the room for whole names.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    out = console()
    right, wrapped = set(numbers), set(folded)
    heads, written = _without(least, list(heads), [list(row) for row in rows], set(cut), out.width)
    cells = _shortened(heads, written, set(cut), out.width)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in heads:
        table.add_column(
            head,
            justify="right" if head in right else "left",
            no_wrap=head not in wrapped,
            overflow="fold",
        )
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    if title:
        out.print(Text(title, style="bold"), soft_wrap=True)
    out.print(table)


def _without(
    least: Sequence[str], heads: list[str], rows: list[list[str]], cut: set[str], width: int
) -> tuple[list[str], list[list[str]]]:
    """Return the heads and rows less the columns that there is no room for."""
    longest = {
        head: 16 if head in cut else max(len(row[place]) for row in [heads, *rows]) for place, head in enumerate(heads)
    }
    for head in least:
        if sum(longest.values()) + 3 * len(longest) - 2 <= width:
            break
        longest.pop(head, None)
    places = [place for place, head in enumerate(heads) if head in longest]
    return [heads[place] for place in places], [[row[place] for place in places] for row in rows]


def _shortened(heads: list[str], rows: list[list[str]], cut: set[str], width: int) -> list[list[str]]:
    """Cut the cells of the `cut` columns so that names stay whole, at 20 characters at the least."""
    places = [place for place, head in enumerate(heads) if head in cut]
    if not places:
        return rows
    kept = sum(max(len(row[place]) for row in [heads, *rows]) + 3 for place in range(len(heads)) if place not in places)
    room = max(16, (width - kept) // len(places) - 3)
    for row in rows:
        for place in places:
            row[place] = row[place] if len(row[place]) <= room else row[place][: room - 1] + "…"
    return rows


# The comparison, in as many columns as the terminal has room for ----------------------------------------------------

# In the order in which they are given up where there is no room, the last first; METRIC is the one that was asked for.
_WANTED = (
    "recipe",
    "test METRIC",
    "95% CI",
    "ties",
    "val METRIC",
    "train s",
    "weights",
    "macro F1",
    "AUROC",
    "ECE",
    "params",
    "seeds",
    "ECE at T",
    "balanced acc.",
)


def print_comparison(comparison: Comparison, pairs: bool = False) -> None:
    """Print a comparison: floors first, then recipes, failures and notes below, and every pair where asked."""
    from zoo.reporting.tables import cells, floor_cells, legend, title

    out, metric = console(), comparison.metric
    written = [floor_cells(floor, metric) for floor in comparison.floors]
    written += [cells(row, metric) for row in comparison.rows]
    name = next(head for head in written[-1] if head.startswith("test ")).removeprefix("test ")
    wanted = [head.replace("METRIC", name) for head in _WANTED]
    kept = _that_fit([head for head in wanted if head in written[-1]], written, out.width)
    heads = [head for head in written[-1] if head in kept]
    rows = [[row.get(head, "") for head in heads] for row in written]
    print_table(
        heads, rows, title(comparison), numbers=set(heads) - {"recipe", "weights"}, folded=("recipe", "weights")
    )
    for row in comparison.rows:
        if row["reason"]:
            out.print(f"{row['status']}: {row['recipe']}: {row['reason']}", markup=False, soft_wrap=True)
    for note in comparison.notes:
        out.print(f"note: {note}", markup=False)
    out.print(legend(comparison), markup=False, style="dim")
    if pairs:
        _print_pairs(comparison)


def print_contrasts(rows: list[dict[str, Any]], name: str) -> None:
    """Print the differences that a benchmark of several datasets asked for, and what the columns mean."""
    from zoo.reporting.contrasts import HEADS, LEGEND, contrast_cells

    if not rows:
        return
    out, written = console(), [contrast_cells(row) for row in rows]
    wanted = ("dataset", "one", "two", "one − two", "shown", "95% CI", "p (Holm)", "score of one", "of two")
    kept = _that_fit(list(wanted), written, out.width)
    heads = [head for head in HEADS if head in kept]
    texts = ("dataset", "one", "two", "shown")
    cells = [[row[head] for head in heads] for row in written]
    print_table(heads, cells, f"{name}: test {rows[0]['metric']}", numbers=set(heads) - set(texts), folded=texts)
    out.print(LEGEND, markup=False, style="dim")


def _print_pairs(comparison: Comparison) -> None:
    from zoo.reporting.tables import pair_cells, pairs_legend

    out = console()
    if not comparison.pairs:
        out.print("no pairs: there is only one recipe", markup=False)
        return
    written = [pair_cells(pair) for pair in comparison.pairs]
    wanted = ("one", "two", "one − two", "p (Holm)", "verdict", "95% CI", "p", *list(written[0])[-1:])
    kept = _that_fit([head for head in wanted if any(row[head] != "–" for row in written)], written, out.width)
    heads = [head for head in written[0] if head in kept]
    rows = [[row[head] for head in heads] for row in written]
    texts = ("one", "two", "verdict")
    print_table(heads, rows, f"difference of test {comparison.metric}", numbers=set(heads) - set(texts), folded=texts)
    out.print(pairs_legend(comparison), markup=False, style="dim")


def _that_fit(heads: list[str], rows: list[dict[str, str]], width: int) -> list[str]:
    """Return the first heads that have room; three stay in any case."""
    kept: list[str] = []
    most = 40 if width >= 100 else 26  # characters of a column; longer names wrap
    for head in heads:
        width -= max(len(head), *(min(most, len(row.get(head, ""))) for row in rows)) + 3
        if width < 0 and len(kept) >= 3:
            break
        kept.append(head)
    return kept


# Progress -----------------------------------------------------------------------------------------------


class Bars:
    """Progress bars on standard error: one for each run, or single lines where it is no terminal."""

    def __init__(self, quiet: bool = False) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = console(stderr=True)
        self.live = self.console.is_terminal and not quiet
        self.quiet = quiet
        self.progress = Progress(
            TextColumn("{task.fields[name]}", markup=False),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[facts]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=not self.live,
        )
        self.tasks: dict[str, Any] = {}
        self.prefixes: dict[str, str] = {}  # of each run: several may be at work at once

    def tick(self, tick: Tick) -> None:
        """Show how far a run is."""
        if not self.live:
            return
        name = f"{self.prefixes.get(tick.run, '')}{_short(tick.run)}"
        task = self.tasks.get(tick.run)
        if task is None:
            task = self.tasks[tick.run] = self.progress.add_task("", total=1.0, name=name, facts="")
        part = tick.done / tick.total if tick.total else 0.0
        done = (max(0, tick.epoch - 1) + part) / tick.epochs if tick.epochs else 0.0
        facts = [f"epoch {tick.epoch}/{tick.epochs}" if tick.epoch else tick.phase]
        facts += [f"loss {tick.loss:.3f}"] if tick.loss is not None else []
        facts += [tick.val] if tick.val else []
        facts += [f"{tick.images_per_s:.0f} images/s"] if tick.images_per_s else []
        self.progress.update(task, completed=done, name=name, facts=" ".join(facts))

    def step(self, step: Step) -> None:
        """Show that a benchmark's run begins, ended or failed."""
        self.prefixes[step.run] = f"{step.number}/{step.total} "
        if step.state == "begins" or self.quiet:
            return
        task = self.tasks.get(step.run)
        if self.live and task is not None and step.state == "finished":
            self.progress.update(task, completed=1.0, facts=step.detail)
            return
        line = f"{step.number}/{step.total} {step.run}: {step.state}"
        self.console.print(f"{line} {step.detail}".rstrip(), markup=False, soft_wrap=True)

    def images(self, what: str, unit: str = "images") -> Callable[[int, int], None]:
        """Return a callback that shows images (or other things) done and in all."""

        def show(done: int, total: int) -> None:
            if not self.live:
                return
            task = self.tasks.get(what)
            if task is None:
                task = self.tasks[what] = self.progress.add_task("", total=total, name=what, facts="")
            self.progress.update(task, completed=done, total=total, facts=f"{done}/{total} {unit}")

        return show


@contextmanager
def bars(quiet: bool = False) -> Iterator[Bars]:
    """Show progress bars while the block runs."""
    shown = Bars(quiet)
    with shown.progress:
        yield shown


def _short(run: str) -> str:
    """Return a run's name without dataset and digest.

    >>> _short("digits--resnet18-lp--s0--01234567")
    'resnet18-lp s0'
    """
    parts = run.split("--")
    return f"{parts[1]} {parts[2]}" if len(parts) >= 4 else run
