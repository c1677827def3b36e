"""What `zoo doctor` looks at."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from zoo.cores import cores
from zoo.errors import ZooError, one_line
from zoo.files import check_writable, home

_PACKAGES = ("torch", "torchvision", "timm", "albumentations", "cv2", "sklearn", "pandas", "matplotlib", "safetensors")
_NAMES = {"cv2": "opencv-python-headless", "sklearn": "scikit-learn"}


def checks() -> list[dict[str, Any]]:
    """Return what was found, one dict per check: name, ok, detail and, where it is not, how to mend it."""
    found = [_check("python", True, f"{platform.python_version()} on {platform.platform()}")]
    found += [_package(name) for name in _PACKAGES]
    if all(check["ok"] for check in found):
        found += [_devices(), *_weights()]
    return [*found, _folder(), _pixel_cache()]


def _check(name: str, ok: bool, detail: str, fix: str = "") -> dict[str, Any]:
    return {"name": name, "ok": ok, "detail": detail, "fix": fix}


def _package(name: str) -> dict[str, Any]:
    shown = _NAMES.get(name, name)
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    try:
        number = version(shown)
        importlib.import_module(name)
    except PackageNotFoundError:
        return _check(shown, False, "not installed", f"pip install {shown}")
    except Exception as error:  # a broken wheel may raise anything; the doctor only reports it
        if "torchvision::nms" in str(error):
            pair = f"torch {version('torch')} and torchvision {version('torchvision')} do not belong together"
            return _check(shown, False, pair, "pip install --upgrade torch torchvision")
        return _check(
            shown, False, f"cannot be imported: {one_line(error, 160)}", f"pip install --force-reinstall {shown}"
        )
    return _check(shown, True, number)


def _devices() -> dict[str, Any]:
    import torch

    from zoo.training.precision import choose_device

    device = choose_device("auto")
    detail = f"{device.type}, {cores()} CPU cores, {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        detail += f", {torch.cuda.get_device_name()} with {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
    return _check("device", True, detail)


def _weights() -> list[dict[str, Any]]:
    from zoo.models.registry import list_models

    folder = os.environ.get("ZOO_WEIGHTS")
    found = []
    if folder is not None and not os.path.isdir(folder):  # noqa: PTH112
        found.append(_check("ZOO_WEIGHTS", False, f"{one_line(folder)} is no folder", "make it, or unset ZOO_WEIGHTS"))
    try:
        at_hand = [spec.name for spec in list_models() if spec.weights_at_hand]
    except ZooError as error:
        return [*found, _check("weights", False, str(error), "mend what the line names")]
    listed = ", ".join(at_hand[:6]) + (" ..." if len(at_hand) > 6 else "")
    return [*found, _check("weights at hand", True, f"{len(at_hand)}{f': {listed}' if at_hand else ''}")]


def _folder() -> dict[str, Any]:
    try:
        root = home()
        check_writable(root.runs)
    except ZooError as error:
        return _check("home", False, str(error), "work elsewhere with --home")
    free = shutil.disk_usage(root.root).free / 2**30
    return _check("home", True, f"{root.root}, {free:.1f} GiB free")


def _pixel_cache() -> dict[str, Any]:
    from zoo.data.room import GB, cache_limit, caches_of

    try:
        limit, caches = cache_limit(), caches_of(home().data)
    except ZooError as error:
        return _check("pixel cache", False, str(error), "give ZOO_CACHE_GB a number, or unset it")
    taken = sum(facts.st_size for facts in caches.values())
    return _check("pixel cache", True, f"{taken / GB:.1f} of {limit / GB:g} GB (ZOO_CACHE_GB), {len(caches)} files")
