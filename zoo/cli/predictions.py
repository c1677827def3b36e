"""`zoo predict`: what a bundle or a trained run says of new images."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from zoo.cli.screen import HomeOption

if TYPE_CHECKING:
    from zoo.deployment.images import Source
    from zoo.deployment.predictor import Prediction, Predictor

Write = Callable[["Prediction"], None]
_FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # OWASP, "CSV injection"


def add_to(parent: typer.Typer) -> None:
    """Add the verb to the command line."""
    parent.command()(predict)


def predict(
    model: Annotated[
        str, typer.Argument(metavar="BUNDLE_OR_RUN", help="Name of `zoo list bundles` or `zoo list runs`, or a folder.")
    ],
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PATH...", help="Images, folders, patterns in quotes; - is one image on standard input."
        ),
    ] = None,
    paths_from: Annotated[
        str | None, typer.Option(metavar="FILE", help="A list of paths, one a line; - for standard input.")
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV, one row an image.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write .csv or .jsonl, whole or not at all.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images that are computed together.", min=1, max=4096)] = 32,
    threads: Annotated[int | None, typer.Option(help="Cores of one call; all where left out.", min=1, max=1024)] = None,
    device: Annotated[str, typer.Option(help="Of a run: auto, cpu, cuda or mps. Bundles run on the CPU.")] = "auto",
    explain: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder for pictures of where the network looked.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON Lines, one object an image, as they come.")] = False,
    home: HomeOption = None,
) -> None:
    """Predict images: calibrated scores, prediction set, and whether to refer to a human.

    A bad file is a row with its reason; exit code 1 where every file is bad.
    """
    from zoo.cli.screen import bars
    from zoo.deployment.predictor import Predictor

    if not paths and paths_from is None:
        raise typer.BadParameter("give images: PATH..., or --paths-from FILE")
    sources = _sources(paths or [], paths_from)
    form = _form(json, csv, output)
    predictor = Predictor.load(model, device=device, threads=threads)
    failed = referred = 0
    with _written(form, output, predictor, explain is not None) as write, bars(quiet=json or csv) as shown:
        advance = shown.images("predicting")
        for number, found in enumerate(predictor.stream(sources, batch_size, explain), 1):
            advance(number, len(sources))
            failed += found.error is not None
            referred += found.refer and found.error is None
            write(found)
    if not (json or csv):
        _say_after(predictor, explain)
        _say_counts(len(sources), referred, failed, output)
    if failed == len(sources):
        raise typer.Exit(1)


def _sources(paths: list[str], paths_from: str | None) -> list[Source]:
    """Return what the words of the command line mean; standard input is read at most once."""
    from zoo.deployment.images import MAX_FILE_BYTES, Encoded, find_images
    from zoo.errors import ZooError

    if [*paths, paths_from].count("-") > 1:
        raise ZooError("standard input was named twice; name it once, as an image or as a list of paths")
    found: list[Source] = []
    for each in paths:
        if each != "-":
            found += find_images([each])
            continue
        data = _standard_input().read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ZooError(f"standard input holds more than {MAX_FILE_BYTES >> 20} MiB; give one image")
        found.append(Encoded("-", data))
    return found + (_listed(paths_from) if paths_from is not None else [])


def _standard_input() -> IO[bytes]:
    from zoo.errors import ZooError

    if sys.stdin is None:
        raise ZooError("standard input is closed; send an image or a list of paths there, or name files")
    return sys.stdin.buffer


def _listed(file: str) -> list[Source]:
    from zoo.deployment.images import listed_images
    from zoo.errors import ZooError, one_line
    from zoo.files import user_path

    if file == "-":
        return listed_images(_standard_input(), "-")
    try:
        with user_path(file).open("rb") as stream:
            return listed_images(stream, file)
    except (OSError, ValueError) as error:
        reason = one_line(getattr(error, "strerror", None) or error)
        raise ZooError(f"cannot read the list {one_line(file)!r}: {reason}; check the path") from None


def _form(json: bool, csv: bool, output: Path | None) -> str:
    from zoo.errors import ZooError, one_line
    from zoo.files import user_path

    if json and csv:
        raise ZooError("--json and --csv exclude each other; take one")
    if output is None:
        return "jsonl" if json else "csv" if csv else "table"
    form = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}.get(output.suffix.lower())
    if form is None:
        raise ZooError(f"--output must end in .csv or .jsonl. Got {one_line(output)!r}")
    if (json and form != "jsonl") or (csv and form != "csv"):
        asked, ending = ("--json", ".jsonl") if json else ("--csv", ".csv")
        raise ZooError(f"{asked} writes {ending}. Got {one_line(output)!r}; leave out {asked}, or name a {ending} file")
    if os.path.isdir(user_path(output)):  # noqa: PTH112
        raise ZooError(f"cannot write {one_line(output)!r}: it is a folder; name a file")
    return form


@contextmanager
def _written(form: str, output: Path | None, predictor: Predictor, explained: bool) -> Iterator[Write]:
    """Give a function that shows a prediction, or writes it; a file is put in place when all are in it."""
    from zoo.files import atomic_writer, user_path

    if output is not None:
        with atomic_writer(user_path(output)) as stream:
            yield _line_writer(form, predictor, explained, lambda line: stream.write(_encoded(line)))
    elif form != "table":
        yield _line_writer(form, predictor, explained, _print_line)
    else:
        rows: list[list[str]] = []
        yield lambda found: rows.append(_table_row(found))
        _print_rows(rows)


def _print_line(line: str) -> None:
    sys.stdout.flush()
    sys.stdout.buffer.write(_encoded(line))  # UTF-8, whatever the terminal's encoding
    sys.stdout.buffer.flush()


def _encoded(line: str) -> bytes:
    r"""Return a line as UTF-8; what is no character, in a file's name of another encoding, as `\udcff`."""
    return line.encode("utf-8", "backslashreplace")


def _line_writer(form: str, predictor: Predictor, explained: bool, put: Callable[[str], Any]) -> Write:
    from zoo.files import to_json

    if form == "jsonl":
        return lambda found: put(to_json(found.row(explained)) + "\n")
    heads = ["path", "label", "refer", "refer_reason", "prediction_set", "error"]
    points, last = list(predictor.rules.operating_points or {}), ["explanation"] if explained else []
    named = [*(f"score {name}" for name in predictor.classes), *(f"positive at {name}" for name in points)]
    put(_csv_line([*heads, *named, *last]))

    def write(found: Prediction) -> None:
        row = found.row(explained)
        cells = [row[head] for head in heads]
        cells[4] = " | ".join(found.prediction_set)
        cells += [found.scores.get(name) for name in predictor.classes]
        cells += [(found.points or {}).get(name) for name in points]
        put(_csv_line([*cells, *([found.explanation] if explained else [])]))

    return write


def _csv_line(cells: list[Any]) -> str:
    """Return one line of CSV; a text that a spreadsheet would take for a formula begins with an apostrophe."""
    import csv
    import io

    def safe(cell: Any) -> Any:
        if isinstance(cell, str) and cell[:1] in _FORMULA and cell != "-":
            return "'" + cell
        return str(cell).lower() if isinstance(cell, bool) else cell

    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow([safe(cell) for cell in cells])
    return out.getvalue()


def _table_row(found: Prediction) -> list[str]:
    from zoo.errors import one_line

    best = sorted(found.scores.items(), key=lambda pair: -pair[1])[:3]
    said = found.error or ", ".join(f"{one_line(name, 30)} {score:.3f}" for name, score in best)
    among = ", ".join(one_line(name, 30) for name in found.prediction_set) or "–"
    return [
        one_line(found.path, 200),
        one_line(found.label or "–", 40),
        one_line(said, 300),
        among,
        "refer" if found.refer else "",
    ]


def _print_rows(rows: list[list[str]]) -> None:
    """Print the table; the folder that all images lie in stands above it, not in every row."""
    from zoo.cli.screen import print_table

    folders = [os.path.dirname(row[0]) for row in rows]  # noqa: PTH120
    shared = os.path.commonpath(folders) if folders and all(folders) and len({each[0] for each in folders}) == 1 else ""
    print_table(
        ["image", "label", "calibrated scores", "one of", "human"],
        [[os.path.relpath(row[0], shared) if shared else row[0], *row[1:]] for row in rows],
        title=f"images in {shared}" if shared else "",
        folded=("image", "label", "calibrated scores", "one of"),
    )


def _say_counts(images: int, referred: int, failed: int, output: Path | None) -> None:
    from zoo.cli.screen import console

    answered = f"{images - failed} answered" + (f", {referred} of them referred to a human" if referred else "")
    counts = f"{images} image{'s' if images > 1 else ''}: {answered}, {failed} unreadable"
    console().print(counts + (f"; {output}" if output else ""), markup=False, soft_wrap=True)


def _say_after(predictor: Predictor, explain: str | None) -> None:
    from zoo.cli.screen import console

    rules, say = predictor.rules, console().print
    if rules.conformal is not None:
        held = f"the true class is among them in {rules.conformal.coverage:.0%} of images like those of val"
        say(f"one of: {held}", markup=False, soft_wrap=True)
    if rules.refer is not None:
        rule = (
            "every image, for val has no 20 that could be answered with so few errors"
            if rules.refer.threshold is None
            else f"confidence below {rules.refer.threshold:.3f}; above it val's error was "
            f"{rules.refer.max_error:.0%} or less"
        )
        say(f"refer: {rule}", markup=False, soft_wrap=True)
    if predictor.bundle is not None and predictor.bundle.record.medical:
        say("not a medical device", markup=False)
    if explain is not None:
        say(f"where the network looked: {explain}", markup=False, soft_wrap=True)
