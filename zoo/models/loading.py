"""Weights into a network: read without running code, checked key by key, an unfit classifier replaced."""

from __future__ import annotations

import argparse
import inspect
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from zoo.errors import Hindered, ZooError, one_line
from zoo.models.nets import classifiers_of
from zoo.runs import FRESH_HEAD

if TYPE_CHECKING:
    from zoo.models.spec import ModelSpec
    from zoo.models.weights import WeightsFile

# A training checkpoint holds the weights, their average and two moments; beyond that a file is no such thing.
MAX_COPIES = 4
SLACK_BYTES = 64 << 20
_NESTS = ("state_dict_ema", "model_ema", "state_dict", "model")
_COUNTER = "num_batches_tracked"
# Where timm's files keep what turns an original checkpoint's keys and shapes into timm's own.
_FILTERS = (
    "checkpoint_filter_fn",
    "checkpoint_filter_fn_classifier",
    "_filter_fn",
    "_filter_torchvision_pretrained",
)


@dataclass(frozen=True)
class LoadReport:
    """What came of loading: how many tensors, and whether the classifier is the file's or fresh.

    head: `kept`, `replaced` (the file's has another shape), `absent` (the file has none). fresh: keys that
    keep their random weights. converted: keys or shapes were turned into timm's by timm's own filter
    (positions resized to another image size, another library's names). note: a sentence for the user.
    """

    head: Literal["kept", "replaced", "absent"]
    loaded: int
    fresh: tuple[str, ...] = ()
    converted: bool = False
    note: str = ""


def load_weights(model: nn.Module, file: WeightsFile, spec: ModelSpec) -> LoadReport:
    """Copy a file's weights into the model, in place, as the model's own dtypes; a classifier may differ.

    A classifier that is absent or of another shape stays as it was initialised, and the report says so.
    Raises ZooError for a damaged or hostile file, and for any other difference, listing missing and
    unexpected keys.
    """
    name = one_line(file.path.name)
    weights = read_weights(file.path, 4 * sum(each.numel() for each in model.parameters()))
    heads = _head_names(model)
    own = model.state_dict()
    fit, converted = _compare(own, weights, heads), False
    if fit.faults:
        for candidate in _timm_filters(spec.arch):
            filtered = _filtered(candidate, weights, model)
            better = _compare(own, filtered, heads) if filtered else fit
            if not better.faults:
                fit, converted = better, True
                break
    if fit.faults:
        raise ZooError(
            f"weights {name!r} do not fit model {spec.name!r}: {'; '.join(fit.faults)}; name the model that "
            "they were made for, or other weights"
        )
    for key, value in fit.values.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ZooError(f"weights {name!r} hold values that are not finite in {key!r}; use another file")
    model.load_state_dict(fit.values, strict=False)
    return LoadReport(fit.head, len(fit.values), fit.fresh, converted, _note(fit, name, spec))


@dataclass(frozen=True)
class _Fit:
    """How a file's tensors fit a model's: what to copy, what stays fresh, and every fault as text."""

    values: dict[str, Tensor]
    fresh: tuple[str, ...]
    head: Literal["kept", "replaced", "absent"]
    faults: list[str]


def _compare(own: dict[str, Tensor], weights: dict[str, Tensor], heads: tuple[str, ...]) -> _Fit:
    def in_head(key: str, widened: bool = False) -> bool:
        # A file without a classifier may lack what prepares its input too: `head.norm` beside `head.fc`.
        return any(key.startswith(f"{head.rpartition('.')[0] if widened and '.' in head else head}.") for head in heads)

    same = {key for key in own if key in weights and _same_kind(own[key], weights[key])}
    present = any(in_head(key) for key in weights)
    # A layer is taken whole or not at all: never a fresh weight beside the file's bias.
    broken = {key.rpartition(".")[0] for key in own if in_head(key) and key not in same and _COUNTER not in key}
    fresh = {key for key in own if in_head(key) and key.rpartition(".")[0] in broken}
    if not present:
        fresh |= {key for key in own if key not in weights and in_head(key, widened=True)}
    missing = [key for key in own if key not in weights and key not in fresh and not key.endswith(_COUNTER)]
    unexpected = [key for key in weights if key not in own and not in_head(key) and not key.endswith(_COUNTER)]
    differing = [key for key in own if key in weights and key not in same and key not in fresh]
    shapes = [f"{key} ({_kind(weights[key])}, not {_kind(own[key])})" for key in differing]
    faults = [
        _list("missing", missing),
        _list("unexpected", unexpected),
        _list("of another shape or type", shapes),
    ]
    values = {key: weights[key].to(own[key].dtype) for key in own if key in same and key not in fresh}
    head: Literal["kept", "replaced", "absent"] = "kept" if not fresh else "replaced" if present else "absent"
    return _Fit(values, tuple(sorted(fresh)), head, [fault for fault in faults if fault])


def _same_kind(own: Tensor, given: Tensor) -> bool:
    return own.shape == given.shape and own.is_floating_point() == given.is_floating_point()


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape)) or 'scalar'}"


def _list(what: str, keys: list[str]) -> str:
    shown = ", ".join(one_line(key, 100) for key in keys[:5])
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return f"{len(keys)} keys {what}: {shown}{more}" if keys else ""


def _note(fit: _Fit, name: str, spec: ModelSpec) -> str:
    if fit.head == "kept":
        return ""
    why = "has another number of classes" if fit.head == "replaced" else "is absent"
    return f"{FRESH_HEAD} {name!r} {why}; {spec.name} starts with a fresh one ({', '.join(fit.fresh)})"


def _head_names(model: nn.Module) -> tuple[str, ...]:
    """Return the dotted names of all classifiers: what the model says, and what timm says of it."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    said = cfg.get("classifier") or ()
    names = [name for name, _ in classifiers_of(model)]
    return tuple(dict.fromkeys([*names, *((said,) if isinstance(said, str) else said)]))


def _timm_filters(arch: str) -> list[Callable[..., Any]]:
    """Return timm's functions that turn original checkpoints of an architecture into timm's own."""
    import timm

    if not timm.is_model(arch):
        return []
    module = sys.modules[timm.models.model_entrypoint(arch).__module__]
    return [found for found in (getattr(module, name, None) for name in _FILTERS) if callable(found)]


def _filtered(function: Callable[..., Any], weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor] | None:
    """Return what timm's filter makes of the weights; None where it cannot read them."""
    known = inspect.signature(function).parameters
    arguments = (dict(weights), model)[: min(2, len(known))]
    extra = {"adapt_layer_scale": True} if "adapt_layer_scale" in known else {}
    try:
        out = function(*arguments, **extra)
    except Exception:
        # It expects one library's names and may stumble over others; the plain comparison then tells.
        return None
    return out if isinstance(out, dict) and all(isinstance(each, Tensor) for each in out.values()) else None


def read_weights(path: Path, model_bytes: int) -> dict[str, Tensor]:
    """Return a file's tensors by key, on the CPU; no code in it is run.

    model_bytes: the size of the model's parameters; a file that unfolds to far more is refused unread.
    Raises ZooError where the file is damaged, too large, or holds anything but tensors.
    """
    name = one_line(path.name)
    limit = MAX_COPIES * model_bytes + SLACK_BYTES
    try:
        size = _unfolded_bytes(path)
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise Hindered(f"weights {name!r} cannot be read: {one_line(error, 160)}; fetch the file again") from error
    if size > limit:
        raise ZooError(
            f"weights {name!r} unfold to {size / 2**20:.0f} MiB where at most {limit / 2**20:.0f} MiB fit "
            "this model; use weights made for it"
        )
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickled(path)
    return _state_dict(content, name)


def _unfolded_bytes(path: Path) -> int:
    if path.suffix != ".safetensors" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return sum(member.file_size for member in archive.infolist())
    return path.stat().st_size


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise Hindered(
            f"weights {one_line(path.name)!r} are no whole safetensors file: {one_line(error, 160)}; "
            "fetch the file again"
        ) from error


def _read_pickled(path: Path) -> Any:
    name = one_line(path.name)
    try:
        # timm's own training checkpoints keep their arguments in a Namespace, which is plain data.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # a file's oddities are either harmless here, or refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own text proposes weights_only=False, which would run the file's code.
        found = re.search(r"(?:GLOBAL|global:?) ([\w.]+)", str(error))
        what = f" ({found.group(1)})" if found and "." in found.group(1) else ""
        raise Hindered(
            f"weights {name!r} are damaged or hold more than tensors{what}; fetch the file again, or convert "
            "it to .safetensors where you trust it"
        ) from error
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        if "weights_only" in reason:
            reason = "its format is too old to be read without running code"
        raise Hindered(f"weights {name!r} cannot be read: {one_line(reason, 160)}; fetch the file again") from error


def _state_dict(content: Any, name: str) -> dict[str, Tensor]:
    """Return the tensors by key of a plain or nested state dict, wrappers' prefixes taken off."""
    from timm.models import clean_state_dict

    for nest in _NESTS:
        if isinstance(content, dict) and isinstance(content.get(nest), dict):
            content = content[nest]
            break
    if not isinstance(content, dict) or not content:
        raise ZooError(f"weights {name!r} must hold tensors by name. Got a {type(content).__name__}; save a state_dict")
    odd = [key for key, value in content.items() if not (isinstance(key, str) and _is_plain(value))]
    if odd:
        raise ZooError(f"weights {name!r} hold more than plain tensors: {_list('odd', [str(key) for key in odd])}")
    return clean_state_dict(content)  # type: ignore[no-any-return]


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu"
