"""`zoo train`: one recipe on one dataset."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from zoo.cli.screen import AcceptLeaksOption, BadImagesOption, HomeOption, JsonOption, OfflineOption, SetOption


def add_to(parent: typer.Typer) -> None:
    """Add the verb to the command line."""
    parent.command()(train)


def train(
    recipe: Annotated[str, typer.Argument(help="Name of `zoo list recipes`, or a .toml file.")],
    data: Annotated[str, typer.Option("--data", help="Name of the dataset.")],
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    set_: SetOption = None,
    bad_images: BadImagesOption = None,
    accept_leaks: AcceptLeaksOption = False,
    offline: OfflineOption = False,
    json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Train a recipe; what was interrupted goes on by itself, what is finished is not trained again."""
    from zoo.cli.screen import assignments, bars, check_bad_images, console, print_json, print_table
    from zoo.recipe import load_recipe
    from zoo.training.loop import train as train_recipe

    bad_images = check_bad_images(bad_images)
    loaded = load_recipe(recipe, assignments(set_))
    follows = os.environ.get("RANK", "0") != "0"  # of several processes that torchrun started the first one speaks
    with bars(quiet=json or follows) as shown:
        run = train_recipe(
            loaded,
            data,
            seed,
            offline=offline,
            bad_images=bad_images,
            accept_leaks=accept_leaks,
            on_tick=shown.tick,
        )
    if follows:
        return
    record, metrics = run.record, run.metrics("val")
    if json:
        print_json(
            {
                "run": run.name,
                "status": record.status,
                "val": metrics,
                "train_s": record.train_s,
                "images_per_s": record.images_per_s,
                "best_epoch": record.best_epoch,
                "epochs": record.epochs,
                "path": str(run.path),
                "images_skipped": record.images_skipped,
                "leaks_accepted": record.leaks_accepted,
            }
        )
        return
    names = ("top1", "balanced_accuracy", "macro_f1", "auroc", "log_loss", "ece", "sensitivity", "specificity")
    rows = [[name, f"{metrics[name]:.4f}"] for name in names if metrics.get(name) is not None]
    print_table(["metric", "val"], rows, run.name, numbers=("val",))
    out = console()
    out.print(
        f"kept epoch {record.best_epoch} of {record.epochs}; {record.train_s:.1f} s; {run.path}",
        markup=False,
        soft_wrap=True,
    )
    if record.leaks_accepted:
        out.print("LEAKS ACCEPTED: a score on test will be too good", markup=False)
    for note in record.notes:
        out.print(f"note: {note}", markup=False)
    for split, paths in record.images_skipped.items():
        out.print(f"left out of {split}: {len(paths)} unreadable images", markup=False)
