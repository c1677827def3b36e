"""Runs to go on from: whose weights they are, and whether what they were trained on stands in this test split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import pandas as pd

from zoo.data.manifest import Dataset, load_dataset
from zoo.errors import ZooError, one_line
from zoo.files import Home
from zoo.models.registry import ModelSpec, find_model
from zoo.models.weights import WeightsFile, resolve_weights
from zoo.runs import Run, RunRecord, find_run

_KEYS = ("sha256", "pixel_sha256")


@dataclass(frozen=True)
class Source:
    """A finished run whose weights another starts from.

    leaks: some of what it was trained on stands in the other's test split, which was accepted. notes: what is to be
    said of it.
    """

    weights: WeightsFile
    record: RunRecord
    leaks: bool
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
        raise ZooError(
            f"model.weights must be 'pretrained', 'scratch', a .safetensors or .pth file, or a run. "
            f"Got {one_line(source)!r}; {error}"
        ) from error
    record = run.record
    if record.status != "finished":
        raise ZooError(f"run {run.name!r} to go on from did not finish: {record.reason}; train it again")
    if find_model(record.model).arch != spec.arch:
        raise ZooError(
            f"run {run.name!r} to go on from trained {record.model!r}, the recipe's model is {spec.name!r}; "
            f"set model.name = {record.model!r}"
        )
    weights = cast("WeightsFile", resolve_weights(spec, str(run.weights_file), root, offline=True))  # a path is one
    if record.weights_sha256 is not None and weights.sha256 != record.weights_sha256:
        raise ZooError(f"the weights of run {run.name!r} to go on from were changed after it had ended; train it again")
    leaks, notes = False, list[str]()
    for name, before in _line(run, root, notes):
        leaks |= _compare(name, before, dataset, root, accept_leaks, notes)
    return Source(weights, record, leaks, tuple(notes))


def _line(run: Run, root: Home, notes: list[str]) -> Iterator[tuple[str, RunRecord]]:
    """Yield a run, the run that it went on from, and so on back."""
    seen, name = set[str](), run.name
    while name not in seen:
        seen.add(name)
        record = run.record
        yield name, record
        if record.weights.get("from") != "run":
            return
        name = str(record.weights.get("label", "")).removeprefix("run ")
        try:
            run = find_run(name, root)
        except ZooError:
            notes.append(f"run {one_line(name)!r}, which the weights come from, is gone: {_UNSEEN}")
            return


_UNSEEN = "whether its training images stand in this test split could not be seen"


def _compare(name: str, record: RunRecord, dataset: Dataset, root: Home, accept_leaks: bool, notes: list[str]) -> bool:
    """Return whether images that a run was trained on or chosen by stand in a dataset's test split."""
    if record.split_digest == dataset.split_digest and record.dataset == dataset.name:
        return False
    if record.dataset == dataset.name:
        raise ZooError(
            f"run {name!r} to go on from was trained on another split of {dataset.name!r} "
            f"({record.split_digest[:8]}, now {dataset.split_digest[:8]}): its training images may stand in this "
            "split's test; train it on this split first"
        )
    try:
        other = load_dataset(record.dataset, root)
    except ZooError:
        other = None
    if other is None or other.split_digest != record.split_digest:
        state = "not here" if other is None else "split anew since"
        notes.append(f"run {name!r} was trained on dataset {one_line(record.dataset)!r}, which is {state}: {_UNSEEN}")
        return False
    count = int(_seen(other.frame, dataset.frame).sum())
    if not count:
        return False
    if not accept_leaks:
        raise ZooError(
            f"run {name!r} to go on from was trained on {one_line(record.dataset)!r}, and {count} images of the test "
            f"split of {dataset.name!r}, or of the same groups, were there for training: a score would be too good; "
            "train it on this split first, or go on with --accept-leaks"
        )
    notes.append(f"{count} images of the test split, or of the same groups, were in the training of run {name!r}")
    return True


def _seen(known: pd.DataFrame, frame: pd.DataFrame) -> pd.Series[bool]:
    """Return which test images another data set had in train or val: the same file, pixels, or group.

    Names of groups are compared only where an image of both has the same one in both: else they may mean others.
    """
    trained, test = known[known["split"] != "test"], frame[frame["split"] == "test"]
    found = pd.Series(False, index=test.index)
    for key in _KEYS:
        found |= test[key].isin(set(trained[key])) & (test[key] != "")
    common = frame[["sha256", "group"]].merge(known[["sha256", "group"]], on="sha256", suffixes=("", "_known"))
    if bool((common["group"].astype(str) == common["group_known"].astype(str)).any()):
        found |= test["group"].isin(set(trained["group"]))
    return found
