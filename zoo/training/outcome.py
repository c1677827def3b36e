"""What a run leaves when its training has ended: weights, history, val's scores, and last its record."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

from safetensors.torch import load_file
from torch import nn

from zoo.evaluation.metrics import METRIC_SIGN
from zoo.models.registry import classifier_of
from zoo.recipe import Recipe
from zoo.training.checkpoint import remove_checkpoints, save_tensors
from zoo.training.derived import StateScorer, average_epochs
from zoo.training.environment import device_name, versions
from zoo.training.scoring import write_scores
from zoo.training.strategy import frozen_names

if TYPE_CHECKING:
    from zoo.training.trainer import Trainer


def finish(trainer: Trainer, model: nn.Module, note: str) -> None:
    """Write what a run leaves, the record last; then remove its checkpoint. note: what is to be said of its head."""
    run, progress, precision = trainer.plan.run, trainer.progress, trainer.precision
    averaged, said = _average(trainer, model)
    sha256 = save_tensors(run.weights_file, trainer.best)
    trainer.write_history()
    splits = {"train": trainer.train_pixels, "val": trainer.val_pixels}
    record = trainer.plan.record(
        "finished",
        params=sum(parameter.numel() for parameter in model.parameters()),
        params_trained=_params_trained(model, trainer.recipe),
        epochs=progress.history[-1]["epoch"],  # fewer than planned where patience ended the head
        best_epoch=progress.best_epoch,
        averaged_epochs=averaged,
        train_s=round(progress.train_s, 3),
        images_per_s=round(progress.images_seen / progress.step_s, 2) if progress.step_s > 0 else None,
        images={split: len(pixels) for split, pixels in splits.items()},
        images_skipped={split: pixels.skipped for split, pixels in splits.items() if pixels.skipped},
        device=device_name(trainer.device),
        precision=precision.record(),
        threads=trainer.threads,
        processes=trainer.group.world,
        versions=versions(),
        weights_sha256=sha256,
        notes=[*([note] if note else []), *_notes(trainer), *said],
    )
    write_scores(run, record, trainer.val_pixels, "val", trainer.best_logits)
    run.write_record(record)
    remove_checkpoints(trainer.folder)


def _average(trainer: Trainer, model: nn.Module) -> tuple[list[int], list[str]]:
    """Take the average of epochs where val scores it no worse than the best of them.

    Return of which epochs it was taken, none where it was not, and what is to be said.
    """
    method, metric = trainer.recipe.average.method, trainer.recipe.finetune.metric
    names = sorted(key for key in trainer.kept if key.startswith("average-"))
    if not names:
        return [], []
    pixels = trainer.train_pixels, trainer.val_pixels
    scorer = StateScorer(trainer.plan, model, *pixels, trainer.precision, trainer.device)
    epochs = {name: int(name.removeprefix("average-")) for name in names}
    by_epoch = {row["epoch"]: row[f"val_{metric}"] for row in trainer.progress.history}
    loads = {name: functools.partial(load_file, trainer.folder / trainer.kept[name].file) for name in names}
    values = {name: by_epoch[epoch] for name, epoch in epochs.items()}
    chosen, value = average_epochs(scorer, method, loads, values, metric)
    taken = sorted(epochs[name] for name in chosen)
    said = f"{method} of epochs {', '.join(map(str, taken))}: val {metric} {value:.4f}"
    best, sign = trainer.progress.best_value, METRIC_SIGN.get(metric, 1)
    if best is not None and not (math.isfinite(value) and sign * value >= sign * best):
        return [], [f"{said}, worse than epoch {trainer.progress.best_epoch}'s {best:.4f}, which is kept"]
    logits = scorer.logits(scorer.state(), averaged=False)
    trainer.score({"epoch": trainer.progress.epoch}, logits)
    trainer.best, trainer.best_logits = scorer.state(), logits
    return taken, [f"{said}, kept in place of epoch {trainer.progress.best_epoch}"]


def _notes(trainer: Trainer) -> list[str]:
    parts, size = trainer.progress.parts, trainer.recipe.finetune.batch_size
    notes = [f"trained again it may have other bits: {trainer.unsteady}"] if trainer.unsteady else []
    if trainer.progress.best_value is None:
        metric = trainer.recipe.finetune.metric
        notes.append(
            f"val cannot define {metric}: no epoch had a value, and the first is kept; set another finetune.metric"
        )
    if trainer.progress.uncached:
        splits = " and ".join(trainer.progress.uncached)
        notes.append(
            f"the disk had no room to keep what the frozen stages make of {splits}: computed anew in every "
            "epoch, which may show in the last bits of the weights"
        )
    if parts == 1:
        return notes
    return [
        *notes,
        f"a batch of {size} needed more memory than there is: computed in {parts} parts, their gradients added up; "
        f"the effective batch is still {size}, but batch normalisation saw {-(-size // parts)} images at a time",
    ]


def _params_trained(model: nn.Module, recipe: Recipe) -> int:
    if recipe.finetune.strategy == "linear-probe":
        return sum(each.numel() for each in classifier_of(model)[1].parameters())
    frozen = frozen_names(model, recipe.finetune.freeze)
    return sum(each.numel() for name, each in model.named_parameters() if name not in frozen)
