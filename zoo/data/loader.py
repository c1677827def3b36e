"""Batches for training: shuffled by seed and epoch alone, the same for any number of workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from zoo.data.cache import Pixels

Augment = Callable[[np.ndarray[Any, Any], int, int], np.ndarray[Any, Any]]
Item = tuple[np.ndarray[Any, Any], int, int]
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def epoch_order(count: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return an epoch's batches as lists of places, each place once, shuffled by (seed, epoch).

    A last batch of one image joins the batch before it: batch normalisation cannot train on one.

    >>> [len(batch) for batch in epoch_order(9, 4, seed=0, epoch=0)]
    [4, 5]
    """
    order = np.random.default_rng([seed, epoch]).permutation(count).tolist()
    batches = [order[start : start + batch_size] for start in range(0, count, batch_size)]
    if len(batches) > 1 and len(batches[-1]) == 1:
        last = batches.pop()
        batches[-1] = batches[-1] + last
    return batches


class _Augmented(Dataset[Item]):
    """Augmented images; asked for by (epoch, place), so that a worker needs no state of its own."""

    def __init__(self, pixels: Pixels, augment: Augment) -> None:
        self.pixels, self.augment = pixels, augment

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, place = key
        return self.augment(self.pixels[place], epoch, place), int(self.pixels.y_true[place]), place


class _Order(Sampler[list[tuple[int, int]]]):
    """The batches of whichever epoch is set."""

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.batch_size, self.seed, self.epoch = count, batch_size, seed, 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in epoch_order(self.count, self.batch_size, self.seed, self.epoch):
            yield [(self.epoch, place) for place in batch]

    def __len__(self) -> int:
        return len(epoch_order(self.count, self.batch_size, self.seed, 0))


def _collate(items: list[Item]) -> Batch:
    images = torch.from_numpy(np.stack([item[0] for item in items]))
    labels = torch.tensor([item[1] for item in items], dtype=torch.int64)
    return images, labels, torch.tensor([item[2] for item in items], dtype=torch.int64)


def _quiet_worker(_: int) -> None:
    import cv2

    cv2.setNumThreads(0)
    torch.set_num_threads(1)


class TrainBatches:
    """The training batches of every epoch: uint8 images (B, H, W, 3), labels (B,) and places (B,)."""

    def __init__(
        self, pixels: Pixels, augment: Augment, batch_size: int, seed: int, workers: int, pin_memory: bool
    ) -> None:
        self._order = _Order(len(pixels), batch_size, seed)
        self._loader: DataLoader[Any] = DataLoader(
            _Augmented(pixels, augment),
            batch_sampler=self._order,
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=_quiet_worker,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
        )

    def __len__(self) -> int:
        return len(self._order)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of one epoch."""
        self._order.epoch = epoch
        yield from self._loader


def fixed_batches(pixels: Pixels, image_size: int, batch_size: int) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Yield a split's images, centre-cropped, in manifest order: uint8 arrays of shape (B, size, size, 3)."""
    from zoo.data.transforms import center_crop

    for start in range(0, len(pixels), batch_size):
        stop = min(start + batch_size, len(pixels))
        yield np.stack([center_crop(pixels[place], image_size) for place in range(start, stop)])
