"""Frozen stages: where they end, their activations computed once, and the network run from there on.

Stages that keep their weights and batch statistics give an unaugmented image the same activations in every epoch.
Nothing here knows a network: where the frozen part ends is read off the order in which its modules run, and that the
rest, started from there, gives the network's own outputs to the last bit is proved on a batch, or there is no boundary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from zoo.data.cache import Pixels
from zoo.data.loader import fixed_batches
from zoo.data.room import cache_limit
from zoo.data.transforms import normalise_tensor
from zoo.training.features import FORWARD_BATCH, OnBatch, array_name, digest_tensors
from zoo.training.memory import give_back, in_pieces, is_out_of_memory
from zoo.training.plan import Plan
from zoo.training.precision import PrecisionPlan
from zoo.training.stored import Add, Stored, store_once

Places = Sequence[int] | np.ndarray[Any, np.dtype[np.int64]]

DEFAULT_LIMIT = 8 << 30
# Multiply-adds that must be saved for each byte that is read instead. In the nanosecond that a byte takes from a disk
# of 1 GB/s a few CPU cores do some tens of them, a GPU some thousands.
WORTH = {"cpu": 60.0}
WORTH_ELSEWHERE = 4000.0
LEAST_SHARE = 0.1
_MOST_TRIED = 12


class _Reached(Exception):
    """What was asked for is known: the rest of the network need not run."""


@dataclass(frozen=True)
class Boundary:
    """Where the frozen part of a network ends.

    module: dotted name of the module whose output is kept. skipped: modules before it that need not run. as_image:
    whether the activations themselves may go in where the images did; else one blank image does. shape, dtype: of one
    image's activations. macs, total_macs: multiply-adds of one image up to the boundary, and in the whole network.
    image: (channels, height, width) of the network's input. ran: the modules that run up to the boundary.
    """

    module: str
    skipped: tuple[str, ...]
    as_image: bool
    shape: tuple[int, ...]
    dtype: torch.dtype
    macs: int
    total_macs: int
    image: tuple[int, ...]
    ran: frozenset[str]

    @property
    def bytes_per_image(self) -> int:
        """Return what one image's activations take on disk."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def pays(self, images: int, epochs: int, device: torch.device, limit: float | None = None) -> bool:
        """Return whether keeping the activations of so many images for so many epochs is worth their bytes.

        limit: the most bytes; left out, 8 GiB, and no more than `ZOO_CACHE_GB`. The answer follows from network, data,
        recipe, kind of device and limit alone, never from a clock: whether activations are kept may show in the last
        bits of a run. (A disk without room is another matter, which the run notes.)
        """
        limit = min(DEFAULT_LIMIT, cache_limit()) if limit is None else limit
        saved = self.macs / self.bytes_per_image >= WORTH.get(device.type, WORTH_ELSEWHERE)
        share = self.macs / max(1, self.total_macs)
        return saved and share >= LEAST_SHARE and epochs >= 2 and images * self.bytes_per_image <= limit

    @contextmanager
    def replay(self, model: nn.Module) -> Iterator[None]:
        """Let the model take activations (B, ...) where it took images, and run only what follows the boundary.

        Outputs, and gradients of what is trained, are those of the whole network. Afterwards the model is as it was.
        Also for a copy of the model that the boundary was found in, such as a moving average of it.
        """
        held: list[torch.Tensor] = []
        whole = model.forward

        def forward(activations: torch.Tensor) -> Any:
            held[:] = [activations]
            blank = activations.new_zeros((1, *self.image), dtype=torch.float32)
            try:
                return whole(activations if self.as_image else blank)
            finally:
                held.clear()

        with ExitStack() as stack:
            for name in self.skipped:
                stack.enter_context(_forward_of(model.get_submodule(name), _first))
            stack.enter_context(_forward_of(model.get_submodule(self.module), lambda *_, **__: held[0]))
            stack.enter_context(_forward_of(model, forward))
            yield

    def activations(
        self,
        model: nn.Module,
        pixels: Pixels,
        split: str,
        plan: Plan,
        precision: PrecisionPlan,
        device: torch.device,
        folder: Path,
        on_batch: OnBatch | None = None,
    ) -> Activations:
        """Return the activations of a split's images, centre-cropped, from a file in the folder or computed now.

        The file is found by the digest of the frozen tensors, so those of other weights are never taken for these.
        on_batch: as for `zoo.training.features.split_features`. Raises ZooError where the folder cannot be written.
        """
        state = {key: value for key, value in model.state_dict().items() if key.rpartition(".")[0] in self.ran}
        frozen = hashlib.sha256(f"{self.module} {digest_tensors(state)}".encode()).hexdigest()
        file = folder / array_name("boundary", split, frozen, pixels, plan, precision, device)

        def forward(batch: Any) -> torch.Tensor:
            images = normalise_tensor(torch.from_numpy(batch).to(device), plan.preprocessing)
            return _output(model, self.module, precision.place(images))

        def compute(add: Add, start: int) -> None:
            size, done = plan.preprocessing.image_size, start
            with torch.inference_mode(), precision.autocast(device):
                for batch in fixed_batches(pixels, size, FORWARD_BATCH, start):
                    for found in in_pieces(model, batch, forward):
                        add(found, True)
                    done += len(batch)
                    if on_batch is not None:
                        on_batch(done, len(pixels))

        tell = on_batch or (lambda done, total: None)
        with _evaluating(model):
            stored = store_once(file, len(pixels), compute, lambda: tell(0, len(pixels)))
        return Activations(stored, torch.from_numpy(pixels.y_true.copy()))

    def logits(
        self, model: nn.Module, activations: Activations, precision: PrecisionPlan, device: torch.device
    ) -> torch.Tensor:
        """Return a split's logits (N, classes), float32 on the CPU: what `forward_pixels` finds from its images."""

        def forward(places: range) -> torch.Tensor:
            logits: torch.Tensor = model(activations.batch(places).to(device)).float().cpu()
            return logits

        model.eval()
        found: list[torch.Tensor] = []
        with torch.inference_mode(), precision.autocast(device), self.replay(model):
            for start in range(0, len(activations), FORWARD_BATCH):
                places = range(start, min(start + FORWARD_BATCH, len(activations)))
                found.extend(in_pieces(model, places, forward))
        return torch.cat(found)


@dataclass(frozen=True)
class Activations:
    """What leaves the frozen part of a network for each image of a split, mapped from disk; y_true: (N,) int64."""

    stored: Stored
    y_true: torch.Tensor

    def __len__(self) -> int:
        return len(self.y_true)

    def batch(self, places: Places) -> torch.Tensor:
        """Return the activations (B, ...) of some images: a copy on the CPU, in the network's memory format."""
        values, chosen = self.stored.values, torch.from_numpy(np.array(places, np.int64))
        if self.stored.facts["channels_last"]:
            return values.permute(0, 2, 3, 1)[chosen].permute(0, 3, 1, 2)
        return values[chosen]

    def batches(self, order: Iterable[Places]) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield activations, labels (B,) and places (B,) in an order as `epoch_order` gives it."""
        for places in order:
            chosen = torch.from_numpy(np.array(places, np.int64))
            yield self.batch(places), self.y_true[chosen], chosen


# Finding it ---------------------------------------------------------------------------------------------------------


def find_boundary(
    model: nn.Module, example: torch.Tensor, precision: PrecisionPlan, device: torch.device
) -> Boundary | None:
    """Return the last place that only frozen modules come before, or None where there is none that can be proved.

    Frozen is what `set_trained` has left without gradients and in evaluation mode. A frozen part that still draws at
    random (dropout, stochastic depth) or takes statistics of its batches has no boundary behind it. example: two or
    more different images, normalised, on the device and in the plan's memory format; where memory does not suffice for
    them, no boundary is found. The model is left as it was.
    """
    try:
        return _last_boundary(model, example, precision, device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    give_back()
    return None


def _last_boundary(
    model: nn.Module, example: torch.Tensor, precision: PrecisionPlan, device: torch.device
) -> Boundary | None:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), precision.autocast(device), _no_zeros(model):
        ended, ran = _frozen_part(model, example)
        for place in range(len(ended) - 1, max(-1, len(ended) - 1 - _MOST_TRIED), -1):
            output = _steady_output(model, ended[place], example)
            if output is not None:
                found = _proved(model, ended[: place + 1], ran, output, example)
                if found is not None:
                    return found
    return None


def _frozen_part(model: nn.Module, example: torch.Tensor) -> tuple[list[str], frozenset[str]]:
    """Return the modules that end, in that order, before any with trained weights begins, and those begun by then."""
    ended: list[str] = []
    begun: set[str] = set()

    def begins(name: str, module: nn.Module) -> None:
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            raise _Reached
        begun.add(name)

    with ExitStack() as stack, torch.no_grad(), _evaluating(model):
        for name, module in model.named_modules():
            hook = module.register_forward_pre_hook(lambda module, _, name=name: begins(name, module))
            stack.callback(hook.remove)
            if name:
                hook = module.register_forward_hook(lambda *_, name=name: ended.append(name))
                stack.callback(hook.remove)
        try:
            model(example)
        except _Reached:
            return ended, frozenset(begun)
    return [], frozenset()  # nothing is trained


def _steady_output(model: nn.Module, name: str, example: torch.Tensor) -> torch.Tensor | None:
    """Return a frozen module's output; None where trained weights, chance or the batch have a part in it."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        before = _random_state(example.device)
        trained = _output(model, name, example)
        drawn = not torch.equal(before, _random_state(example.device))
        with _evaluating(model):
            output = _output(model, name, example)
    except TypeError:
        return None
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    if drawn or trained.requires_grad or output.requires_grad or not torch.equal(trained, output):
        return None
    return output


def _random_state(device: torch.device) -> torch.Tensor:
    states = [torch.get_rng_state()]
    return torch.cat([*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states)


def _output(model: nn.Module, name: str, images: torch.Tensor) -> torch.Tensor:
    """Return what a module gives for the images, with its gradients' past; nothing that follows it runs.

    Raises TypeError where it gives no tensor of one row for each image.
    """
    caught: list[torch.Tensor] = []

    def catch(_: nn.Module, __: Any, output: Any) -> None:
        if not isinstance(output, torch.Tensor) or output.shape[:1] != images.shape[:1]:
            raise TypeError(f"{name} gives no tensor with a row for each image")
        caught.append(output)
        raise _Reached

    hook = model.get_submodule(name).register_forward_hook(catch)
    try:
        with suppress(_Reached):
            model(images)
    finally:
        hook.remove()
    return caught[0]


def _proved(
    model: nn.Module, ended: list[str], ran: frozenset[str], output: torch.Tensor, example: torch.Tensor
) -> Boundary | None:
    """Return the cheapest replay from the last of these modules that gives the network's own logits, bit for bit."""
    with torch.no_grad(), _evaluating(model):
        wanted = model(example)
        for skipped, as_image in _ways(ended):
            found = Boundary(
                module=ended[-1],
                skipped=skipped,
                as_image=as_image,
                shape=tuple(output.shape[1:]),
                dtype=output.dtype,
                macs=_macs(lambda: _output(model, ended[-1], example)) // len(example),
                total_macs=_macs(lambda: model(example)) // len(example),
                image=tuple(example.shape[1:]),
                ran=ran,
            )
            try:
                with found.replay(model):
                    logits = model(output.clone(memory_format=torch.preserve_format))
            except Exception:
                continue  # what stands between the modules does not fit; another way may
            if isinstance(logits, torch.Tensor) and torch.equal(logits, wanted):
                return found
    return None


def _ways(ended: list[str]) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Yield what might be left out before the last of these modules, the cheapest first: (skipped, as_image)."""
    *earlier, last = ended
    ran = set(earlier)
    outer = [name for name in dict.fromkeys(earlier) if not any(parent in ran for parent in _parents(name))]
    outer = [name for name in outer if not name.startswith(f"{last}.")]
    container = last.rpartition(".")[0]
    beside = tuple(name for name in outer if container and name.rpartition(".")[0] == container)
    yield tuple(outer), True
    if beside:
        yield beside, False
    yield (), False


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _macs(run: Callable[[], Any]) -> int:
    """Return the multiply-adds of a forward pass, counted and not timed."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops()) // 2


# For as long as a block lasts ---------------------------------------------------------------------------------------


def _first(value: Any, *_: Any, **__: Any) -> Any:
    return value


@contextmanager
def _forward_of(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Let a module do another thing."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = function
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and back into its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _no_zeros(model: nn.Module) -> Iterator[None]:
    """Make trained weights random where all are zero: behind a fresh head everything would look the same."""
    generator = torch.Generator().manual_seed(0)
    zeros = [each for each in model.parameters() if each.requires_grad and not each.any()]
    try:
        with torch.no_grad():
            for parameter in zeros:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        yield
    finally:
        with torch.no_grad():
            for parameter in zeros:
                parameter.zero_()
