"""Looking into a finished run: where it looked, and its score with a part of each image painted over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from zoo.data.cache import Pixels, open_pixels
from zoo.data.manifest import load_dataset
from zoo.data.transforms import center_crop, normalise_tensor
from zoo.errors import ZooError
from zoo.evaluation.explain import activation_maps, paint_over
from zoo.evaluation.heat import overlay
from zoo.evaluation.predictions import Predictions
from zoo.evaluation.statistics import top1_interval
from zoo.files import Home, digest_of, home, read_json, sha256_file, write_json
from zoo.runs import Preprocessing, Run, RunRecord
from zoo.training.precision import set_threads
from zoo.training.scoring import finished_record, load_model

_BATCH = 16  # gradients need more memory than scores
_MOST = 2000  # images of val that the probe looks at
Image = np.ndarray[Any, np.dtype[np.uint8]]
_PARTS: Mapping[str, Literal["centre", "border"] | None] = {
    "whole": None,
    "centre_masked": "centre",
    "border_masked": "border",
}


def explain_images(
    run: Run, sample_ids: Iterable[str], split: str = "test", root: Home | None = None
) -> dict[str, Image]:
    """Return pictures of where a run looked for the class it predicts: sample id to uint8 (S, S, 3).

    Images that are gone are left out. Raises ZooError where the run did not finish, the dataset's split is another
    now, or the network has no map of its image.
    """
    record, pixels = _opened(run, split, root)
    assert record.preprocessing is not None
    place = {sample: number for number, sample in enumerate(pixels.sample_ids.tolist())}
    wanted = [sample for sample in dict.fromkeys(sample_ids) if sample in place]
    set_threads()
    model = load_model(run, root)
    found: dict[str, Image] = {}
    for start in range(0, len(wanted), _BATCH):
        part = wanted[start : start + _BATCH]
        batch = _crops(pixels, [place[sample] for sample in part], record.preprocessing)
        images = normalise_tensor(torch.from_numpy(batch), record.preprocessing)
        with torch.inference_mode():
            targets = model(images).argmax(dim=1)
        maps = activation_maps(model, images, targets.clone()).numpy()
        found |= {sample: overlay(image, heat) for sample, image, heat in zip(part, batch, maps, strict=True)}
    return found


def shortcut_probe(run: Run, root: Home | None = None) -> dict[str, Any]:
    """Return top1 on val of the whole images, with the centre painted over, and with all around it painted over.

    `split`, `n`, and `whole`, `centre_masked`, `border_masked`, each with its `_ci`; of at most 2000 images, evenly
    spaced over val. A high score without the centre hints at a shortcut. Kept in the run folder as
    `probe-val.json`. Raises ZooError where the run did not finish, or its images are gone or split anew.
    """
    record = finished_record(run)
    file = run.path / "probe-val.json"
    key = digest_of([record.split_digest, sha256_file(run.weights_file), _MOST])
    if file.is_file():
        stored = read_json(file)
        if stored.get("key") == key:
            return {name: value for name, value in stored.items() if name not in ("key", "schema_version")}
    _, pixels = _opened(run, "val", root)
    assert record.preprocessing is not None
    chosen = np.unique(np.linspace(0, len(pixels) - 1, min(len(pixels), _MOST)).round().astype(int)).tolist()
    set_threads()
    model = load_model(run, root)
    found: dict[str, Any] = {"split": "val", "n": len(chosen)}
    for name, part in _PARTS.items():
        logits = _logits(model, pixels, chosen, record.preprocessing, part)
        own = Predictions(pixels.sample_ids[chosen], pixels.groups[chosen], pixels.y_true[chosen], logits)
        found[name] = float((own.y_pred == own.y_true).mean())
        found[f"{name}_ci"] = list(top1_interval([own]))
    write_json(file, {"key": key, **found})
    return found


def _opened(run: Run, split: str, root: Home | None) -> tuple[RunRecord, Pixels]:
    record = finished_record(run)
    assert record.preprocessing is not None
    dataset = load_dataset(record.dataset, root or home(), make_builtin=False)
    if dataset.split_digest != record.split_digest:
        raise ZooError(f"run {run.name!r} was trained on another split of {dataset.name!r}; train it again")
    return record, open_pixels(dataset, split, record.preprocessing, record.bad_images)


def _crops(pixels: Pixels, places: Sequence[int], preprocessing: Preprocessing) -> Image:
    return np.stack([center_crop(pixels[place], preprocessing.image_size) for place in places])


def _logits(
    model: torch.nn.Module,
    pixels: Pixels,
    places: Sequence[int],
    preprocessing: Preprocessing,
    part: Literal["centre", "border"] | None,
) -> np.ndarray[Any, np.dtype[np.float32]]:
    found = []
    with torch.inference_mode():
        for start in range(0, len(places), 2 * _BATCH):
            batch = _crops(pixels, places[start : start + 2 * _BATCH], preprocessing)
            batch = np.stack([paint_over(image, part) for image in batch]) if part else batch
            found.append(model(normalise_tensor(torch.from_numpy(batch), preprocessing)).float().numpy())
    return np.concatenate(found)
