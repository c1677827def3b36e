"""`zoo predict`: what a trained run says of new images."""

from __future__ import annotations

from typing import Annotated

import typer

from zoo.cli.screen import HomeOption, JsonOption


def add_to(parent: typer.Typer) -> None:
    """Add the verb to the command line."""
    parent.command()(predict)


def predict(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Name of `zoo list runs`, or a run's folder.")],
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Images, or folders of images.")],
    batch_size: Annotated[int, typer.Option(help="Images that are computed together.", min=1)] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    explain: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder for pictures of where the network looked.")
    ] = None,
    json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Predict images; with --json one object a line. A bad file is a row with its reason."""
    from zoo.cli.screen import bars, console, print_table
    from zoo.deployment.images import find_images
    from zoo.deployment.predictor import Predictor
    from zoo.errors import one_line
    from zoo.files import to_json

    files = find_images(paths)
    predictor = Predictor.load(run, device=device)
    rows, failed = [], 0
    with bars(quiet=json) as shown:
        advance = shown.images("predicting")
        for number, found in enumerate(predictor.stream(files, batch_size, explain), 1):
            advance(number, len(files))
            failed += found.error is not None
            if json:
                print(to_json(found.row(explain is not None)), flush=True)
                continue
            best = sorted(found.scores.items(), key=lambda pair: -pair[1])[:3]
            said = found.error or ", ".join(f"{one_line(name, 30)} {score:.3f}" for name, score in best)
            rows.append([one_line(found.path, 200), one_line(found.label or "–", 40), said])
    if not json:
        print_table(["path", "label", "scores"], rows, folded=("path", "scores", "label"))
        if explain is not None:
            console().print(f"where the network looked: {explain}", markup=False, soft_wrap=True)
    if failed == len(files):
        raise typer.Exit(1)
