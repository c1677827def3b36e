"""The recipe: how one model is trained. Read from TOML, checked whole, every fault said at once."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

from zoo.errors import ZooError, one_line
from zoo.files import Home, check_name, find_toml, home, list_toml, read_toml
from zoo.recipe.faults import contradictions, search_faults, unknown_keys, validate
from zoo.recipe.keys import full_key, with_value
from zoo.recipe.schema import (
    METRICS,
    PRECISIONS,
    AverageTable,
    LossTable,
    Recipe,
    ScoreTable,
    known_keys,
)

__all__ = [
    "METRICS",
    "PRECISIONS",
    "AverageTable",
    "LossTable",
    "Recipe",
    "ScoreTable",
    "full_key",
    "known_keys",
    "list_recipes",
    "load_recipe",
    "parse_assignment",
    "parse_recipe",
]


def load_recipe(
    name: str | os.PathLike[str], overrides: dict[str, Any] | None = None, root: Home | None = None
) -> Recipe:
    """Return the recipe of a name (`zoo list recipes`) or of a .toml file.

    overrides: dotted key to value, as `--set` gives them; a key's last part alone is enough where only one
    key ends in it. Raises ZooError that names every unknown key and every value out of range at once.

    >>> load_recipe("simple_cnn", {"optimizer.lr": 5e-4, "epochs": 3}).finetune.epochs
    3
    """
    path = find_toml(os.fspath(name), "recipes", (root or home()).recipes)
    table = read_toml(path)
    return parse_recipe(table, path.stem, overrides)


def parse_recipe(table: dict[str, Any], name: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """Return the recipe of a TOML table; raises ZooError that names every fault at once."""
    check_name(name, "recipe")
    table = {key: value for key, value in table.items() if key != "schema_version"}
    faults: list[str] = []
    for key, value in (overrides or {}).items():
        try:
            table = with_value(table, full_key(key), value)
        except ZooError as error:
            faults.append(str(error))
    faults += unknown_keys(table)
    recipe, wrong = validate(table, name)
    faults += [text for text in wrong.values() if text]
    if recipe is not None:
        faults += contradictions(recipe)
    faults += search_faults(table)
    if faults or recipe is None:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise ZooError(f"recipe {name!r} has {count}: " + "; ".join(faults))
    return recipe


def parse_assignment(text: str) -> tuple[str, Any]:
    """Return key and value of `KEY=VALUE`; the value is read as TOML, else taken as a string.

    >>> parse_assignment("optimizer.lr=3e-4"), parse_assignment("strategy=lp-ft")
    (('optimizer.lr', 0.0003), ('strategy', 'lp-ft'))
    """
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise ZooError(f"--set takes KEY=VALUE, such as optimizer.lr=3e-4. Got {one_line(text)!r}")
    try:
        parsed = tomllib.loads(f"value = {raw.strip()}")
    except (tomllib.TOMLDecodeError, RecursionError):
        parsed = {}
    plain = len(parsed) == 1 and isinstance(parsed["value"], (str, int, float, list, dict))
    return key.strip(), parsed["value"] if plain else raw.strip()


def list_recipes(root: Home | None = None) -> dict[str, Path]:
    """Return name to file of every recipe, the user's own before built-in ones of the same name."""
    return list_toml("recipes", (root or home()).recipes)
