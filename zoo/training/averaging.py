"""Averages of weights: the mean of several epochs, the greedy soup, and batch-norm statistics that fit them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from zoo.data.cache import Pixels
from zoo.data.loader import epoch_order
from zoo.data.transforms import center_crop
from zoo.runs import Preprocessing
from zoo.training.memory import in_pieces

State = Mapping[str, torch.Tensor]
Batch = TypeVar("Batch", bound=Any)


def average(states: Iterable[State]) -> dict[str, torch.Tensor]:
    """Return the mean of state dicts, as stochastic weight averaging takes it of the last epochs.

    Floating tensors are summed as float64 and returned in their own type; counts are the last's. Of an iterator only
    the sum and one state are in memory. Izmailov et al. 2018 (arXiv 1803.05407). Raises ValueError for no state, and
    for states that are not of one network.
    """
    total = _Sum()
    for state in states:
        total.add(state)
        del state  # before the next is read
    return total.mean()


class _Sum:
    """The sum of state dicts so far."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, torch.Tensor] = {}
        self.dtypes: dict[str, torch.dtype] = {}

    def add(self, state: State) -> None:
        self._check(state)
        for key, value in state.items():
            if not value.is_floating_point():
                self.sums[key] = value.clone()
            elif self.count:
                self.sums[key] += value
            else:
                self.sums[key] = value.to(torch.float64, copy=True)
        self.dtypes = {key: value.dtype for key, value in state.items()}
        self.count += 1

    def mean(self, also: State | None = None) -> dict[str, torch.Tensor]:
        """Return the mean of what was added, or of that and one more; the sum stays as it is."""
        if not self.count:
            raise ValueError("there is no state to average")
        if also is not None:
            self._check(also)
        count = self.count + (also is not None)
        found = {}
        for key, value in self.sums.items():
            if value.is_floating_point():
                whole = value if also is None else value + also[key]
                found[key] = (whole / count).to(self.dtypes[key])
            else:
                found[key] = (value if also is None else also[key]).clone()
        return found

    def _check(self, state: State) -> None:
        if not self.count:
            return
        odd = self.sums.keys() ^ state.keys()
        odd |= {key for key in self.sums.keys() & state.keys() if self.sums[key].shape != state[key].shape}
        if odd:
            raise ValueError(f"the states are not of one network; they differ in {', '.join(sorted(odd)[:3])}")


# The greedy soup ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """Weights that may go into a soup: read only when they are asked for.

    load: returns the state dict, such as `functools.partial(load_file, path)`. value: its score on val where that is
    known already, so that it need not be computed.
    """

    name: str
    load: Callable[[], State]
    value: float | None = None


@dataclass(frozen=True)
class Soup:
    """Averaged weights, the candidates they are of in the order they were added, and all scores on val.

    value: of the soup. values: candidate to its own score.
    """

    state: dict[str, torch.Tensor]
    chosen: list[str]
    value: float
    values: dict[str, float]


def greedy_soup(candidates: Sequence[Candidate], score: Callable[[State], float], sign: int = 1) -> Soup:
    """Return the greedy soup of Wortsman et al. 2022 (arXiv 2203.05482, recipe 1), scored on val.

    From the best candidate down, one is added where the average with it scores no worse than the one without. Thus the
    soup scores no worse on val than the best of them. score: of a state dict; where the network has batch norm it must
    estimate the statistics anew for any but a candidate's own (`reestimate_batch_norm`). sign: -1 where less is better.
    A score that is no number is the worst; of equals the first comes first.

    One candidate, the sum and one average are in memory. Raises ValueError for no candidate and for those of different
    networks.
    """
    if not candidates:
        raise ValueError("there is no candidate for the soup")

    def rated(value: float) -> float:
        return sign * value if math.isfinite(value) else -math.inf

    values = {each.name: score(each.load()) if each.value is None else each.value for each in candidates}
    first, *others = sorted(candidates, key=lambda each: rated(values[each.name]), reverse=True)
    total, chosen, best = _Sum(), [first.name], values[first.name]
    total.add(first.load())
    for each in others:
        state = each.load()
        value = score(total.mean(also=state))
        if math.isfinite(value) and rated(value) >= rated(best):
            total.add(state)
            chosen.append(each.name)
            best = value
        del state  # before the next is read
    return Soup(total.mean(), chosen, best, values)


# Batch norm -----------------------------------------------------------------------------------------------------------


def statistics_batches(
    pixels: Pixels, preprocessing: Preprocessing, batch_size: int, seed: int
) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Yield the training images for `reestimate_batch_norm`: uint8 (B, size, size, 3), each once.

    They are centre-cropped and not augmented: the statistics are for the images that the network will be asked about,
    and crops at random show other sizes (Touvron et al. 2019, arXiv 1906.06423). They are shuffled by the seed, for a
    manifest is sorted by class, and a batch of one class is normalised as no other.
    """
    for places in epoch_order(len(pixels), batch_size, seed, 0):
        yield np.stack([center_crop(pixels[place], preprocessing.image_size) for place in places])


def reestimate_batch_norm(
    model: nn.Module, batches: Iterable[Batch], forward: Callable[[Batch], Any], frozen: Sequence[str] = ()
) -> int:
    """Give batch-norm layers the statistics of their input under the weights as they are; return how many got them.

    Averaged weights need it: the mean of statistics is not the statistics of the mean. As
    `torch.optim.swa_utils.update_bn`, but batches count by their size, and all other layers are in evaluation mode:
    dropout would widen the variance beyond that of prediction (Li et al. 2019, arXiv 1801.05134). A single image has no
    variance and is passed over. A network without such layers, as those with layer norm, is left as it is, and no batch
    is asked for. frozen: modules by name whose layers keep their statistics.

    batches: what forward gives to the model, each with a length; where memory does not suffice for one, its slices
    count as batches. The model is left in evaluation mode.
    """
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and module.track_running_stats
        and not any(f"{name}.".startswith(f"{each}.") for each in frozen)
    ]
    model.eval()
    if not layers:
        return 0
    momenta = [layer.momentum for layer in layers]
    buffers = [buffer for layer in layers for buffer in layer.buffers()]
    seen = 0

    def count_in(batch: Batch) -> int:
        before = [buffer.clone() for buffer in buffers]
        for layer in layers:
            layer.momentum = len(batch) / (seen + len(batch))
        try:
            forward(batch)
        except BaseException:  # the first layers may have counted what the last have not seen
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
            raise
        return len(batch)

    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.train()
        with torch.inference_mode():
            for batch in batches:
                if len(batch) < 2:
                    continue
                for count in in_pieces(model, batch, count_in, least=2):
                    seen += count
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
            layer.eval()
    if not seen:
        raise ValueError("batch norm needs a batch of two images or more")
    return len(layers)
