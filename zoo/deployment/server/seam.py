# ruff: noqa
"""A bundle's predictor until `zoo.deployment.predictor` opens bundles itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zoo.data.decode import decode, resize
from zoo.data.transforms import center_crop, normalise
from zoo.data.window import windowing_of
from zoo.deployment.bundle import open_bundle
from zoo.deployment.runtime import Session


@dataclass
class Answer:
    label: str
    scores: dict[str, float]
    prediction_set: list[str]
    refer: bool
    refer_reason: str | None
    points: dict[str, Any] | None


class Predictor:
    def __init__(self, bundle: Any, threads: int | None = None) -> None:
        self.bundle = bundle
        record = bundle.record
        self.session = Session(bundle.model_file, record.format, record.precision, threads)
        self.classes, self.preprocessing = record.classes, record.preprocessing
        self.explains = record.activation_map

    @classmethod
    def load(cls, source: Any, root: Any = None, device: str = "cpu", threads: int | None = None) -> Predictor:
        return cls(open_bundle(source, root), threads)

    def prepare(self, data: bytes, max_pixels: int = 64_000_000) -> np.ndarray[Any, Any]:
        decoded = decode(data, windowing_of(self.preprocessing), max_pixels=max_pixels)
        return resize(decoded, self.preprocessing.resize_size, self.preprocessing.interpolation)

    def logits(self, images: Sequence[Any]) -> Any:
        batch = np.stack([center_crop(each, self.preprocessing.image_size) for each in images])
        return self.session(normalise(batch, self.preprocessing))

    def answers(self, logits: Any) -> list[Answer]:
        found = []
        for row in logits:
            e = np.exp(row - row.max())
            p = e / e.sum()
            label = self.classes[int(row.argmax())]
            found.append(Answer(label, dict(zip(self.classes, p.tolist(), strict=True)), [label], False, None, None))
        return found
