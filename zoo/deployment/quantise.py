"""Smaller number formats of an exported network: int8 calibrated on val images, and float16 weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from zoo.data.cache import Pixels
from zoo.data.transforms import center_crop, normalise
from zoo.deployment.graph import need_openvino, quiet, save_openvino, without_traces
from zoo.deployment.runtime import INPUT
from zoo.errors import ZooError, one_line
from zoo.runs import Preprocessing

Floats = np.ndarray[Any, np.dtype[np.float32]]
Method = Literal["nncf", "onnxruntime"]
CALIBRATION_IMAGES = 300  # at most; NNCF's own default
ONNX_METHOD: Method = "nncf"


class CalibrationImages:
    """A split's images as the network sees them, one at a time (1, 3, S, S): at most CALIBRATION_IMAGES.

    They are spread evenly over the manifest, which is sorted by path, so that every class and source has its part.
    """

    def __init__(self, pixels: Pixels, preprocessing: Preprocessing, most: int = CALIBRATION_IMAGES) -> None:
        count = min(most, len(pixels))
        self.places = [place * len(pixels) // count for place in range(count)]
        self.pixels, self.preprocessing = pixels, preprocessing

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[Floats]:
        for place in self.places:
            image = center_crop(self.pixels[place], self.preprocessing.image_size)
            yield normalise(image[None], self.preprocessing)


class _Reader:
    """The images as ONNX Runtime's quantiser asks for them, from the start as often as it likes."""

    def __init__(self, images: CalibrationImages) -> None:
        self._images = images
        self.rewind()

    def rewind(self) -> None:
        self._left = iter(self._images)

    def get_next(self) -> dict[str, Floats] | None:
        found = next(self._left, None)
        return None if found is None else {INPUT: found}

    def __iter__(self) -> _Reader:
        return self

    def __next__(self) -> dict[str, Floats]:
        found = self.get_next()
        if found is None:
            raise StopIteration
        return found


def quantise_onnx(file: Path, images: CalibrationImages, method: Method = ONNX_METHOD) -> dict[str, Any]:
    """Turn an ONNX file into int8 in its place, weights by channel, and return what it was made with.

    method: `nncf` or `onnxruntime`, both of which write QuantizeLinear and DequantizeLinear around each operator.
    Raises ZooError where the package is missing or cannot quantise this network.
    """
    try:
        with quiet():
            proto = _by_nncf(file, images) if method == "nncf" else _by_onnxruntime(file, images)
            file.write_bytes(without_traces(proto))
    except (ZooError, OSError):
        raise
    except Exception as error:  # quantisers raise of every kind
        raise _refused(method, error) from error
    return {"quantiser": method, method: version(method), "calibration_images": len(images)}


def _by_nncf(file: Path, images: CalibrationImages) -> Any:
    import onnx

    nncf = need_nncf()
    dataset = nncf.Dataset(list(images), lambda each: {INPUT: each})
    return nncf.quantize(onnx.load(str(file)), dataset, subset_size=len(images))


def _by_onnxruntime(file: Path, images: CalibrationImages) -> Any:
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".quantise-") as folder:
        prepared, made = Path(folder) / "prepared.onnx", Path(folder) / "made.onnx"
        quant_pre_process(str(file), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(made),
            _Reader(images),  # what it needs of a CalibrationDataReader
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
        return onnx.load(str(made))


def quantise_openvino(onnx_file: Path, folder: Path, images: CalibrationImages) -> dict[str, Any]:
    """Write an ONNX file as an OpenVINO model in int8, and return what it was made with; errors as `quantise_onnx`."""
    openvino, nncf = need_openvino(), need_nncf()
    try:
        with quiet():
            model = openvino.convert_model(str(onnx_file))
            made = nncf.quantize(model, nncf.Dataset(list(images), lambda each: {INPUT: each}), subset_size=len(images))
            facts = save_openvino(made, folder)
    except OSError:
        raise
    except Exception as error:
        raise _refused("nncf", error) from error
    return {**facts, "quantiser": "nncf", "nncf": version("nncf"), "calibration_images": len(images)}


def halve_onnx(file: Path) -> dict[str, Any]:
    """Turn an ONNX file's weights and sums into float16 in its place; inputs and outputs stay float32.

    By `onnxruntime.transformers.float16`; values beyond what float16 holds are cut to its range. On a CPU without
    float16 units ONNX Runtime computes in float32 after all: such a file is smaller, not faster.
    """
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    try:
        with quiet():
            proto = convert_float_to_float16(onnx.load(str(file)), keep_io_types=True)
            file.write_bytes(without_traces(proto))
    except OSError:
        raise
    except Exception as error:
        raise ZooError(f"this network cannot be turned into fp16: {one_line(error, 160)}; take float32") from error
    return {"converter": "onnxruntime.transformers.float16", "onnxruntime": version("onnxruntime")}


def need_nncf() -> Any:
    """Return the module `nncf`, which then calls nobody; raises ZooError where it is not installed."""
    need_openvino()  # which keeps telemetry from being imported
    try:
        with quiet():
            import nncf
    except ImportError:
        raise ZooError("NNCF is not installed; install it with: pip install 'zoo[openvino]'") from None
    return nncf


def _refused(method: str, error: Exception) -> ZooError:
    return ZooError(f"{method} cannot quantise this network: {one_line(error, 160)}; take float32 or fp16")
