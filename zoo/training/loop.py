"""The training loop: a plan in, a finished run folder out; an interrupted one goes on where it stopped."""

from __future__ import annotations

import functools
import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from zoo.data.cache import Pixels, open_pixels
from zoo.data.loader import TrainBatches, epoch_order
from zoo.data.manifest import Dataset
from zoo.data.transforms import make_augment
from zoo.errors import Interrupted, ZooError, one_line
from zoo.evaluation.metrics import METRIC_SIGN, selection_score
from zoo.files import Home, to_json, write_text
from zoo.models.registry import classifier_of
from zoo.recipe import Recipe
from zoo.runs import Run, run_lock
from zoo.training import features as feature_cache
from zoo.training.checkpoint import Progress, load_checkpoint, remove_checkpoints, save_checkpoint, save_tensors
from zoo.training.environment import device_name, versions
from zoo.training.plan import Plan, finished_run, make_plan
from zoo.training.precision import (
    PrecisionPlan,
    choose_device,
    choose_plan,
    choose_workers,
    set_threads,
)
from zoo.training.scoring import score_split
from zoo.training.step import FINITE_FIX, EpochTrainer, NonFiniteLossError, make_ema, step_seed
from zoo.training.strategy import (
    DEFAULT_HEAD_LR,
    Phase,
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


def train(
    recipe: Recipe | str,
    data: Dataset | str,
    seed: int = 0,
    root: Home | None = None,
    *,
    offline: bool = False,
    bad_images: str | None = None,
    accept_leaks: bool = False,
    on_tick: OnTick | None = None,
) -> Run:
    """Train a recipe on a dataset and return the run; a finished run is returned as it is.

    Only train and val are opened; the kept weights are the best on val by the recipe's metric. A dataset whose
    splits leak (`zoo.data.leaks`) is refused unless accept_leaks, which every table of the run then says.
    Raises ZooError for what the user can mend, before work where it can be known, and Interrupted after Ctrl-C:
    the same call then goes on from the last finished epoch.
    """
    plan = make_plan(recipe, data, seed, root, offline=offline, bad_images=bad_images, accept_leaks=accept_leaks)
    return train_plan(plan, on_tick)


def train_plan(plan: Plan, on_tick: OnTick | None = None) -> Run:
    """Train what a plan says and return the run; a failure is recorded in the run folder and raised."""
    done = finished_run(plan)
    if done is not None:
        return done
    with run_lock(plan.home, plan.run.name):
        done = finished_run(plan)  # another process may have ended between the look and the lock
        if done is not None:
            return done
        # What a failed run has saved is good: it goes on from there once the cause is mended.
        for name in ("run.json", "traceback.txt"):
            (plan.run.path / name).unlink(missing_ok=True)
        try:
            return _Trainer(plan, on_tick or (lambda _: None)).run()
        except KeyboardInterrupt as stop:
            code = getattr(stop, "exit_code", 130)
            raise Interrupted(
                f"interrupted; run {plan.run.name!r} goes on from its last finished epoch with the same command", code
            ) from None
        except ZooError as error:
            _record_failure(plan, str(error))
            raise
        except Exception as error:
            # A network may break in any way; that must not take the benchmark down, nor lose the traceback.
            said = f"{type(error).__name__}: {one_line(error, 200)}"
            _record_failure(plan, said, traceback.format_exc())
            file = plan.run.path / "traceback.txt"
            raise ZooError(f"run {plan.run.name!r} failed: {said}; the traceback is in {str(file)!r}") from error


def _record_failure(plan: Plan, reason: str, trace: str = "") -> None:
    try:
        if trace:
            write_text(plan.run.path / "traceback.txt", trace)
        plan.run.write_record(plan.record("failed", reason))
    except ZooError:
        return  # the disk is full: the error itself says so


class _Trainer:
    """One run in progress."""

    def __init__(self, plan: Plan, on_tick: OnTick) -> None:
        self.plan, self.recipe, self.on_tick = plan, plan.recipe, on_tick
        self.device = choose_device(plan.recipe.device)
        self.threads = set_threads()
        self.precision: PrecisionPlan = choose_plan(plan.recipe.precision, self.device)
        self.progress = Progress()
        self.best: dict[str, torch.Tensor] = {}
        self.train_pixels = self._pixels("train")
        self.val_pixels = self._pixels("val")
        missing = set(range(len(plan.dataset.classes))) - set(self.train_pixels.y_true.tolist())
        if missing:
            names = ", ".join(one_line(plan.dataset.classes[each]) for each in sorted(missing))
            raise ZooError(f"split 'train' has no readable image of class {names}; import the data again")
        self.criterion = self._criterion()

    def run(self) -> Run:
        """Train every phase, then score val with the best weights and write the record."""
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = False
            torch.backends.cudnn.deterministic = True
        model, note = self.plan.model()
        model = model.to(self.device).to(memory_format=self.precision.memory_format)
        self.plan.run.path.mkdir(parents=True, exist_ok=True)
        self.recipe.write(self.plan.run.path / "recipe.toml")
        checkpoint = load_checkpoint(self.plan.run.path / "checkpoint", self.plan.digest)
        if checkpoint is not None:
            self.progress = checkpoint.progress
            feature_cache.load_grown(model, checkpoint.part("model"))
            self.best = checkpoint.part("best")
        for phase in phases(self.recipe):
            if phase.name == "head" and self.progress.epoch < phase.first_epoch + phase.epochs - 1:
                self._train_head(model, phase)
            elif phase.name == "network" and not self._stopped_early:
                self._train_network(model, phase, checkpoint)
        return self._finish(model, note)

    def _finish(self, model: nn.Module, note: str) -> Run:
        run, progress = self.plan.run, self.progress
        model.load_state_dict(self.best)
        save_tensors(run.weights_file, self.best)
        self._write_history()
        trained = sum(parameter.numel() for parameter in self._trained_parameters(model))
        record = self.plan.record(
            "finished",
            params=sum(parameter.numel() for parameter in model.parameters()),
            params_trained=trained,
            epochs=progress.history[-1]["epoch"],  # fewer than planned where patience ended the head
            best_epoch=progress.best_epoch,
            train_s=round(progress.train_s, 3),
            images_per_s=round(progress.images_seen / progress.step_s, 2) if progress.step_s > 0 else None,
            images={"train": len(self.train_pixels), "val": len(self.val_pixels)},
            images_skipped={
                split: pixels.skipped
                for split, pixels in (("train", self.train_pixels), ("val", self.val_pixels))
                if pixels.skipped
            },
            device=device_name(self.device),
            precision=self.precision.facts(),
            threads=self.threads,
            versions=versions(),
            notes=[note] if note else [],
        )
        score_split(run, record, model, self.val_pixels, "val", self.precision, self.device)
        run.write_record(record)
        remove_checkpoints(run.path / "checkpoint")
        return run

    def _trained_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        if self.recipe.finetune.strategy == "linear-probe":
            return list(classifier_of(model)[1].parameters())
        return list(model.parameters())

    def _pixels(self, split: str) -> Pixels:
        def on_image(done: int, total: int) -> None:
            self.on_tick(Tick(self.plan.run.name, f"decoding {split}", done, total))

        return open_pixels(self.plan.dataset, split, self.plan.preprocessing, self.plan.bad_images, on_image)

    def _criterion(self) -> nn.CrossEntropyLoss:
        weights = None
        if self.recipe.loss.class_weights == "balanced":
            # scikit-learn's "balanced": n / (classes * count), so that the mean weight of an image is 1.
            counts = np.bincount(self.train_pixels.y_true, minlength=len(self.plan.dataset.classes))
            weights = torch.tensor(counts.sum() / (len(counts) * counts), dtype=torch.float32, device=self.device)
        return nn.CrossEntropyLoss(weight=weights, label_smoothing=self.recipe.loss.label_smoothing)

    # The head on cached features ------------------------------------------------------------------------------

    def _train_head(self, model: nn.Module, phase: Phase) -> None:
        """Train the classifier alone; cheap enough to be done again from its start after an interruption."""
        started = time.perf_counter()
        self.progress, self.best = Progress(), {}
        name, classifier = classifier_of(model)
        self.on_tick(Tick(self.plan.run.name, "features", 0, 1, 0, self.recipe.finetune.epochs))
        train, val = (
            feature_cache.split_features(model, pixels, split, self.plan, self.precision, self.device)
            for split, pixels in (("train", self.train_pixels), ("val", self.val_pixels))
        )
        elapsed = time.perf_counter() - started
        # A run that finds the features in the cache is charged for what they cost, so that all are alike.
        charged = max(0.0, train.seconds + val.seconds - elapsed)
        self.progress.step_s = train.seconds
        self.progress.images_seen = len(self.train_pixels)
        backbone = {key: value.detach().clone() for key, value in model.state_dict().items()}
        head = feature_cache.StandardisedHead(_plain_head(classifier), train.values)
        optimizer = make_optimizer(head, self.recipe, self.recipe.finetune.head_lr or DEFAULT_HEAD_LR)
        batch_size = min(self.recipe.finetune.batch_size, len(train.values))
        updates = len(epoch_order(len(train.values), batch_size, self.plan.seed, 0))
        scheduler = make_scheduler(optimizer, self.recipe, phase.epochs, updates)
        for epoch in range(phase.first_epoch, phase.first_epoch + phase.epochs):
            row = self._head_epoch(head, optimizer, scheduler, train, epoch, batch_size)
            head.eval()
            with torch.inference_mode():
                logits = head(val.values)
            state = {f"{name}.{key}": value for key, value in head.fold().items()}
            self._after_epoch(row, logits, functools.partial(_join, backbone, state))
            self.on_tick(self._tick("head", 1, 1, row))
            if self._stopped_early:
                break
        feature_cache.load_grown(model, self.best)
        self.progress.train_s += time.perf_counter() - started + charged
        self.progress.epoch = phase.first_epoch + phase.epochs - 1
        if self.recipe.finetune.strategy != "linear-probe":
            self.progress.stale_epochs = 0

    def _head_epoch(
        self,
        head: feature_cache.StandardisedHead,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        train: feature_cache.Features,
        epoch: int,
        batch_size: int,
    ) -> dict[str, Any]:
        criterion = self.criterion.cpu()
        torch.manual_seed(step_seed(self.plan.seed, epoch, 0))
        loss_sum, right, count = 0.0, 0, 0
        head.train()
        for places in epoch_order(len(train.values), batch_size, self.plan.seed, epoch):
            logits = head(train.values[places])
            loss = criterion(logits, train.y_true[places])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            self.progress.updates += 1
            scheduler.step_update(self.progress.updates)
            loss_sum += float(loss.detach()) * len(places)
            right += int((logits.argmax(1) == train.y_true[places]).sum())
            count += len(places)
        if not math.isfinite(loss_sum):
            raise NonFiniteLossError(f"the loss was not finite in epoch {epoch}; lower finetune.head_lr")
        self.criterion.to(self.device)
        return {"epoch": epoch, "phase": "head", "train_loss": loss_sum / count, "train_top1": right / count}

    # The whole network on augmented images ----------------------------------------------------------------------

    def _train_network(self, model: nn.Module, phase: Phase, checkpoint: Any) -> None:
        recipe, finetune = self.recipe, self.recipe.finetune
        augment = make_augment(
            recipe.policy, recipe.augment.transforms, self.plan.preprocessing.image_size, self.plan.seed
        )
        batches = TrainBatches(
            self.train_pixels,
            augment,
            min(finetune.batch_size, len(self.train_pixels)),
            self.plan.seed,
            choose_workers(recipe.workers, self.device),
            pin_memory=self.device.type == "cuda",
        )
        set_trained(model, None)
        optimizer = make_optimizer(model, recipe)
        scheduler = make_scheduler(optimizer, recipe, phase.epochs, len(batches))
        ema = make_ema(model, finetune.ema_decay)
        resumed = checkpoint is not None and self.progress.epoch >= phase.first_epoch
        if resumed:
            checkpoint.restore_optimizer(optimizer)
            scheduler.step_update(self.progress.updates)
            if ema is not None:
                ema.module.load_state_dict(checkpoint.part("ema"))
        else:
            self.progress.updates = 0
        trainer = EpochTrainer(
            self.plan,
            self.device,
            self.precision,
            self.criterion,
            self.progress,
            model,
            optimizer,
            scheduler,
            ema,
            lambda done, total, row: self.on_tick(self._tick("network", done, total, row)),
        )
        for epoch in range(max(phase.first_epoch, self.progress.epoch + 1), phase.first_epoch + phase.epochs):
            started = time.perf_counter()
            set_trained(model, trained_names(model, recipe, phase, epoch))
            row = trainer.epoch(batches, epoch)
            scored = ema.module if ema is not None else model
            _, logits = feature_cache.forward_pixels(
                scored, self.val_pixels, self.plan.preprocessing, self.precision, self.device
            )
            self._after_epoch(row, logits, functools.partial(_copy, scored))
            self.progress.train_s += time.perf_counter() - started
            self._save(model, ema, optimizer)
            self.on_tick(self._tick("network", len(batches), len(batches), row))
            if self._stopped_early:
                break

    def _save(self, model: nn.Module, ema: Any, optimizer: torch.optim.Optimizer) -> None:
        parts = {"model": model.state_dict(), "best": self.best}
        if ema is not None:
            parts["ema"] = ema.module.state_dict()
        folder = self.plan.run.path / "checkpoint"
        save_checkpoint(folder, self.plan.digest, self.progress, parts, optimizer)
        self._write_history()

    # What both phases share -------------------------------------------------------------------------------------

    def _after_epoch(
        self, row: dict[str, Any], logits: torch.Tensor, weights: Callable[[], dict[str, torch.Tensor]]
    ) -> None:
        """Score val, keep the weights where they are the best so far, and add the epoch to the history."""
        labels = torch.from_numpy(self.val_pixels.y_true.copy())
        loss = float(self.criterion.cpu()(logits, labels))
        self.criterion.to(self.device)
        if not math.isfinite(loss) or not bool(torch.isfinite(logits).all()):
            raise NonFiniteLossError(f"the val loss was not finite after epoch {row['epoch']}; {FINITE_FIX}")
        metric = self.recipe.finetune.metric
        value = selection_score(metric, logits.numpy(), labels.numpy())
        row |= {
            "val_loss": loss,
            "val_top1": float((logits.argmax(1) == labels).float().mean()),
            f"val_{metric}": value,
        }
        progress = self.progress
        progress.epoch = row["epoch"]
        progress.history.append(row)
        sign = METRIC_SIGN.get(metric, 1)
        # A metric that val cannot define (AUROC of one class) is no best; the first epoch stands in for it.
        best = progress.best_value
        first = progress.best_epoch == 0
        if first or (math.isfinite(value) and (best is None or sign * value > sign * best)):
            progress.best_value = value if math.isfinite(value) else None
            progress.best_epoch, progress.stale_epochs = row["epoch"], 0
            self.best = weights()
        else:
            progress.stale_epochs += 1

    @property
    def _stopped_early(self) -> bool:
        patience = self.recipe.finetune.patience
        return patience is not None and self.progress.stale_epochs >= patience

    def _write_history(self) -> None:
        write_text(self.plan.run.history_file, "".join(f"{to_json(row)}\n" for row in self.progress.history))

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


def _copy(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}


def _join(backbone: dict[str, torch.Tensor], head: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**backbone, **head}


def _plain_head(classifier: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(classifier).cpu().float()
