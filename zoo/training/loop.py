"""The training loop: a plan in, a finished run folder out; an interrupted one goes on where it stopped."""

from __future__ import annotations

import functools
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from zoo.data.cache import Pixels, open_pixels
from zoo.data.loader import TrainBatches, epoch_order
from zoo.data.manifest import Dataset
from zoo.data.transforms import make_augment, normalise_tensor
from zoo.errors import Interrupted, ZooError, one_line
from zoo.evaluation.metrics import METRIC_SIGN, selection_score
from zoo.files import Home, to_json, write_text
from zoo.models.registry import classifier_of
from zoo.recipe import Recipe
from zoo.runs import Run, run_lock
from zoo.training import features as feature_cache
from zoo.training.checkpoint import Progress, load_checkpoint, remove_checkpoints, save_checkpoint, save_tensors
from zoo.training.plan import Plan, finished_run, make_plan
from zoo.training.precision import (
    PrecisionPlan,
    choose_device,
    choose_plan,
    choose_workers,
    set_threads,
)
from zoo.training.scoring import score_split
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
_FINITE_FIX = "lower optimizer.lr, or set finetune.clip_grad = 1.0"


def train(
    recipe: Recipe | str,
    data: Dataset | str,
    seed: int = 0,
    root: Home | None = None,
    *,
    offline: bool = False,
    bad_images: str | None = None,
    on_tick: OnTick | None = None,
) -> Run:
    """Train a recipe on a dataset and return the run; a finished run is returned as it is.

    Only train and val are opened; the kept weights are the best on val by the recipe's metric.
    Raises ZooError for what the user can mend, before work where it can be known, and Interrupted after Ctrl-C:
    the same call then goes on from the last finished epoch.
    """
    plan = make_plan(recipe, data, seed, root, offline=offline, bad_images=bad_images)
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
        (plan.run.path / "run.json").unlink(missing_ok=True)
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
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            # A network that breaks inside torch must not take the benchmark down, nor lose its traceback.
            _record_failure(plan, f"{type(error).__name__}: {one_line(error, 200)}")
            raise ZooError(f"run {plan.run.name!r} failed: {type(error).__name__}: {one_line(error)}") from error


def _record_failure(plan: Plan, reason: str) -> None:
    try:
        plan.run.write_record(plan.record("failed", reason))
    except ZooError:
        return  # the disk is full: the error itself says so


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    names = ("torch", "timm", "torchvision", "albumentations", "numpy", "pillow", "scikit-learn", "zoo")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _processor() -> str:
    """Return the processor's name; Linux alone says it in a file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{named[0]} ({platform.machine()})" if named else platform.machine()


class NonFiniteLossError(ZooError):
    """Training stopped because the loss was no number."""


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
            _load_grown(model, checkpoint.part("model"))
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
            device=self._device_name(),
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

    def _device_name(self) -> str:
        if self.device.type == "cuda":
            return f"cuda: {torch.cuda.get_device_name(self.device)}"
        return f"{self.device.type}: {_processor()}, {self.threads} threads"

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
        _load_grown(model, self.best)
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
        torch.manual_seed(_step_seed(self.plan.seed, epoch, 0))
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
        ema = _make_ema(model, finetune.ema_decay)
        resumed = checkpoint is not None and self.progress.epoch >= phase.first_epoch
        if resumed:
            checkpoint.restore_optimizer(optimizer)
            scheduler.step_update(self.progress.updates)
            if ema is not None:
                ema.module.load_state_dict(checkpoint.part("ema"))
        else:
            self.progress.updates = 0
        step = _Step(self, model, optimizer, scheduler, ema, _make_mixup(recipe, len(self.plan.dataset.classes)))
        for epoch in range(max(phase.first_epoch, self.progress.epoch + 1), phase.first_epoch + phase.epochs):
            started = time.perf_counter()
            set_trained(model, trained_names(model, recipe, phase, epoch))
            row = step.epoch(batches, epoch)
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
            raise NonFiniteLossError(f"the val loss was not finite after epoch {row['epoch']}; {_FINITE_FIX}")
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
        if progress.best_value is None or sign * value > sign * progress.best_value:
            progress.best_value, progress.best_epoch, progress.stale_epochs = value, row["epoch"], 0
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


class _Step:
    """Forward, backward and update over the batches of an epoch."""

    def __init__(
        self,
        trainer: _Trainer,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        ema: Any,
        mixup: Any,
    ) -> None:
        self.trainer, self.model, self.optimizer = trainer, model, optimizer
        self.scheduler, self.ema, self.mixup = scheduler, ema, mixup
        # A GPU waits for each number that is asked of it; a CPU does not.
        self.check_every = 1 if trainer.device.type == "cpu" else 20

    def epoch(self, batches: TrainBatches, epoch: int) -> dict[str, Any]:
        """Train one epoch; return its row of the history."""
        losses: list[tuple[torch.Tensor, int]] = []
        right = torch.zeros((), dtype=torch.int64, device=self.trainer.device)
        count, loss_sum, checked, started = 0, 0.0, 0, time.perf_counter()
        for number, (images, labels, _) in enumerate(batches.epoch(epoch), 1):
            loss, hits = self._step(images, labels, epoch, number)
            losses.append((loss, len(labels)))
            right += hits
            count += len(labels)
            if number % self.check_every == 0 or number == len(batches):
                for each, size in losses:
                    checked += 1
                    self._refuse_non_finite(float(each), epoch, checked)
                    loss_sum += float(each) * size
                losses.clear()
                rate = count / (time.perf_counter() - started)
                row = {"epoch": epoch, "train_loss": loss_sum / count, "images_per_s": rate}
                self.trainer.on_tick(self.trainer._tick("network", number, len(batches), row))
        seconds = time.perf_counter() - started
        self.trainer.progress.step_s += seconds
        self.trainer.progress.images_seen += count
        return {
            "epoch": epoch,
            "phase": "network",
            "lr": max(group["lr"] for group in self.optimizer.param_groups),
            "train_loss": loss_sum / count,
            "train_top1": float(right) / count,
            "images_per_s": round(count / seconds, 2),
        }

    def _step(
        self, images: torch.Tensor, labels: torch.Tensor, epoch: int, number: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        trainer = self.trainer
        # Dropout, drop-path and mixing follow from (seed, epoch, step) alone: no random state to keep.
        seed = _step_seed(trainer.plan.seed, epoch, number)
        torch.manual_seed(seed)
        labels = labels.to(trainer.device, non_blocking=True)
        batch = normalise_tensor(images.to(trainer.device, non_blocking=True), trainer.plan.preprocessing)
        target = labels
        if self.mixup is not None and len(labels) % 2 == 0:  # timm mixes a batch with its own reverse
            np.random.seed(seed % 2**32)
            batch, target = self.mixup(batch, labels)
        with trainer.precision.autocast(trainer.device):
            logits = self.model(trainer.precision.place(batch))
            loss = trainer.criterion(logits.float(), target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if trainer.recipe.finetune.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), trainer.recipe.finetune.clip_grad)
        self.optimizer.step()
        trainer.progress.updates += 1
        self.scheduler.step_update(trainer.progress.updates)
        if self.ema is not None:
            self.ema.update(self.model, step=trainer.progress.updates)
        return loss.detach(), (logits.detach().argmax(1) == labels).sum()

    @staticmethod
    def _refuse_non_finite(loss: float, epoch: int, step: int) -> None:
        if not math.isfinite(loss):
            raise NonFiniteLossError(f"the loss was not finite in epoch {epoch}, step {step}; {_FINITE_FIX}")


def _step_seed(seed: int, epoch: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, epoch, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _copy(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}


def _join(backbone: dict[str, torch.Tensor], head: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**backbone, **head}


def _plain_head(classifier: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(classifier).cpu().float()


def _load_grown(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Load a state dict, adding the bias that scaling brings to a classifier that had none."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.bias is None and f"{name}.bias" in state:
            module.bias = nn.Parameter(module.weight.new_zeros(module.out_features))
    model.load_state_dict(state)


def _make_ema(model: nn.Module, decay: float | None) -> Any:
    if decay is None:
        return None
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, decay=decay, use_warmup=True)


def _make_mixup(recipe: Recipe, classes: int) -> Any:
    if not recipe.augment.mixup and not recipe.augment.cutmix:
        return None
    from timm.data import Mixup

    # The criterion smooths labels itself, so that mixed and unmixed batches are treated alike.
    return Mixup(
        mixup_alpha=recipe.augment.mixup, cutmix_alpha=recipe.augment.cutmix, label_smoothing=0.0, num_classes=classes
    )
