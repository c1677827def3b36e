"""What `zoo tune` may vary: the recipe's `[search]`, checked whole before any work, and the recipe of each proposal."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel

from zoo.errors import ZooError, one_line
from zoo.files import to_json
from zoo.recipe import Recipe, parse_recipe
from zoo.recipe.effects import NEEDS, OF_SOME_NETWORKS, value_of

HOW = (
    'add a table such as [search] with "optimizer.lr" = { low = 1e-4, high = 1e-2, log = true } to its file, or give '
    "--set 'search={\"optimizer.lr\"={low=1e-4,high=1e-2,log=true}}'"
)
_DRAWS = 500  # of the other keys, to see whether a value goes with any of them
_DIGITS = 4  # significant digits of a number that is proposed: what a person would write into a recipe


@dataclass(frozen=True)
class Space:
    """A recipe and what may be varied in it; keys are the recipe's dotted keys."""

    recipe: Recipe
    spaces: dict[str, dict[str, Any]]

    def distributions(self) -> dict[str, Any]:
        """Return Optuna's distribution of each key."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        found: dict[str, Any] = {}
        for key, space in self.spaces.items():
            if "choices" in space:
                found[key] = CategoricalDistribution([_label(value) for value in space["choices"]])
            else:
                kind = IntDistribution if _whole(key) else FloatDistribution
                found[key] = kind(space["low"], space["high"], log=space.get("log", False))
        return found

    def own_params(self) -> dict[str, Any]:
        """Return the recipe's own values, as parameters, of those keys whose space has them."""
        own = {key: _own_value(self.recipe, key) for key in self.spaces}
        return {key: _label(value) for key, value in own.items() if _inside(self.spaces[key], value)}

    def recipe_of(self, params: dict[str, Any]) -> Recipe:
        """Return the recipe with proposed parameters; raises ZooError where they contradict each other."""
        return parse_recipe(plain_table(self.recipe), self.recipe.name, self.values(params))

    def values(self, params: dict[str, Any]) -> dict[str, Any]:
        """Return what a recipe says for parameters: the choices behind labels, numbers in few digits."""
        return {key: self._value(key, param) for key, param in params.items()}

    def _value(self, key: str, param: Any) -> Any:
        space = self.spaces[key]
        if "choices" in space:
            return next(value for value in space["choices"] if _label(value) == param)
        if isinstance(param, int):
            return param
        return float(min(max(float(f"{param:.{_DIGITS}g}"), space["low"]), space["high"]))


def space_of(recipe: Recipe) -> Space:
    """Return the search space of a recipe.

    Raises ZooError that names every fault: no table, a key that changes what is measured or nothing at all, a choice
    given twice, a value that contradicts the recipe whatever else is chosen.
    """
    if not recipe.search:
        raise ZooError(f"recipe {recipe.name!r} has no [search], so that there is nothing to tune; {HOW}")
    space = Space(recipe, dict(recipe.search))
    faults = [fault for key in space.spaces for fault in _key_faults(space, key)]
    if not faults:
        faults = list(_contradicting(space))
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise ZooError(f"the search space of recipe {recipe.name!r} has {count}: " + "; ".join(faults))
    return space


def plain_table(recipe: Recipe) -> dict[str, Any]:
    """Return what a recipe itself says as a TOML table, without defaults and without `[search]`."""
    table: dict[str, Any] = recipe.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    table.pop("search", None)
    return table


def probes(space: Space) -> Iterator[tuple[str, Any]]:
    """Yield every choice and both ends of every range, as key and value."""
    for key, inner in space.spaces.items():
        for value in inner.get("choices") or [inner["low"], inner["high"]]:
            yield key, value


def _key_faults(space: Space, key: str) -> list[str]:
    inner, faults = space.spaces[key], []
    labels = [_label(value) for value in inner.get("choices", [])]
    twice = sorted({str(label) for label in labels if labels.count(label) > 1})
    if twice:
        faults.append(f"{key!r} names {one_line(', '.join(twice), 80)} twice; name each choice once")
    need = None if key == OF_SOME_NETWORKS else NEEDS.get(key)
    if need is not None and need.key not in space.spaces:
        value = value_of(space.recipe, need.key)
        if value not in need.allowed:
            fix = f"vary {need.instead!r}" if need.instead else "leave it out"
            faults.append(f"{key!r} changes nothing where {need.key} = {value!r}; {fix}")
    return faults


def settings(space: Space) -> Iterator[dict[str, Any]]:
    """Yield values of all keys, of which any may be looked at with another: the recipe's own first, then drawn ones.

    Always the same. A key whose space has not the recipe's own value has a drawn one from the first on.
    """
    draw, own = random.Random(0), space.values(space.own_params())
    for _ in range(_DRAWS):
        yield {**{key: _drawn(key, inner, draw) for key, inner in space.spaces.items()}, **own}
        own = {}


def _contradicting(space: Space) -> Iterator[str]:
    """Yield what is wrong with each value that no draw of the other keys makes a recipe of."""
    drawn, table = list(settings(space)), plain_table(space.recipe)
    for key, value in probes(space):
        said = ""
        for others in drawn:
            try:
                parse_recipe(table, space.recipe.name, {**others, key: value})
                break
            except ZooError as error:
                said = said or str(error).partition(": ")[2]
        else:
            yield f"{key!r} = {one_line(value, 60)} goes with nothing else that is searched: {said}"


def _drawn(key: str, space: dict[str, Any], draw: random.Random) -> Any:
    if "choices" in space:
        return draw.choice(space["choices"])
    if _whole(key):
        return draw.randint(space["low"], space["high"])
    return draw.uniform(space["low"], space["high"])


def _own_value(recipe: Recipe, key: str) -> Any:
    """Return a recipe's value of a key, and where it says nothing what that means."""
    if key == "finetune.head_lr" and recipe.finetune.head_lr is None:
        from zoo.training.strategy import DEFAULT_HEAD_LR

        return DEFAULT_HEAD_LR
    implied = {"finetune.head_epochs": recipe.head_epochs, "augment.policy": recipe.policy}
    value = value_of(recipe, key)
    return implied.get(key) if value is None else value


def _inside(space: dict[str, Any], value: Any) -> bool:
    if "choices" in space:
        return any(_label(each) == _label(value) for each in space["choices"])
    return isinstance(value, (int, float)) and space["low"] <= value <= space["high"]


def _label(value: Any) -> Any:
    """Return a choice as Optuna stores it: lists and tables as JSON."""
    return value if isinstance(value, (str, int, float, bool)) else to_json(value)


def _whole(key: str) -> bool:
    """Return whether a key takes whole numbers alone."""
    annotation: Any = Recipe
    for part in key.split("."):
        annotation = annotation.model_fields[part].annotation
    kinds = _kinds(annotation)
    return int in kinds and float not in kinds


def _kinds(annotation: Any) -> set[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return set()
    inner = get_args(annotation)
    return set().union(*(_kinds(each) for each in inner)) if inner else {annotation}
