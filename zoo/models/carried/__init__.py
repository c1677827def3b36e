"""Backbones that the package carries: pretrained on formula images by this project, ours to license."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from zoo.errors import ZooError

FOLDER = Path(str(files("zoo.models.carried")))


@dataclass(frozen=True)
class CarriedWeights:
    """One carried file: its card (`<name>.json`, as `zoo pretrain` wrote it) beside float16 safetensors.

    name: `arch.tag`. size_bytes: of the file. image_size: pixels that it was pretrained at. facts: the whole card.
    """

    name: str
    sha256: str
    size_bytes: int
    licence: str
    image_size: int
    crop_pct: float
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    summary: str
    facts: dict[str, Any]

    @property
    def path(self) -> Path:
        """Return the file in the installed package."""
        return FOLDER / f"{self.name}.safetensors"


@cache
def carried_weights() -> dict[str, CarriedWeights]:
    """Return the carried weights by name; raises ZooError where the installation is damaged.

    >>> sorted(name.partition(".")[2] for name in carried_weights())
    ['zoo_formula', 'zoo_formula', 'zoo_formula']
    """
    found = {}
    for path in sorted(FOLDER.glob("*.json")):
        try:
            card = json.loads(path.read_text(encoding="utf-8"))
            found[card["name"]] = CarriedWeights(
                card["name"],
                card["sha256"],
                card["bytes"],
                card["licence"],
                card["image_size"],
                float(card["crop_pct"]),
                card["interpolation"],
                tuple(card["mean"]),
                tuple(card["std"]),
                f"{card['classes']} formula classes, {card['images_seen'] / 1e6:.1f}M images",
                card,
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ZooError(f"the carried weights' card {path.name!r} is damaged; install the package again") from error
    return found
