"""The recipe: how one model is trained. Read from TOML, checked whole, every fault said at once."""

from __future__ import annotations

import difflib
import math
import os
import tomllib
from collections.abc import Iterable, Iterator
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
Triple = Annotated[tuple[float, float, float], Field(strict=False)]
PositiveTriple = Annotated[tuple[Positive, Positive, Positive], Field(strict=False)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ModelTable(_Table):
    """`[model]`: which network, where its weights come from, and at which image size (pixels)."""

    name: Annotated[str, Field(min_length=1)]
    weights: Annotated[str, Field(min_length=1)] = "pretrained"
    image_size: Annotated[int, Field(ge=16, le=2048)] | None = None
    drop_rate: Fraction = 0.0
    drop_path_rate: Fraction = 0.0
    mean: Triple | None = None
    std: PositiveTriple | None = None
    interpolation: Literal["bilinear", "bicubic", "lanczos", "nearest"] | None = None
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = None
    window: Annotated[str, Field(min_length=1)] | None = None
    options: dict[str, str | int | float | bool] = {}


class FinetuneTable(_Table):
    """`[finetune]`: what is trained, for how long, and which epoch on val is kept.

    batch_size: images of a batch; an update follows every `accumulate` batches, whose gradients are those of one batch
    of batch_size x accumulate. freeze: stages, or modules by name, that keep their weights. image_sizes: pixels,
    growing over the run. sampler: `balanced` draws every class equally often.
    """

    strategy: Strategy = "full"
    epochs: Annotated[int, Field(ge=1, le=10_000)] = 12
    head_epochs: Annotated[int, Field(ge=1, le=10_000)] | None = None
    head_lr: Positive | None = None
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 32
    accumulate: Annotated[int, Field(ge=1, le=4096)] = 1
    freeze: list[Annotated[str, Field(min_length=1)]] = []
    image_sizes: list[Annotated[int, Field(ge=16, le=2048)]] = []
    sampler: Literal["shuffled", "balanced"] = "shuffled"
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
        nameless = [
            f"transforms[{place}]"
            for place, transform in enumerate(self.transforms or [])
            if not isinstance(transform.get("name"), str)
        ]
        if nameless:
            raise ValueError(f"{', '.join(nameless)} must have a name, as albumentations spells it")
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
    """`[loss]`: cross-entropy or focal loss (Lin et al. 2017, arXiv 1708.02002), weighted by class; or smoothed.

    gamma: how much less the focal loss counts images that are right already; left out, 2.
    """

    name: Literal["cross_entropy", "focal"] = "cross_entropy"
    gamma: Annotated[float, Field(ge=0, le=10)] | None = None
    class_weights: Literal["none", "balanced"] = "none"
    label_smoothing: Fraction = 0.0


class AverageTable(_Table):
    """`[average]`: weights averaged over epochs of a run, or over runs of several seeds.

    method: `swa`, the mean of the last `last_epochs` epochs (Izmailov et al. 2018, arXiv 1803.05407), or `soup`,
    those of them that help on val, taken greedily (Wortsman et al. 2022, arXiv 2203.05482). seeds: a greedy soup of
    the runs of so many seeds.
    """

    method: Literal["none", "swa", "soup"] = "none"
    last_epochs: Annotated[int, Field(ge=2, le=10_000)] | None = None
    seeds: Annotated[int, Field(ge=2, le=64)] | None = None


class ScoreTable(_Table):
    """`[score]`: how a trained model is scored. tta: the mean over views of an image, its mirror, its corners."""

    tta: Literal["none", "flip", "crops", "flip-crops"] = "none"


PRECISIONS = tuple(
    f"{dtype}{layout}{compiled}"
    for dtype in ("float32", "bf16", "fp16")
    for layout in ("", "-nchw", "-channels-last")
    for compiled in ("", "-compile")
)


class Recipe(_Table):
    """One recipe; `name` is that of its file.

    `workers`, `device` and `checkpoint_minutes` say where and how safely it is computed and are no part of its
    identity; everything else is. precision: `auto`, or one of PRECISIONS.
    """

    name: str = Field(default="recipe", exclude=True)
    summary: str = ""
    source: str = ""
    workers: Literal["auto"] | Annotated[int, Field(ge=0, le=256)] = "auto"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    precision: Annotated[str, Field(pattern=rf"^(auto|{'|'.join(PRECISIONS)})$")] = "auto"
    checkpoint_minutes: Annotated[float, Field(ge=0, le=1440)] = 5.0
    model: ModelTable
    finetune: FinetuneTable = FinetuneTable()
    augment: AugmentTable = AugmentTable()
    optimizer: OptimizerTable = OptimizerTable()
    schedule: ScheduleTable = ScheduleTable()
    loss: LossTable = LossTable()
    average: AverageTable = AverageTable()
    score: ScoreTable = ScoreTable()
    search: dict[str, dict[str, Any]] = {}

    @property
    def policy(self) -> str:
        """Return the augmentation policy's name; left out, `none` for a linear probe and else `light`."""
        if self.augment.policy is not None:
            return self.augment.policy
        if self.augment.transforms is not None:
            return "own"
        return "none" if self.finetune.strategy == "linear-probe" else "light"

    @property
    def head_epochs(self) -> int:
        """Return the epochs of the head alone: all for a probe; lp-ft and gradual, left out, a quarter."""
        if self.finetune.strategy == "linear-probe":
            return self.finetune.epochs
        if self.finetune.strategy == "full":
            return 0
        return self.finetune.head_epochs or max(1, self.finetune.epochs // 4)

    @property
    def digest(self) -> str:
        """Return the identity of the recipe: whatever changes the numbers, and nothing else."""
        kept = self.table()
        for key in ("summary", "source", "workers", "device", "checkpoint_minutes", "search"):
            kept.pop(key, None)
        for table, keys in _LATER.items():  # so that runs from before a key was known stay finished
            kept[table] = {key: value for key, value in kept[table].items() if value != keys.get(key, _NEVER)}
        return digest_of({key: value for key, value in kept.items() if value or key not in ("average", "score")})

    def table(self) -> dict[str, Any]:
        """Return the recipe as a TOML table with every default filled in."""
        return self.model_dump(mode="json", exclude_none=True)

    def write(self, path: Path) -> None:
        """Write the recipe as TOML, every default filled in."""
        write_toml(path, self.table())


_NEVER = object()
# Keys that came after the first release, with the defaults that are no part of a recipe's identity.
_LATER: dict[str, dict[str, Any]] = {
    "finetune": {"accumulate": 1, "freeze": [], "image_sizes": [], "sampler": "shuffled"},
    "loss": {"name": "cross_entropy"},
    "average": {"method": "none"},
    "score": {"tta": "none"},
}


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
            table = _set(table, full_key(key), value)
        except ZooError as error:
            faults.append(str(error))
    faults += _unknown_keys(table)
    recipe, wrong = _validate(table, name)
    faults += [text for text in wrong.values() if text]
    if recipe is not None:
        faults += _contradictions(recipe)
    faults += _search_faults(table)
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
    raise ZooError(f"unknown key {one_line(key)!r}{_nearest_key(key, known)}")


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
        if key == "name":
            faults.append("unknown key 'name'; a recipe has the name of its file, [model] that of its network")
        elif key not in known:
            faults.append(f"unknown key {one_line(key)!r}{_nearest_key(key, known)}")
        elif known[key] is not None and isinstance(value, dict):
            inside = {full for full in known if full.startswith(f"{key}.")}
            names = ", ".join(sorted(full.removeprefix(f"{key}.") for full in inside))
            for full in (f"{key}.{inner}" for inner in value):
                if full not in inside:
                    hint = _nearest_key(full, inside) or _nearest_key(full, known) or f"; [{key}] knows {names}"
                    faults.append(f"unknown key {one_line(full)!r}{hint}")
    return faults


def _nearest_key(key: str, allowed: Iterable[str]) -> str:
    """Return a hint with the whole dotted key whose last part is the closest, or an empty string."""
    by_last = {full.rsplit(".", 1)[-1]: full for full in sorted(allowed, reverse=True)}
    close = difflib.get_close_matches(key.rsplit(".", 1)[-1].lower(), by_last, n=1, cutoff=0.6)
    return f"; did you mean {by_last[close[0]]!r}?" if close else ""


def _validate(table: dict[str, Any], name: str) -> tuple[Recipe | None, dict[str, str]]:
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


def _contradictions(recipe: Recipe) -> list[str]:
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


def _changed(table: _Table, name: str) -> set[str]:
    """Return the keys of a table that differ from the defaults of keys that came later."""
    return {key for key, default in _LATER[name].items() if getattr(table, key) != default}


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
)


def _search_faults(table: dict[str, Any]) -> list[str]:
    """Return what is wrong with `[search]`: its keys, their spaces, and every value that these name."""
    known, spaces, faults = known_keys(), table.get("search"), []
    for key, space in spaces.items() if isinstance(spaces, dict) else ():
        if not isinstance(space, dict):
            continue  # said by the schema
        if key not in known:
            faults.append(f"search: unknown key {one_line(key)!r}{_nearest_key(key, known)}")
        elif known[key] is not None or key in _NOT_SEARCHED:
            faults.append(f"search: {key!r} cannot be varied; name a value such as 'optimizer.lr'")
        elif fault := _space_fault(space):
            faults.append(f"search: {key!r} {fault}")
        else:
            for value in space.get("choices") or [space["low"], space["high"]]:
                _, wrong = _validate({**_set(table, key, value), "search": {}}, "search")
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
