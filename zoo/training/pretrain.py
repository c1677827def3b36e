"""Pretraining a backbone on formula images: from a seed to float16 weights with a card, resumable at epoch ends."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.data.formula import GENERATOR_VERSION, Pixels, formula_classes, formula_pool
from zoo.errors import Interrupted, ZooError, one_line
from zoo.files import (
    SCHEMA_VERSION,
    Home,
    check_name,
    check_writable,
    digest_of,
    read_json,
    sha256_file,
    to_json,
    write_json,
    write_text,
)
from zoo.models.nets import build_timm, classifiers_of
from zoo.runs import run_lock
from zoo.training.checkpoint import Progress, load_checkpoint, remove_checkpoints, save_checkpoint, save_tensors
from zoo.training.environment import device_name, versions
from zoo.training.kernels import steady_kernels
from zoo.training.loop import OnTick, Tick
from zoo.training.precision import PrecisionPlan, choose_device, choose_plan, set_threads

MEAN = STD = (0.5, 0.5, 0.5)
HELD_OUT = 4  # instances of each class that only the top-1 of the history sees
_BINS_PER_CHANNEL = 4
_THUMBNAIL_PX = 3
_POOL_PX = 8
WARMUP = 0.1
CLIP_GRAD = 5.0
LABEL_SMOOTHING = 0.1


@dataclass(frozen=True)
class Pretraining:
    """All that pretrained weights depend on, beside the machine.

    image_sizes: pixels of the crops, each for an even share of the epochs, in order. pool_size: pixels of the drawn
    images. families: none named means all. colour_weight: of the auxiliary loss (colour histogram and layout).
    """

    arch: str
    families: tuple[str, ...] = ()
    images_per_class: int = 250
    epochs: int = 12
    image_sizes: tuple[int, ...] = (48, 64)
    pool_size: int = 72
    batch_size: int = 128
    lr: float = 3e-3
    weight_decay: float = 0.05
    colour_weight: float = 1.0
    seed: int = 0
    precision: str = "auto"

    def __post_init__(self) -> None:
        import timm

        if not timm.is_model(self.arch) or "." in self.arch:
            raise ZooError(
                f"zoo pretrain takes an architecture of timm without a tag. Got {one_line(self.arch, 80)!r}; "
                "see `zoo list models`"
            )
        limits: dict[str, tuple[float, float]] = {
            "images_per_class": (HELD_OUT + 1, 1_000_000),
            "epochs": (1, 100_000),
            "batch_size": (2, 65_536),
            "lr": (1e-7, 1.0),
            "weight_decay": (0.0, 10.0),
            "colour_weight": (0.0, 1000.0),
        }
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ZooError(f"zoo pretrain: {name} must be from {low:g} to {high:g}. Got {getattr(self, name)!r}")
        if self.precision not in ("auto", "float32", "bf16"):
            raise ZooError(
                f"precision {one_line(self.precision, 40)!r} is not offered for pretraining; take auto, float32 or bf16"
            )
        if not self.image_sizes or any(not 32 <= size <= self.pool_size for size in self.image_sizes):
            raise ZooError(
                f"zoo pretrain: image_sizes must lie between 32 px and the {self.pool_size} px of the drawn images. "
                f"Got {', '.join(map(str, self.image_sizes)) or 'none'}"
            )

    @property
    def digest(self) -> str:
        """Return 64 hexadecimal digits that tell two pretrainings apart."""
        return digest_of({**asdict(self), "generator": GENERATOR_VERSION})

    def size_in(self, epoch: int) -> int:
        """Return the pixels of the crops in an epoch, counted from 1."""
        return self.image_sizes[(epoch - 1) * len(self.image_sizes) // self.epochs]


@dataclass
class _Losses:
    total: float = 0.0
    right: int = 0
    count: int = 0
    pending: list[tuple[Tensor, Tensor, int]] = field(default_factory=list)


def pretrain(
    settings: Pretraining,
    root: Home,
    tag: str = "formula",
    device: str = "auto",
    processes: int = 1,
    licence: str = "not stated",
    on_tick: OnTick = lambda _: None,
) -> Path:
    """Pretrain an architecture on formula images and return its folder; what is finished is returned as it is.

    The folder `models/pretrained/<arch>.<tag>/` holds `<arch>.<tag>.safetensors` (float16, no classifier, its
    preprocessing as metadata; fit for ZOO_WEIGHTS), the card `<arch>.<tag>.json`, and `history.jsonl`. processes: how
    many draw the images; above 1 a script needs `if __name__ == "__main__":`, as they are started anew. licence: what
    the file and its card say of it, which is for whoever trains to decide. The same
    settings, thread count and machine give the same bytes. Raises ZooError for bad settings, for a folder that
    holds the weights or the checkpoint of other settings, and Interrupted after Ctrl-C: the same call goes on from the
    last finished epoch.
    """
    name = f"{settings.arch}.{check_name(tag, 'tag')}"
    formula_classes(settings.families, settings.seed)
    folder = root.root / "models" / "pretrained" / name
    if _finished(folder, name, settings):
        return folder
    _check_network(settings)
    check_writable(folder)
    with run_lock(root, f"pretrain-{name}"):
        try:
            _Pretrainer(settings, root, folder, name, device, processes, licence, on_tick).run()
        except KeyboardInterrupt as stop:
            code = getattr(stop, "exit_code", 130)
            raise Interrupted(
                f"interrupted; {name} goes on from its last finished epoch with the same command", code
            ) from None
    return folder


def _finished(folder: Path, name: str, settings: Pretraining) -> bool:
    file = folder / f"{name}.json"
    if not file.is_file():
        return False
    card, weights = read_json(file), folder / f"{name}.safetensors"
    if card.get("digest") != settings.digest:
        raise ZooError(
            f"{str(folder)!r} holds weights that were pretrained otherwise; choose another --tag, or remove the folder"
        )
    if not weights.is_file() or sha256_file(weights) != card.get("sha256"):
        raise ZooError(f"{str(weights)!r} is gone or not what its card says; remove the folder to pretrain anew")
    return True


def _check_network(settings: Pretraining) -> None:
    """Raise ZooError where the architecture lacks a part that is needed, or takes no crops of these sizes."""
    try:
        with torch.device("meta"):
            net = FormulaNet(settings.arch, 2, max(settings.image_sizes))
            for size in settings.image_sizes:
                net(torch.zeros(2, 3, size, size))
    except Exception as error:  # a network may refuse in any way
        sizes = ", ".join(map(str, settings.image_sizes))
        raise ZooError(
            f"{settings.arch!r} cannot be pretrained on crops of {sizes} px: {one_line(error, 120)}; take a "
            "convolutional network, or other --image-sizes"
        ) from error


class _Pretrainer:
    """One pretraining in progress."""

    def __init__(
        self,
        settings: Pretraining,
        root: Home,
        folder: Path,
        name: str,
        device: str,
        processes: int,
        licence: str,
        on_tick: OnTick,
    ) -> None:
        self.settings, self.root, self.folder, self.name, self.on_tick = settings, root, folder, name, on_tick
        self.device, self.processes, self.licence = choose_device(device), processes, licence
        self.plan: PrecisionPlan = choose_plan(settings.precision, self.device)
        self.threads = set_threads()
        self.progress = Progress()

    def run(self) -> None:
        """Draw the images, train every epoch, write weights and card."""
        with steady_kernels(self.device, strict=False):
            self._run()

    def _run(self) -> None:
        settings = self.settings
        classes = formula_classes(settings.families, settings.seed)
        pool = formula_pool(
            self.root.data / "formula" / ".cache",
            settings.families,
            settings.images_per_class,
            settings.pool_size,
            settings.seed,
            self.processes,
            lambda done, total: self.on_tick(Tick(self.name, "drawing images", done, total)),
        )
        torch.manual_seed(settings.seed)
        model = FormulaNet(settings.arch, len(classes), max(settings.image_sizes)).to(self.device)
        model = model.to(memory_format=self.plan.memory_format)
        optimizer = _optimizer(model, settings)
        checkpoint = load_checkpoint(self.folder / "checkpoint", settings.digest)
        if checkpoint is not None:
            self.progress = checkpoint.progress
            model.load_state_dict(checkpoint.part("model"))
            checkpoint.restore_optimizer(optimizer)
        for epoch in range(self.progress.epoch + 1, settings.epochs + 1):
            started = time.perf_counter()
            row = self._epoch(model, optimizer, pool, epoch)
            self.progress.train_s += time.perf_counter() - started
            row |= {"seconds": round(time.perf_counter() - started, 1), "held_out_top1": self._held_out(model, pool)}
            self.progress.epoch = epoch
            self.progress.history.append(row)
            parts = {"model": cast("dict[str, Tensor]", model.state_dict())}
            save_checkpoint(self.folder / "checkpoint", settings.digest, self.progress, parts, optimizer)
            write_text(self.folder / "history.jsonl", "".join(f"{to_json(each)}\n" for each in self.progress.history))
        self._export(model, len(classes))

    def _epoch(self, model: FormulaNet, optimizer: torch.optim.Optimizer, pool: Pixels, epoch: int) -> dict[str, Any]:
        settings, losses = self.settings, _Losses()
        of_class = settings.images_per_class
        train = np.flatnonzero(np.arange(len(pool)) % of_class < of_class - HELD_OUT)
        order = np.random.default_rng([settings.seed, epoch]).permutation(train)
        batches = [order[start : start + settings.batch_size] for start in range(0, len(order), settings.batch_size)]
        batches = [np.sort(each) for each in batches if len(each) > 1]  # batch norm has no variance of one image
        size = settings.size_in(epoch)
        model.train()
        for number, places in enumerate(batches, 1):
            lr = one_cycle(settings.lr, (epoch - 1 + (number - 1) / len(batches)) / settings.epochs)
            for group in optimizer.param_groups:
                group["lr"] = lr
            # One generator for each batch: an epoch that is done again draws the same.
            chance = torch.Generator().manual_seed(int(digest_of([settings.seed, epoch, number])[:15], 16))
            images = augmented(torch.from_numpy(pool[places]), size, chance).to(self.device)
            labels = torch.from_numpy(places // of_class).to(self.device)
            losses.pending.append((*self._step(model, optimizer, images, labels), len(places)))
            if number % 50 == 0 or number == len(batches):
                self._settle(losses, epoch, number, len(batches))
        mean, top1 = losses.total / losses.count, losses.right / losses.count
        return {"epoch": epoch, "image_size": size, "loss": mean, "top1": top1}

    def _step(
        self, model: FormulaNet, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Make one update; return its loss, and how many images were known."""
        with self.plan.autocast(self.device):
            logits, colour = model(self.plan.place(images))
        loss = functional.cross_entropy(logits.float(), labels, label_smoothing=LABEL_SMOOTHING)
        if self.settings.colour_weight:
            loss = loss + self.settings.colour_weight * colour_loss(colour.float(), images)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD)
        optimizer.step()
        self.progress.updates += 1
        self.progress.images_seen += len(labels)
        return loss.detach(), (logits.argmax(1) == labels).sum()

    def _settle(self, losses: _Losses, epoch: int, done: int, of: int) -> None:
        """Ask the device for the numbers of some steps at once; it waits for each question."""
        for loss, right, count in losses.pending:
            losses.total += float(loss) * count
            losses.right += int(right)
            losses.count += count
        losses.pending.clear()
        if not math.isfinite(losses.total):
            raise ZooError(f"pretraining {self.name}: the loss was not finite in epoch {epoch}; lower --lr")
        mean = losses.total / losses.count
        self.on_tick(Tick(self.name, "training", done, of, epoch, self.settings.epochs, mean))

    @torch.inference_mode()
    def _held_out(self, model: FormulaNet, pool: Pixels) -> float:
        """Return the top-1 on the held-out instances, their middle seen at the largest size."""
        of_class, size = self.settings.images_per_class, max(self.settings.image_sizes)
        places = np.flatnonzero(np.arange(len(pool)) % of_class >= of_class - HELD_OUT)
        low = (self.settings.pool_size - size) // 2
        model.eval()
        right = 0
        for start in range(0, len(places), 256):
            chosen = places[start : start + 256]
            pixels = torch.from_numpy(pool[chosen][:, low : low + size, low : low + size])
            images = _signed(pixels).to(self.device)
            with self.plan.autocast(self.device):
                logits, _ = model(self.plan.place(images))
            right += int((logits.argmax(1).cpu() == torch.from_numpy(chosen // of_class)).sum())
        return right / len(places)

    def _export(self, model: FormulaNet, classes: int) -> None:
        """Write the weights, then the card, whose presence means that both are whole."""
        shown: dict[str, Any] = {
            "licence": self.licence,
            "mean": MEAN,
            "std": STD,
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "image_size": max(self.settings.image_sizes),
        }
        file = self.folder / f"{self.name}.safetensors"
        texts = {key: ",".join(map(str, each)) if isinstance(each, tuple) else str(each) for key, each in shown.items()}
        sha256 = save_tensors(file, model.backbone_state(), texts)
        card = {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "sha256": sha256,
            "bytes": file.stat().st_size,
            **shown,
            "source": "formula images: generated, no photograph among them",
            "generator_version": GENERATOR_VERSION,
            "classes": classes,
            "images": classes * self.settings.images_per_class,
            "images_seen": self.progress.images_seen,
            "held_out_top1": round(self.progress.history[-1]["held_out_top1"], 4),
            "hours": round(self.progress.train_s / 3600, 3),
            "hardware": device_name(self.device),
            "threads": self.threads,
            "precision_plan": self.plan.facts(),
            "versions": versions(),
            "settings": asdict(self.settings),
            "digest": self.settings.digest,
        }
        write_json(self.folder / f"{self.name}.json", card)
        remove_checkpoints(self.folder / "checkpoint")


class FormulaNet(nn.Module):
    """A timm network with a classifier of formula classes, and a linear layer for colours beside it."""

    def __init__(self, arch: str, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.backbone = cast("Any", build_timm(arch, num_classes))
        self.backbone.eval()
        with torch.no_grad():
            features = self.backbone.forward_head(
                self.backbone.forward_features(torch.zeros(1, 3, image_size, image_size)), pre_logits=True
            )
        self.colour = nn.Linear(features.shape[1], _BINS_PER_CHANNEL**3 + 3 * _THUMBNAIL_PX**2)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (N, classes) and what `colour_loss` compares (N, 64 + 27) of images (N, 3, H, W)."""
        features = self.backbone.forward_head(self.backbone.forward_features(images), pre_logits=True)
        return self.backbone.get_classifier()(features), self.colour(features)

    def backbone_state(self) -> dict[str, Tensor]:
        """Return the tensors of the backbone without its classifier, floats as float16."""
        heads = tuple(f"{name}." for name, _ in classifiers_of(self.backbone))
        state: dict[str, Tensor] = self.backbone.state_dict()
        kept = {key: value for key, value in state.items() if not key.startswith(heads)}
        half = {key: value.half() if value.is_floating_point() else value for key, value in kept.items()}
        lost = [key for key, value in half.items() if value.is_floating_point() and not torch.isfinite(value).all()]
        if lost:
            raise ZooError(f"{len(lost)} tensors do not fit float16, {lost[0]!r} among them; lower --lr")
        return half


def _optimizer(model: nn.Module, settings: Pretraining) -> torch.optim.Optimizer:
    """Return AdamW (arXiv 1711.05101) that lets only matrices and kernels decay."""
    decayed = [each for each in model.parameters() if each.ndim > 1]
    plain = [each for each in model.parameters() if each.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr)


def one_cycle(peak: float, done: float) -> float:
    """Return the learning rate after a share of training: up in a line for a tenth, then down a cosine to 0.

    Source: Smith and Topin 2018, arXiv 1708.07120.

    >>> [round(one_cycle(1.0, done), 3) for done in (0.0, 0.05, 0.1, 0.55, 1.0)]
    [0.04, 0.52, 1.0, 0.5, 0.0]
    """
    if done < WARMUP:
        return peak * (0.04 + 0.96 * done / WARMUP)
    return peak * 0.5 * (1 + math.cos(math.pi * (done - WARMUP) / (1 - WARMUP)))


def _signed(pixels: Tensor) -> Tensor:
    """Return uint8 (N, H, W, 3) as float32 (N, 3, H, W) from -1 to 1."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def augmented(pixels: Tensor, size: int, chance: torch.Generator) -> Tensor:
    """Return crops of 45 to 100 % of each image, mirrored, their colours mixed: float32 (N, 3, size, size).

    pixels: uint8 (N, H, W, 3). The values stay in [-1, 1]. Turning is left to the generator.
    """
    count = len(pixels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=chance)

    side = uniform(0.45, 1.0).sqrt()
    stretch = torch.exp(uniform(-0.15, 0.15))
    width, height = (side * stretch).clamp(max=1), (side / stretch).clamp(max=1)
    across, down = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    mirrored = [1 - 2 * (uniform(0, 1) < 0.5).float() for _ in range(2)]
    zero = torch.zeros(count)
    theta = torch.stack([width * mirrored[0], zero, across, zero, height * mirrored[1], down], 1).view(-1, 2, 3)
    grid = functional.affine_grid(theta, [count, 3, size, size], align_corners=False)
    images = functional.grid_sample(_signed(pixels), grid, padding_mode="reflection", align_corners=False)
    mix = torch.eye(3) + (uniform(0, 1) < 0.5).float()[:, None, None] * 0.15 * torch.randn(
        count, 3, 3, generator=chance
    )
    grey = uniform(0, 1) < 0.2
    mix[grey] = torch.full((3, 3), 1 / 3)
    gain, offset = uniform(0.7, 1.3, 1, 1), uniform(-0.25, 0.25, 1, 1)
    mixed = torch.einsum("nij,njp->nip", mix, images.flatten(2)) * gain + offset
    return mixed.view(count, 3, size, size).clamp(-1, 1)


def colour_loss(predicted: Tensor, images: Tensor) -> Tensor:
    """Return how badly (N, 64 + 27) tells the images' colour histogram (cross-entropy) and 3 x 3 layout (MSE).

    images: (N, 3, H, W) in [-1, 1], as the network saw them, so that colour jitter does not teach blindness.
    """
    with torch.no_grad():
        small = functional.avg_pool2d(images.float(), _POOL_PX)
        steps = torch.linspace(-1, 1, _BINS_PER_CHANNEL, device=images.device)
        centres = torch.cartesian_prod(steps, steps, steps)
        away = (small.flatten(2).transpose(1, 2)[:, :, None] - centres).square().sum(-1)
        histogram = torch.softmax(-7.5 * away, -1).mean(1)
        layout = functional.adaptive_avg_pool2d(images.float(), _THUMBNAIL_PX).flatten(1)
    bins = _BINS_PER_CHANNEL**3
    said = functional.log_softmax(predicted[:, :bins], 1)
    return -(histogram * said).sum(1).mean() + functional.mse_loss(predicted[:, bins:], layout)
