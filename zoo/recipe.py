"""The recipe: how one model is trained. Read from TOML, checked whole, every fault said at once."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from zoo.errors import ZooError, nearest, one_line
from zoo.files import Home, check_name, digest_of, find_toml, home, list_toml, read_toml, write_toml

Strategy = Literal["linear-probe", "full", "lp-ft", "gradual"]
PolicyName = Literal["none", "light", "strong", "ct"]
Metric = Literal["top1", "balanced_accuracy", "macro_f1", "auroc", "log_loss"]
METRICS: tuple[str, ...] = get_args(Metric)

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Triple = tuple[float, float, float]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelTable(_Table):
    """`[model]`: which network, where its weights come from, and at which image size (pixels)."""

    name: Annotated[str, Field(min_length=1)]
    weights: Annotated[str, Field(min_length=1)] = "pretrained"
    image_size: Annotated[int, Field(ge=16, le=2048)] | None = None
    drop_rate: Fraction = 0.0
    drop_path_rate: Fraction = 0.0
    mean: Annotated[Triple, Field(strict=False)] | None = None
    std: Annotated[Annotated[tuple[Positive, Positive, Positive], Field(strict=False)] | None, Field()] = None
    interpolation: Literal["bilinear", "bicubic", "lanczos", "nearest"] | None = None
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = None
    options: dict[str, str | int | float | bool] = {}


class FinetuneTable(_Table):
    """`[finetune]`: what is trained, for how long, and which epoch on val is kept."""

    strategy: Strategy = "full"
    epochs: Annotated[int, Field(ge=1, le=10_000)] = 12
    head_epochs: Annotated[int, Field(ge=1, le=10_000)] | None = None
    head_lr: Positive | None = None
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 32
    clip_grad: Positive | None = None
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    patience: Annotated[int, Field(ge=1)] | None = None
    metric: Metric = "balanced_accuracy"


class AugmentTable(_Table):
    """`[augment]`: a policy by name, or own `transforms` by albumentations' names, and batch mixing."""

    policy: PolicyName | None = None
    transforms: list[dict[str, Any]] | None = None
    mixup: Annotated[float, Field(ge=0, le=10)] = 0.0
    cutmix: Annotated[float, Field(ge=0, le=10)] = 0.0

    @model_validator(mode="after")
    def _one_of_both(self) -> AugmentTable:
        if self.policy is not None and self.transforms is not None:
            raise ValueError("give a policy or own transforms, not both")
        for number, transform in enumerate(self.transforms or []):
            if not isinstance(transform.get("name"), str):
                raise ValueError(f"transforms[{number}] must have a name, as albumentations spells it")
        return self


class OptimizerTable(_Table):
    """`[optimizer]`: timm's optimiser of that name."""

    name: Literal["adamw", "sgd", "adam", "lamb", "nadamw", "rmsprop"] = "adamw"
    lr: Positive = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    momentum: Fraction = 0.9


class ScheduleTable(_Table):
    """`[schedule]`: the learning rate over the run; warm-up in epochs, min_lr as a fraction of lr."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    min_lr: Fraction = 0.0


class LossTable(_Table):
    """`[loss]`: cross-entropy, weighted by class and smoothed."""

    class_weights: Literal["none", "balanced"] = "none"
    label_smoothing: Fraction = 0.0


class Recipe(_Table):
    """One recipe; `name` is that of its file.

    `workers` and `device` say where it is computed and are no part of its identity; everything else is.
    """

    name: str = Field(default="recipe", exclude=True)
    summary: str = ""
    source: str = ""
    workers: Literal["auto"] | Annotated[int, Field(ge=0, le=256)] = "auto"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    model: ModelTable
    finetune: FinetuneTable = FinetuneTable()
    augment: AugmentTable = AugmentTable()
    optimizer: OptimizerTable = OptimizerTable()
    schedule: ScheduleTable = ScheduleTable()
    loss: LossTable = LossTable()
    search: dict[str, dict[str, Any]] = {}

    @property
    def policy(self) -> str:
        """Return the augmentation policy's name; `none` for a linear probe, else `light`, where none is given."""
        if self.augment.policy is not None:
            return self.augment.policy
        if self.augment.transforms is not None:
            return "own"
        return "none" if self.finetune.strategy == "linear-probe" else "light"

    @property
    def head_epochs(self) -> int:
        """Return the epochs of the head-only phase: all for a probe, a quarter for lp-ft and gradual by default."""
        if self.finetune.strategy == "linear-probe":
            return self.finetune.epochs
        if self.finetune.strategy == "full":
            return 0
        return self.finetune.head_epochs or max(1, self.finetune.epochs // 4)

    @property
    def digest(self) -> str:
        """Return the identity of the recipe: whatever changes the numbers, and nothing else."""
        kept = self.table()
        for key in ("summary", "source", "workers", "device", "search"):
            kept.pop(key, None)
        return digest_of(kept)

    def table(self) -> dict[str, Any]:
        """Return the recipe as a TOML table with every default filled in."""
        return self.model_dump(mode="json", exclude_none=True)

    def write(self, path: Path) -> None:
        """Write the recipe as TOML, every default filled in."""
        write_toml(path, self.table())


def load_recipe(
    name: str | os.PathLike[str], overrides: dict[str, Any] | None = None, root: Home | None = None
) -> Recipe:
    """Return the recipe of a name (`zoo list recipes`) or of a .toml file.

    overrides: dotted key to value, as `--set` gives them; a key's last part alone is enough where only one key
    ends in it. Raises ZooError that names every unknown key and every value out of range at once.

    >>> load_recipe("simple_cnn", {"optimizer.lr": 5e-4, "epochs": 3}).finetune.epochs
    3
    """
    path = find_toml(os.fspath(name), "recipes", (root or home()).recipes)
    table = read_toml(path)
    return parse_recipe(table, path.stem, overrides)


def parse_recipe(table: dict[str, Any], name: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """Return the recipe of a TOML table; raises ZooError that names every fault at once."""
    check_name(name, "recipe")
    table = {key: value for key, value in table.items() if key not in ("schema_version", "name")}
    faults: list[str] = []
    for key, value in (overrides or {}).items():
        try:
            table = _set(table, full_key(key), value)
        except ZooError as error:
            faults.append(str(error))
    faults += _unknown_keys(table)
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate({**table, "name": name})
    except ValidationError as error:
        faults += [_say(each) for each in error.errors() if each["type"] != "extra_forbidden"]
    if recipe is not None:
        faults += _contradictions(recipe) + _search_faults(recipe)
    if faults or recipe is None:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise ZooError(f"recipe {name!r} has {count}: " + "; ".join(faults))
    return recipe


def known_keys() -> dict[str, type[BaseModel] | None]:
    """Return every dotted key that a recipe may have, to its table's class or None for a value."""
    keys: dict[str, type[BaseModel] | None] = {}
    for key, field in Recipe.model_fields.items():
        if key == "name":
            continue
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            keys[key] = annotation
            keys.update({f"{key}.{inner}": None for inner in annotation.model_fields})
        else:
            keys[key] = None
    return keys


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
    by_last = {each.rsplit(".", 1)[-1]: each for each in known}
    hint = nearest(key, known) or nearest(key.rsplit(".", 1)[-1], by_last)
    raise ZooError(f"unknown key {one_line(key)!r}{hint}")


def parse_assignment(text: str) -> tuple[str, Any]:
    """Return key and value of `KEY=VALUE`; the value is read as TOML, else taken as a string.

    >>> parse_assignment("optimizer.lr=3e-4"), parse_assignment("strategy=lp-ft")
    (('optimizer.lr', 0.0003), ('strategy', 'lp-ft'))
    """
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise ZooError(f"--set takes KEY=VALUE, such as optimizer.lr=3e-4. Got {one_line(text)!r}")
    try:
        return key.strip(), tomllib.loads(f"value = {raw.strip()}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return key.strip(), raw.strip()


def list_recipes(root: Home | None = None) -> dict[str, Path]:
    """Return name to file of every recipe, the user's own before built-in ones of the same name."""
    return list_toml("recipes", (root or home()).recipes)


def _set(table: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    if not rest:
        return {**table, first: value}
    inner = table.get(first, {})
    return {**table, first: _set(inner if isinstance(inner, dict) else {}, rest, value)}


def _unknown_keys(table: dict[str, Any]) -> list[str]:
    known = known_keys()
    faults = []
    for key, value in table.items():
        if key not in known:
            faults.append(f"unknown key {one_line(key)!r}{nearest(key, known)}")
        elif known[key] is not None and isinstance(value, dict):
            fields = {full.split(".", 1)[1]: full for full in known if full.startswith(f"{key}.")}
            for inner in value:
                if inner not in fields:
                    hint = nearest(inner, fields) or f"; [{key}] knows {', '.join(fields)}"
                    faults.append(f"unknown key {one_line(f'{key}.{inner}')!r}{hint}")
    return faults


def _say(error: Any) -> str:
    """Return one of pydantic's faults as what, allowed, got."""
    places = [str(part) for part in error["loc"] if part not in ("constrained-int", "constrained-float")]
    known = known_keys()
    while len(places) > 1 and ".".join(places) not in known and not places[-1].isdigit():
        places.pop()
    key = ".".join(places)
    if error["type"] == "missing":
        return f"{key} is missing; give it a value"
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if error["type"] == "value_error":
        return f"{key}: {message}"
    hint = ""
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        hint = nearest(error["input"], error["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", "))
    return f"{key} {message}. Got {one_line(repr(error['input']), 80)}{hint}"


def _contradictions(recipe: Recipe) -> list[str]:
    """Return what each table allows by itself but the tables together do not."""
    faults = []
    tune, mixes = recipe.finetune, recipe.augment.mixup or recipe.augment.cutmix
    if tune.strategy == "linear-probe" and (recipe.policy != "none" or mixes):
        faults.append(
            "augment must be policy = 'none' without mixup and cutmix where finetune.strategy = 'linear-probe' "
            "(its features are computed once, from plain images)"
        )
    if tune.strategy in ("lp-ft", "gradual") and recipe.head_epochs >= tune.epochs:
        faults.append(
            f"finetune.head_epochs must be below finetune.epochs ({tune.epochs}) where "
            f"finetune.strategy = {tune.strategy!r}. Got {recipe.head_epochs}"
        )
    if tune.strategy == "full" and tune.head_epochs is not None:
        faults.append("finetune.head_epochs means nothing where finetune.strategy = 'full'; leave it out")
    if recipe.schedule.warmup_epochs >= tune.epochs and recipe.schedule.warmup_epochs > 0:
        faults.append(
            f"schedule.warmup_epochs must be below finetune.epochs ({tune.epochs}). "
            f"Got {recipe.schedule.warmup_epochs:g}"
        )
    return faults


def _search_faults(recipe: Recipe) -> list[str]:
    known, faults = known_keys(), []
    for key, space in recipe.search.items():
        if key not in known:
            faults.append(f"search: unknown key {one_line(key)!r}{nearest(key, known)}")
        elif not ("choices" in space or {"low", "high"} <= set(space)):
            faults.append(f"search.{key!r} must have low and high, or choices. Got {sorted(space)}")
    return faults
