"""Naming a key of a recipe: in full or by its last part, and which one may have been meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from zoo.errors import ZooError, one_line
from zoo.recipe.schema import known_keys


def full_key(key: str) -> str:
    """Return the dotted key that a whole key or an unambiguous last part of one stands for.

    >>> full_key("lr"), full_key("model.image_size")
    ('optimizer.lr', 'model.image_size')
    """
    known = known_keys()
    if key in known or key.startswith("model.options."):
        return key
    ends = [each for each in known if each.endswith(f".{key}")]
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise ZooError(f"{one_line(key)!r} may mean any of {', '.join(ends)}; write one of these")
    raise ZooError(f"unknown key {one_line(key)!r}{nearest_key(key, known)}")


def with_value(table: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return a table with the value of a dotted key set; the table itself stays as it was."""
    first, _, rest = key.partition(".")
    if not rest:
        return {**table, first: value}
    inner = table.get(first, {})
    return {**table, first: with_value(inner if isinstance(inner, dict) else {}, rest, value)}


def nearest_key(key: str, allowed: Iterable[str]) -> str:
    """Return a hint with the whole dotted key whose last part is the closest, or an empty string."""
    by_last = {full.rsplit(".", 1)[-1]: full for full in sorted(allowed, reverse=True)}
    close = difflib.get_close_matches(key.rsplit(".", 1)[-1].lower(), by_last, n=1, cutoff=0.6)
    return f"; did you mean {by_last[close[0]]!r}?" if close else ""
