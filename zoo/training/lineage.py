"""Runs to go on from: whose weights they are, and whether what they were trained on stands in this test split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from zoo.data.manifest import Dataset, load_dataset
from zoo.errors import Hindered, ZooError, one_line
from zoo.files import Home
from zoo.models.registry import ModelSpec, find_model
from zoo.models.weights import WeightsFile, resolve_weights
from zoo.runs import LEAKED_SOURCE, Run, RunRecord, find_run

_KEYS = ("sha256", "pixel_sha256")


@dataclass(frozen=True)
class Source:
    """A finished run whose weights another starts from; notes: what is to be said of it."""

    weights: WeightsFile
    record: RunRecord
    notes: tuple[str, ...]


def source_run(source: str, spec: ModelSpec, dataset: Dataset, root: Home, accept_leaks: bool) -> Source:
    """Return the run that `model.weights` names, for training on a dataset.

    Raises ZooError for no such run, one that did not finish, of another architecture, of another split of the same
    dataset, whose weights have changed, or whose images, or those of a run before it, stand in the dataset's test
    split, unless accept_leaks.
    """
    try:
        run = find_run(source, root)
    except ZooError as error:
        raise Hindered(
            f"model.weights must be 'pretrained', 'scratch', a .safetensors or .pth file, or a run. "
            f"Got {one_line(source)!r}; {error}"
        ) from error
    weights = resolve_weights(spec, str(run.weights_file), root, offline=True) if run.finished else None
    return _source(run, weights, spec, dataset, root, accept_leaks)


def source_of_file(
    weights: WeightsFile, spec: ModelSpec, dataset: Dataset, root: Home, accept_leaks: bool
) -> Source | None:
    """Return the run whose file the weights are; None where they are no run's. Raises ZooError as `source_run`."""
    run = Run(weights.path.parent)
    if weights.path.name != run.weights_file.name or not (run.path / "run.json").is_file():
        return None
    return _source(run, weights, spec, dataset, root, accept_leaks)


def _source(
    run: Run, weights: WeightsFile | None, spec: ModelSpec, dataset: Dataset, root: Home, accept_leaks: bool
) -> Source:
    record = run.record
    if record.status != "finished" or weights is None:
        raise Hindered(f"run {run.name!r} to go on from did not finish: {record.reason}; train it again")
    if find_model(record.model).arch != spec.arch:
        raise ZooError(
            f"run {run.name!r} to go on from trained {record.model!r}, the recipe's model is {spec.name!r}; "
            f"set model.name = {record.model!r}"
        )
    if record.weights_sha256 is not None and weights.sha256 != record.weights_sha256:
        raise Hindered(f"the weights of run {run.name!r} to go on from were changed after it had ended; train it again")
    notes = list[str]()
    for name, before in _line(run, root, notes):
        _compare(name, before, dataset, root, accept_leaks, notes)
    return Source(weights, record, tuple(notes))


def _line(run: Run, root: Home, notes: list[str]) -> Iterator[tuple[str, RunRecord]]:
    """Yield a run, the run that it went on from, and so on back."""
    seen, name = set[str](), run.name
    while name not in seen:
        seen.add(name)
        yield name, run.record
        name = run.record.weights.get("run") or ""
        if not name:
            return
        try:
            run = find_run(name, root)
        except ZooError:
            notes.append(f"run {one_line(name)!r}, which the weights come from, is gone: {_UNSEEN}")
            return


_UNSEEN = "whether its training images stand in this test split could not be seen"


def _compare(name: str, record: RunRecord, dataset: Dataset, root: Home, accept_leaks: bool, notes: list[str]) -> None:
    """See whether images that a run was trained on or chosen by stand in a dataset's test split."""
    if record.dataset == dataset.name:
        if record.split_digest != dataset.split_digest:
            raise ZooError(
                f"run {name!r} to go on from was trained on another split of {dataset.name!r} "
                f"({record.split_digest[:8]}, now {dataset.split_digest[:8]}): its training images may stand in this "
                "split's test; train it on this split first"
            )
        return
    state, other = "split anew since", None
    try:
        other = load_dataset(record.dataset, root, make_builtin=False)
    except ZooError as error:
        state = f"not here as it was ({one_line(error, 120)})"
    if other is None or other.split_digest != record.split_digest:
        notes.append(f"run {name!r} was trained on dataset {one_line(record.dataset)!r}, which is {state}: {_UNSEEN}")
        return
    count = int(_seen(other.frame, dataset.frame).sum())
    if count and not accept_leaks:
        raise ZooError(
            f"run {name!r} to go on from was trained on {one_line(record.dataset)!r}, and {count} images of the test "
            f"split of {dataset.name!r}, or of the same groups, were there for training: a score would be too good; "
            "train it on this split first, or go on with --accept-leaks"
        )
    if count:
        notes.append(
            f"{LEAKED_SOURCE}: {count} images of the test split, or of the same groups, were in the training of run "
            f"{name!r}, which the weights come from: a score on test is too good"
        )


def _seen(known: pd.DataFrame, frame: pd.DataFrame) -> pd.Series[bool]:
    """Return which test images another data set had in train or val: the same file, pixels, or group.

    Names of groups are compared only where most images of both have the same one in both: else they may mean others.
    """
    trained, test = known[known["split"] != "test"], frame[frame["split"] == "test"]
    found = pd.Series(False, index=test.index)
    for key in _KEYS:
        found |= test[key].isin(set(trained[key])) & (test[key] != "")
    common = frame[["sha256", "group"]].merge(known[["sha256", "group"]], on="sha256", suffixes=("", "_known"))
    if len(common) and (common["group"].astype(str) == common["group_known"].astype(str)).mean() > 0.5:
        found |= test["group"].isin(set(trained["group"])) & (test["group"] != "")
    return found
