"""The floors of a dataset's split: what needs no network scores on the same images."""

from __future__ import annotations

from typing import Any

import numpy as np

from zoo.data.cache import open_pixels
from zoo.data.facts import dataset_facts, file_facts
from zoo.data.manifest import Dataset
from zoo.data.transforms import center_crop
from zoo.data.window import windowing_of_facts
from zoo.errors import ZooError
from zoo.evaluation.floors import SIDE, compute_floors, fact_columns
from zoo.files import digest_of, read_json, write_json
from zoo.runs import Preprocessing

FLOORS_VERSION = 3
_SMALL = Preprocessing(
    image_size=SIDE, crop_pct=1.0, interpolation="bilinear", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
)


def dataset_floors(dataset: Dataset, bad_images: str | None = None, split: str = "test") -> list[dict[str, Any]]:
    """Return the floors of a dataset's test or val split, computed once per split.

    Each row: `name`, and of each of FLOOR_METRICS `<split>_<metric>` and `<split>_<metric>_ci`. Fitted on train. Raises
    ZooError where an image is gone or changed and the policy is `fail`.
    """
    parts = [FLOORS_VERSION, dataset.split_digest, bad_images or dataset.bad_images, dataset.facts.get("window")]
    key = digest_of(parts if split == "test" else [*parts, split])
    file = dataset.folder / ".cache" / f"floors-{key[:16]}.json"
    try:
        stored: list[dict[str, Any]] = read_json(file)["floors"]
    except (ZooError, KeyError):
        stored = _computed(dataset, bad_images, split)
        write_json(file, {"floors": stored})
    return stored


def _computed(dataset: Dataset, bad_images: str | None, split: str) -> list[dict[str, Any]]:
    own = windowing_of_facts(dataset.facts)
    shown = {"window": dataset.facts.get("window"), "rescale_slope": own.slope, "rescale_intercept": own.intercept}
    preprocessing = _SMALL.model_copy(update=shown)
    train, scored = (open_pixels(dataset, each, preprocessing, bad_images) for each in ("train", split))
    pixels = [np.stack([center_crop(each[i], SIDE) for i in range(len(each))]) for each in (train, scored)]
    columns = fact_columns(file_facts(dataset_facts(dataset)))
    place = {sample: number for number, sample in enumerate(dataset.frame["sample_id"])}
    facts = [columns[[place[each] for each in part.sample_ids.tolist()]] for part in (train, scored)]
    rows = compute_floors(
        pixels[0], train.y_true, pixels[1], scored.y_true, scored.groups, dataset.classes, facts[0], facts[1]
    )
    return [{name.replace("test_", f"{split}_", 1): value for name, value in row.items()} for row in rows]
