"""Every model by name: the from-scratch CNN, the user's own, timm's with each of its weights."""

from __future__ import annotations

import fnmatch
import inspect
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import Hindered, ZooError, nearest, one_line
from zoo.models import nets
from zoo.models.carried import CarriedWeights, carried_weights
from zoo.models.fingerprint import network_digest
from zoo.models.nets import classifier_of, classifiers_of, count_params
from zoo.models.spec import (
    NOT_STATED,
    ModelSpec,
    load_plugins,
    own_models,
    own_row,
    params_of,
    plain_preprocessing,
    register_model,
    write_params_table,
)
from zoo.models.weights import KNOWN_WEIGHTS, AtHand, scan_weights, weights_at_hand
from zoo.runs import Preprocessing

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "ModelSpec",
    "classifier_of",
    "classifiers_of",
    "count_params",
    "create_model",
    "find_model",
    "list_models",
    "load_plugins",
    "preprocessing_for",
    "register_model",
    "write_params_table",
]

MIN_IMAGE_SIZE = 16
_SPDX = {
    "apache-2.0": "Apache-2.0",
    "bsd-3-clause": "BSD-3-Clause",
    "cc-by-4.0": "CC-BY-4.0",
    "cc-by-nc-4.0": "CC-BY-NC-4.0",
    "mit": "MIT",
    "unknown": NOT_STATED,
}
_TAG = re.compile(r"[A-Za-z0-9_.+-]{1,100}")
_UNUSABLE = "unusable: "
_METADATA_KEYS = ("mean", "std", "crop_pct", "interpolation", "image_size")
_METADATA = "mean and std as three numbers, crop_pct as a number, a known interpolation, image_size in pixels"


def list_models(pattern: str = "*") -> list[ModelSpec]:
    """Return the rows whose name fits a glob, or holds the pattern where it is none; case does not matter.

    simple_cnn and the user's own come first, then timm's in natural order, each with its weights.
    """
    glob = pattern.lower() if re.search(r"[*?\[]", pattern) else f"*{pattern.lower()}*"
    fits = re.compile(fnmatch.translate(glob)).match
    found = scan_weights()
    rows = (spec for spec in _all_rows(found) if fits(spec.name.lower()))
    return [replace(spec, weights_at_hand=weights_at_hand(spec, found)) for spec in rows]


def _all_rows(found: AtHand) -> Iterator[ModelSpec]:
    load_plugins()
    import timm

    for arch in ("simple_cnn", *sorted(own_models)):
        yield from _rows_of(arch, found)
    for arch in timm.list_models():
        yield from _timm_rows(arch, found)


def _rows_of(arch: str, found: AtHand) -> list[ModelSpec]:
    """Return the rows of an architecture, none where it is unknown."""
    import timm

    if arch == "simple_cnn" or arch in own_models:
        plain = _simple_cnn() if arch == "simple_cnn" else own_row(arch)
        return [plain, *_file_rows(plain, [plain], found)]
    if timm.is_model(arch) and arch not in timm.models.get_deprecated_models():
        return list(_timm_rows(arch, found))
    return []


def find_model(name: str) -> ModelSpec:
    """Return the row of `arch.tag`, or of `arch` with timm's default weights.

    An architecture of which timm has no weights gives the row of its only file in ZOO_WEIGHTS, else a row
    without weights. Raises ZooError with the nearest name, or with the known tags, where there is none.

    >>> find_model("resnet18").name, find_model("resnet18.a1_in1k").preprocessing.crop_pct
    ('resnet18.a1_in1k', 0.95)
    """
    load_plugins()
    arch, _, tag = name.partition(".")
    found = scan_weights()
    rows = _rows_of(arch, found)
    if not rows:
        raise _unknown_model(name, arch)
    by_tag = {row.tag: row for row in rows}
    tag = tag or _default_tag(rows, found)
    if tag not in by_tag:
        tags = sorted(filter(None, by_tag))
        known = f"known: {', '.join(tags)}" if tags else "none is known"
        raise Hindered(
            f"model {arch!r} has no weights of the tag {one_line(tag)!r}{nearest(tag, tags)} ({known}; "
            f"a file {arch}.TAG.safetensors in ZOO_WEIGHTS adds one)"
        )
    row = by_tag[tag]
    if row.summary.startswith(_UNUSABLE):
        raise Hindered(row.summary.removeprefix(_UNUSABLE))
    return replace(row, weights_at_hand=weights_at_hand(row, found))


def _default_tag(rows: list[ModelSpec], found: AtHand) -> str:
    """Return timm's default tag; where timm has none, that of the only file at hand, else none."""
    import timm

    arch = rows[0].arch
    if rows[0].hub_id or rows[0].url:
        return timm.models.get_pretrained_cfg(arch).tag or ""
    files = {tag for tag, _ in found.files.get(arch, ())}
    return files.pop() if len(files) == 1 else ""


def _unknown_model(name: str, arch: str) -> ZooError:
    import timm

    moved = timm.models.get_deprecated_models().get(arch)
    if moved:
        return ZooError(f"the model {one_line(name)!r} is now called {moved!r}; use that name")
    names = ["simple_cnn", *own_models, *timm.list_models()]
    return ZooError(
        f"unknown model {one_line(name, 80)!r}{nearest(arch, names) or ';'} `zoo list models PATTERN` "
        f"searches the names of all {len(names)} architectures"
    )


def _simple_cnn() -> ModelSpec:
    return ModelSpec(
        "simple_cnn",
        "simple_cnn",
        "",
        "zoo",
        params_of("simple_cnn"),
        plain_preprocessing(224),
        "no weights",
        summary="small residual CNN, trained from scratch",
    )


def _timm_rows(arch: str, found: AtHand) -> Iterator[ModelSpec]:
    """Yield an architecture's rows: one for each of timm's tags, or one without; then those outside timm."""
    import timm

    cfgs = timm.models.get_arch_pretrained_cfgs(arch)
    plain = _timm_row(arch, arch, timm.models.get_pretrained_cfg(arch, allow_unregistered=True))
    rows = [_timm_row(name, arch, cfg) for name, cfg in cfgs.items() if cfg.has_weights]
    rows = rows or [replace(plain, hub_id="", url="", summary="timm publishes no weights")]
    rows += [_known_row(plain, name) for name in KNOWN_WEIGHTS if name.partition(".")[0] == arch]
    rows += [_carried_row(plain, each) for name, each in carried_weights().items() if name.partition(".")[0] == arch]
    yield from rows
    yield from _file_rows(plain, rows, found)


def _timm_row(name: str, arch: str, cfg: Any) -> ModelSpec:
    head = f"{cfg.num_classes} classes" if cfg.num_classes else "no head"
    return ModelSpec(
        name,
        arch,
        name.partition(".")[2],
        "timm",
        params_of(arch),
        Preprocessing(
            # timm's few inputs that are not square are taken at their longer side
            image_size=max(cfg.input_size[1:]),
            crop_pct=min(1.0, cfg.crop_pct),
            interpolation=cfg.interpolation if cfg.interpolation in ("bilinear", "lanczos") else "bicubic",
            mean=cfg.mean,
            std=cfg.std,
        ),
        _SPDX.get(cfg.license or "unknown", cfg.license),
        cfg.fixed_input_size,
        cfg.hf_hub_id or "",
        cfg.url if isinstance(cfg.url, str) else "",
        summary=cfg.description or f"timm's weights, {head}",
    )


def _known_row(plain: ModelSpec, name: str) -> ModelSpec:
    known = KNOWN_WEIGHTS[name]
    return replace(
        plain,
        name=name,
        tag=name.partition(".")[2],
        origin="file",
        preprocessing=plain.preprocessing.model_copy(update={"mean": known.mean, "std": known.std}),
        licence=known.licence,
        hub_id="",
        url="",
        summary=known.summary,
        sha256=known.sha256,
        options=known.options,
    )


def _carried_row(plain: ModelSpec, carried: CarriedWeights) -> ModelSpec:
    return replace(
        plain,
        name=carried.name,
        tag=carried.name.partition(".")[2],
        origin="carried",
        preprocessing=Preprocessing.model_validate(
            {key: getattr(carried, key) for key in ("image_size", "crop_pct", "interpolation", "mean", "std")}
        ),
        licence=carried.licence,
        hub_id="",
        url="",
        summary=carried.summary,
        sha256=carried.sha256,
        size_bytes=carried.size_bytes,
    )


def _file_rows(plain: ModelSpec, known: list[ModelSpec], found: AtHand) -> Iterator[ModelSpec]:
    """Yield a row for each tag in ZOO_WEIGHTS that is not known yet.

    Its preprocessing is what the file states, else that of the tag that it extends, else the architecture's.
    """
    tags = {row.tag for row in known}
    # Of two files with one tag the .safetensors file wins, which can state its preprocessing.
    files = dict(sorted(found.files.get(plain.arch, []), key=lambda each: each[1].suffix == ".safetensors"))
    for tag, path in sorted(files.items()):
        if tag in tags or not _TAG.fullmatch(tag):
            continue
        extended = [row for row in known if row.tag and tag.startswith(row.tag)]
        row = replace(
            max(extended, key=lambda row: len(row.tag), default=plain),
            name=f"{plain.arch}.{tag}",
            tag=tag,
            origin="file",
            licence=NOT_STATED,
            hub_id="",
            url="",
            summary=f"{path.name} in ZOO_WEIGHTS",
            sha256=None,
        )
        try:
            yield _with_metadata(row, path)
        except ZooError as error:
            # A listing goes on; `find_model` refuses the row.
            yield replace(row, summary=f"{_UNUSABLE}{error}")


def _with_metadata(row: ModelSpec, path: Path) -> ModelSpec:
    """Return the row with the preprocessing and the licence that a safetensors file states."""
    if path.suffix != ".safetensors":
        return row
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            said: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise ZooError(f"{path.name!r} in ZOO_WEIGHTS is no whole safetensors file: {one_line(error, 120)}") from error
    update: dict[str, Any] = {key: said[key] for key in _METADATA_KEYS if key in said}
    if row.fixed_input_size:
        update.pop("image_size", None)  # the architecture's own, which `create_model` changes where it can
    try:
        for key in {"mean", "std"} & set(update):
            update[key] = tuple(float(part) for part in update[key].strip(" []()").split(","))
        preprocessing = Preprocessing.model_validate({**row.preprocessing.model_dump(), **update})
    except ValueError as error:
        raise ZooError(
            f"{path.name!r} in ZOO_WEIGHTS: its metadata must hold {_METADATA}. "
            f"Got {one_line(update)}; mend it or remove the file"
        ) from error
    where = f"{path.name!r} in ZOO_WEIGHTS: its metadata"
    _check_preprocessing(preprocessing, where)
    if preprocessing.image_size < MIN_IMAGE_SIZE:
        raise ZooError(f"{where} must have image_size of at least {MIN_IMAGE_SIZE}. Got {preprocessing.image_size}")
    licence = said.get("licence") or said.get("license") or row.licence
    return replace(row, preprocessing=preprocessing, licence=one_line(licence, 40))


def _check_preprocessing(made: Preprocessing, where: str) -> None:
    if not all(math.isfinite(each) for each in (*made.mean, *made.std)) or min(made.std) <= 0:
        raise ZooError(f"{where} must have finite mean and std, std above 0. Got {made.mean} and {made.std}")
    if not 0 < made.crop_pct <= 1:
        raise ZooError(f"{where} must have crop_pct above 0, at most 1. Got {made.crop_pct:g}")


def preprocessing_for(
    spec: ModelSpec,
    image_size: int | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    interpolation: str | None = None,
    crop_pct: float | None = None,
) -> Preprocessing:
    """Return the model's preprocessing, with whatever a recipe gives in place of its own.

    An interpolation that is unknown, timm's `random` among them, becomes bicubic. Raises ZooError for an
    image size that the architecture cannot take: below 16 pixels, or no multiple of its patches. What only
    building the network can tell, `create_model` refuses.

    >>> preprocessing_for(find_model("resnet18"), image_size=128).resize_size
    134
    """
    given = {"image_size": image_size, "mean": mean, "std": std, "crop_pct": crop_pct}
    update: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if interpolation is not None:
        known = ("bilinear", "bicubic", "lanczos", "nearest")
        update["interpolation"] = interpolation if interpolation in known else "bicubic"
    made = Preprocessing.model_validate({**spec.preprocessing.model_dump(), **update})
    _check_preprocessing(made, "model")
    if image_size is not None:
        _check_image_size(spec, image_size)
    return made


def _check_image_size(spec: ModelSpec, image_size: int) -> None:
    if image_size < MIN_IMAGE_SIZE:
        raise ZooError(f"model.image_size must be at least {MIN_IMAGE_SIZE} pixels. Got {image_size}")
    patch = re.search(r"patch(\d+)", spec.arch) if spec.fixed_input_size else None
    if patch and image_size % int(patch.group(1)):
        step = int(patch.group(1))
        below = max(step, image_size // step * step)
        raise ZooError(
            f"model.image_size must be a multiple of {step} for {spec.name!r}. Got {image_size}; "
            f"take {below} or {below + step}"
        )


def create_model(
    spec: ModelSpec,
    num_classes: int,
    image_size: int | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    options: dict[str, Any] | None = None,
) -> nn.Module:
    """Return the network with random weights, drawn from torch's global generator; in training mode.

    It maps float images (N, 3, image_size, image_size) to logits (N, num_classes); image_size: pixels, the
    model's own where left out. drop_rate: dropout before the classifier; drop_path_rate: stochastic depth.
    options: what the architecture's constructor takes besides. Raises ZooError for an image size, option or
    rate that the architecture does not know, and for one that is no classifier.
    """
    pixels = image_size or spec.preprocessing.image_size
    _check_image_size(spec, pixels)
    chosen = {**dict(spec.options), **(options or {})}
    if spec.arch == "simple_cnn" or spec.arch in own_models:
        model: nn.Module = _create_own(spec, num_classes, drop_rate, drop_path_rate, chosen)
        nets.check_forward(model, spec.name, num_classes, pixels)
        return model
    resized = spec.fixed_input_size and pixels != spec.preprocessing.image_size
    name = spec.name if spec.origin == "timm" else spec.arch
    build: dict[str, Any] = {
        "image_size": pixels if resized else None,
        "drop_rate": drop_rate,
        "drop_path_rate": drop_path_rate,
        "options": nets.check_options(chosen),
    }
    # On the meta device first: a size that is refused costs neither memory nor the drawing of random weights.
    nets.check_timm(name, num_classes, pixels, **build)
    return nets.build_timm(name, num_classes, **build)


def _create_own(
    spec: ModelSpec, num_classes: int, drop_rate: float, drop_path_rate: float, options: dict[str, Any]
) -> Any:
    rates = {"drop_rate": drop_rate, "drop_path_rate": drop_path_rate}
    build: Callable[..., Any] = nets.SimpleCNN if spec.arch == "simple_cnn" else own_models[spec.arch].build
    allowed = inspect.signature(build).parameters
    any_option = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in allowed.values())
    for key, rate in rates.items():
        if rate and key not in allowed and not any_option:
            raise ZooError(f"model {spec.name!r} has no {key}; leave model.{key} out")
    for key in options:
        if key == "num_classes" or (key not in allowed and not any_option):
            raise ZooError(
                f"model.options: {spec.name!r} has no option {one_line(key)!r}"
                f"{nearest(key, list(allowed)[1:]) or '; leave it out'}"
            )
    try:
        model: Any = build(num_classes, **{key: rate for key, rate in rates.items() if rate}, **options)
    except ZooError:
        raise
    except Exception as error:
        raise ZooError(
            f"model {spec.name!r} cannot be built: {type(error).__name__}: {one_line(error)}; mend the "
            "function that makes it"
        ) from error
    if not hasattr(model, "parameters"):
        raise ZooError(
            f"model {spec.name!r} must be a torch nn.Module. Got a {type(model).__name__}; mend its function"
        )
    if not hasattr(model, "num_classes"):
        model.num_classes = num_classes  # by which `classifier_of` knows its last layer
    return model


def own_network_digest(spec: ModelSpec, model: nn.Module) -> str | None:
    """Return what identifies a user's own network; None for one that its package's version identifies."""
    return network_digest(model, own_models[spec.arch].build) if spec.origin == "own" else None
