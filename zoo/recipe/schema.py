"""The tables of a recipe: every key, its type, its range and its default, and a recipe's identity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from zoo.files import digest_of, write_toml

Strategy = Literal["linear-probe", "full", "lp-ft", "gradual"]
PolicyName = Literal["none", "light", "strong", "ct"]
Metric = Literal["top1", "balanced_accuracy", "macro_f1", "auroc", "log_loss"]
METRICS: tuple[str, ...] = get_args(Metric)

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Triple = Annotated[tuple[float, float, float], Field(strict=False)]
PositiveTriple = Annotated[tuple[Positive, Positive, Positive], Field(strict=False)]


class Table(BaseModel):
    """A table of a recipe: unknown keys, values of another type and numbers that are not finite are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ModelTable(Table):
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


class FinetuneTable(Table):
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


class AugmentTable(Table):
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


class OptimizerTable(Table):
    """`[optimizer]`: timm's optimiser of that name."""

    name: Literal["adamw", "sgd", "adam", "lamb", "nadamw", "rmsprop"] = "adamw"
    lr: Positive = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    momentum: Fraction = 0.9


class ScheduleTable(Table):
    """`[schedule]`: the learning rate over the run; warm-up in epochs, min_lr as a fraction of lr."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    min_lr: Fraction = 0.0


class LossTable(Table):
    """`[loss]`: cross-entropy or focal loss (Lin et al. 2017, arXiv 1708.02002), weighted by class; or smoothed.

    gamma: how much less the focal loss counts images that are right already; left out, 2.
    """

    name: Literal["cross_entropy", "focal"] = "cross_entropy"
    gamma: Annotated[float, Field(ge=0, le=10)] | None = None
    class_weights: Literal["none", "balanced"] = "none"
    label_smoothing: Fraction = 0.0


class AverageTable(Table):
    """`[average]`: weights averaged over epochs of a run, or over runs of several seeds.

    method: `swa`, the mean of the last `last_epochs` epochs (Izmailov et al. 2018, arXiv 1803.05407), or `soup`,
    those of them that help on val, taken greedily (Wortsman et al. 2022, arXiv 2203.05482). seeds: a greedy soup of
    the runs of so many seeds.
    """

    method: Literal["none", "swa", "soup"] = "none"
    last_epochs: Annotated[int, Field(ge=2, le=10_000)] | None = None
    seeds: Annotated[int, Field(ge=2, le=64)] | None = None


class ScoreTable(Table):
    """`[score]`: how a trained model is scored. tta: the mean over views of an image, its mirror, its corners."""

    tta: Literal["none", "flip", "crops", "flip-crops"] = "none"


PRECISIONS = tuple(
    f"{dtype}{layout}{compiled}"
    for dtype in ("float32", "bf16", "fp16")
    for layout in ("", "-nchw", "-channels-last")
    for compiled in ("", "-compile")
)


class Recipe(Table):
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
        for table, keys in LATER.items():  # so that runs from before a key was known stay finished
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
LATER: dict[str, dict[str, Any]] = {
    "finetune": {"accumulate": 1, "freeze": [], "image_sizes": [], "sampler": "shuffled"},
    "loss": {"name": "cross_entropy"},
    "average": {"method": "none"},
    "score": {"tta": "none"},
}


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
