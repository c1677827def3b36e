"""Scoring a split: the kept weights in, the predictions file and its metrics out."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from zoo.data.cache import ImageProgress, Pixels, open_pixels
from zoo.data.manifest import load_dataset
from zoo.data.transforms import normalise_tensor
from zoo.errors import Hindered, ZooError, one_line
from zoo.evaluation.ledger import record_look
from zoo.evaluation.metrics import compute_metrics
from zoo.evaluation.predictions import Predictions, read_predictions, write_predictions
from zoo.files import Home, home, sha256_file, write_json
from zoo.models.registry import classifier_of, create_model, find_model, own_network_digest
from zoo.runs import SPLITS, Run, RunRecord, find_run, run_lock
from zoo.training.features import (
    FORWARD_BATCH,
    are_kept,
    head_logits,
    kept_features,
    load_grown,
    pixels_logits,
    split_features,
)
from zoo.training.kernels import steady_kernels
from zoo.training.memory import freed_memory_kept, in_pieces
from zoo.training.precision import PrecisionPlan, choose_device, recorded_plan, set_threads
from zoo.training.views import logits_of_views


def load_model(run: Run | str, root: Home | None = None, device: str = "cpu") -> nn.Module:
    """Return a finished run's network with its kept weights, in evaluation mode.

    Its preprocessing is `run.record.preprocessing`, its classes `run.record.classes`. Raises ZooError where the
    run did not finish or its weights are damaged.
    """
    run = find_run(run, root) if isinstance(run, str) else run
    record = finished_record(run)
    spec, model = find_model(record.model), _build(record)
    if record.network is not None and own_network_digest(spec, model) != record.network:
        raise ZooError(
            f"the network registered as {record.model!r} is no longer the one that run {run.name!r} trained; register "
            "that code again, or train anew"
        )
    state = _weights_of(run)
    try:
        load_grown(model, state)
    except RuntimeError as error:
        raise ZooError(
            f"the weights of run {run.name!r} do not fit {record.model!r}: {one_line(error, 200)}; train it again"
        ) from error
    _refuse_changed(run, record)
    return model.eval().to(choose_device(device)).to(memory_format=torch.channels_last)


def _build(record: RunRecord) -> nn.Module:
    assert record.preprocessing is not None
    return create_model(
        find_model(record.model),
        len(record.classes),
        image_size=record.preprocessing.image_size,
        options=dict(record.model_options),
    )


def _weights_of(run: Run) -> dict[str, torch.Tensor]:
    try:
        return load_file(run.weights_file)
    except (OSError, SafetensorError) as error:
        raise Hindered(f"the weights of run {run.name!r} cannot be read: {one_line(error)}; train it again") from error


def _refuse_changed(run: Run, record: RunRecord) -> None:
    """Refuse weights that are no longer those of the run: a flipped byte loads silently."""
    if record.weights_sha256 is not None and sha256_file(run.weights_file) != record.weights_sha256:
        raise Hindered(f"the weights of run {run.name!r} were changed after the run had ended; train it again")


def finished_record(run: Run) -> RunRecord:
    """Return a run's record; raises ZooError where it did not finish."""
    record = run.record
    if record.status != "finished" or record.preprocessing is None:
        raise ZooError(f"run {run.name!r} did not finish: {record.reason}; train it again")
    return record


def write_scores(run: Run, record: RunRecord, pixels: Pixels, split: str, logits: torch.Tensor) -> dict[str, Any]:
    """Write the predictions and metrics of a split from its logits (N, classes), and return the metrics."""
    predictions = Predictions(pixels.sample_ids, pixels.groups, pixels.y_true, logits.float().cpu().numpy())
    metrics = compute_metrics(predictions, record.classes, record.negative_class)
    metrics["images_skipped"] = pixels.skipped
    write_predictions(run.predictions_file(split), predictions)
    of = {"weights_sha256": record.weights_sha256} if record.weights_sha256 else {}
    write_json(run.metrics_file(split), {"run": run.name, "split": split, **of, **metrics})
    return metrics


def score_split(
    run: Run,
    record: RunRecord,
    model: nn.Module,
    pixels: Pixels,
    split: str,
    precision: PrecisionPlan,
    device: torch.device,
) -> dict[str, Any]:
    """Write the predictions and metrics of a split, and return the metrics.

    A linear probe is scored by its classifier on the backbone's features, which all runs with that backbone share.
    """
    logits = _split_logits(record, model, pixels, split, precision, device)
    return write_scores(run, record, pixels, split, logits)


def _split_logits(
    record: RunRecord,
    model: nn.Module,
    pixels: Pixels,
    split: str,
    precision: PrecisionPlan,
    device: torch.device,
) -> torch.Tensor:
    assert record.preprocessing is not None
    if record.tta != "none":
        return _views_logits(record, model, pixels, precision, device)
    if are_kept(record):
        features = split_features(model, pixels, split, record, precision, device)
        if features.whole:
            return head_logits(classifier_of(model)[1], features, precision, device)
    return pixels_logits(model, pixels, record.preprocessing, precision, device)


def _views_logits(
    record: RunRecord, model: nn.Module, pixels: Pixels, precision: PrecisionPlan, device: torch.device
) -> torch.Tensor:
    """Return a split's logits over several views of each image (`zoo.training.views`)."""
    assert record.preprocessing is not None
    preprocessing, found = record.preprocessing, []

    def forward(batch: Any) -> torch.Tensor:
        images = normalise_tensor(torch.from_numpy(batch).to(device), preprocessing)
        logits: torch.Tensor = model(precision.place(images)).float().cpu()
        return logits

    def of_view(batch: Any) -> torch.Tensor:
        return torch.cat(list(in_pieces(model, batch, forward)))

    model.eval()
    with torch.inference_mode(), precision.autocast(device):
        for start in range(0, len(pixels), FORWARD_BATCH):
            images = [pixels[place] for place in range(start, min(start + FORWARD_BATCH, len(pixels)))]
            found.append(logits_of_views(images, preprocessing, record.tta, of_view))
    return torch.cat(found)


def _kept_logits(
    run: Run, record: RunRecord, pixels: Pixels, split: str, precision: PrecisionPlan, device: torch.device
) -> torch.Tensor | None:
    """Return a linear probe's logits from features on disk, without its backbone in memory; None where that fails."""
    spec = find_model(record.model)
    if not are_kept(record) or spec.origin == "own" or record.tta != "none":
        return None
    assert record.preprocessing is not None
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        shell = _build(record)
    head, classifier = classifier_of(shell)
    state = _weights_of(run)
    _refuse_changed(run, record)
    own = {key: value for key, value in state.items() if key.startswith(f"{head}.")}
    computed = [name for name, _ in classifier.named_buffers() if f"{head}.{name}" not in own]
    features = kept_features(state, head, pixels, split, record, precision, device)
    if features is None or not features.whole or computed or set(shell.state_dict()) - set(state):
        return None
    holder = nn.ModuleDict({"head": classifier.to_empty(device="cpu")})
    try:
        load_grown(holder, {f"head.{key.removeprefix(f'{head}.')}": value for key, value in own.items()})
    except RuntimeError:
        return None  # `load_model` says what does not fit
    return head_logits(holder["head"].to(device), features, precision, device)


def evaluate(
    run: Run | str,
    split: str = "test",
    root: Home | None = None,
    *,
    bad_images: str | None = None,
    progress: ImageProgress | None = None,
) -> dict[str, Any]:
    """Score a finished run on a split once, and return the metrics; a split that was is not scored again.

    bad_images: `fail` or `skip`; left out, what the run was trained with. Scores that say that they are of other
    weights are replaced.

    Raises ZooError where the run did not finish or the dataset's split is no longer the one it was trained on.
    """
    root = root or home()
    run = find_run(run, root) if isinstance(run, str) else run
    if split not in SPLITS:
        raise ZooError(f"split must be one of {', '.join(SPLITS)}. Got {one_line(split)!r}")
    finished_record(run)
    if not run.scored(split):
        # Not the run's own lock, which clears what is half written in its folder: a bundle may be on its way there.
        with run_lock(root, f"{run.name}.scoring", wait=True):
            if not run.scored(split):  # by the process that was waited for
                _score(run, split, root, bad_images, progress)
    return run.metrics(split)


def _score(run: Run, split: str, root: Home, bad_images: str | None, progress: ImageProgress | None) -> None:
    """Score a split and write what `evaluate` returns; before test is looked at, the ledger is told."""
    record = finished_record(run)
    dataset = load_dataset(record.dataset, root)
    if dataset.split_digest != record.split_digest:
        raise ZooError(
            f"run {run.name!r} was trained on another split of {dataset.name!r} ({record.split_digest[:8]}, now "
            f"{dataset.split_digest[:8]}); train it again"
        )
    if dataset.classes != record.classes:
        raise ZooError(
            f"run {run.name!r} tells {one_line(', '.join(record.classes))} apart, in this order; dataset "
            f"{dataset.name!r} has {one_line(', '.join(dataset.classes))}: put the order back, or train it again"
        )
    assert record.preprocessing is not None
    set_threads()
    device = _device_of(record)
    # The number format is the run's own, so that what is scored is what was selected.
    plan = recorded_plan(record.precision)
    pixels = open_pixels(dataset, split, record.preprocessing, bad_images or record.bad_images, progress)
    logits = _kept_logits(run, record, pixels, split, plan, device)
    model = load_model(run, root, device.type) if logits is None else None
    if split == "test":
        record_look(root, record)
    if model is not None:
        model = model.to(memory_format=plan.memory_format)
        with freed_memory_kept(), steady_kernels(device, strict=False):
            logits = _split_logits(record, model, pixels, split, plan, device)
    assert logits is not None
    write_scores(run, record, pixels, split, logits)


def _device_of(record: RunRecord) -> torch.device:
    """Return the kind of device that the run was trained on, or the CPU where it is not here."""
    try:
        return choose_device(record.device.split(":")[0] or "cpu")
    except ZooError:
        return choose_device("cpu")


def predictions_of(run: Run, split: str) -> Predictions:
    """Return a run's predictions on a split; raises ZooError where it is not scored yet."""
    if not run.predictions_file(split).is_file():
        raise ZooError(f"run {run.name!r} is not scored on {split!r} yet; call evaluate(run, {split!r})")
    return read_predictions(run.predictions_file(split))
