"""What a run says of itself to TensorBoard and MLflow, beside its own files, which stay the truth."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from zoo.errors import ZooError, nearest, one_line
from zoo.files import sha256_file
from zoo.recipe import Recipe
from zoo.runs import RunRecord

if TYPE_CHECKING:
    from zoo.training.plan import Plan

# Writer to the packages that its extra installs.
WRITERS: dict[str, tuple[str, ...]] = {
    "tensorboard": ("tensorboard",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
}
_NOT_OF_THE_NUMBERS = ("search", "summary", "source", "workers", "device", "checkpoint_minutes")
Row = Mapping[str, Any]


class Writer(Protocol):
    """One place that a run writes to."""

    def epoch(self, row: Row) -> None:
        """Write the numbers of a finished epoch; what is there already is not written twice."""

    def finish(self, record: RunRecord, metrics: Row) -> None:
        """Write the val metrics and what the weights are, and close."""

    def fail(self, reason: str, interrupted: bool) -> None:
        """Write why the run ended, and close."""


class Writers:
    """All places that a run writes to, as one.

    What goes wrong while it trains (a full disk, a store that is gone) ends that writer, is kept in `notes` and handed
    to on_note, and does not end the run.
    """

    def __init__(self, writers: Mapping[str, Writer], on_note: Callable[[str], None] | None = None) -> None:
        self.notes: list[str] = []
        self._writers, self._on_note = dict(writers), on_note

    def epoch(self, row: Row) -> None:
        """Write a row of the history: its numbers, the epoch being the step."""
        self._each(lambda writer: writer.epoch(row))

    def finish(self, record: RunRecord, metrics: Row) -> None:
        """Write what a finished run has come to, and close; metrics: those on val, as `compute_metrics` gives them."""
        self._each(lambda writer: writer.finish(record, metrics))
        self._writers = {}

    def fail(self, reason: str, interrupted: bool = False) -> None:
        """Write why a run ended, and close; one that was interrupted will go on."""
        self._each(lambda writer: writer.fail(one_line(reason), interrupted))
        self._writers = {}

    def _each(self, work: Callable[[Writer], None]) -> None:
        for name, writer in list(self._writers.items()):
            try:
                with _quiet():
                    work(writer)
            except Exception as error:  # of a store that is not ours; the run's own files have it all
                del self._writers[name]
                self.notes.append(f"nothing more is written to {name}: {type(error).__name__}: {one_line(error)}")
                if self._on_note is not None:
                    self._on_note(self.notes[-1])


def check_writers(names: Iterable[str]) -> list[str]:
    """Return the names, each once; raise ZooError for one that is unknown or whose packages are not installed."""
    found = list(dict.fromkeys(names))
    for name in found:
        if name not in WRITERS:
            allowed = ", ".join(WRITERS)
            raise ZooError(f"a run can write to {allowed}. Got {one_line(name)!r}{nearest(name, WRITERS)}")
        for package in WRITERS[name]:
            if importlib.util.find_spec(package) is None:
                raise ZooError(f"writing to {name} needs {package}, which is not installed; pip install 'zoo[{name}]'")
    return found


def open_writers(names: Iterable[str], plan: Plan, on_note: Callable[[str], None] | None = None) -> Writers:
    """Return the writers of a run that is about to be trained, or to go on.

    tensorboard: event files in the run's folder `tensorboard`; `tensorboard --logdir models/runs` shows all runs.
    mlflow: a run of the experiment that has the dataset's name, in `models/mlflow/mlflow.db` of the home, or where the
    environment's MLFLOW_TRACKING_URI says; no server is needed, nothing is uploaded, and its telemetry is off. A run
    that goes on writes to the same place, and no step twice: what its history knows and the place lacks is written now.

    Raises ZooError for a name that is unknown, a package that is not installed, and a place that cannot be opened.
    """
    makers: dict[str, Callable[[Plan], Writer]] = {"tensorboard": _TensorBoard, "mlflow": _MLflow}
    opened: dict[str, Writer] = {}
    for name in check_writers(names):
        try:
            with _quiet():
                opened[name] = makers[name](plan)
        except ImportError as error:
            raise ZooError(f"{name} cannot be used: {one_line(error)}; pip install 'zoo[{name}]'") from error
        except ZooError:
            raise
        except Exception as error:  # of a store that is not ours: another version's, damaged, on a full disk
            said = f"{type(error).__name__}: {one_line(error, 200)}"
            raise ZooError(f"{name} cannot be opened: {said}; mend its store, or train without it") from error
    return Writers(opened, on_note)


class _quiet(warnings.catch_warnings):  # noqa: N801
    """Keep warnings of others' code, which a user cannot mend, to ourselves."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")


def flat_recipe(recipe: Recipe) -> dict[str, str | int | float | bool]:
    """Return what decides the numbers of a recipe as dotted key to value; a list becomes JSON.

    >>> from zoo.recipe import load_recipe
    >>> flat_recipe(load_recipe("simple_cnn"))["optimizer.name"]
    'adamw'
    """

    def walk(key: str, value: Any) -> Iterable[tuple[str, Any]]:
        if isinstance(value, dict):
            for inner, each in value.items():
                yield from walk(f"{key}.{inner}", each)
        else:
            yield key, value if isinstance(value, (str, int, float)) else json.dumps(value)

    table = {key: value for key, value in recipe.table().items() if key not in _NOT_OF_THE_NUMBERS}
    return {"name": recipe.name, **dict(pair for key, value in table.items() for pair in walk(key, value))}


def _numbers(row: Row, prefix: str = "") -> dict[str, float]:
    """Return the finite numbers of a row, without the epoch, which is the step."""
    return {
        f"{prefix}{key}": float(value)
        for key, value in row.items()
        if key != "epoch" and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


def _facts(plan: Plan) -> dict[str, str]:
    return {
        "zoo.run": plan.run.name,
        "dataset": plan.dataset.name,
        "split_digest": plan.dataset.split_digest,
        "recipe": plan.recipe.name,
        "recipe_digest": plan.recipe_digest,
        "seed": str(plan.seed),
        "leaks_accepted": str(plan.leaks_accepted).lower(),
    }


# TensorBoard ----------------------------------------------------------------------------------------------------------


class _TensorBoard:
    """Scalars of every epoch, the recipe as text, and its values as hyperparameters with the val metrics."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.folder = plan, plan.run.path / "tensorboard"
        rows = plan.run.history()
        self.seen = _seen(self.folder)
        self.last = max((int(row["epoch"]) for row in rows), default=0)
        # What an attempt has written beyond the history, before it was killed, will be written again.
        self._open(self.last + 1 if self.seen else None)
        self._text("recipe", "\n".join(f"    {key} = {value}" for key, value in flat_recipe(plan.recipe).items()))
        self._text("run", "\n".join(f"    {key} = {value}" for key, value in _facts(plan).items()))
        for row in rows:
            self._scalars(_numbers(row), int(row["epoch"]))
        self.writer.flush()

    def _open(self, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(self.folder), purge_step=purge_step)
        if purge_step is not None:
            self.seen = {(key, step) for key, step in self.seen if step < purge_step}

    def epoch(self, row: Row) -> None:
        epoch = int(row["epoch"])
        if epoch <= self.last:  # the checkpoint was lost: what follows is done again
            self.writer.close()
            self._open(epoch)
        self._scalars(_numbers(row), epoch)
        self.last = epoch
        self.writer.flush()

    def finish(self, record: RunRecord, metrics: Row) -> None:
        from torch.utils.tensorboard import summary

        untyped: Any = summary
        final = _numbers(metrics, "final_val_")
        self._scalars(final, record.epochs or self.last)
        if ("_hparams_/experiment", 0) not in self.seen:
            for each in untyped.hparams(flat_recipe(self.plan.recipe) | {"seed": self.plan.seed}, final):
                self.writer.file_writer.add_summary(each)
        self._text("weights", f"    sha256 = {sha256_file(self.plan.run.weights_file)}")
        self.writer.close()

    def fail(self, reason: str, interrupted: bool) -> None:
        self.writer.add_text("interrupted" if interrupted else "failed", f"    {reason}", self.last)
        self.writer.close()

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            if (key, step) not in self.seen:
                self.writer.add_scalar(key, value, step)
                self.seen.add((key, step))

    def _text(self, key: str, text: str) -> None:
        if (f"{key}/text_summary", 0) not in self.seen:
            self.writer.add_text(key, text, 0)


def _seen(folder: Path) -> set[tuple[str, int]]:
    """Return tag and step of all that the event files of a folder hold, less what a later start has taken back."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    found: set[tuple[str, int]] = set()
    for file in sorted(folder.glob("events.out.tfevents.*")):
        for event in LegacyEventFileLoader(str(file)).Load():
            if event.HasField("session_log") and event.session_log.status == event.session_log.START:
                found = {(key, step) for key, step in found if step < event.step}
            found |= {(value.tag, event.step) for value in event.summary.value}
    return found


# MLflow ---------------------------------------------------------------------------------------------------------------


class _MLflow:
    """A run of MLflow: the recipe as parameters, metrics of every epoch, and what identifies the run as tags."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        client, uri = _mlflow_client(plan)
        self.client = client
        self.run_id, known = self._run(_experiment(client, uri, plan))
        keys = list(known.data.metrics)
        self.seen = {(key, each.step) for key in keys for each in client.get_metric_history(self.run_id, key)}
        self._params(known.data.params)
        for row in plan.run.history():
            self.epoch(row)

    def _run(self, experiment: str) -> tuple[str, Any]:
        """Return the run to go on with, or a new one where there is none or the last one is a finished one."""
        name = self.plan.run.name
        newest = self.client.search_runs(
            [experiment], f"tags.`zoo.run` = '{name}'", max_results=1, order_by=["attributes.start_time DESC"]
        )
        if newest and (newest[0].info.status != "FINISHED" or self.plan.run.history()):
            self.client.update_run(newest[0].info.run_id, status="RUNNING")
            return newest[0].info.run_id, newest[0]
        made = self.client.create_run(
            experiment, tags={**_facts(self.plan), "mlflow.source.name": "zoo"}, run_name=name
        )
        return made.info.run_id, made

    def _params(self, known: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        flat = {re.sub(r"[^\w./ -]", "_", key): str(value) for key, value in flat_recipe(self.plan.recipe).items()}
        new = [Param(key, value[:6000]) for key, value in flat.items() if key not in known]
        for start in range(0, len(new), 100):  # the most of one call
            self.client.log_batch(self.run_id, params=new[start : start + 100])

    def epoch(self, row: Row) -> None:
        self._metrics(_numbers(row), int(row["epoch"]))

    def finish(self, record: RunRecord, metrics: Row) -> None:
        self._metrics(_numbers(metrics, "final_val_"), record.epochs or 0)
        self.client.set_tag(self.run_id, "weights_sha256", sha256_file(self.plan.run.weights_file))
        self.client.set_terminated(self.run_id, "FINISHED")

    def fail(self, reason: str, interrupted: bool) -> None:
        self.client.set_tag(self.run_id, "reason", reason)
        self.client.set_terminated(self.run_id, "KILLED" if interrupted else "FAILED")

    def _metrics(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = [Metric(key, value, now, step) for key, value in values.items() if (key, step) not in self.seen]
        if new:
            self.client.log_batch(self.run_id, metrics=new)
            self.seen |= {(metric.key, step) for metric in new}


def _mlflow_client(plan: Plan) -> tuple[Any, str]:
    """Return MLflow's client and the address of its store; the file of a local one is made here."""
    # Read when mlflow is imported: without them it asks for a configuration and sends what is called (since 3.2).
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = os.environ["DO_NOT_TRACK"] = "true"
    from filelock import FileLock
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    folder = plan.home.root / "models" / "mlflow"
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
    folder.mkdir(parents=True, exist_ok=True)
    plan.home.locks.mkdir(parents=True, exist_ok=True)
    with FileLock(plan.home.locks / "mlflow.lock"):  # two runs that start must not both make its tables
        return MlflowClient(tracking_uri=uri, registry_uri=uri), uri


def _experiment(client: Any, uri: str, plan: Plan) -> str:
    """Return the id of the dataset's experiment, which is made where it is not there."""
    from filelock import FileLock

    with FileLock(plan.home.locks / "mlflow.lock"):
        found = client.get_experiment_by_name(plan.dataset.name)
        if found is None:
            local = "MLFLOW_TRACKING_URI" not in os.environ
            place = (plan.home.root / "models" / "mlflow" / "artifacts").as_uri() if local else None
            return str(client.create_experiment(plan.dataset.name, artifact_location=place))
    if found.lifecycle_stage == "deleted":
        raise ZooError(
            f"MLflow's experiment {plan.dataset.name!r} in {one_line(uri)!r} was deleted; restore it there, or remove "
            "it for good with `mlflow gc`"
        )
    return str(found.experiment_id)
