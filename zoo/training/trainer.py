"""One run in progress: its phases, the best on val so far, its checkpoints, and what it leaves when it ends."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from zoo.cores import cores
from zoo.data.cache import Pixels, open_pixels
from zoo.errors import ZooError, one_line
from zoo.evaluation.metrics import METRIC_SIGN, selection_score
from zoo.files import remove_half_written, to_json, write_error, write_text
from zoo.models.registry import classifier_of
from zoo.runs import Run
from zoo.training import features as feature_cache
from zoo.training.checkpoint import (
    Checkpoint,
    Kept,
    Progress,
    keep_tensors,
    load_checkpoint,
    save_checkpoint,
)
from zoo.training.head import HeadTrainer
from zoo.training.inputs import Inputs, make_inputs
from zoo.training.interruption import Interruption
from zoo.training.kernels import steady_kernels
from zoo.training.loss import make_criterion
from zoo.training.memory import images_at_a_time
from zoo.training.outcome import finish
from zoo.training.parallel import Group, across, shared_batch_norm
from zoo.training.plan import Plan, check_shares
from zoo.training.precision import PrecisionPlan, begun_plan, choose_device, set_threads
from zoo.training.speed import FORWARD_BATCH, compiled, plan_precision
from zoo.training.step import FINITE_FIX, EpochTrainer, NonFiniteLossError, Updater, make_ema
from zoo.training.strategy import (
    Phase,
    image_size_of,
    make_optimizer,
    make_scheduler,
    phases,
    set_trained,
    trained_names,
)


@dataclass(frozen=True)
class Tick:
    """A sign of life: which run does what, how far it is, and how well it goes."""

    run: str
    phase: str
    done: int
    total: int
    epoch: int = 0
    epochs: int = 0
    loss: float | None = None
    val: str = ""
    images_per_s: float | None = None


OnTick = Callable[[Tick], None]
OnEpoch = Callable[[dict[str, Any]], None]


class Trainer:
    """One run in one process, or this process's part of it.

    parts: into how many a batch is divided so that it fits the memory; what a checkpoint says is the least. no_kernel:
    what torch said of a CUDA kernel that gives the same bits every time, where it has none for this network.
    """

    def __init__(
        self,
        plan: Plan,
        group: Group,
        interruption: Interruption,
        on_tick: OnTick,
        on_epoch: OnEpoch,
        parts: int = 1,
        no_kernel: str = "",
    ) -> None:
        self.plan, self.recipe, self.group, self.interruption = plan, plan.recipe, group, interruption
        self.on_tick, self.on_epoch = on_tick, on_epoch
        self.device = choose_device(plan.recipe.device)
        self.precision = PrecisionPlan("float32", channels_last=True)
        self.folder = plan.run.path / "checkpoint"
        self.checkpoint: Checkpoint | None = load_checkpoint(self.folder, plan.digest)
        self.progress = Progress() if self.checkpoint is None else self.checkpoint.progress
        # Shares of several processes are cut alike only where they are not cut at all.
        self.progress.parts = max(parts, self.progress.parts) if group.world == 1 else 1
        self.no_kernel = no_kernel
        self.updating = False  # whether an update is under way, or broke
        self.scored: list[nn.Module] = []
        if self.progress.best_epoch and self.checkpoint is not None and "best" not in self.checkpoint.kept:
            raise ZooError(
                f"the checkpoint in {str(self.folder)!r} is of an older zoo; move the folder away to start anew"
            )
        self.threads = self.progress.threads = _begun_threads(self.progress)
        self.kept: dict[str, Kept] = {} if self.checkpoint is None else dict(self.checkpoint.kept)
        self.best: dict[str, torch.Tensor] = {}
        self.best_logits = torch.empty(0)
        self.saved_updates = -1
        self.clock = time.perf_counter()

    def run(self) -> Run:
        """Train every phase, then score val with the best weights and write the record."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with steady_kernels(self.device, strict=not self.no_kernel and self.group.world == 1):
                return self._run()
        finally:
            torch.set_num_threads(before)

    def _run(self) -> Run:
        plan = self.plan
        if self.group.leads:
            self._begin()
        with self.group.first_alone():
            self.train_pixels, self.val_pixels = self._pixels("train"), self._pixels("val")
        self._check_classes()
        check_shares(
            len(self.train_pixels), min(self.recipe.finetune.batch_size, len(self.train_pixels)), self.group.world
        )
        counts = np.bincount(self.train_pixels.y_true, minlength=len(plan.dataset.classes))
        self.criterion = make_criterion(self.recipe.loss, counts, self.device)
        model, note = plan.model()
        if self.checkpoint is not None:
            feature_cache.load_grown(model, self.checkpoint.part("model"))
            stored = self.checkpoint.kept_tensors("best")
            self.best_logits = stored.pop("val.logits", self.best_logits)
            self.best = {key.removeprefix("weights/"): value for key, value in stored.items()}
        model = model.to(self.device)
        self.scored = [model]
        self.precision = self.group.shared(self._precision(model))
        self.progress.precision = self.precision.record()
        model = model.to(memory_format=self.precision.memory_format)
        self.clock = time.perf_counter()
        for phase in phases(self.recipe):
            if phase.name == "head" and self.progress.epoch < phase.first_epoch + phase.epochs - 1:
                self._train_head(model, phase)
            elif phase.name == "network" and not self._stopped_early:
                self._train_network(model, phase)
        self._account()
        if self.group.leads:
            finish(self, model, note)
        self.group.wait()
        return plan.run

    @property
    def unsteady(self) -> str:
        """Return why the run, trained again, may have other bits; empty where it will have the same."""
        most = min((images_at_a_time(model, feature_cache.FORWARD_BATCH) for model in self.scored), default=0)
        fewer = f"memory sufficed for scoring {most} image{'s' if most > 1 else ''} at a time"
        short = bool(self.scored) and most < feature_cache.FORWARD_BATCH
        return "; ".join(each for each in (self.no_kernel, fewer if short else "") if each)

    # Before the first step ------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Make the run's folder, and clear what a process that was killed has left half written in it."""
        path = self.plan.run.path
        try:
            path.mkdir(parents=True, exist_ok=True)
            remove_half_written(path)
        except OSError as error:
            raise write_error(path, error) from error
        self.recipe.write(path / "recipe.toml")

    def _check_classes(self) -> None:
        missing = set(range(len(self.plan.dataset.classes))) - set(self.train_pixels.y_true.tolist())
        if missing:
            names = ", ".join(one_line(self.plan.dataset.classes[each]) for each in sorted(missing))
            raise ZooError(f"split 'train' has no readable image of class {names}; import the data again")

    def _pixels(self, split: str) -> Pixels:
        tell = self._counted(f"decoding {split}")
        return open_pixels(self.plan.dataset, split, self.plan.preprocessing, self.plan.bad_images, tell)

    def _counted(self, phase: str) -> Callable[[int, int], None]:
        """Return what tells of images done and in all."""
        return lambda done, total: self.on_tick(Tick(self.plan.run.name, phase, done, total))

    def _precision(self, model: nn.Module) -> PrecisionPlan:
        """Return the plan that an interrupted run began with, else the one asked for or measured."""
        if self.progress.precision:
            return begun_plan(self.progress.precision)
        network = [phase for phase in phases(self.recipe) if phase.name == "network"]
        if network:
            names = trained_names(model, self.recipe, network[0], network[0].first_epoch)
            set_trained(model, names)
            batch = self.recipe.finetune.batch_size
            steps = network[0].epochs * -(-len(self.train_pixels) // batch)
        else:
            steps = (len(self.train_pixels) + len(self.val_pixels)) // FORWARD_BATCH
        if not self.group.leads:  # the first one's is taken
            return self.precision
        self.on_tick(Tick(self.plan.run.name, "precision", 0, 1))
        return plan_precision(self.plan, model, self.device, steps, training=bool(network))

    # The head on cached features ------------------------------------------------------------------------------

    def _train_head(self, model: nn.Module, phase: Phase) -> None:
        """Train the classifier alone; cheap enough to be done again from its start after an interruption."""
        started = time.perf_counter()
        begun = self.progress
        self.progress = Progress(parts=begun.parts, threads=begun.threads, precision=begun.precision)
        name, classifier = classifier_of(model)
        with self.group.first_alone():
            train, val = (
                feature_cache.split_features(
                    model, pixels, split, self.plan, self.precision, self.device, self._counted(f"features of {split}")
                )
                for split, pixels in (("train", self.train_pixels), ("val", self.val_pixels))
            )
        # A run that finds the features in the cache is charged for what they cost, so that all are alike.
        charged = max(0.0, train.seconds + val.seconds - (time.perf_counter() - started))
        self.progress.step_s = train.seconds
        self.progress.images_seen = len(self.train_pixels)
        backbone = {key: value.detach().to("cpu", copy=True) for key, value in model.state_dict().items()}
        counts = np.bincount(self.train_pixels.y_true, minlength=len(self.plan.dataset.classes))
        criterion = make_criterion(self.recipe.loss, counts, torch.device("cpu"))
        trainer = HeadTrainer(self.recipe, self.plan.seed, phase, name, classifier, train, val, criterion)
        for row, logits, state in trainer.epochs():
            self._after_epoch(row, logits, lambda state=state: {**backbone, **state()})  # type: ignore[misc]
            self._told("head", 1, row)
            if self._stopped_early:
                break
        feature_cache.load_grown(model, self.best)
        if self.recipe.finetune.strategy == "linear-probe":  # as test will be scored
            self.best_logits = self._probe_logits(model, val)
        self.progress.train_s += charged
        self.progress.epoch = phase.first_epoch + phase.epochs - 1
        if self.recipe.finetune.strategy != "linear-probe":
            self.progress.stale_epochs = 0

    def _probe_logits(self, model: nn.Module, val: feature_cache.Features) -> torch.Tensor:
        if val.whole:
            return feature_cache.head_logits(classifier_of(model)[1], val, self.precision, self.device)
        preprocessing = self.plan.preprocessing
        return feature_cache.pixels_logits(model, self.val_pixels, preprocessing, self.precision, self.device)

    # The whole network on augmented images ----------------------------------------------------------------------

    def _train_network(self, model: nn.Module, phase: Phase) -> None:
        set_trained(model, trained_names(model, self.recipe, phase, phase.first_epoch))
        inputs = self._inputs(model, phase)
        set_trained(model, None)
        trainer = self._epoch_trainer(model, phase, inputs)
        try:
            with shared_batch_norm(model, self.group):
                self._epochs(model, trainer, inputs, phase)
        except KeyboardInterrupt:
            if trainer.whole and self.progress.updates != self.saved_updates:
                trainer.save()
            raise
        finally:
            self.updating = trainer.updating
            inputs.batches.close()

    def _epochs(self, model: nn.Module, trainer: EpochTrainer, inputs: Inputs, phase: Phase) -> None:
        before: object = self
        for epoch in range(max(phase.first_epoch, self.progress.epoch + 1), phase.first_epoch + phase.epochs):
            names = trained_names(model, self.recipe, phase, epoch)
            set_trained(model, names)
            if names != before:
                trainer.updater.network = self._across(model, trainer.updater, phase, epoch)
                before = names
            self._epoch(model, trainer, inputs, phase, epoch)
            if self._stopped_early:
                break

    def _across(self, model: nn.Module, updater: Updater, phase: Phase, epoch: int) -> nn.Module:
        size = image_size_of(self.recipe, phase, epoch, self.plan.preprocessing.image_size)
        network = compiled(model, self.precision)
        return across(network, self.group, self.device, lambda: updater.dry_logits(size))

    def _inputs(self, model: nn.Module, phase: Phase) -> Inputs:
        inputs = make_inputs(
            self.plan,
            model,
            self.train_pixels,
            self.val_pixels,
            self.precision,
            self.device,
            self.group,
            self.folder,
            phase,
            self._counted("frozen stages"),
            None if self.checkpoint is None else self.progress.uncached,
        )
        self.progress.uncached = inputs.uncached
        return inputs

    def _epoch(self, model: nn.Module, trainer: EpochTrainer, inputs: Inputs, phase: Phase, epoch: int) -> None:
        size = image_size_of(self.recipe, phase, epoch, self.plan.preprocessing.image_size)
        row = trainer.epoch(inputs.batches, epoch, size)
        scored = trainer.ema.module if trainer.ema is not None else model
        logits = self._val_logits(scored, inputs)
        with self.interruption.step():
            trainer.whole = False
            self._after_epoch(row, logits, functools.partial(_copy, scored))
            self._keep_epoch(row["epoch"], scored)
            trainer.whole = True
            trainer.save()
            trainer.saved_at = time.perf_counter()
        self._told("network", len(inputs.batches), row)
        self.interruption.check()

    def _epoch_trainer(self, model: nn.Module, phase: Phase, inputs: Inputs) -> EpochTrainer:
        recipe, progress = self.recipe, self.progress
        optimizer = make_optimizer(model, recipe)
        updates = -(-len(inputs.batches) // recipe.finetune.accumulate)
        scheduler = make_scheduler(optimizer, recipe, phase.epochs, updates)
        ema = make_ema(model, recipe.finetune.ema_decay)
        self.scored += [] if ema is None else [ema.module]
        scaler = self.precision.scaler(self.device)
        if self.checkpoint is not None:
            self.checkpoint.restore_optimizer(optimizer)
            scheduler.step_update(progress.updates)
            if ema is not None:
                ema.module.load_state_dict(self.checkpoint.part("ema"))
            if scaler is not None and self.checkpoint.scaler:
                scaler.load_state_dict(self.checkpoint.scaler)
        else:
            progress.updates = 0
        updater = Updater(
            recipe,
            self.plan.preprocessing,
            self.plan.seed,
            self.device,
            self.precision,
            self.criterion,
            model,
            optimizer,
            len(self.plan.dataset.classes),
            self.group,
            progress.parts,
            scaler,
            boundary=inputs.train_boundary,
        )
        return EpochTrainer(
            updater,
            progress,
            scheduler,
            ema,
            self.interruption,
            lambda done, total, row: self.on_tick(self._tick("network", done, total, row)),
            lambda: self._save(updater, ema),
            60 * recipe.checkpoint_minutes,
        )

    def _val_logits(self, model: nn.Module, inputs: Inputs) -> torch.Tensor:
        """Return the logits of val, which the first process computes for all."""
        found: torch.Tensor = self.group.shared(inputs.val_logits(model) if self.group.leads else None)
        return found

    def _keep_epoch(self, epoch: int, model: nn.Module) -> None:
        """Keep an epoch's weights beside the checkpoint where they will be averaged: the last few."""
        average = self.recipe.average
        if average.method == "none" or not self.group.leads:
            return
        name = f"average-{epoch:05d}"
        self.kept[name] = keep_tensors(self.folder, name, _copy(model))
        for old in sorted(key for key in self.kept if key.startswith("average-"))[: -(average.last_epochs or 2)]:
            del self.kept[old]

    def _save(self, updater: Updater, ema: Any) -> None:
        """Write a checkpoint; signals wait for its end."""
        self._account()
        if not self.group.leads:
            return
        with self.interruption.step():
            name = f"best-{self.progress.best_epoch:05d}"
            if self.progress.best_epoch and self.kept.get("best", Kept("", "")).file != f"{name}.safetensors":
                tensors = {f"weights/{key}": value for key, value in self.best.items()}
                self.kept["best"] = keep_tensors(self.folder, name, {**tensors, "val.logits": self.best_logits})
            parts = {"model": updater.model.state_dict()}
            if ema is not None:
                parts["ema"] = ema.module.state_dict()
            scaler = updater.scaler.state_dict() if updater.scaler is not None else None
            save_checkpoint(
                self.folder,
                self.plan.digest,
                self.progress,
                parts,
                updater.optimizer,
                scaler=scaler,
                kept=self.kept,
            )
            self.saved_updates = self.progress.updates
            self.write_history()

    def _account(self) -> None:
        """Add the seconds since the last time to what training took."""
        now = time.perf_counter()
        self.progress.train_s += now - self.clock
        self.clock = now

    # What both phases share -------------------------------------------------------------------------------------

    def _after_epoch(
        self, row: dict[str, Any], logits: torch.Tensor, weights: Callable[[], dict[str, torch.Tensor]]
    ) -> None:
        """Score val, keep the weights where they are the best so far, and add the epoch to the history."""
        value = self.score(row, logits)
        progress = self.progress
        progress.end_epoch(row)
        sign = METRIC_SIGN.get(self.recipe.finetune.metric, 1)
        # A metric that val cannot define (AUROC of one class) is no best; the first epoch stands in for it.
        best = progress.best_value
        first = progress.best_epoch == 0
        if first or (math.isfinite(value) and (best is None or sign * value > sign * best)):
            progress.best_value = value if math.isfinite(value) else None
            progress.best_epoch, progress.stale_epochs = row["epoch"], 0
            self.best, self.best_logits = weights(), logits.clone()
        else:
            progress.stale_epochs += 1

    def score(self, row: dict[str, Any], logits: torch.Tensor) -> float:
        """Add val's loss and scores to an epoch's row, and return the score that chooses the epoch."""
        labels = torch.from_numpy(self.val_pixels.y_true.copy())
        loss = float(self.criterion(logits.to(self.device), labels.to(self.device)))
        if not math.isfinite(loss) or not bool(torch.isfinite(logits).all()):
            raise NonFiniteLossError(f"the val loss was not finite after epoch {row['epoch']}; {FINITE_FIX}")
        metric = self.recipe.finetune.metric
        value = selection_score(metric, logits.numpy(), labels.numpy())
        top1 = float((logits.argmax(1) == labels).float().mean())
        row |= {"val_loss": loss, "val_top1": top1, f"val_{metric}": value}
        return value

    @property
    def _stopped_early(self) -> bool:
        patience = self.recipe.finetune.patience
        return patience is not None and self.progress.stale_epochs >= patience

    def _told(self, phase: str, batches: int, row: dict[str, Any]) -> None:
        self.on_tick(self._tick(phase, batches, batches, row))
        self.on_epoch(dict(row))

    def _tick(self, phase: str, done: int, total: int, row: dict[str, Any]) -> Tick:
        metric = self.recipe.finetune.metric
        value = row.get(f"val_{metric}")
        return Tick(
            self.plan.run.name,
            phase,
            done,
            total,
            row["epoch"],
            self.recipe.finetune.epochs,
            row.get("train_loss"),
            "" if value is None else f"val {metric} {value:.3f}",
            row.get("images_per_s"),
        )

    def write_history(self) -> None:
        """Write `history.jsonl`, a line for each finished epoch."""
        write_text(self.plan.run.history_file, "".join(f"{to_json(row)}\n" for row in self.progress.history))


def _copy(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.detach().to("cpu", copy=True) for key, value in model.state_dict().items()}


def _begun_threads(progress: Progress) -> int:
    """Return the threads that a run began with, whose number decides its bits; at most as many as there are cores."""
    return min(progress.threads, cores()) if progress.threads else set_threads()
