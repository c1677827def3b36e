"""Runs that are there already, compared; torch is imported only where one is still to be scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from zoo.data.manifest import Dataset, load_dataset, split_summary
from zoo.errors import ZooError
from zoo.evaluation.floors import dataset_floors
from zoo.evaluation.ledger import looks_at_test
from zoo.evaluation.statistics import MARGIN
from zoo.files import Home, home
from zoo.reporting.comparison import Comparison, make_comparison, refuse_different
from zoo.runs import Run, RunRecord, find_run, runs_on_split

if TYPE_CHECKING:
    import pandas as pd


def compare(
    runs: Iterable[Run | str] | None = None,
    *,
    data: str | None = None,
    root: Home | None = None,
    metric: str = "top1",
    margin: float = MARGIN,
) -> pd.DataFrame:
    """Return the comparison of runs as a tidy pandas DataFrame, one row per recipe, with letters of the metric.

    runs: the runs, or their names; left out, all on the present split of `data`. margin: of equivalence. Floors and
    pairs stand in the frame's `attrs`. Raises ZooError where the runs are of different datasets, splits or classes.
    """
    return comparison_of(runs, data=data, root=root, metric=metric, margin=margin).frame()


def comparison_of(
    runs: Iterable[Run | RunRecord | str] | None = None,
    *,
    data: str | None = None,
    root: Home | None = None,
    by: str | None = None,
    metric: str = "top1",
    margin: float = MARGIN,
) -> Comparison:
    """Return the comparison of runs, or of all runs on a dataset's present split, with its floors.

    by, metric, margin: as `make_comparison` takes them.
    """
    root = root or home()
    found = [find_run(run, root) if isinstance(run, str) else run for run in runs or []]
    if not found and data is None:
        raise ZooError("nothing to compare; name runs of `zoo list runs`, or a dataset with --data")
    dataset = load_dataset(data, root, make_builtin=False) if data else _dataset_of(found[0], root)
    if not found:
        assert dataset is not None
        found = list(runs_on_split(dataset.name, dataset.split_digest, root))
        if not found:
            raise ZooError(f"there is no run on the present split of {data!r}; train one with `zoo train`")
    records = [run.record if isinstance(run, Run) else run for run in found]
    digest = records[0].split_digest
    known: dict[str, Any] = {"by": by, "metric": metric, "margin": margin, "looks": looks_at_test(root, digest)}
    if dataset is None or dataset.split_digest != digest:
        return make_comparison(found, **known)
    images = {split: facts["images"] for split, facts in split_summary(dataset)["splits"].items()}
    # Runs that left bad images out are compared with floors that do.
    policy = "skip" if any(record.bad_images == "skip" for record in records) else None
    refuse_different(records)
    return make_comparison(found, floors=dataset_floors(dataset, policy), images=images, **known)


def _dataset_of(run: Run | RunRecord, root: Home) -> Dataset | None:
    record = run.record if isinstance(run, Run) else run
    try:
        return load_dataset(record.dataset, root, make_builtin=False)
    except ZooError:
        return None  # the runs are all that is left; they are compared without floors


def score_missing(
    runs: Iterable[Run | str],
    *,
    data: str | None = None,
    root: Home | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Score on test those finished runs that are not scored yet; all on a dataset's split where none is named."""
    root = root or home()
    found = [find_run(run, root) if isinstance(run, str) else run for run in runs]
    if not found and data is not None:
        dataset = load_dataset(data, root, make_builtin=False)
        found = runs_on_split(dataset.name, dataset.split_digest, root)
    for run in found:
        if run.finished and not run.scored("test"):
            from zoo.training.scoring import evaluate

            evaluate(run, "test", root, progress=progress)
