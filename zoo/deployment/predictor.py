"""Predicting new images with a finished run: the same decoding and preprocessing as in training."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from zoo.data.decode import BadImage, decode, resize
from zoo.data.layouts import IMAGE_SUFFIXES
from zoo.data.transforms import center_crop, normalise_tensor
from zoo.data.window import windowing_of
from zoo.errors import ZooError, one_line
from zoo.evaluation.explain import activation_maps, overlay
from zoo.files import Home, atomic_writer, check_writable, user_path
from zoo.runs import Preprocessing, Run, RunRecord, find_run
from zoo.training.precision import PrecisionPlan, choose_device, recorded_plan, set_threads
from zoo.training.scoring import finished_record, load_model
from zoo.training.views import logits_of_views

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

_EXPLAINED = 16  # images at once: gradients need more memory than scores


@dataclass(frozen=True)
class Prediction:
    """What a network says of one image: scores per class in [0, 1], or the reason why there are none."""

    path: str
    label: str | None
    scores: dict[str, float]
    refer: bool
    error: str | None
    explanation: str | None = None

    def row(self, explained: bool = False) -> dict[str, Any]:
        """Return the prediction as one line of JSON has it; `explanation` is in it where one was asked for."""
        found: dict[str, Any] = {
            "path": self.path,
            "label": self.label,
            "scores": self.scores,
            "refer": self.refer,
            "error": self.error,
        }
        return {**found, "explanation": self.explanation} if explained else found


class Predictor:
    """A network together with the preprocessing and the class names that belong to it.

    tta: the views of an image that scores are the mean of (`zoo.training.views`), as the run was scored.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocessing: Preprocessing,
        classes: list[str],
        precision: PrecisionPlan,
        tta: str = "none",
    ) -> None:
        self.model, self.preprocessing, self.classes = model, preprocessing, list(classes)
        self.precision, self.tta = precision, tta
        self.device = next(model.parameters()).device

    @classmethod
    def load(cls, source: Run | str | os.PathLike[str], root: Home | None = None, device: str = "auto") -> Predictor:
        """Return the predictor of a finished run, given itself, by name, or by its folder.

        Raises ZooError where there is no such run or it did not finish.
        """
        run = source if isinstance(source, Run) else find_run(os.fspath(source), root)
        record: RunRecord = finished_record(run)
        assert record.preprocessing is not None
        set_threads()
        chosen = choose_device(device)
        same = chosen.type == record.device.split(":")[0]
        plan = recorded_plan(record.precision) if same else PrecisionPlan("float32", channels_last=True)
        model = load_model(run, root, str(chosen)).to(memory_format=plan.memory_format)
        return cls(model, record.preprocessing, record.classes, plan, record.tta)

    def pixels(self, data: bytes) -> Pixels:
        """Return the network's view of an encoded image: uint8 of shape (size, size, 3).

        Raises BadImage where it cannot be decoded.
        """
        return center_crop(self._resized(data), self.preprocessing.image_size)

    def _resized(self, data: bytes) -> Pixels:
        decoded = decode(data, windowing_of(self.preprocessing))
        return resize(decoded, self.preprocessing.resize_size, self.preprocessing.interpolation)

    def scores(self, batch: Pixels) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return softmax scores (B, classes) of uint8 images (B, size, size, 3)."""
        found: np.ndarray[Any, np.dtype[np.float64]] = torch.softmax(self._logits(batch).double(), 1).numpy()
        return found

    def _logits(self, batch: Pixels) -> torch.Tensor:
        with torch.inference_mode(), self.precision.autocast(self.device):
            images = normalise_tensor(torch.from_numpy(batch).to(self.device), self.preprocessing)
            logits: torch.Tensor = self.model(self.precision.place(images)).float().cpu()
        return logits

    def explain(self, batch: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return where the network looked for the class it predicts: uint8 (B, size, 2 x size, 3).

        batch: uint8 (B, size, size, 3), as `pixels` gives them; they stand at the left of their maps. Raises ZooError
        where the network keeps no map of its image.
        """
        images = normalise_tensor(torch.from_numpy(batch).to(self.device), self.preprocessing)
        with torch.no_grad():
            targets = self.model(images).argmax(dim=1)
        maps = activation_maps(self.model, images, targets).numpy()
        looked = np.stack([overlay(image, heat) for image, heat in zip(batch, maps, strict=True)])
        return np.concatenate([batch, looked], axis=2)

    def predict(
        self,
        paths: Iterable[str | os.PathLike[str]],
        batch_size: int = 32,
        explain: str | os.PathLike[str] | None = None,
    ) -> list[Prediction]:
        """Return one prediction for each image file; folders are searched. Bad files are rows with a reason.

        explain: a folder for one PNG per image that shows where the network looked. Raises ZooError where a path is not
        there, a folder holds no image, the folder cannot be written, or the network keeps no map of its image.
        """
        return list(self.stream(find_images(paths), batch_size, explain))

    def stream(
        self, files: Iterable[Path], batch_size: int = 32, explain: str | os.PathLike[str] | None = None
    ) -> Iterator[Prediction]:
        """Yield the predictions of image files in order, a batch at a time; explain as in `predict`."""
        folder = None
        if explain is not None:
            if not os.fspath(explain):
                raise ZooError("explain needs a folder for its pictures. Got an empty name")
            folder = user_path(explain)
            check_writable(folder)
        waiting: list[tuple[int, Path]] = []
        for place in enumerate(files):
            waiting.append(place)
            if len(waiting) == batch_size:
                yield from self._batch(waiting, folder)
                waiting = []
        if waiting:
            yield from self._batch(waiting, folder)

    def _batch(self, numbered: list[tuple[int, Path]], folder: Path | None) -> Iterator[Prediction]:
        files = [file for _, file in numbered]
        images: dict[int, Pixels] = {}
        errors: dict[int, str] = {}
        for place, file in enumerate(files):
            try:
                images[place] = self._resized(file.read_bytes())
            except OSError as error:
                errors[place] = one_line(error.strerror or error)
            except BadImage as error:
                errors[place] = str(error)
        scores: dict[int, Any] = {}
        if images:
            logits = logits_of_views(list(images.values()), self.preprocessing, self.tta, self._logits)
            scores = dict(zip(images, torch.softmax(logits.double(), 1).numpy(), strict=True))
        images = {place: center_crop(image, self.preprocessing.image_size) for place, image in images.items()}
        shown = self._write_explanations(images, numbered, folder) if folder is not None and images else {}
        for place, file in enumerate(files):
            if place in errors:
                yield Prediction(str(file), None, {}, True, errors[place])
                continue
            row = scores[place]
            named = {name: float(value) for name, value in zip(self.classes, row, strict=True)}
            yield Prediction(str(file), self.classes[int(row.argmax())], named, False, None, shown.get(place))

    def _write_explanations(
        self, images: dict[int, np.ndarray[Any, Any]], numbered: list[tuple[int, Path]], folder: Path
    ) -> dict[int, str]:
        """Write a picture for each image and return the files; a number before the name keeps two of one name apart."""
        found: dict[int, str] = {}
        places = list(images)
        for start in range(0, len(places), _EXPLAINED):
            part = places[start : start + _EXPLAINED]
            for place, picture in zip(part, self.explain(np.stack([images[each] for each in part])), strict=True):
                number, file = numbered[place]
                name = re.sub(r"[^A-Za-z0-9._-]+", "_", file.stem)[:60]
                target = folder / f"{number:05d}-{name}.png"
                with atomic_writer(target) as stream:
                    Image.fromarray(picture).save(stream, "PNG")
                found[place] = str(target)
        return found


def find_images(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Return the files that paths mean: a file is itself, a folder all images below it, in order of names.

    Raises ZooError where a path is not there, a folder holds no image, or no path is given.
    """
    found: list[Path] = []
    for path in (user_path(each) for each in paths):
        if not os.path.lexists(path):  # unlike Path.exists it takes a name that is too long
            raise ZooError(f"there is no file or folder {one_line(path)!r}; check the path")
        if path.is_dir():
            inside = sorted(
                file
                for file in path.rglob("*")
                if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file() and not file.name.startswith(".")
            )
            if not inside:
                raise ZooError(f"folder {one_line(path)!r} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
            found += inside
        else:
            found.append(path)
    if not found:
        raise ZooError("no image was named; give files or folders")
    return found
