"""Running an exported network: ONNX Runtime or OpenVINO, with stated threads and number format. Needs no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from zoo.cores import cores
from zoo.deployment.onnx_file import check_onnx
from zoo.errors import ZooError, one_line

Floats = np.ndarray[Any, np.dtype[np.float32]]
Run = Callable[[Floats], list[np.ndarray[Any, Any]]]

# From 1.29 on ONNX Runtime calls home and keeps a device's id on disk; it looks once, when it is imported.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

INPUT, LOGITS, MAP = "images", "logits", "activation_map"
_OPENVINO_HINTS = {"float32": "f32", "int8": "f32", "fp16": "f16", "bf16": "bf16"}


class Session:
    """An opened network: float32 (B, 3, S, S) in, logits (B, C) and, where it has them, class maps (B, C, h, w) out.

    threads: cores of one call, all that this process may use where left out. It may be called from several threads.
    Raises ZooError where the runtime is not installed, or the file is no network that it can open.
    """

    def __init__(
        self, file: Path, form: Literal["onnx", "openvino"], precision: str = "float32", threads: int | None = None
    ) -> None:
        self.threads = threads or cores()
        opener = _open_onnx if form == "onnx" else _open_openvino
        self._run, self.outputs, self.runtime = opener(file, precision, self.threads)

    def __call__(self, images: Floats) -> tuple[Floats, Floats | None]:
        """Return logits (B, C) and class maps (B, C, h, w), None where the network gives none, both float32."""
        found = dict(zip(self.outputs, self._run(images), strict=True))
        logits, maps = found[LOGITS].astype(np.float32, copy=False), found.get(MAP)
        return logits, None if maps is None else maps.astype(np.float32, copy=False)


def _open_onnx(file: Path, precision: str, threads: int) -> tuple[Run, list[str], str]:
    try:
        import onnxruntime
    except ImportError:
        raise ZooError(_missing("onnxruntime", "runtime")) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    try:
        with file.open("rb") as stream:
            check_onnx(stream)
    except (OSError, ZooError) as error:
        raise ZooError(f"{str(file)!r} is refused: {one_line(error)}; export it again") from error
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of its own kinds, which share no parent
        raise ZooError(f"ONNX Runtime cannot open {str(file)!r}: {one_line(error, 200)}; export it again") from error
    names = [each.name for each in session.get_outputs()]

    def run(images: Floats) -> list[np.ndarray[Any, Any]]:
        found: list[np.ndarray[Any, Any]] = session.run(names, {INPUT: images})
        return found

    return run, names, f"onnxruntime {onnxruntime.__version__}"


def need_openvino() -> Any:
    """Return the module `openvino`, which then calls nobody; raises ZooError where it is not installed."""
    # None, not left out: it and NNCF send what they do to a server where they can import this.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError:
        raise ZooError(_missing("openvino", "openvino")) from None
    return openvino


def _open_openvino(file: Path, precision: str, threads: int) -> tuple[Run, list[str], str]:
    openvino = need_openvino()
    # Unasked, it computes in bf16 where the processor has units for it: other labels than were measured.
    settings = {
        "INFERENCE_PRECISION_HINT": _OPENVINO_HINTS[precision],
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    try:
        model = openvino.Core().compile_model(str(file), "CPU", settings)
    except RuntimeError as error:
        raise ZooError(f"OpenVINO cannot open {str(file)!r}: {one_line(error, 200)}; export it again") from error
    names = [port.get_any_name() for port in model.outputs]

    def run(images: Floats) -> list[np.ndarray[Any, Any]]:
        found = model.create_infer_request().infer({INPUT: images}, share_inputs=True)
        return [np.array(found[port]) for port in model.outputs]

    return run, names, f"openvino {openvino.__version__.split('-')[0]}"


def _missing(package: str, extra: str) -> str:
    return f"{package} is not installed; install it with: pip install 'zoo[{extra}]'"
