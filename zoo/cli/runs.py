"""`zoo train`: one recipe on one dataset."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoo.cli.screen import AcceptLeaksOption, BadImagesOption, HomeOption, JsonOption, OfflineOption, SetOption
from zoo.cli.tuning import find_lr
from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.cli.screen import Bars
    from zoo.runs import Run, RunRecord
    from zoo.training.loop import Tick
    from zoo.training.plan import Plan


def add_to(parent: typer.Typer) -> None:
    """Add the verb to the command line."""
    parent.command()(train)


def train(
    recipe: Annotated[str, typer.Argument(help="Name of `zoo list recipes`, or a .toml file.")],
    data: Annotated[str, typer.Option("--data", help="Name of the dataset.")],
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    set_: SetOption = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Keep a figure of the loss, loss.png, in the run folder.")
    ] = False,
    log: Annotated[
        list[str] | None,
        typer.Option("--log", metavar="tensorboard|mlflow", help="Write the run there, too; repeatable."),
    ] = None,
    lr_find: Annotated[
        bool, typer.Option("--lr-find", help="Only test learning rates; no weights are kept, the figure is.")
    ] = False,
    bad_images: BadImagesOption = None,
    accept_leaks: AcceptLeaksOption = False,
    offline: OfflineOption = False,
    json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Train a recipe; what was interrupted goes on by itself, what is finished is not trained again."""
    from zoo.cli.screen import assignments, bars, check_bad_images
    from zoo.recipe import load_recipe
    from zoo.reporting.writers import check_writers
    from zoo.training.parallel import expected_world
    from zoo.training.plan import make_plan

    bad_images = check_bad_images(bad_images)
    loaded = load_recipe(recipe, assignments(set_))
    writers = check_writers(log or [])
    if lr_find:
        if expected_world() > 1:
            raise ZooError("--lr-find is the work of one process; run it without torchrun")
        find_lr(loaded, data, seed, offline=offline, bad_images=bad_images, accept_leaks=accept_leaks, json=json)
        return
    plan = make_plan(loaded, data, seed, offline=offline, bad_images=bad_images, accept_leaks=accept_leaks)
    follows = os.environ.get("RANK", "0") != "0"  # of several processes that torchrun started the first one speaks
    with bars(quiet=json or follows) as shown:
        run = _train(plan, shown, watch and not follows, [] if follows else writers)
    if not follows:
        _print(run, json)


def _train(plan: Plan, shown: Bars, watch: bool, names: list[str]) -> Run:
    """Train, telling of it to whatever was asked for; what goes wrong there is a note and never stops the run.

    Each of the runs that a derived one is made of has a figure and writers of its own.
    """
    from zoo.errors import Interrupted, ZooError
    from zoo.reporting.live import LiveFigure
    from zoo.reporting.writers import Writers, open_writers
    from zoo.training.derived import is_derived, sources
    from zoo.training.loop import StopRun, train_plan
    from zoo.training.plan import finished_run

    done = finished_run(plan)
    if done is None and is_derived(plan.recipe):
        for source in sources(plan):
            _train(source, shown, watch, names)
    if done is not None or not (watch or names):
        return train_plan(plan, shown.tick)

    def note(text: str) -> None:
        shown.console.print(f"note: {text}", markup=False, soft_wrap=True)

    figure = LiveFigure(plan.run.path / "loss.png", on_note=note) if watch else None
    opened: list[Writers] = []

    def writers() -> Writers:
        if not opened:
            opened.append(open_writers(names, plan, note))
        return opened[0]

    def on_tick(tick: Tick) -> None:
        shown.tick(tick)
        if figure is not None:
            figure.tick(tick)
        # Not before there is a sign of life: until then another process may hold the run, and write of it.
        try:
            writers()
        except ZooError as error:
            raise StopRun from error  # no fault of the run's, whose record is not to say that it failed

    def on_epoch(row: dict[str, Any]) -> None:
        writers().epoch(row)
        if figure is not None:
            figure.epoch(row)

    try:
        run = train_plan(plan, on_tick, on_epoch)
    except StopRun as stop:
        raise stop.__cause__ or stop from None
    except ZooError as error:
        for each in opened:
            each.fail(str(error), interrupted=isinstance(error, Interrupted))
        raise
    finally:
        if figure is not None:
            figure.close()
    writers().finish(run.record, run.metrics("val"))
    return run


def _print(run: Run, json: bool) -> None:
    from zoo.cli.screen import console, print_json, print_table

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
                "precision": record.precision,
                "threads": record.threads,
                "notes": record.notes,
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
        f"kept epoch {record.best_epoch} of {record.epochs}; {record.train_s:.1f} s; {_precision(record)}; {run.path}",
        markup=False,
        soft_wrap=True,
    )
    if record.leaks_accepted:
        out.print("LEAKS ACCEPTED: a score on test will be too good", markup=False)
    for note in record.notes:
        out.print(f"note: {note}", markup=False)
    for split, paths in record.images_skipped.items():
        out.print(f"left out of {split}: {len(paths)} unreadable images", markup=False)


def _precision(record: RunRecord) -> str:
    """Return the precision plan in words, with what it was chosen from."""
    plan = record.precision
    name, source = plan.get("name", plan.get("dtype", "float32")), plan.get("source", "default")
    rates = {each: rate for each, rate in plan.get("images_per_s", {}).items() if rate is not None}
    slowest = min(rates.values(), default=0.0)
    faster = f", {rates[name] / slowest:.1f} x the slowest of {len(rates)} plans" if slowest and name in rates else ""
    return f"{name} ({source}{faster})"
