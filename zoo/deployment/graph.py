"""The network as a runtime's file: ONNX by torch's exporters, OpenVINO from that; nothing of this machine in it."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo.deployment.bundle import MODEL_FILES
from zoo.deployment.runtime import INPUT, LOGITS, MAP, Session, need_openvino
from zoo.errors import ZooError, one_line
from zoo.models.registry import classifier_of

OPSET = 20
_OLD_OPSET = 17  # the older exporter knows no newer one for all layers
_CLOSE = 1e-3  # of the greatest logit, on random images: of a graph that is the network, and not some other function
_TRIED_BATCHES = (1, 3)


class _Exported(nn.Module):
    """What is traced: logits and, for a network that pools and then is linear, each class's map before pooling."""

    def __init__(self, model: Any, classifier: nn.Linear | nn.Conv2d | None) -> None:
        super().__init__()
        self.model = model
        # Its own copy: a large weight that the graph itself reshapes is one that NNCF cannot read.
        weight = None if classifier is None else _as_convolution(classifier.weight.detach()).clone()
        self.map_weight = None if weight is None else nn.Parameter(weight, requires_grad=False)

    def forward(self, images: torch.Tensor) -> Any:
        if self.map_weight is None:
            return self.model(images)
        values = self.model.forward_features(images)
        return self.model.forward_head(values), nn.functional.conv2d(values, self.map_weight)


def write_onnx(model: nn.Module, image_size: int, file: Path) -> tuple[dict[str, Any], bool]:
    """Write a network as ONNX with a free batch; return exporter, opset and versions, and whether it gives class maps.

    torch's newer exporter, else, where that fails or gives another function, the older one, with `fallback`: what went
    wrong. The example batch is of 2 images: of 1, the exporter would fix the batch. The same network gives the same
    bytes. Raises ZooError where neither can.
    """
    _need_onnx()
    model = model.to(memory_format=torch.contiguous_format).eval()
    wrapped = _Exported(model, pooled_classifier(model, image_size)).eval()
    mapped, why = wrapped.map_weight is not None, ""
    for name, write, opset in _EXPORTERS:
        try:
            with quiet(), torch.no_grad():
                proto = write(wrapped, torch.zeros(2, 3, image_size, image_size), [LOGITS, MAP][: 1 + mapped])
            file.write_bytes(onnx_bytes(proto))
            fault = _fault(wrapped, file, image_size)
        except OSError:
            raise
        except Exception as error:  # torch's exporters raise of every kind
            fault = type(error).__name__ if not isinstance(error, ZooError) else "no runtime can open it"
        if not fault:
            facts = {"name": name, "opset": opset, **{each: version(each) for each in ("torch", "onnx", "onnxscript")}}
            return {**facts, **({"fallback": why} if why else {})}, mapped
        why = f"{name}: {fault}"
    raise ZooError(f"this network cannot be written as ONNX ({one_line(why)}); choose another model for deployment")


def _by_dynamo(model: nn.Module, images: torch.Tensor, outputs: list[str]) -> Any:
    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=[INPUT],
        output_names=outputs,
        opset_version=OPSET,
        verbose=False,
    )
    assert program is not None
    return program.model_proto


def _by_trace(model: nn.Module, images: torch.Tensor, outputs: list[str]) -> Any:
    import io

    import onnx

    stream = io.BytesIO()
    axes = {name: {0: "batch"} for name in (INPUT, *outputs)}
    torch.onnx.export(
        model,
        (images,),
        stream,  # type: ignore[arg-type]  # the older exporter writes to any stream
        dynamo=False,
        dynamic_axes=axes,
        input_names=[INPUT],
        output_names=outputs,
        opset_version=_OLD_OPSET,
    )
    return onnx.load_from_string(stream.getvalue())


_EXPORTERS = (("torch.onnx dynamo", _by_dynamo, OPSET), ("torch.onnx TorchScript", _by_trace, _OLD_OPSET))


def _fault(wrapped: _Exported, file: Path, image_size: int) -> str | None:
    """Return why a written graph is not the network, tried with batches other than the example; None where it is."""
    session = Session(file, "onnx")
    generator = torch.Generator().manual_seed(0)
    for count in _TRIED_BATCHES:
        images = torch.randn(count, 3, image_size, image_size, generator=generator)
        with torch.no_grad():
            expected = wrapped(images)
        wanted = expected if isinstance(expected, tuple) else (expected,)
        for place, (one, two) in enumerate(zip(session(images.numpy()), wanted, strict=False)):
            found = torch.from_numpy(one)
            if found.shape != two.shape or not _alike(found, two, _CLOSE):
                return f"its {(LOGITS, MAP)[place]} differs for a batch of {count}"
    return None


def onnx_bytes(proto: Any) -> bytes:
    """Return a graph's bytes without what names places on this machine; raises ZooError for weights outside of it."""
    import onnx

    from zoo.deployment.onnx_file import check_onnx

    def clean(message: Any) -> None:
        for name in ("doc_string", "metadata_props"):
            if name in message.DESCRIPTOR.fields_by_name:
                message.ClearField(name)
        for descriptor, value in message.ListFields():
            if descriptor.message_type is None:
                continue
            for each in [value] if hasattr(value, "ListFields") else value:
                clean(each)

    clean(proto)
    onnx.checker.check_model(proto)
    data: bytes = proto.SerializeToString(deterministic=True)
    check_onnx(data)
    return data


def _as_convolution(weight: torch.Tensor) -> torch.Tensor:
    return weight if weight.ndim == 4 else weight[:, :, None, None]


def pooled_classifier(model: Any, image_size: int) -> nn.Linear | nn.Conv2d | None:
    """Return the last layer of a network whose logits are the mean over places of a linear map; proven on numbers.

    Only then a class's map is what its logit was made of (Zhou et al. 2016, arXiv 1512.04150).
    """
    if not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
        return None
    try:
        _, classifier = classifier_of(model)
    except ZooError:
        return None
    if not isinstance(classifier, nn.Linear | nn.Conv2d):
        return None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        images = torch.randn(2, 3, image_size, image_size, generator=generator)
        try:  # a network of the user's own may call its parts otherwise
            values = model.forward_features(images)
            whole = _alike(model(images), model.forward_head(model.forward_features(images)))
        except Exception:
            return None
        if not whole or not isinstance(values, torch.Tensor) or values.ndim != 4:
            return None
        if (*values.shape[1:2], 1, 1) != _as_convolution(classifier.weight).shape[1:]:
            return None
        own = classifier.weight.detach().clone(), None if classifier.bias is None else classifier.bias.detach().clone()
        try:  # a fresh head is zero, which would prove nothing
            classifier.weight.normal_(generator=generator)
            maps = nn.functional.conv2d(values, _as_convolution(classifier.weight), classifier.bias)
            close = _alike(maps.mean((2, 3)), model.forward_head(values.clone()))
        finally:
            classifier.weight.copy_(own[0])
            if own[1] is not None and classifier.bias is not None:
                classifier.bias.copy_(own[1])
    return classifier if close else None


def _alike(one: torch.Tensor, two: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return one.shape == two.shape and float((one - two).abs().max()) <= tolerance * max(1e-6, float(two.abs().max()))


def write_openvino(onnx_file: Path, folder: Path, half: bool = False) -> dict[str, Any]:
    """Write an ONNX file as OpenVINO's model.xml and model.bin, and return the versions; half: weights as float16."""
    openvino = need_openvino()
    with quiet():
        model = openvino.convert_model(str(onnx_file))
        return save_openvino(model, folder, half)


def save_openvino(model: Any, folder: Path, half: bool = False) -> dict[str, Any]:
    """Write an OpenVINO model without what names files of this machine."""
    openvino = need_openvino()
    for key in ("conversion_parameters", "nncf"):
        if key in model.get_rt_info():
            model.set_rt_info("", key)
    for number, each in enumerate(model.get_ordered_ops()):
        if each.get_type_name() not in ("Parameter", "Result"):
            each.set_friendly_name(f"{each.get_type_name()}_{number}")  # numbered by the process, else
    try:
        openvino.save_model(model, str(folder / MODEL_FILES["openvino"][0]), compress_to_fp16=half)
    except RuntimeError as error:  # a full disk among others, which it does not name
        raise ZooError(
            f"OpenVINO cannot write the network: {one_line(error, 160)}; free space on that disk, or take format onnx"
        ) from error
    return {"openvino": version("openvino")}


def _need_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ZooError(
            f"{one_line(error.name or 'onnx')} is not installed; install it with: pip install 'zoo[export]'"
        ) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what exporters print, warn and log off the screen, and what OpenVINO's tools tell a server on this machine.

    The latter for who imported `openvino` before: otherwise `need_openvino` has taken their telemetry from them.
    """
    import contextlib

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            Path(os.devnull).open("w", encoding="utf-8") as nowhere,
            _mute(sys.modules.get("openvino_telemetry")),
        ):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stdout(nowhere):
                yield
    finally:
        logging.disable(before)


_TELLS = ("send_", "start_", "end_", "force_")


class _Mute:
    """What OpenVINO's tools take for their telemetry: it hears all and tells nobody."""

    def __init__(self, *given: Any, **named: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith(_TELLS):
            return _Mute
        raise AttributeError(name)


@contextmanager
def _mute(telemetry: Any) -> Iterator[None]:
    if telemetry is None:
        yield
        return
    own = telemetry.Telemetry
    sends = {name: value for name, value in vars(own).items() if name.startswith(_TELLS)}
    telemetry.Telemetry = _Mute  # OpenVINO's converter makes one at each call
    for name in sends:
        setattr(own, name, _Mute)  # NNCF has kept one since it was imported
    try:
        yield
    finally:
        telemetry.Telemetry = own
        for name, value in sends.items():
            setattr(own, name, value)
