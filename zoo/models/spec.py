"""One row of the registry, the table of parameters, and the models that a user registers."""

from __future__ import annotations

import csv
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from zoo.errors import ZooError, one_line
from zoo.files import atomic_writer, check_name, user_path
from zoo.models import nets
from zoo.models.nets import count_params
from zoo.runs import Preprocessing

Builder = TypeVar("Builder", bound=Callable[..., Any])
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
NOT_STATED = "not stated"
_PARAMS_TABLE = Path(__file__).with_name("params.csv")


@dataclass(frozen=True)
class ModelSpec:
    """One row of the registry: an architecture, perhaps with the tag of its weights, and its preprocessing.

    name: `arch.tag`, or `arch` where there is no tag. origin: `timm`; `zoo` (simple_cnn); `own` (registered
    by the user); `file` (weights outside timm, found by name in ZOO_WEIGHTS); `carried` (weights in this
    package). params: parameters with 1000 classes, None where that cannot be told. licence: of the weights, as
    their source states it.
    fixed_input_size: built for one image size, which `create_model` may change. hub_id, url: where the
    weights are published, or empty. weights_at_hand: `file`, `carried`, `hub cache` or empty. sha256,
    size_bytes: of the weights, where known in advance. options: what the architecture is built with.
    """

    name: str
    arch: str
    tag: str
    origin: Literal["timm", "zoo", "own", "file", "carried"]
    params: int | None
    preprocessing: Preprocessing
    licence: str
    fixed_input_size: bool = False
    hub_id: str = ""
    url: str = ""
    weights_at_hand: str = ""
    summary: str = ""
    sha256: str | None = None
    size_bytes: int | None = None
    options: nets.Options = ()


@dataclass(frozen=True)
class OwnModel:
    """What a user registered: the function that builds the network, and its row."""

    build: Callable[..., Any]
    spec: ModelSpec


own_models: dict[str, OwnModel] = {}
_loaded_plugins: set[Path] = set()


def register_model(
    name: str,
    *,
    summary: str = "",
    licence: str = "",
    preprocessing: Preprocessing | None = None,
    image_size: int = 224,
) -> Callable[[Builder], Builder]:
    """Register a function `(num_classes: int, **options) -> nn.Module` as a model that recipes can name.

    preprocessing: ImageNet's mean and std at image_size pixels where it is left out. The network maps float
    images (N, 3, H, W) to logits (N, num_classes). Raises ZooError for a name that is taken or cannot be one.

        @register_model("tiny_mlp", summary="one layer", image_size=32)
        def tiny_mlp(num_classes: int) -> nn.Module:
            return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes))
    """
    import timm

    check_name(name, "model")
    if "." in name:
        raise ZooError(f"a model's name must have no '.', which parts it from its weights' tag. Got {name!r}")
    if name in own_models or name == "simple_cnn" or timm.is_model(name):
        whose = "registered already" if name in own_models else "that of a built-in model"
        raise ZooError(f"the model name {name!r} is {whose}; choose another")
    spec = ModelSpec(
        name,
        name,
        "",
        "own",
        None,
        preprocessing or plain_preprocessing(image_size),
        licence or NOT_STATED,
        summary=summary or "registered by the user",
    )

    def register(build: Builder) -> Builder:
        own_models[name] = OwnModel(build, spec)
        return build

    return register


def load_plugins() -> None:
    """Import each .py file that the environment's ZOO_PLUGINS names, once, so that its models are registered.

    Raises ZooError that names the file which is missing or fails; nothing of it stays registered.
    """
    for named in filter(None, os.environ.get("ZOO_PLUGINS", "").split(os.pathsep)):
        path = user_path(named).resolve()
        if path in _loaded_plugins:
            continue
        if not path.is_file():
            raise ZooError(f"ZOO_PLUGINS names {one_line(named)!r}, which is no file; fix or unset it")
        before = dict(own_models)
        try:
            module_spec = importlib.util.spec_from_file_location(f"zoo_plugin_{len(_loaded_plugins)}", path)
            if module_spec is None or module_spec.loader is None:
                raise ImportError("it must be a .py file")
            module_spec.loader.exec_module(importlib.util.module_from_spec(module_spec))
        except Exception as error:
            own_models.clear()
            own_models.update(before)
            kind = "" if isinstance(error, ZooError) else f"{type(error).__name__}: "
            raise ZooError(f"ZOO_PLUGINS: {one_line(named)!r} fails: {kind}{one_line(error)}; mend the file") from error
        _loaded_plugins.add(path)


def plain_preprocessing(image_size: int) -> Preprocessing:
    """Return ImageNet's mean and std at image_size pixels, nothing cropped."""
    return Preprocessing(
        image_size=image_size, crop_pct=1.0, interpolation="bicubic", mean=IMAGENET_MEAN, std=IMAGENET_STD
    )


def own_row(name: str) -> ModelSpec:
    """Return the row of a registered model, its parameters counted."""
    return replace(own_models[name].spec, params=_own_params(own_models[name].build))


@cache
def _own_params(build: Callable[..., Any]) -> int | None:
    return nets.count_own_params(build)


def params_of(arch: str) -> int:
    """Return the number of parameters with 1000 classes: from the table, counted where that has none."""
    return _params_by_arch().get(arch) or count_params(arch)


@cache
def _params_by_arch() -> dict[str, int]:
    with _PARAMS_TABLE.open(newline="", encoding="utf-8") as stream:
        return {row["arch"]: int(row["params"]) for row in csv.DictReader(stream)}


def write_params_table(path: Path = _PARAMS_TABLE) -> None:
    """Write the table of parameters of every architecture, counted on torch's meta device (some minutes).

    Run after an update of timm: `python -c "from zoo.models.registry import *; write_params_table()"`.
    """
    import timm

    with atomic_writer(path) as stream:
        stream.write(b"arch,params\n")
        for arch in ("simple_cnn", *timm.list_models()):
            stream.write(f"{arch},{count_params(arch)}\n".encode())
