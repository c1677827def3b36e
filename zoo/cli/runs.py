"""`zoo train`: one recipe on one dataset."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoo.cli.screen import AcceptLeaksOption, BadImagesOption, HomeOption, JsonOption, OfflineOption, SetOption
from zoo.cli.tuning import find_lr

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zoo.cli.screen import Bars
    from zoo.errors import ZooError
    from zoo.reporting.live import LiveFigure
    from zoo.reporting.writers import Writers
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
        typer.Option(
            "--log",
            "--log-to",  # torchrun takes `--log` for an abbreviation of its own options
            metavar="tensorboard|mlflow",
            help="Write the run there, too; repeatable. With torchrun: --log-to.",
        ),
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
    from zoo.training.plan import make_plan

    bad_images = check_bad_images(bad_images)
    loaded = load_recipe(recipe, assignments(set_))
    writers = check_writers(log or [])
    if lr_find:
        find_lr(loaded, data, seed, offline=offline, bad_images=bad_images, accept_leaks=accept_leaks, json=json)
        return
    plan = make_plan(loaded, data, seed, offline=offline, bad_images=bad_images, accept_leaks=accept_leaks)
    follows = os.environ.get("RANK", "0") != "0"  # of several processes that torchrun started the first one speaks
    with bars(quiet=json or follows) as shown:
        run = _train(plan, shown, watch and not follows, [] if follows else writers)
    if not follows:
        _print(run, json)


def _train(plan: Plan, shown: Bars, watch: bool, names: list[str]) -> Run:
    """Train, telling of it to whatever was asked for; what goes wrong there is a note and never stops the run."""
    from zoo.errors import ZooError
    from zoo.training.loop import StopRun, train_plan
    from zoo.training.plan import finished_run

    if finished_run(plan) is not None or not (watch or names):
        return train_plan(plan, shown.tick)
    told = _Told(plan, shown, watch, names)
    try:
        run = train_plan(plan, told.tick, told.epoch)
    except StopRun as stop:
        raise stop.__cause__ or stop from None
    except ZooError as error:
        told.end(error)
        raise
    finally:
        told.close()
    told.end(None)
    return run


class _Told:
    """The figures and writers of what a command trains: each run that a derived one is made of has its own."""

    def __init__(self, plan: Plan, shown: Bars, watch: bool, names: list[str]) -> None:
        self.shown, self.watch, self.names = shown, watch, names
        self.plans = {each.run.name: each for each in _made_of(plan)}
        self.now = plan
        self.figures: dict[str, LiveFigure] = {}
        self.writers: dict[str, Writers] = {}

    def tick(self, tick: Tick) -> None:
        """Take a sign of life; not before is a store opened, for another process may hold the run until then."""
        from zoo.errors import ZooError
        from zoo.reporting.live import LiveFigure
        from zoo.reporting.writers import open_writers
        from zoo.training.loop import StopRun

        self.shown.tick(tick)
        self.now = plan = self.plans.get(tick.run, self.now)
        name = plan.run.name
        if self.watch and name not in self.figures:
            self.figures[name] = LiveFigure(plan.run.path / "loss.png", on_note=self._note)
        if name in self.figures:
            self.figures[name].tick(tick)
        try:
            if name not in self.writers:
                self.writers[name] = open_writers(self.names, plan, self._note)
        except ZooError as error:
            raise StopRun from error  # no fault of the run's, whose record is not to say that it failed

    def epoch(self, row: dict[str, Any]) -> None:
        """Take an epoch's row, of the run that gave the last sign of life."""
        name = self.now.run.name
        if name in self.writers:
            self.writers[name].epoch(row)
        if name in self.figures:
            self.figures[name].epoch(row)

    def end(self, error: ZooError | None) -> None:
        """Tell the writers how their runs have ended."""
        from zoo.errors import Interrupted

        for name, writers in self.writers.items():
            run = self.plans[name].run
            if run.finished:
                writers.finish(run.record, run.metrics("val"))
            elif error is not None:
                writers.fail(str(error), interrupted=isinstance(error, Interrupted))

    def close(self) -> None:
        for figure in self.figures.values():
            figure.close()

    def _note(self, text: str) -> None:
        self.shown.console.print(f"note: {text}", markup=False, soft_wrap=True)


def _made_of(plan: Plan) -> Iterator[Plan]:
    """Yield a plan, and those of all runs that it is made of."""
    from zoo.training.derived import is_derived, sources

    yield plan
    if is_derived(plan.recipe):
        for source in sources(plan):
            yield from _made_of(source)


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
                "averaged_epochs": record.averaged_epochs,
                "made_of": record.made_of,
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
        f"kept {_kept(record)}; {record.train_s:.1f} s; {_precision(record)}; {run.path}",
        markup=False,
        soft_wrap=True,
    )
    if record.leaks_accepted:
        out.print("LEAKS ACCEPTED: a score on test will be too good", markup=False)
    for note in record.notes:
        out.print(f"note: {note}", markup=False)
    for split, paths in record.images_skipped.items():
        out.print(f"left out of {split}: {len(paths)} unreadable images", markup=False)


def _kept(record: RunRecord) -> str:
    """Return in words of what the weights are."""
    if len(record.made_of) > 1:
        return f"the average of runs {', '.join(record.made_of)}"
    if len(record.averaged_epochs) > 1:
        return f"the average of epochs {', '.join(map(str, record.averaged_epochs))} of {record.epochs}"
    epoch = record.averaged_epochs[0] if record.averaged_epochs else record.best_epoch
    return f"epoch {epoch} of {record.epochs}"


def _precision(record: RunRecord) -> str:
    """Return the precision plan in words, with what it was chosen from."""
    plan = record.precision
    name, source = plan.get("name", plan.get("dtype", "float32")), plan.get("source", "default")
    rates = {each: rate for each, rate in plan.get("images_per_s", {}).items() if rate is not None}
    slowest = min(rates.values(), default=0.0)
    faster = f", {rates[name] / slowest:.1f} x the slowest of {len(rates)} plans" if slowest and name in rates else ""
    return f"{name} ({source}{faster})"
