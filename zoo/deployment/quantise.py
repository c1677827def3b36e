"""Smaller number formats: 8-bit integers calibrated on val images, and float16; what they cost is the gate's to say."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.cache import Pixels
from zoo.data.transforms import center_crop, normalise
from zoo.deployment.graph import onnx_bytes, quiet, save_openvino
from zoo.deployment.runtime import INPUT, need_openvino
from zoo.errors import ZooError
from zoo.runs import Preprocessing

IMAGES = 300
"""At most as many images are looked at; the makers of NNCF advise this number, and more change little."""
SEED = 0


class Calibration:
    """A seeded choice of at most IMAGES of a split, as the network sees them: float32 (1, 3, S, S), one at a time."""

    def __init__(self, pixels: Pixels, preprocessing: Preprocessing, seed: int = SEED) -> None:
        self.pixels, self.preprocessing, self.seed = pixels, preprocessing, seed
        count = min(IMAGES, len(pixels))
        self.chosen = np.sort(np.random.default_rng(seed).choice(len(pixels), count, replace=False))

    def __len__(self) -> int:
        return len(self.chosen)

    def __iter__(self) -> Iterator[np.ndarray[Any, np.dtype[np.float32]]]:
        for place in self.chosen:
            image = center_crop(self.pixels[int(place)], self.preprocessing.image_size)
            yield normalise(image[None], self.preprocessing)

    @property
    def facts(self) -> dict[str, Any]:
        """Return what a bundle says of it: of which split, how many images, and the seed of the choice."""
        return {"split": self.pixels.source.split, "images": len(self), "seed": self.seed}


def int8_onnx(file: Path, calibration: Calibration) -> dict[str, Any]:
    """Make an ONNX file one of 8-bit integers in its place, weights per channel; return how.

    By NNCF, which kept more labels of MobileNets than the quantisation of ONNX Runtime (docs/deployment.md).
    Raises ZooError where NNCF is not installed, or cannot do it.
    """
    import onnx

    quantised = _quantised(onnx.load(str(file)), calibration)
    file.write_bytes(onnx_bytes(quantised))
    return _facts(calibration)


def int8_openvino(onnx_file: Path, folder: Path, calibration: Calibration) -> dict[str, Any]:
    """Write an ONNX file as OpenVINO's model.xml and model.bin of 8-bit integers; return how.

    Raises ZooError where OpenVINO or NNCF is not installed, or cannot do it.
    """
    openvino = need_openvino()
    with quiet():
        model = openvino.convert_model(str(onnx_file))
    facts = save_openvino(_quantised(model, calibration), folder)
    return {**facts, **_facts(calibration)}


def half_onnx(file: Path) -> dict[str, Any]:
    """Make an ONNX file one of float16 in its place; what goes in and comes out stays float32; return how.

    Weights beyond what float16 holds are cut to its ends. Raises ZooError where the graph cannot be converted.
    """
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    with quiet():
        try:
            model = OnnxModel(convert_float_to_float16(onnx.load(str(file)), keep_io_types=True))
            model.topological_sort(is_deterministic=True)
            data = onnx_bytes(model.model)
        except (ValueError, RuntimeError, onnx.checker.ValidationError) as error:
            raise ZooError(
                f"this network cannot be written as float16 ({type(error).__name__}); take float32"
            ) from error
    file.write_bytes(data)
    return {"converter": "onnxruntime.transformers.float16", "onnxruntime": version("onnxruntime")}


def need_nncf() -> Any:
    """Return the module `nncf`, which then calls nobody; raises ZooError where it is not installed."""
    need_openvino()  # first, for it is what keeps both from sending what they do
    try:
        with quiet():
            import nncf
    except ImportError:
        raise ZooError(
            "NNCF is not installed, and int8 needs it; install it with: pip install 'zoo[openvino]'"
        ) from None
    return nncf


def _quantised(model: Any, calibration: Calibration) -> Any:
    nncf = need_nncf()
    images = nncf.Dataset(calibration, lambda batch: {INPUT: batch})
    with quiet():
        try:
            return nncf.quantize(
                model,
                images,
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(calibration),
                fast_bias_correction=True,
            )
        except ZooError:
            raise
        except Exception as error:  # of its own kinds, and of the runtime's that it asks
            raise ZooError(
                f"this network cannot be quantised by NNCF ({type(error).__name__}); take float32 or fp16"
            ) from error


def _facts(calibration: Calibration) -> dict[str, Any]:
    return {"quantiser": "nncf", "nncf": version("nncf"), "calibration": calibration.facts}
