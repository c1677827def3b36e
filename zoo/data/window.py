"""From measured values of more than 8 bits, such as a CT's Hounsfield units, to grey levels: named windows."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from zoo.errors import ZooError, nearest, one_line
from zoo.runs import Preprocessing

# Centre and width in Hounsfield units, as radiologists set them for chest CT.
WINDOWS: dict[str, tuple[float, float]] = {
    "lung": (-600.0, 1500.0),
    "mediastinum": (40.0, 400.0),
    "bone": (400.0, 1800.0),
}
DEFAULT_CT = "lung"
_PAIR = re.compile(r"(-?\d+(?:\.\d+)?)\s*/\s*(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Windowing:
    """How values of more than 8 bits become grey levels.

    windows: none (the whole range of the stored bits), one (centre, width), or three, one for each channel.
    slope, intercept: what turns stored values into those that the window counts in, for files that do not say
    so themselves, as 16-bit PNG and TIFF do not; a DICOM's own come first.
    """

    windows: tuple[tuple[float, float], ...] = ()
    slope: float = 1.0
    intercept: float = 0.0

    def grey(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return windowed values (H, W) as uint8 RGB (H, W, 3); needs a window.

        Linear from centre - width / 2 to centre + width / 2, as DICOM's LINEAR_EXACT (PS3.3 C.11.2.1.3.2),
        rounded half up; what is no number is black.
        """
        values = np.nan_to_num(values.astype(np.float64), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
        channels = []
        for center, width in self.windows:
            scaled = (values - (center - width / 2)) * 255.0 / width
            channels.append(np.floor(np.clip(scaled, 0.0, 255.0) + 0.5).astype(np.uint8))
        return np.stack(channels * (3 // len(channels)), axis=2)


PLAIN = Windowing()


def parse_window(text: str) -> tuple[tuple[float, float], ...]:
    """Return (centre, width) of a window, or of three with commas between them, one for each channel.

    A window is a name of WINDOWS or `centre/width`. Raises ZooError for anything else.

    >>> parse_window("lung")
    ((-600.0, 1500.0),)
    >>> parse_window("lung, mediastinum, 300/1500")[2]
    (300.0, 1500.0)
    """
    windows = []
    for part in (each.strip() for each in str(text).split(",")):
        pair = _PAIR.fullmatch(part)
        if part in WINDOWS:
            windows.append(WINDOWS[part])
        elif pair and float(pair[2]) > 0:
            windows.append((float(pair[1]), float(pair[2])))
        else:
            raise ZooError(
                f"window must be {', '.join(WINDOWS)} or CENTRE/WIDTH such as -600/1500, with WIDTH above 0. "
                f"Got {one_line(part)!r}{nearest(part, WINDOWS)}"
            )
    if len(windows) not in (1, 3):
        raise ZooError(f"window must be one, or three for three channels. Got {len(windows)} in {one_line(text)!r}")
    return tuple(windows)


def parse_rescale(text: str) -> tuple[float, float]:
    """Return slope and intercept of `SLOPE,INTERCEPT`; raises ZooError for anything else.

    >>> parse_rescale("1,-32768")
    (1.0, -32768.0)
    """
    try:
        slope, intercept = (float(part) for part in text.split(","))
    except ValueError:
        slope = intercept = math.nan
    if not (math.isfinite(slope) and math.isfinite(intercept)) or slope == 0:
        raise ZooError(
            f"rescale must be SLOPE,INTERCEPT such as 1,-1024, with a slope other than 0. Got {one_line(text)!r}"
        )
    return slope, intercept


def windowing_of(preprocessing: Preprocessing) -> Windowing:
    """Return the windowing that a preprocessing names."""
    windows = parse_window(preprocessing.window) if preprocessing.window else ()
    return Windowing(windows, preprocessing.rescale_slope, preprocessing.rescale_intercept)


def windowing_of_facts(facts: dict[str, Any]) -> Windowing:
    """Return the windowing that a `dataset.toml` names; raises ZooError where it is none."""
    rescale = facts.get("rescale", "1,0")
    windows = parse_window(facts["window"]) if facts.get("window") else ()
    return Windowing(windows, *parse_rescale(str(rescale)))
