"""Runs made of other runs: one scored over several views of each image, or the greedy soup of several seeds."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file
from torch import nn

from zoo.data.cache import Pixels, open_pixels
from zoo.errors import Hindered, one_line
from zoo.evaluation.metrics import METRIC_SIGN, selection_score
from zoo.files import atomic_writer, sha256_file, write_error
from zoo.models.registry import classifier_of
from zoo.recipe import AverageTable, Recipe, ScoreTable
from zoo.runs import Preprocessing, Run
from zoo.training.averaging import Candidate, State, average, greedy_soup, reestimate_batch_norm, statistics_batches
from zoo.training.checkpoint import save_tensors
from zoo.training.features import FORWARD_BATCH, load_grown, pixels_logits
from zoo.training.plan import Plan
from zoo.training.precision import PrecisionPlan, choose_device, recorded_plan
from zoo.training.scoring import finished_record, load_model, score_split, write_scores
from zoo.training.speed import to_input
from zoo.training.strategy import frozen_names


def is_derived(recipe: Recipe) -> bool:
    """Return whether a recipe's run is made of other runs."""
    return recipe.score.tta != "none" or recipe.average.seeds is not None


def sources(plan: Plan) -> list[Plan]:
    """Return the plans of the runs that a derived run is made of, each of which is a run of its own.

    Views are of the run without them. A soup with seed s is of the seeds s * K to s * K + K - 1, so that no two soups
    share a run. Runs of another recipe that are the same in all that counts are taken as they are.
    """
    recipe, seeds = plan.recipe, [plan.seed]
    if recipe.score.tta != "none":
        plain, ending = recipe.model_copy(update={"score": ScoreTable()}), "-tta"
    else:
        count = recipe.average.seeds or 1
        table = recipe.average.model_dump(exclude={"seeds"})
        plain, ending = recipe.model_copy(update={"average": AverageTable.model_validate(table)}), "-soup"
        seeds = [plan.seed * count + each for each in range(count)]
    stem = recipe.name.removesuffix(ending)
    plain = plain.model_copy(update={"name": stem if stem != recipe.name else f"{stem}-plain"})
    return [_known(plan.with_recipe(plain, seed)) for seed in seeds]


def _known(plan: Plan) -> Plan:
    """Return the plan under the name of another recipe whose run is there, where it is the same in all that counts."""
    for path in sorted((plan.place or plan.home.runs).glob(f"{plan.dataset.name}--*--s{plan.seed}--{plan.digest[:8]}")):
        if Run(path).finished and Run(path).record.recipe_digest == plan.recipe_digest:
            return replace(plan, recipe=plan.recipe.model_copy(update={"name": Run(path).record.recipe}))
    return plan


def derive(plan: Plan, runs: list[Run]) -> None:
    """Make a derived run of its finished sources: weights, history, val's scores, and last the record."""
    try:
        plan.run.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(plan.run.path, error) from error
    plan.recipe.write(plan.run.path / "recipe.toml")
    pixels = open_pixels(plan.dataset, "val", plan.preprocessing, plan.bad_images)
    if plan.recipe.score.tta != "none":
        _derive_views(plan, runs[0], pixels)
    else:
        _derive_soup(plan, runs, pixels)


def _derive_views(plan: Plan, source: Run, pixels: Pixels) -> None:
    run, record = plan.run, finished_record(source)
    _copy(source, run)
    facts = record.model_dump()
    facts |= plan.record("finished").model_dump(include={"run", "recipe", "recipe_digest"})
    facts |= {"tta": plan.recipe.score.tta, "made_of": [source.name]}
    derived = type(record).model_validate(facts)
    device = choose_device(plan.recipe.device)
    precision = recorded_plan(record.precision)
    model = load_model(source, plan.home, device.type).to(memory_format=precision.memory_format)
    score_split(run, derived, model, pixels, "val", precision, device)
    run.write_record(derived)


def _derive_soup(plan: Plan, runs: list[Run], pixels: Pixels) -> None:
    records = [finished_record(run) for run in runs]
    device = choose_device(plan.recipe.device)
    precision = recorded_plan(records[0].precision)
    train_pixels = open_pixels(plan.dataset, "train", plan.preprocessing, plan.bad_images)
    metric = plan.recipe.finetune.metric
    model = load_model(runs[0], plan.home, device.type).to(memory_format=precision.memory_format)
    scorer = StateScorer(plan, model, train_pixels, pixels, precision, device)
    candidates = [
        Candidate(run.name, partial(load_file, run.weights_file), _value(run, metric))
        for run in runs
    ]  # fmt: skip
    soup = greedy_soup(candidates, scorer.value, METRIC_SIGN.get(metric, 1))
    best = runs[[run.name for run in runs].index(soup.chosen[0])]
    logits = scorer.logits(soup.state, averaged=len(soup.chosen) > 1)
    _copy(best, plan.run)
    sha256 = save_tensors(plan.run.weights_file, scorer.state())
    facts = {**finished_record(best).model_dump(), "weights_sha256": sha256}
    facts |= plan.record("finished").model_dump(include={"run", "recipe", "recipe_digest", "seed", "weights"})
    facts["train_s"] = round(sum(record.train_s or 0.0 for record in records), 3)
    facts["made_of"] = soup.chosen
    facts["precision"] = records[0].precision  # that the soup was scored in
    facts["notes"] = [*facts["notes"], f"greedy soup of {len(soup.chosen)} of {len(runs)} seeds"]
    record = type(records[0]).model_validate(facts)
    write_scores(plan.run, record, pixels, "val", logits)
    plan.run.write_record(record)


def _value(run: Run, metric: str) -> float | None:
    found = run.metrics("val").get(metric)
    return float(found) if isinstance(found, (int, float)) else None


def _copy(source: Run, run: Run) -> None:
    """Copy weights and history, and see that they arrived whole."""
    for before, after in ((source.weights_file, run.weights_file), (source.history_file, run.history_file)):
        with _opened(source, before) as stream, atomic_writer(after) as copy:
            shutil.copyfileobj(stream, copy, 1 << 20)
    if sha256_file(source.weights_file) != sha256_file(run.weights_file):
        raise Hindered(f"the weights of run {source.name!r} changed while they were copied; train it again")


def _opened(source: Run, file: Path) -> IO[bytes]:
    try:
        return file.open("rb")
    except OSError as error:
        raise Hindered(
            f"{file.name} of run {source.name!r} cannot be read: {one_line(error)}; train it again"
        ) from error


class StateScorer:
    """Scores state dicts of one network on val, averaged ones with batch statistics of their own."""

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        train_pixels: Pixels,
        val_pixels: Pixels,
        precision: PrecisionPlan,
        device: torch.device,
    ) -> None:
        self.plan, self.model, self.precision, self.device = plan, model, precision, device
        self.train_pixels, self.val_pixels = train_pixels, val_pixels
        frozen = frozen_names(model, plan.recipe.finetune.freeze)
        self.frozen = sorted({name.rpartition(".")[0] for name in frozen})
        if plan.recipe.finetune.strategy == "linear-probe":
            head, _ = classifier_of(model)
            self.frozen = [name for name, _ in model.named_modules() if name and not name.startswith(head)]

    def value(self, state: State) -> float:
        """Return the score on val of averaged weights, by the recipe's metric."""
        logits = self.logits(state, averaged=True)
        return selection_score(self.plan.recipe.finetune.metric, logits.numpy(), self.val_pixels.y_true)

    def logits(self, state: State, averaged: bool) -> torch.Tensor:
        """Return val's logits (N, C) of a state dict; the model then holds it."""
        load_grown(self.model, dict(state))
        if averaged:
            preprocessing: Preprocessing = self.plan.preprocessing
            batches = statistics_batches(self.train_pixels, preprocessing, FORWARD_BATCH, self.plan.seed)
            reestimate_batch_norm(self.model, batches, self._forward, self.frozen)
        return pixels_logits(self.model, self.val_pixels, self.plan.preprocessing, self.precision, self.device)

    def _forward(self, batch: Any) -> Any:
        with self.precision.autocast(self.device):
            return self.model(to_input(batch, self.plan.preprocessing, self.precision, self.device))

    def state(self) -> dict[str, torch.Tensor]:
        """Return the weights that were scored last."""
        return {key: value.detach().cpu().clone() for key, value in self.model.state_dict().items()}


def average_epochs(
    scorer: StateScorer, method: str, epochs: Mapping[str, Callable[[], State]], values: dict[str, float], metric: str
) -> tuple[list[str], float]:
    """Load the mean of epochs' weights, or their greedy soup, into the scorer's model; return names and score.

    epochs: name to what reads its weights, in order. values: the score of each on val.
    """
    if method == "swa":
        state = average(load() for load in epochs.values())
        return list(epochs), scorer.value(state)
    candidates = [Candidate(name, load, values[name]) for name, load in epochs.items()]
    soup = greedy_soup(candidates, scorer.value, METRIC_SIGN.get(metric, 1))
    logits = scorer.logits(soup.state, averaged=len(soup.chosen) > 1)
    return soup.chosen, selection_score(metric, logits.numpy(), scorer.val_pixels.y_true)
