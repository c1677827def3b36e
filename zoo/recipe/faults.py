"""What is wrong with a recipe, in words: unknown keys, values out of range, tables that contradict each other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from zoo.errors import nearest, one_line
from zoo.recipe.keys import nearest_key, with_value
from zoo.recipe.schema import LATER, PRECISIONS, Recipe, Table, known_keys


def unknown_keys(table: dict[str, Any]) -> list[str]:
    """Return a fault for each key that no recipe has, with the nearest that one may have."""
    known = known_keys()
    faults = []
    for key, value in table.items():
        if key == "name":
            faults.append("unknown key 'name'; a recipe has the name of its file, [model] that of its network")
        elif key not in known:
            faults.append(f"unknown key {one_line(key)!r}{nearest_key(key, known)}")
        elif known[key] is not None and isinstance(value, dict):
            inside = {full for full in known if full.startswith(f"{key}.")}
            names = ", ".join(sorted(full.removeprefix(f"{key}.") for full in inside))
            for full in (f"{key}.{inner}" for inner in value):
                if full not in inside:
                    hint = nearest_key(full, inside) or nearest_key(full, known) or f"; [{key}] knows {names}"
                    faults.append(f"unknown key {one_line(full)!r}{hint}")
    return faults


def validate(table: dict[str, Any], name: str) -> tuple[Recipe | None, dict[str, str]]:
    """Return the recipe or None, and what is wrong by dotted key; empty text for a key that is unknown."""
    try:
        return Recipe.model_validate({**table, "name": name}), _not_finite(table)
    except ValidationError as error:
        wrong: dict[str, str] = {}
        for each in error.errors():
            key = _place(each["loc"])
            wrong.setdefault(key, "" if each["type"] == "extra_forbidden" else _say(key, each))
        return None, wrong | _not_finite(table)


def _not_finite(table: dict[str, Any]) -> dict[str, str]:
    """Return a fault for each number that is not finite where the schema leaves the values free."""

    def walk(value: Any, key: str) -> Iterator[tuple[str, float]]:
        if isinstance(value, dict):
            for inner, each in value.items():
                yield from walk(each, f"{key}.{inner}")
        elif isinstance(value, list):
            for place, each in enumerate(value):
                yield from walk(each, f"{key}[{place}]")
        elif isinstance(value, float) and not math.isfinite(value):
            yield key, value

    augment = table.get("augment")
    transforms = augment.get("transforms") if isinstance(augment, dict) else None
    found = [*walk(transforms, "augment.transforms"), *walk(table.get("search"), "search")]
    return {key: f"{one_line(key)} must be a finite number. Got {value}" for key, value in found}


# Tables and lists whose own keys or places the schema does not name.
_OPEN = (
    "model.options",
    "model.mean",
    "model.std",
    "augment.transforms",
    "finetune.freeze",
    "finetune.image_sizes",
    "search",
)
_ALLOWED = {
    "workers": "'auto' or a whole number from 0 to 256",
    "device": "'auto', 'cpu', 'mps', 'cuda' or 'cuda:N'",
    "precision": "'auto', 'float32', 'bf16' or 'fp16', with '-nchw' or '-channels-last' after it, and '-compile'",
    "model.options": "a table of text, finite numbers, true or false",
    "model.mean": "a list of three numbers",
    "model.std": "a list of three numbers above 0",
}
_NAMES = {"workers": "auto", "device": "auto, cpu, mps, cuda", "precision": ", ".join(("auto", *PRECISIONS))}
_ALLOWED_BY_TYPE = {
    "model_type": "a table",
    "dict_type": "a table",
    "list_type": "a list",
    "tuple_type": "a list",
    "string_type": "text in quotes",
    "string_too_short": "text that is not empty",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
}


def _place(loc: tuple[int | str, ...]) -> str:
    """Return the dotted key of one of pydantic's places; what it adds for unions is left out."""
    known, key = known_keys(), ""
    for part in loc:
        longer = f"{key}.{part}" if key else str(part)
        if longer not in known and key in _OPEN:
            return f"{key}[{part}]" if isinstance(part, int) else longer
        if longer not in known and key:
            break
        key = longer
    return key


def _say(key: str, error: Any) -> str:
    """Return one of pydantic's faults as what, allowed, got."""
    kind, given = error["type"], error["input"]
    whole, inside, _ = key.partition("[")
    if kind == "value_error":
        return f"{key}: {error['ctx']['error']}"
    if kind == "missing" and not inside:
        return f"{key} is missing; give it a value"
    if kind == "missing":
        key, inside = whole, ""
    allowed = _ALLOWED_BY_TYPE.get(kind) or error["msg"].removeprefix("Input should be ")
    allowed = _ALLOWED.get(key, allowed)
    hint = ""
    if isinstance(given, str):
        names = _NAMES.get(key) or error.get("ctx", {}).get("expected", "").replace("'", "")
        hint = nearest(given, names.replace(" or ", ", ").split(", ")) if names else ""
        if kind in ("int_type", "float_type") and key not in _NAMES:
            hint = "; write a number without quotes"
    if key.startswith("model.options."):
        allowed, hint = "text, a finite number, true or false", ""
    return f"{one_line(key)} must be {allowed}. Got {one_line(repr(given), 80)}{hint}"


def contradictions(recipe: Recipe) -> list[str]:
    """Return what each table allows by itself but the tables together do not."""
    faults = []
    tune, mixes = recipe.finetune, recipe.augment.mixup or recipe.augment.cutmix
    if tune.strategy == "linear-probe" and (recipe.policy != "none" or mixes):
        faults.append(
            "augment must be policy = 'none' without mixup and cutmix where finetune.strategy = "
            "'linear-probe' (its features are computed once, from plain images)"
        )
    if tune.strategy in ("lp-ft", "gradual") and recipe.head_epochs >= tune.epochs:
        faults.append(
            f"finetune.head_epochs must be below finetune.epochs ({tune.epochs}) where "
            f"finetune.strategy = {tune.strategy!r}. Got {recipe.head_epochs}"
        )
    if tune.strategy == "full" and tune.head_epochs is not None:
        faults.append("finetune.head_epochs means nothing where finetune.strategy = 'full'; leave it out")
    faults += _training_contradictions(recipe) + _average_contradictions(recipe)
    if recipe.schedule.warmup_epochs >= tune.epochs and recipe.schedule.warmup_epochs > 0:
        faults.append(
            f"schedule.warmup_epochs must be below finetune.epochs ({tune.epochs}). "
            f"Got {_number(recipe.schedule.warmup_epochs)}"
        )
    return faults


def _training_contradictions(recipe: Recipe) -> list[str]:
    tune, faults = recipe.finetune, []
    if tune.strategy == "linear-probe":
        unused = [key for key in ("accumulate", "freeze", "image_sizes") if key in _changed(tune, "finetune")]
        faults += [
            f"finetune.{key} means nothing where finetune.strategy = 'linear-probe'; leave it out" for key in unused
        ]
    if tune.strategy == "gradual" and tune.freeze:
        faults.append(
            "finetune.freeze cannot go with finetune.strategy = 'gradual', which opens every stage; use 'full'"
        )
    if tune.image_sizes != sorted(set(tune.image_sizes)):
        faults.append(f"finetune.image_sizes must grow. Got {tune.image_sizes}")
    if len(tune.image_sizes) > max(1, tune.epochs - recipe.head_epochs):
        faults.append(
            f"finetune.image_sizes must not be more than the epochs of the whole network "
            f"({tune.epochs - recipe.head_epochs}). Got {len(tune.image_sizes)}"
        )
    if tune.sampler == "balanced" and recipe.loss.class_weights == "balanced":
        faults.append(
            "finetune.sampler = 'balanced' cannot go with loss.class_weights = 'balanced', or rare classes would count "
            "twice; leave one out"
        )
    if recipe.loss.name == "focal" and recipe.loss.label_smoothing:
        faults.append("loss.label_smoothing cannot go with loss.name = 'focal'; leave one out")
    if recipe.loss.name != "focal" and recipe.loss.gamma is not None:
        faults.append("loss.gamma means nothing without loss.name = 'focal'; leave it out")
    return faults


def _average_contradictions(recipe: Recipe) -> list[str]:
    tune, average, faults = recipe.finetune, recipe.average, []
    network = tune.epochs - recipe.head_epochs
    if average.method == "none" and average.last_epochs is not None:
        faults.append("average.last_epochs means nothing without average.method = 'swa' or 'soup'; leave it out")
    if average.method != "none" and tune.ema_decay is not None:
        faults.append("average.method cannot go with finetune.ema_decay, which averages already; leave one out")
    if average.method != "none" and (average.last_epochs or 2) > network:
        faults.append(
            f"average.last_epochs must be at most the epochs of the whole network ({network}). "
            f"Got {average.last_epochs or 2}"
        )
    if average.seeds is not None and recipe.model.weights == "scratch":
        faults.append(
            "average.seeds needs weights that all seeds start from: networks from scratch cannot be averaged; set "
            "model.weights, or leave it out"
        )
    return faults


def _changed(table: Table, name: str) -> set[str]:
    """Return the keys of a table that differ from the defaults of keys that came later."""
    return {key for key, default in LATER[name].items() if getattr(table, key) != default}


def _number(value: float) -> str:
    """Return a number as a person writes it: whole ones without a point."""
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


# What says nothing about how well a recipe does.
_NOT_SEARCHED = (
    "summary",
    "source",
    "workers",
    "device",
    "checkpoint_minutes",
    "search",
    "model.name",
    "score.tta",
    "average.seeds",
    "finetune.metric",
)


def search_faults(table: dict[str, Any]) -> list[str]:
    """Return what is wrong with `[search]`: its keys, their spaces, and every value that these name."""
    known, spaces, faults = known_keys(), table.get("search"), []
    for key, space in spaces.items() if isinstance(spaces, dict) else ():
        if not isinstance(space, dict):
            continue  # said by the schema
        if key not in known:
            faults.append(f"search: unknown key {one_line(key)!r}{nearest_key(key, known)}")
        elif known[key] is not None or key in _NOT_SEARCHED:
            faults.append(f"search: {key!r} cannot be varied; name a value such as 'optimizer.lr'")
        elif fault := _space_fault(space):
            faults.append(f"search: {key!r} {fault}")
        else:
            for value in space.get("choices") or [space["low"], space["high"]]:
                _, wrong = validate({**with_value(table, key, value), "search": {}}, "search")
                faults += [f"search: {wrong[place]}" for place in wrong if place.partition("[")[0] == key]
    return faults


def _space_fault(space: dict[str, Any]) -> str:
    """Return what is wrong with one key's space, or nothing."""
    got = f"Got {one_line(space, 80)}"
    if set(space) == {"choices"}:
        listed = isinstance(space["choices"], list) and space["choices"]
        return "" if listed else f"must have choices = [...] that are not empty. {got}"
    if not {"low", "high"} <= set(space) <= {"low", "high", "log"}:
        return f"must have low and high, and log = true if wanted, or choices. {got}"
    numbers = [space["low"], space["high"]]
    if any(isinstance(each, bool) or not isinstance(each, (int, float)) for each in numbers):
        return f"must have numbers as low and high. {got}"
    if not isinstance(space.get("log", False), bool) or not numbers[0] < numbers[1]:
        return f"must have low below high, and log = true or false. {got}"
    return f"must have low above 0 where log is true. {got}" if space.get("log") and numbers[0] <= 0 else ""
