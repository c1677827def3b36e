"""Frozen-backbone features: computed once per network and split, and the head that is trained on them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from zoo.data.cache import Pixels
from zoo.data.loader import fixed_batches
from zoo.data.room import cache_limit
from zoo.data.transforms import normalise_tensor
from zoo.errors import ZooError
from zoo.files import digest_of
from zoo.models.registry import classifier_of
from zoo.runs import Preprocessing, RunRecord
from zoo.training.environment import device_name
from zoo.training.memory import in_pieces
from zoo.training.plan import Plan
from zoo.training.precision import PrecisionPlan, recorded_plan
from zoo.training.stored import Add, Stored, read_stored, store_once

FORWARD_BATCH = 64
FEATURES_VERSION = 3

OnBatch = Callable[[int, int], None]


@dataclass(frozen=True)
class Features:
    """What reaches the classifier for each image of a split, and what computing it cost.

    values: (N, ...) float32. y_true: (N,) int64. seconds: of the forward pass that computed them. whole: whether the
    classifier's outputs are the network's logits, as was seen when they were computed.
    """

    values: torch.Tensor
    y_true: torch.Tensor
    seconds: float
    whole: bool


def forward_pixels(
    model: nn.Module,
    pixels: Pixels,
    preprocessing: Preprocessing,
    plan: PrecisionPlan,
    device: torch.device,
    on_batch: OnBatch | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (features, logits) of a split, float32 on the CPU, in manifest order.

    Features are the input of the final classifier, caught on its way in; empty where there is none. on_batch is
    called after every batch with the images done and in all; what it raises ends the pass.
    """
    caught: list[torch.Tensor] = []
    logits: list[torch.Tensor] = []

    def take(features: torch.Tensor | None, own: torch.Tensor) -> None:
        logits.append(own)
        if features is not None:
            caught.append(features)

    _each_batch(model, pixels, preprocessing, plan, device, take, on_batch)
    return (torch.cat(caught) if caught else torch.empty(len(pixels), 0)), torch.cat(logits)


def pixels_logits(
    model: nn.Module,
    pixels: Pixels,
    preprocessing: Preprocessing,
    plan: PrecisionPlan,
    device: torch.device,
) -> torch.Tensor:
    """Return a split's logits (N, C) alone, float32 on the CPU, in manifest order: features may not fit into memory."""
    logits: list[torch.Tensor] = []
    _each_batch(model, pixels, preprocessing, plan, device, lambda _, own: logits.append(own), None)
    return torch.cat(logits)


def _each_batch(
    model: nn.Module,
    pixels: Pixels,
    preprocessing: Preprocessing,
    plan: PrecisionPlan,
    device: torch.device,
    take: Callable[[torch.Tensor | None, torch.Tensor], None],
    on_batch: OnBatch | None,
    start: int = 0,
) -> None:
    """Hand the features and logits of every batch, or of its pieces, to `take`, float32 on the CPU."""
    caught: list[torch.Tensor] = []

    def forward(batch: Any) -> tuple[torch.Tensor | None, torch.Tensor]:
        caught.clear()
        images = normalise_tensor(torch.from_numpy(batch).to(device), preprocessing)
        logits = model(plan.place(images)).float().cpu()
        # A classifier that is used twice, or not on whole batches, has no features of its own.
        fits = len(caught) == 1 and len(caught[0]) == len(batch)
        return caught[0] if fits else None, logits

    hook = None
    try:
        _, classifier = classifier_of(model)
        hook = classifier.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0].detach().float().cpu()))
    except ZooError:
        pass  # a network without one final classifier can still be scored
    model.eval()
    done = start
    try:
        with torch.inference_mode(), plan.autocast(device):
            for batch in fixed_batches(pixels, preprocessing.image_size, FORWARD_BATCH, start):
                for features, logits in in_pieces(model, batch, forward):
                    take(features, logits)
                done += len(batch)
                if on_batch is not None:
                    on_batch(done, len(pixels))
    finally:
        if hook is not None:
            hook.remove()


# Features on disk ---------------------------------------------------------------------------------------------------


def split_features(
    model: nn.Module,
    pixels: Pixels,
    split: str,
    plan: Plan | RunRecord,
    precision: PrecisionPlan,
    device: torch.device,
    on_batch: OnBatch | None = None,
) -> Features:
    """Return a split's features from the cache beside the dataset's pixels, computing them once.

    They are found by the digest of the backbone's own tensors, so that all seeds, recipes and runs with that backbone
    share them, and none other can take them. Those of random weights differ for each seed and are not kept. on_batch:
    as for `forward_pixels`, and called too while another process computes the same features.
    Raises ZooError for a network without one final classifier.
    """
    name, _ = classifier_of(model)
    y_true = torch.from_numpy(pixels.y_true.copy())

    def compute(add: Add, start: int) -> None:
        _features_of(model, pixels, _facts(plan)["preprocessing"], precision, device, add, on_batch, start)

    if not are_kept(plan):
        caught: list[tuple[torch.Tensor, bool]] = []
        started = time.perf_counter()
        compute(lambda values, whole: caught.append((values, whole)), 0)
        seconds, values = time.perf_counter() - started, torch.cat([each for each, _ in caught])
        return Features(values, y_true, seconds, all(whole for _, whole in caught))
    backbone = backbone_digest(model.state_dict(), name)
    file = pixels.file.parent / array_name("features", split, backbone, pixels, plan, precision, device)
    tell = on_batch or (lambda done, total: None)
    return _from(store_once(file, len(pixels), compute, lambda: tell(0, len(pixels)), FORWARD_BATCH), y_true)


def kept_features(
    state: dict[str, torch.Tensor],
    head: str,
    pixels: Pixels,
    split: str,
    record: RunRecord,
    precision: PrecisionPlan,
    device: torch.device,
) -> Features | None:
    """Return the features of a run's own weights where the cache has them whole, else None; computes nothing.

    state: the run's weights. head: the classifier's name in it.
    """
    if not are_kept(record):
        return None
    name = array_name("features", split, backbone_digest(state, head), pixels, record, precision, device)
    stored = read_stored(pixels.file.parent / name, len(pixels))
    return None if stored is None else _from(stored, torch.from_numpy(pixels.y_true.copy()))


def _from(stored: Stored, y_true: torch.Tensor) -> Features:
    return Features(stored.values, y_true, stored.facts["seconds"], stored.facts["whole"])


def are_kept(plan: Plan | RunRecord) -> bool:
    """Return whether features are kept on disk: of a backbone from a file, as it was before any training of its own.

    `ZOO_CACHE_GB=0` keeps none.
    """
    if cache_limit() == 0:
        return False
    if isinstance(plan, RunRecord):
        return plan.strategy == "linear-probe" and plan.weights.get("sha256") is not None
    return plan.weights is not None


def _facts(plan: Plan | RunRecord) -> dict[str, Any]:
    if isinstance(plan, RunRecord):
        split_digest, model, options = plan.split_digest, plan.model, plan.model_options
    else:
        split_digest, model, options = plan.dataset.split_digest, plan.spec.name, plan.recipe.model.options
    return {
        "split_digest": split_digest,
        "model": model,
        "options": options,
        "network": plan.network,
        "preprocessing": plan.preprocessing,
    }


def array_name(
    kind: str,
    split: str,
    weights: str,
    pixels: Pixels,
    plan: Plan | RunRecord,
    precision: PrecisionPlan,
    device: torch.device,
) -> str:
    """Return the name of a file of what a network makes of a split: its digest holds all that moves the last bit.

    weights: the digest of the tensors that have a part in it.
    """
    facts = _facts(plan)
    facts["preprocessing"] = facts["preprocessing"].identity
    # Other chips, numbers of threads and versions of torch round otherwise.
    made_with = [device_name(device), torch.backends.cpu.get_cpu_capability(), torch.__version__, version("timm")]
    key = digest_of(
        [FEATURES_VERSION, facts, split, pixels.skipped, weights, recorded_plan(precision.facts()).facts(), made_with]
    )
    return f"{kind}-{split}-{key[:16]}.npy"


def backbone_digest(state: dict[str, torch.Tensor], head: str) -> str:
    """Return the digest of all tensors of a state dict but the classifier's."""
    return digest_tensors({key: value for key, value in state.items() if not key.startswith(f"{head}.")})


def digest_tensors(state: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 of tensors by name, type, shape and content."""
    digest = hashlib.sha256()
    for key, value in sorted(state.items()):
        plain = value.detach().cpu().contiguous()
        digest.update(f"{key} {plain.dtype} {tuple(plain.shape)}\n".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _features_of(
    model: nn.Module,
    pixels: Pixels,
    preprocessing: Preprocessing,
    precision: PrecisionPlan,
    device: torch.device,
    add: Add,
    on_batch: OnBatch | None,
    start: int,
) -> None:
    """Hand over the features of every batch from an image on, and whether the classifier's outputs were the logits.

    A fresh classifier is zero, which would prove nothing: it is random while the pass goes on.
    """
    _, classifier = classifier_of(model)
    tolerance = 1e-4 if precision.dtype == "float32" else 2e-2

    def take(features: torch.Tensor | None, logits: torch.Tensor) -> None:
        if features is None:
            raise ZooError(
                f"{type(model).__name__} uses its classifier more than once for an image, so that no head can be "
                "trained on its input; use finetune.strategy = 'full', or choose another model"
            )
        own = _flat(classifier(features.to(device))).float().cpu()
        alike = own.shape == logits.shape
        alike = alike and float((own - logits).abs().max()) <= tolerance * float(logits.abs().max())
        add(features, alike)

    with _random_head(classifier):
        _each_batch(model, pixels, preprocessing, precision, device, take, on_batch, start)


@contextmanager
def _random_head(classifier: nn.Module) -> Iterator[None]:
    """Give a classifier random weights, always the same, and its own back in the end."""
    generator = torch.Generator().manual_seed(0)
    own = [(parameter, parameter.detach().clone()) for parameter in classifier.parameters()]
    try:
        with torch.no_grad():
            for parameter, value in own:
                parameter.copy_(torch.randn(value.shape, generator=generator))
        yield
    finally:
        with torch.no_grad():
            for parameter, value in own:
                parameter.copy_(value)


def head_logits(
    classifier: nn.Module, features: Features, precision: PrecisionPlan, device: torch.device
) -> torch.Tensor:
    """Return the logits (N, classes) that a whole network with this classifier gives, float32 on the CPU.

    Batches and number format are those of `forward_pixels`, so that the bits are too. features must be `whole`.
    """
    if not features.whole:
        raise ValueError("these features do not give the network's logits; use forward_pixels")
    classifier.eval()
    with torch.inference_mode(), precision.autocast(device):
        parts = [
            logits
            for batch in torch.split(features.values, FORWARD_BATCH)
            for logits in in_pieces(classifier, batch, lambda part: _flat(classifier(part.to(device))).float().cpu())
        ]
    return torch.cat(parts)


# The head -----------------------------------------------------------------------------------------------------------


def _flat(values: torch.Tensor) -> torch.Tensor:
    """Return (B, C) of (B, C, 1, 1), which some networks' classifiers, 1 x 1 convolutions, take and give."""
    return values.flatten(1) if values.ndim == 4 and values.shape[2:] == (1, 1) else values


def _as_linear(classifier: nn.Module) -> nn.Module:
    """Return the linear layer that a 1 x 1 convolution of 1 x 1 maps is, with its weights; others as they are."""
    if not isinstance(classifier, nn.Conv2d) or classifier.kernel_size != (1, 1) or classifier.groups != 1:
        return classifier
    linear = nn.Linear(classifier.in_channels, classifier.out_channels, bias=classifier.bias is not None)
    state = {key: value.flatten(1) if value.ndim == 4 else value for key, value in classifier.state_dict().items()}
    linear.load_state_dict(state)
    return linear


class StandardisedHead(nn.Module):
    """A linear classifier on centred features of one common scale; it starts as the function that it was.

    One scale for all makes one learning rate fit all networks; a scale for each would blow up rarely active
    features. `fold` gives the same function as plain weights for the network's own classifier.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, classifier: nn.Module, values: torch.Tensor) -> None:
        super().__init__()
        flat = _flat(values[:1]).ndim == 2
        self.convolution = isinstance(classifier, nn.Conv2d)
        self.classifier = classifier = _as_linear(classifier) if flat else classifier
        self.scaled = isinstance(classifier, nn.Linear) and flat
        if isinstance(classifier, nn.Linear) and self.scaled:
            values = _flat(values)
            scale, mean = values.var(0, correction=0).mean().sqrt(), values.mean(0)
            scale = scale if float(scale) > 1e-12 else torch.ones(())
            self.register_buffer("mean", mean)
            self.register_buffer("scale", scale)
            with torch.no_grad():
                bias = torch.zeros(classifier.out_features) if classifier.bias is None else classifier.bias
                classifier.bias = nn.Parameter(bias + classifier.weight @ mean)
                classifier.weight.mul_(scale)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Return logits (B, classes) of features (B, ...)."""
        scaled = (_flat(values) - self.mean) / self.scale if self.scaled else values
        return _flat(self.classifier(scaled))

    def fold(self) -> dict[str, torch.Tensor]:
        """Return the classifier's state dict for features that are not scaled."""
        state = {key: value.detach().clone() for key, value in self.classifier.state_dict().items()}
        if self.scaled:
            state["weight"] = state["weight"] / self.scale
            state["bias"] = state["bias"] - state["weight"] @ self.mean
            if self.convolution:
                state["weight"] = state["weight"][..., None, None]
        return state


def load_grown(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Load a state dict, giving a bias to a classifier that had none before its features were centred."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is None and f"{name}.bias" in state:
            module.bias = nn.Parameter(module.weight.new_zeros(len(module.weight)))
    model.load_state_dict(state)
