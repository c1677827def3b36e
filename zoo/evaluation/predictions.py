"""The predictions file: sample ids, groups, true labels and logits of one run on one split."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from zoo.errors import ZooError, one_line
from zoo.files import atomic_writer

KEYS = ("sample_ids", "groups", "y_true", "logits")
# What numpy and zipfile are known to raise on a file that was cut off or changed.
_DAMAGE = (
    AttributeError,
    EOFError,
    KeyError,
    MemoryError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True, eq=False)
class Predictions:
    """What one run says about N samples of C classes.

    sample_ids, groups: (N,) str. y_true: (N,) int64 in [0, C). logits: (N, C) float32. A sample whose group is
    empty is a group of its own. Raises ZooError where the shapes do not fit or a label is out of range.
    """

    sample_ids: np.ndarray
    groups: np.ndarray
    y_true: np.ndarray
    logits: np.ndarray

    def __post_init__(self) -> None:
        # The same content gives the same dtype, hence the same bytes on disk.
        object.__setattr__(self, "sample_ids", np.array(np.asarray(self.sample_ids).tolist(), dtype=np.str_))
        object.__setattr__(self, "groups", np.array(np.asarray(self.groups).tolist(), dtype=np.str_))
        object.__setattr__(self, "y_true", np.ascontiguousarray(self.y_true, dtype="<i8"))
        object.__setattr__(self, "logits", np.ascontiguousarray(self.logits, dtype="<f4"))
        shapes = {key: getattr(self, key).shape for key in KEYS}
        n = len(self.y_true) if self.y_true.ndim == 1 else -1
        if self.logits.ndim != 2 or any(shape[:1] != (n,) for shape in shapes.values()):
            raise ZooError(f"predictions must be (N,), (N,), (N,) and (N, C). Got {shapes}; score the run again")
        if n and not (self.y_true.min() >= 0 and self.y_true.max() < self.logits.shape[1]):
            raise ZooError(
                f"y_true must lie in [0, {self.logits.shape[1]}), one logit for each class. Got "
                f"{self.y_true.min()} to {self.y_true.max()}; score the run again"
            )

    @cached_property
    def y_score(self) -> np.ndarray:
        """Return the softmax of the logits: (N, C) float64 in [0, 1], rows that sum to 1."""
        from scipy.special import softmax

        return np.asarray(softmax(self.logits.astype(np.float64), axis=1))

    @cached_property
    def y_pred(self) -> np.ndarray:
        """Return the class of the highest logit, the first of equals: (N,) int64."""
        return np.asarray(self.logits.argmax(axis=1))

    @cached_property
    def group_codes(self) -> np.ndarray:
        """Return a number in [0, G) for each sample's group: (N,) int64; an empty group is the sample's own."""
        own = self.groups == ""
        codes = np.unique(self.groups, return_inverse=True)[1].astype(np.int64)
        codes[own] = codes.size + np.arange(own.sum())
        return np.unique(codes, return_inverse=True)[1].astype(np.int64)


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write predictions as an uncompressed .npz, atomically; the same content gives the same bytes.

    Raises ZooError where the file cannot be written.
    """
    with atomic_writer(path) as stream:
        np.savez(stream, allow_pickle=False, **{key: getattr(predictions, key) for key in KEYS})


def read_predictions(path: Path) -> Predictions:
    """Return the predictions that `write_predictions` wrote.

    Raises ZooError where the file is missing, damaged, or holds anything but these four arrays. Never unpickles.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ZooError(f"there is no predictions file {str(path)!r}; score the run again") from None
    except OSError as error:
        raise ZooError(f"cannot read {str(path)!r}: {one_line(error.strerror or error)}") from error
    try:
        return Predictions(**_arrays(data))
    except (*_DAMAGE, ZooError) as error:
        raise ZooError(
            f"predictions file {str(path)!r} is damaged: {one_line(error, 160)}; remove it and score the run again"
        ) from error


def _arrays(data: bytes) -> dict[str, Any]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = sorted(archive.namelist())
        if names != sorted(f"{key}.npy" for key in KEYS):
            raise ValueError(f"it must hold {', '.join(KEYS)}. Got {', '.join(names)}")
        # Reading each member whole makes zipfile verify its checksum.
        members = {key: archive.read(f"{key}.npy") for key in KEYS}
    arrays = {key: np.load(io.BytesIO(member), allow_pickle=False) for key, member in members.items()}
    kinds = {key: array.dtype.kind for key, array in arrays.items()}
    if kinds != {"sample_ids": "U", "groups": "U", "y_true": "i", "logits": "f"}:
        raise ValueError(f"its arrays must be of text, text, int64 and float32. Got {kinds}")
    return arrays
