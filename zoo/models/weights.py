"""Where pretrained weights come from: a path, the folder ZOO_WEIGHTS, this package, the hub's cache, the hub."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zoo.errors import Hindered, ZooError, nearest, one_line
from zoo.files import Home, user_path
from zoo.models import hub
from zoo.models.carried import carried_weights
from zoo.models.loading import LoadReport, load_weights

if TYPE_CHECKING:
    from zoo.models.spec import ModelSpec

__all__ = [
    "KNOWN_WEIGHTS",
    "AtHand",
    "KnownWeights",
    "LoadReport",
    "WeightsFile",
    "known_tags",
    "load_weights",
    "resolve_weights",
    "scan_weights",
    "weights_at_hand",
]

SUFFIXES = (".safetensors", ".pth", ".pt")
FOLDER_SUFFIXES = (".safetensors", ".pth")


@dataclass(frozen=True)
class WeightsFile:
    """One file of weights that was found and verified.

    sha256: 64 hexadecimal digits. location: what `run.json` says of it, the same on every machine: a file's
    name, or `<hub id>@<commit>/<file>`.
    """

    path: Path
    sha256: str
    origin: Literal["recipe path", "ZOO_WEIGHTS", "carried", "hub cache", "hub"]
    location: str


@dataclass(frozen=True)
class KnownWeights:
    """Weights outside timm that the zoo knows by name: their preprocessing and digest come with the row."""

    sha256: str
    licence: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    summary: str
    options: tuple[tuple[str, Any], ...] = ()


_HALF = (0.5, 0.5, 0.5)
KNOWN_WEIGHTS = {
    "mobilenetv2_035.keras_in1k_notop": KnownWeights(
        sha256="c8badffd8cf15cb78ef012f4c59ee59bc847a764cfea50632012a5bc2b5b9097",
        licence="not stated",
        mean=_HALF,
        std=_HALF,
        summary="ImageNet-1k body from Keras, no head",
        options=(("pad_type", "same"),),  # Keras pads at the right and bottom only where the stride is 2
    ),
    "mobilenetv2_100.onnxzoo_in1k_notop": KnownWeights(
        sha256="117b8637488d4ee390303d91a1cfa9f5669197cffc6e84cd843009a57bc97335",
        licence="Apache-2.0",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        summary="ImageNet-1k body from the ONNX model zoo, no head",
    ),
    "mobilenetv2_100.tf2_in1k_ptq": KnownWeights(
        sha256="5c0a751101e6c19ad86a327f53de4e7dbc12e7b1764f42ef0ebccd899ad05986",
        licence="Apache-2.0",
        mean=_HALF,
        std=_HALF,
        summary="ImageNet-1k, de-quantised from TensorFlow 2, 1000 classes",
    ),
    "tf_mobilenetv3_small_100.keras_in1k_int8": KnownWeights(
        sha256="edf12037277a337b42c5f457b54ccfafa580bf29002ba9d882ab9cd268a9ec38",
        licence="not stated",
        mean=_HALF,
        std=_HALF,
        summary="ImageNet-1k, de-quantised from Keras, 1000 classes",
    ),
}


@dataclass(frozen=True)
class AtHand:
    """What lies on this machine: ZOO_WEIGHTS' files as (tag, path) by architecture, and the caches' names."""

    files: dict[str, list[tuple[str, Path]]] = field(default_factory=dict)
    repos: frozenset[str] = frozenset()
    urls: frozenset[str] = frozenset()


def scan_weights() -> AtHand:
    """Return what lies in ZOO_WEIGHTS and in the hub's caches; each folder is listed once.

    Raises ZooError where ZOO_WEIGHTS is set and names no folder.
    """
    files: dict[str, list[tuple[str, Path]]] = {}
    for path in _folder_files():
        arch, _, tag = path.name.removesuffix(path.suffix).partition(".")
        files.setdefault(arch, []).append((tag, path))
    return AtHand(files, hub.cached_repos(), hub.cached_urls())


def _folder_files() -> list[Path]:
    named = os.environ.get("ZOO_WEIGHTS")
    if not named:
        return []
    folder = user_path(named)
    if not folder.is_dir():
        raise Hindered(f"ZOO_WEIGHTS must name a folder of weight files. Got {one_line(named)!r}; fix or unset it")
    return sorted(path for path in folder.iterdir() if path.suffix in FOLDER_SUFFIXES and path.is_file())


def weights_at_hand(spec: ModelSpec, found: AtHand | None = None) -> str:
    """Return `carried`, `file`, `hub cache`, or an empty string where the model's weights are not on this machine.

    found: what `scan_weights()` gave, for many models at once. Nothing is read or verified.
    """
    if spec.origin == "carried":
        return "carried"
    found = found or scan_weights()
    if _in_folder(spec, found):
        return "file"
    repo, _, _ = spec.hub_id.partition("@")
    return "hub cache" if repo in found.repos or (spec.url and hub.url_name(spec.url) in found.urls) else ""


def resolve_weights(spec: ModelSpec, source: str, root: Home, offline: bool = False) -> WeightsFile | None:
    """Return the verified file that holds the model's weights; None where source is `scratch`.

    source: `scratch`; `pretrained`: where the name says carried weights, this package; else the folder ZOO_WEIGHTS, the
    hub's cache, the hub; or the path of a .safetensors, .pth or .pt file, below the home's root where it is relative.
    offline: open no connection (so does HF_HUB_OFFLINE=1). Raises ZooError, at once, where no file can be had or
    a file is not what it should be.
    """
    if source == "scratch":
        return None
    if source != "pretrained":
        return _from_path(spec, source, root)
    if spec.origin == "carried":
        carried = carried_weights()[spec.name].path
        return WeightsFile(carried, hub.checked_sha256(carried, spec.sha256), "carried", f"zoo/{carried.name}")
    in_folder = _from_folder(spec)
    if in_folder:
        return in_folder
    cached = hub.find_cached(spec.hub_id, spec.url)
    if cached:
        path, sha256, location = cached
        return WeightsFile(path, sha256, "hub cache", location)
    return _from_hub(spec, offline)


def _from_path(spec: ModelSpec, source: str, root: Home) -> WeightsFile:
    given = user_path(source)
    path = next((each for each in (root.root / given, given) if each.is_file()), None)
    if path is None:
        hint = nearest(source, ["pretrained", "scratch"]) or "; check the path"
        raise Hindered(
            "model.weights must be 'pretrained', 'scratch', a run, or a weights file. "
            f"Got {one_line(source)!r}, and there is no such file{hint}"
        )
    if path.suffix not in SUFFIXES:
        raise ZooError(f"a weights file must end in {', '.join(SUFFIXES)}. Got {one_line(path.name)!r}; convert it")
    return WeightsFile(path, hub.checked_sha256(path, _known_digest(spec, path)), "recipe path", path.name)


def _from_folder(spec: ModelSpec) -> WeightsFile | None:
    paths = _in_folder(spec, scan_weights())
    if not paths:
        return None
    digests = [hub.checked_sha256(path, _known_digest(spec, path)) for path in paths]
    if len(set(digests)) > 1:
        raise ZooError(
            f"the folder ZOO_WEIGHTS holds {len(paths)} files that fit {spec.name!r} equally well: "
            f"{', '.join(path.name for path in paths)}; keep one there, or name one in the recipe: "
            '[model] weights = "FILE"'
        )
    return WeightsFile(paths[0], digests[0], "ZOO_WEIGHTS", paths[0].name)


def _known_digest(spec: ModelSpec, path: Path) -> str | None:
    return spec.sha256 if path.name == f"{spec.name}.safetensors" else None


def _in_folder(spec: ModelSpec, found: AtHand) -> list[Path]:
    """Return the files of ZOO_WEIGHTS that fit best: the exact name first, then .safetensors before .pth."""
    fits = found.files.get(spec.arch, [])
    if spec.tag and fits:
        tags = known_tags(spec.arch)
        fits = [(tag, path) for tag, path in fits if _extends(tag, spec.tag, tags)]
    best = [(tag, path) for tag, path in fits if tag == spec.tag] or fits
    if not spec.tag and len({tag for tag, _ in best}) > 1:
        return [path for _, path in best]  # nothing says which of the tags is meant
    rank = min((FOLDER_SUFFIXES.index(path.suffix) for _, path in best), default=0)
    return [path for _, path in best if path.suffix == FOLDER_SUFFIXES[rank]]


def _extends(tag: str, wanted: str, tags: list[str]) -> bool:
    """Return whether a file's tag is the wanted one, perhaps with an addition, and no other tag fits better.

    >>> _extends("in21k-v2", "in21k", ["in21k", "in21k_ft_in1k"])
    True
    >>> _extends("in21k_ft_in1k-v2", "in21k", ["in21k", "in21k_ft_in1k"])
    False
    """
    fitting = [each for each in tags if tag.startswith(each)]
    return tag.startswith(wanted) and len(max(fitting, key=len, default="")) <= len(wanted)


def known_tags(arch: str) -> list[str]:
    """Return the tags under which timm, or the zoo's own table, knows weights of an architecture."""
    import timm

    named = (*KNOWN_WEIGHTS, *carried_weights())
    known = [name.partition(".")[2] for name in named if name.startswith(f"{arch}.")]
    if not timm.is_model(arch):
        return known
    cfgs = timm.models.get_arch_pretrained_cfgs(arch)
    return [name.partition(".")[2] for name, cfg in cfgs.items() if cfg.has_weights] + known


def _from_hub(spec: ModelSpec, offline: bool) -> WeightsFile:
    if not spec.hub_id and not spec.url:
        raise _no_weights(spec, "no hub has weights of that name")
    if hub.is_offline(offline):
        raise _no_weights(spec, "--offline or HF_HUB_OFFLINE forbids the network")
    try:
        path, sha256, location = hub.fetch(spec.hub_id, spec.url)
    except hub.HubError as error:
        raise _no_weights(spec, str(error)) from error
    return WeightsFile(path, sha256, "hub", location)


def _no_weights(spec: ModelSpec, reason: str) -> Hindered:
    """Return the one error that says why there are no weights, and all that can be done about it."""
    folder = os.environ.get("ZOO_WEIGHTS")
    here = f"the folder ZOO_WEIGHTS (now {one_line(folder, 80)!r}" if folder else "the folder ZOO_WEIGHTS (now unset"
    others = sorted(path.name for _, path in scan_weights().files.get(spec.arch, ()))
    here += f", which holds other weights of {spec.arch}: {', '.join(others[:5])})" if others else ")"
    file = f"{spec.name}.safetensors" if spec.tag else f"{spec.arch}.TAG.safetensors"
    repo, _, _ = spec.hub_id.partition("@")
    fetch = f"`hf download {repo} {hub.HUB_FILES[0]}`" if repo else spec.url or "for a tag that a hub has"
    return Hindered(
        f"cannot get pretrained weights for {spec.name!r}: {reason}. Five ways out: (1) name a file in the "
        f'recipe, [model] weights = "FILE"; (2) put {file} (or .pth) into {here}; (3) fill the hub\'s cache '
        f"on a machine with a network, {fetch}, and copy it here; (4) go online, without --offline and with "
        f"HF_HUB_OFFLINE unset; (5) take small weights that this package carries and that work now, [model] name = "
        f'{_remedy(spec.arch)}. Random weights are never taken silently: [model] weights = "scratch" asks for them'
    )


def _remedy(arch: str) -> str:
    """Return the carried weights to name: those of the architecture itself, where there are any, else all."""
    names = sorted(carried_weights())
    own = [name for name in names if name.partition(".")[0] == arch]
    return " or ".join(f'"{name}"' for name in own or names)
