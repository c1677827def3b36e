"""The plan of a run: all that is decided and checked before any work, and the run's identity."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zoo.data.leaks import refuse_leaks
from zoo.data.manifest import Dataset, load_dataset
from zoo.data.window import windowing_of, windowing_of_facts
from zoo.errors import Hindered, ZooError, one_line
from zoo.evaluation.metrics import selection_score
from zoo.files import Home, check_writable, digest_of, home, sha256_file
from zoo.models.registry import (
    ModelSpec,
    classifier_of,
    classifiers_of,
    create_model,
    find_model,
    own_network_digest,
    preprocessing_for,
)
from zoo.models.weights import WeightsFile, resolve_weights
from zoo.recipe import Recipe, load_recipe
from zoo.recipe.effects import effect_notes
from zoo.runs import FRESH_HEAD, Preprocessing, Run, RunRecord, run_name
from zoo.training.lineage import Source, source_of_file, source_run
from zoo.training.strategy import frozen_names


@dataclass(frozen=True)
class Plan:
    """One run, decided: everything that it needs is known to be there.

    place: a folder in place of the home's runs. notes: what is to be said of the recipe, and stands in the record.
    own_head: False where the weights are of a run that told other classes apart. source: the name of that run.
    """

    recipe: Recipe
    dataset: Dataset
    seed: int
    home: Home
    spec: ModelSpec
    preprocessing: Preprocessing
    weights: WeightsFile | None
    weights_from: str
    recipe_digest: str
    digest: str
    bad_images: str | None
    network: str | None = None
    leaks_accepted: bool = False
    place: Path | None = None
    notes: tuple[str, ...] = ()
    own_head: bool = True
    source: str | None = None

    @property
    def run(self) -> Run:
        """Return the run folder, which need not be there yet; it lies in `place`, else among the home's runs."""
        name = run_name(self.dataset.name, self.recipe.name, self.seed, self.digest)
        return Run((self.place or self.home.runs) / name)

    def with_seed(self, seed: int) -> Plan:
        """Return the same plan for another seed."""
        return replace(self, seed=seed, digest=_run_digest(self.recipe_digest, self.dataset, seed))

    def with_recipe(self, recipe: Recipe, seed: int) -> Plan:
        """Return the plan of a recipe that differs in how weights are averaged or scored alone, for a seed."""
        digest = _recipe_digest(
            recipe, self.spec, self.preprocessing, self.weights, self.network, self.bad_images, self.own_head
        )
        return replace(self, recipe=recipe, recipe_digest=digest).with_seed(seed)

    @property
    def weights_label(self) -> str:
        """Return in a few words where the weights come from, as tables print it."""
        if self.weights is None:
            return "scratch"
        if self.weights_from == "run":
            return f"run {self.weights.path.parent.name}"
        if self.weights_from == "file":
            return f"file {self.weights.path.name}"
        return self.spec.tag or self.weights.path.name

    def model(self) -> tuple[torch.nn.Module, str]:
        """Return the network with the weights to start from, and what is to be said of its head.

        A new head on trained features starts at zero: the random one of some networks (uniform within
        1 / sqrt(classes)) is so large that it drowns them. A network from scratch keeps its own start.
        """
        from zoo.models.weights import load_weights

        torch.manual_seed(self.seed)
        model = build_model(self.recipe, self.spec, self.preprocessing, len(self.dataset.classes))
        fresh, note = self.recipe.finetune.strategy != "full", ""
        if self.weights is not None:
            report = load_weights(model, self.weights, self.spec)
            fresh, note = report.head != "kept" or not self.own_head, report.note
            if report.head == "kept" and not self.own_head:
                note = f"{FRESH_HEAD} {self.weights_label!r} told other classes apart: a fresh one takes its place"
        if fresh:
            _zero_heads(model)
        return model, note

    def record(self, status: str, reason: str | None = None, **facts: Any) -> RunRecord:
        """Return what `run.json` says of this run."""
        weights = {"label": self.weights_label, "from": self.weights_from}
        if self.weights is not None:
            weights |= {"location": self.weights.location, "sha256": self.weights.sha256}
        if self.source is not None:
            weights["run"] = self.source
        return RunRecord.model_validate(
            {
                "run": self.run.name,
                "status": status,
                "reason": reason,
                "dataset": self.dataset.name,
                "recipe": self.recipe.name,
                "recipe_digest": self.recipe_digest,
                "seed": self.seed,
                "split_digest": self.dataset.split_digest,
                "bad_images": self.bad_images,
                "network": self.network,
                "leaks_accepted": self.leaks_accepted,
                "classes": self.dataset.classes,
                "negative_class": self.dataset.negative_class,
                # A weights tag would promise what a network from scratch has not.
                "model": self.spec.name if self.weights is not None else self.spec.arch,
                "preprocessing": self.preprocessing,
                "model_options": self.recipe.model.options,
                "weights": weights,
                "strategy": self.recipe.finetune.strategy,
                **facts,
                "notes": [*self.notes, *facts.get("notes", ())],
            }
        )


def _zero_heads(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for _, classifier in classifiers_of(model):
            for module in classifier.modules():
                if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                    for parameter in module.parameters(recurse=False):
                        parameter.zero_()


def build_model(recipe: Recipe, spec: ModelSpec, preprocessing: Preprocessing, classes: int) -> torch.nn.Module:
    """Return the recipe's network with random weights."""
    return create_model(
        spec,
        classes,
        image_size=preprocessing.image_size,
        drop_rate=recipe.model.drop_rate,
        drop_path_rate=recipe.model.drop_path_rate,
        options=dict(recipe.model.options),
    )


def make_plan(
    recipe: Recipe | str,
    data: Dataset | str,
    seed: int = 0,
    root: Home | None = None,
    *,
    offline: bool = False,
    bad_images: str | None = None,
    accept_leaks: bool = False,
) -> Plan:
    """Decide a run and check all that can be checked before work.

    Raises ZooError for a dataset whose splits leak, unless accept_leaks, an unknown model, weights that cannot be
    reached or do not fit, a strategy that the model cannot follow, augmentation that does not exist, a device that
    is not there, a batch larger than the training set, a metric that val cannot define, more loading processes or, by
    torchrun, training processes than make sense, and folders that are full or cannot be written.
    """
    from zoo.data.transforms import make_augment
    from zoo.training.precision import choose_device, choose_plan, choose_workers

    root = root or home()
    if not 0 <= seed < 2**31:
        raise ZooError(f"the seed must be from 0 to 2147483647. Got {seed}")
    recipe = load_recipe(recipe, root=root) if isinstance(recipe, str) else recipe
    dataset = load_dataset(data, root) if isinstance(data, str) else data
    device = choose_device(recipe.device)
    _refuse_one_card_for_all(recipe.device)
    choose_plan(recipe.precision, device)
    choose_workers(recipe.workers, device)
    _check_batch(recipe, dataset)
    _check_metric(recipe, dataset)
    spec = find_model(recipe.model.name)
    leaks_accepted = refuse_leaks(dataset, accept_leaks)
    weights, weights_from, source = _weights(recipe, spec, dataset, root, offline, accept_leaks)
    before = source.record if source and weights_from == "run" else None
    preprocessing = preprocessing_of(recipe, spec, before, dataset)
    make_augment(recipe.policy, recipe.augment.transforms, preprocessing.image_size, seed)
    network, notes = _check_model(recipe, spec, preprocessing, len(dataset.classes))
    _refuse_changed_network(before, network, len(dataset.classes))
    check_writable(root.runs)
    own_head = source is None or source.record.classes == dataset.classes
    recipe_digest = _recipe_digest(recipe, spec, preprocessing, weights, network, bad_images, own_head)
    return Plan(
        recipe=recipe,
        dataset=dataset,
        seed=seed,
        home=root,
        spec=spec,
        preprocessing=preprocessing,
        weights=weights,
        weights_from=weights_from,
        recipe_digest=recipe_digest,
        digest=_run_digest(recipe_digest, dataset, seed),
        bad_images=bad_images,
        network=network,
        leaks_accepted=leaks_accepted,
        notes=(*notes, *(source.notes if source else ())),
        own_head=own_head,
        source=source.record.run if source else None,
    )


def _run_digest(recipe_digest: str, dataset: Dataset, seed: int) -> str:
    """Return the identity of a run; the order of the classes is that of its logits, and counts where it is unusual."""
    order = [] if dataset.classes == sorted(dataset.classes) else [dataset.classes]
    return digest_of([recipe_digest, dataset.split_digest, seed, *order])


def _recipe_digest(
    recipe: Recipe,
    spec: ModelSpec,
    preprocessing: Preprocessing,
    weights: WeightsFile | None,
    network: str | None,
    bad_images: str | None,
    own_head: bool,
) -> str:
    """Return the identity of a recipe together with what its names stand for here."""
    from zoo.data.transforms import POLICY_VERSIONS

    resolved: dict[str, Any] = {
        "recipe": recipe.digest,
        "model": spec.name,
        "preprocessing": preprocessing.identity,
        "weights": weights.sha256 if weights else None,
        "augment": [recipe.policy, POLICY_VERSIONS.get(recipe.policy, 1)],
    }
    trained = recipe.finetune.strategy != "linear-probe"
    if trained and recipe.finetune.layer_decay < 1:
        resolved["layer_decay"] = 2  # before, warm-up and min_lr were a share of a rate that no layer had
    if trained and recipe.finetune.sampler == "balanced":
        resolved["sampler"] = 2  # before, an image that is drawn again in an epoch was augmented as the first time
    if not own_head:
        resolved["head"] = "fresh"
    if network is not None:
        resolved["network"] = network
    if bad_images:
        resolved["bad_images"] = bad_images
    return digest_of(resolved)


def _refuse_one_card_for_all(device: str) -> None:
    from zoo.training.parallel import expected_world

    if ":" in device and expected_world() > 1:
        raise ZooError(
            f"device {device!r} names one card, and torchrun started {expected_world()} processes; set device=cuda, "
            "which gives each its own"
        )


def _check_batch(recipe: Recipe, dataset: Dataset) -> None:
    """Refuse batches larger than the training set, where they are asked for, or too small for torchrun's processes.

    A recipe that leaves the size open takes the whole of a small training set as one batch.
    """
    from zoo.training.parallel import expected_world

    images = int((dataset.frame["split"] == "train").sum())
    size, times, world = recipe.finetune.batch_size, recipe.finetune.accumulate, expected_world()
    if times == 1 and "batch_size" not in recipe.finetune.model_fields_set:
        size = min(size, images)
    if size * times > images:
        got = f"{size}" if times == 1 else f"{size} x {times} (finetune.accumulate)"
        raise ZooError(
            f"finetune.batch_size must be at most the {images} training images of {dataset.name!r}. Got {got}; set "
            f"finetune.batch_size={max(1, images // times // 4)}"
        )
    check_shares(images, size, world)


def _check_metric(recipe: Recipe, dataset: Dataset) -> None:
    """Refuse to choose the epoch by a metric that val's classes cannot define, whatever is predicted for them."""
    metric, frame = recipe.finetune.metric, dataset.frame
    there = set(frame.loc[frame["split"] == "val", "label"].unique())
    labels = np.array([place for place, name in enumerate(dataset.classes) if name in there], np.int64)
    blank = np.zeros((len(labels), len(dataset.classes)), np.float32)
    if len(labels) and math.isnan(selection_score(metric, blank, labels)):
        shown = ", ".join(one_line(dataset.classes[place]) for place in labels)
        raise ZooError(
            f"val cannot define {metric}; set another finetune.metric (split 'val' of {dataset.name!r} has class "
            f"{shown} alone, of {len(dataset.classes)})"
        )


def check_shares(images: int, size: int, world: int) -> None:
    """Raise ZooError where batches of `size` out of so many images leave one that `world` processes cannot share."""
    last = images % size or size
    smallest = min(size, last + size if last == 1 and images > size else last)
    if world > (smallest + 1) // 2:
        raise ZooError(
            f"torchrun started {world} processes, but {images} training images in batches of {size} leave one of "
            f"{smallest}, which {(smallest + 1) // 2} can share; start fewer, or set finetune.batch_size"
        )


def _weights(
    recipe: Recipe, spec: ModelSpec, dataset: Dataset, root: Home, offline: bool, accept_leaks: bool
) -> tuple[WeightsFile | None, str, Source | None]:
    """Return the file of the weights, what kind of source named it, and that source where it is a run."""
    source = recipe.model.weights
    if source == "scratch":
        return None, "scratch", None
    if source == "pretrained":
        return resolve_weights(spec, source, root, offline), "pretrained", None
    if source.endswith((".safetensors", ".pth", ".pt", ".bin")):
        file = resolve_weights(spec, source, root, offline)
        return file, "file", source_of_file(file, spec, dataset, root, accept_leaks) if file else None
    found = source_run(source, spec, dataset, root, accept_leaks)
    return found.weights, "run", found


def preprocessing_of(recipe: Recipe, spec: ModelSpec, source_run: RunRecord | None, dataset: Dataset) -> Preprocessing:
    """Return what the recipe says, else what the run to go on from used, else what network and dataset say."""
    keys = ("image_size", "mean", "std", "interpolation", "crop_pct")
    inherited = source_run.preprocessing if source_run else None
    chosen = {key: getattr(recipe.model, key) or getattr(inherited, key, None) for key in keys}
    own = windowing_of_facts(dataset.facts)
    made = preprocessing_for(spec, **chosen).model_copy(
        update={
            "window": recipe.model.window or getattr(inherited, "window", None) or dataset.facts.get("window"),
            "rescale_slope": own.slope,
            "rescale_intercept": own.intercept,
        }
    )
    windowing_of(made)
    return made


def _refuse_changed_network(source_run: RunRecord | None, network: str | None, classes: int) -> None:
    """Refuse to go on from a run of an own network whose code has changed; another head is no such change."""
    if source_run is None or source_run.network is None or len(source_run.classes) != classes:
        return
    if source_run.network != network:
        raise ZooError(
            f"the network registered as {source_run.model!r} is no longer the one that run {source_run.run!r} "
            "trained; register that code again, or train anew"
        )


def _check_model(
    recipe: Recipe, spec: ModelSpec, preprocessing: Preprocessing, classes: int
) -> tuple[str | None, tuple[str, ...]]:
    """Build the network without memory, see that the strategy can be followed; return an own one's identity, notes."""
    with torch.device("meta"):
        model = build_model(recipe, spec, preprocessing, classes)
    if recipe.finetune.strategy != "full":
        classifier_of(model)
    grouped = recipe.finetune.layer_decay < 1 or recipe.finetune.strategy == "gradual"
    if grouped and not hasattr(model, "group_matcher"):
        raise ZooError(
            f"model {spec.name!r} does not say which layer comes first (it has no group_matcher); set "
            "finetune.layer_decay = 1.0 and a strategy other than gradual"
        )
    frozen_names(model, recipe.finetune.freeze)
    _check_sizes(recipe, spec, preprocessing, model)
    drops = any(isinstance(each, torch.nn.Dropout) for _, part in classifiers_of(model) for each in part.modules())
    return own_network_digest(spec, model), effect_notes(recipe, classifier_drops=drops)


def _check_sizes(recipe: Recipe, spec: ModelSpec, preprocessing: Preprocessing, model: torch.nn.Module) -> None:
    """Refuse growing image sizes that do not end at the run's own, or that the network cannot take."""
    sizes = recipe.finetune.image_sizes
    if sizes and sizes[-1] != preprocessing.image_size:
        raise ZooError(
            f"finetune.image_sizes must end at the model's image size, {preprocessing.image_size} pixels. Got {sizes}; "
            f"add {preprocessing.image_size}, or set model.image_size = {sizes[-1]}"
        )
    for size in sizes[:-1]:
        try:
            with torch.no_grad():
                model.eval()(torch.zeros(2, 3, size, size, device="meta"))
        except Exception as error:  # a network may refuse in any way
            raise ZooError(
                f"model {spec.name!r} cannot take images of {size} pixels ({one_line(error, 120)}); leave "
                "finetune.image_sizes out"
            ) from error


def failed_record(recipe: Recipe | str, dataset: Dataset, seed: int, reason: str) -> RunRecord:
    """Return the record of a run that could not even be planned."""
    name = recipe if isinstance(recipe, str) else recipe.name
    digest = recipe.digest if isinstance(recipe, Recipe) else digest_of(name)
    return RunRecord(
        run=run_name(dataset.name, Path(name).stem, seed, _run_digest(digest, dataset, seed)),
        status="failed",
        reason=reason,
        dataset=dataset.name,
        recipe=Path(name).stem,
        recipe_digest=digest,
        seed=seed,
        split_digest=dataset.split_digest,
        classes=dataset.classes,
        negative_class=dataset.negative_class,
        model=recipe.model.name if isinstance(recipe, Recipe) else "",
        weights={"label": recipe.model.weights if isinstance(recipe, Recipe) else ""},
        strategy=recipe.finetune.strategy if isinstance(recipe, Recipe) else "",
    )


def finished_run(plan: Plan) -> Run | None:
    """Return the plan's run where it is finished already, and its weights are those that it ended with.

    Raises ZooError where they cannot be read.
    """
    run = plan.run
    if not run.finished or not run.weights_file.is_file():
        return None
    wanted = run.record.weights_sha256
    try:
        return run if wanted is None or sha256_file(run.weights_file) == wanted else None
    except OSError as error:
        raise Hindered(
            f"the weights of run {run.name!r} cannot be read: {one_line(error.strerror or error)}; check "
            f"{str(run.weights_file)!r}, or delete it to train the run again"
        ) from error
