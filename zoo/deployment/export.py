"""From a finished run to a bundle: the network in a runtime's format, with what is needed to use and to trust it."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import nn

from zoo.data.decode import decode, resize
from zoo.data.transforms import center_crop, normalise
from zoo.data.window import windowing_of
from zoo.deployment.bundle import (
    CARD,
    MODEL_FILES,
    RECORD,
    SAMPLE,
    SUMS,
    Bundle,
    BundleRecord,
    Sample,
    open_bundle,
    sums_text,
)
from zoo.deployment.runtime import INPUT, LOGITS, MAP, Session
from zoo.files import Home, home, sha256_file, to_json, write_error
from zoo.models.registry import classifier_of
from zoo.runs import Preprocessing, Run, find_run
from zoo.training.scoring import finished_record, load_model

OPSET = 20
_TOLERANCE = {"float32": 1e-3, "fp16": 2e-2, "bf16": 5e-2, "int8": 2e-1}


class _Exported(nn.Module):
    """What is traced: logits and, for a network that pools and then is linear, each class's map before pooling."""

    def __init__(self, model: Any, classifier: nn.Linear | None) -> None:
        super().__init__()
        self.model, self.classifier = model, classifier

    def forward(self, images: torch.Tensor) -> Any:
        if self.classifier is None:
            return self.model(images)
        values = self.model.forward_features(images)
        weight = self.classifier.weight[:, :, None, None]
        return self.model.forward_head(values), nn.functional.conv2d(values, weight)


def export(
    run: Run | str,
    root: Home | None = None,
    *,
    format: Literal["onnx", "openvino"] = "onnx",  # noqa: A002
    precision: Literal["float32", "fp16", "bf16", "int8"] = "float32",
) -> Bundle:
    """Return the bundle of a finished run, written below `models/bundles/`."""
    root = root or home()
    run = find_run(run, root) if isinstance(run, str) else run
    record = finished_record(run)
    assert record.preprocessing is not None
    name = f"{run.name}--{format}-{precision}"
    root.bundles.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=root.bundles, prefix=".new-"))
    try:
        model = load_model(run, root)
        exporter, mapped = write_onnx(model, record.preprocessing.image_size, staging / MODEL_FILES["onnx"][0])
        (staging / CARD).write_text(f"# {name}\n", encoding="utf-8")
        (staging / SAMPLE).write_bytes(sample_png())
        session = Session(staging / MODEL_FILES[format][0], format, precision)
        logits = session(normalise(_pixels(sample_png(), record.preprocessing)[None], record.preprocessing))[0][0]
        kept = {key: getattr(record, key) for key in ("dataset", "recipe", "seed", "model", "params", "weights")}
        bundle = BundleRecord(
            name=name,
            run=run.name,
            **kept,
            classes=record.classes,
            negative_class=record.negative_class,
            preprocessing=record.preprocessing,
            tta=record.tta,
            format=format,
            precision=precision,
            activation_map=mapped,
            exporter=exporter,
            split_digest=record.split_digest,
            weights_sha256=record.weights_sha256,
            sample=Sample(logits=logits.tolist(), tolerance=_TOLERANCE[precision]),
            files={each: sha256_file(staging / each) for each in (*MODEL_FILES[format], CARD, SAMPLE)},
        )
        (staging / RECORD).write_text(to_json(bundle.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
        (staging / SUMS).write_text(sums_text({path.name: sha256_file(path) for path in staging.iterdir()}))
        staging.chmod(0o755)
        shutil.rmtree(root.bundles / name, ignore_errors=True)
        staging.replace(root.bundles / name)
    except OSError as error:
        raise write_error(root.bundles / name, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return open_bundle(name, root)


def write_onnx(model: nn.Module, image_size: int, file: Path) -> tuple[dict[str, Any], bool]:
    """Write a network as ONNX with a free batch; return exporter, opset and versions, and whether it gives class maps.

    The example batch is of 2 images: of 1, the exporter would fix the batch.
    """
    import onnx

    images = torch.zeros(2, 3, image_size, image_size)
    model = model.to(memory_format=torch.contiguous_format)
    wrapped = _Exported(model, _pooled_classifier(model, image_size)).eval()
    mapped = wrapped.classifier is not None
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            wrapped,
            (images,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=[INPUT],
            output_names=[LOGITS, MAP] if mapped else [LOGITS],
            opset_version=OPSET,
            verbose=False,
        )
        assert program is not None
        program.save(os.fspath(file), external_data=False)
    return {"name": "torch.onnx dynamo", "opset": OPSET, "torch": torch.__version__, "onnx": onnx.__version__}, mapped


def _pooled_classifier(model: Any, image_size: int) -> nn.Linear | None:
    """Return the last layer of a network whose logits are the mean over places of a linear map; proven on numbers.

    Only then a class's map is what its logit was made of (Zhou et al. 2016, arXiv 1512.04150).
    """
    if not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
        return None
    _, classifier = classifier_of(model)
    if not isinstance(classifier, nn.Linear):
        return None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        values = model.forward_features(torch.randn(2, 3, image_size, image_size, generator=generator))
        if not isinstance(values, torch.Tensor) or values.ndim != 4 or values.shape[1] != classifier.in_features:
            return None
        maps = nn.functional.conv2d(values, classifier.weight[:, :, None, None], classifier.bias)
        close = torch.allclose(maps.mean((2, 3)), model.forward_head(values), rtol=1e-4, atol=1e-4)
    return classifier if close else None


def sample_png() -> bytes:
    """Return the bundle's sample: a drawn picture, for no patient's image should travel with a model."""
    y, x = np.mgrid[0:288, 0:352].astype(np.float64)
    waves = [np.sin(x / a + y / b) for a, b in ((23, 61), (47, -29), (-17, 83))]
    noise = np.random.default_rng(0).normal(0, 12, (288, 352, 3))
    pixels = np.clip(np.stack(waves, axis=2) * 90 + 128 + noise, 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def _pixels(data: bytes, preprocessing: Preprocessing) -> np.ndarray[Any, np.dtype[np.uint8]]:
    decoded = decode(data, windowing_of(preprocessing))
    resized = resize(decoded, preprocessing.resize_size, preprocessing.interpolation)
    return center_crop(resized, preprocessing.image_size)
