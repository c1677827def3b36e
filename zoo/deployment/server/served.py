"""What is served: bundles by name, opened and verified, and what is told of each."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from zoo.deployment.bundle import TEST_OF, VAL_OF, Bundle, find_bundle, open_bundle
from zoo.deployment.predictor import Predictor
from zoo.errors import ZooError, one_line
from zoo.files import Home
from zoo.runs import find_run

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


def named_bundles(bundles: Iterable[str], named: Iterable[str], root: Home) -> dict[str, str]:
    """Return name to bundle of `BUNDLE...` and `--name NAME=BUNDLE`, in that order.

    Raises ZooError for none, a name that stands twice or does not fit into a query, a run, or what is no bundle.
    """
    pairs = [("", each) for each in bundles]
    for each in named:
        name, equals, bundle = each.partition("=")
        if not equals or _NAME.fullmatch(name) is None:
            raise ZooError(f"--name must be NAME=BUNDLE, NAME of letters, digits, . _ and -. Got {one_line(each)!r}")
        pairs.append((name, bundle))
    found: dict[str, str] = {}
    for given, bundle in pairs:
        path = _find(bundle, root)
        name = given or path.name
        if name in found:
            raise ZooError(f"two bundles have the name {one_line(name)!r}; give one another with --name NAME=BUNDLE")
        found[name] = str(path)
    if not found:
        raise ZooError("name a bundle to serve; `zoo list bundles` shows them, `zoo export` makes one")
    return found


def _find(bundle: str, root: Home) -> Any:
    try:
        return find_bundle(bundle, root)
    except ZooError:
        try:
            run = find_run(bundle, root)
        except ZooError:
            run = None
        if run is None:
            raise
        raise ZooError(
            f"{one_line(bundle)!r} is a run, and what is served is a bundle; make one with: zoo export {run.name}"
        ) from None


def load_models(bundles: dict[str, str], root: Home, threads: int | None) -> dict[str, Predictor]:
    """Return a predictor per name; raises ZooError for a bundle that is damaged, or whose sample comes out wrong."""
    return {name: Predictor.load(open_bundle(path, root), threads=threads) for name, path in bundles.items()}


def facts_of(name: str, bundle: Bundle | None) -> dict[str, Any]:
    """Return what `GET /model` says of a bundle that is served under a name."""
    assert bundle is not None
    record = bundle.record
    return {
        "name": name,
        "classes": record.classes,
        "medical": record.medical,
        "image_size": record.preprocessing.image_size,
        "explains": record.activation_map,
        "format": record.format,
        "precision": record.precision,
        "model": record.model,
        "dataset": record.dataset,
        "rules": record.rules.model_dump(mode="json"),
        "card": bundle.card,
        "val": record.val,
        "val_of": VAL_OF,
        "test": record.test,
        "test_of": TEST_OF if record.test else None,
    }
