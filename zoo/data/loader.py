"""Batches for training: drawn by seed and epoch alone, the same for any number of workers."""

from __future__ import annotations

import copy
import signal
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from zoo.data.cache import Pixels
from zoo.errors import ZooError, one_line

Augment = Callable[[np.ndarray[Any, Any], int, int], np.ndarray[Any, Any]]
Places = np.ndarray[Any, np.dtype[np.int64]]
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_Key = tuple[int, Places, Places]

MOST_THREADS = 4  # more of them wait for Python's lock, which a quarter of an augmentation's time needs


def epoch_order(count: int, batch_size: int, seed: int, epoch: int, labels: Places | None = None) -> list[Places]:
    """Return an epoch's batches as int64 arrays of places, each place once, shuffled by (seed, epoch).

    A last batch of one image joins the batch before it: batch normalisation cannot train on one. With labels (N,)
    `count` places are drawn with replacement instead, every class that occurs equally often up to one.

    >>> [len(batch) for batch in epoch_order(9, 4, seed=0, epoch=0)]
    [4, 5]
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(count) if labels is None else _balanced(labels, count, generator)
    return [order[start:stop] for start, stop in _bounds(count, batch_size)]


def _bounds(count: int, batch_size: int) -> list[tuple[int, int]]:
    starts = list(range(0, count, batch_size))
    if len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], count], strict=True))


def _balanced(labels: Places, count: int, generator: np.random.Generator) -> Places:
    """Draw `count` places so that classes are alike; which classes are drawn once more is left to chance too."""
    by_class = np.argsort(labels, kind="stable")
    _, firsts, sizes = np.unique(labels[by_class], return_index=True, return_counts=True)
    drawn = np.resize(generator.permutation(len(sizes)), count)
    places = by_class[firsts[drawn] + generator.integers(0, sizes[drawn])]
    return generator.permutation(places)


def _copies(places: Places) -> Places:
    """Return how often each place came before in the same order: 0 for the first time."""
    order = np.argsort(places, kind="stable")
    _, firsts, counts = np.unique(places[order], return_index=True, return_counts=True)
    copies = np.empty_like(places)
    copies[order] = np.arange(len(places)) - np.repeat(firsts, counts)
    return copies


def share(batch_len: int, rank: int, world: int) -> list[int]:
    """Return the positions in a batch that one of `world` processes computes, in the batch's order.

    Position i and its mirror image B - 1 - i go to the same process, so that mixing a batch with its own reverse
    pairs the same images in any number of processes. Sizes differ by two images at most.

    >>> [share(9, rank, 2) for rank in (0, 1)]
    [[0, 1, 7, 8], [2, 3, 4, 5, 6]]
    """
    pairs = (batch_len + 1) // 2
    first = range(pairs * rank // world, pairs * (rank + 1) // world)
    return [*first, *(batch_len - 1 - place for place in reversed(first) if 2 * place != batch_len - 1)]


class _Batches(Dataset[Batch | ZooError]):
    """Augmented batches; asked for by (epoch, places, copies), so that a worker needs no state of its own.

    An image that is drawn several times in an epoch is another one to the augmentation each time.
    threads: how many augment at once. OpenCV and NumPy let go of Python's lock, so two take half the time of one.
    """

    def __init__(self, pixels: Pixels, augment: Augment, threads: int) -> None:
        self.pixels = pixels
        # An augmentation holds the random state of the image that it works on: each thread needs its own.
        self.augments = [copy.copy(augment) for _ in range(threads)]
        self.pool = ThreadPoolExecutor(threads - 1, "augment") if threads > 1 else None
        self.shape: tuple[int, ...] = ()

    def __getitem__(self, key: _Key) -> Batch | ZooError:
        epoch, places, copies = key
        try:
            images = self._augmented(epoch, places, copies)
        except ZooError as error:  # said as it is: raised in a worker it would come with a traceback as its text
            return error
        return images, torch.from_numpy(self.pixels.y_true[places]), torch.from_numpy(places.copy())

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown()

    def _augmented(self, epoch: int, places: Places, copies: Places) -> torch.Tensor:
        if not len(places):
            return torch.empty(0, dtype=torch.uint8)
        if not self.shape:
            self.shape = self.augments[0](self.pixels[int(places[0])], epoch, int(places[0])).shape
        images = torch.empty((len(places), *self.shape), dtype=torch.uint8)
        rows = images.numpy()  # here: a thread of its own that called torch would get threads of its own

        def fill(number: int) -> None:
            for row in range(number, len(places), len(self.augments)):
                place, copy_number = int(places[row]), int(copies[row])
                sample = place + copy_number * len(self.pixels)
                rows[row] = self.augments[number](self.pixels[place], epoch, sample)

        others = [self.pool.submit(fill, number) for number in range(1, len(self.augments))] if self.pool else []
        try:
            fill(0)
        finally:
            wait(others)
        for each in others:
            each.result()
        return images


class _Order(Sampler[_Key]):
    """A process's share of the batches of whichever epoch is set, from `start` on, and of those up to the last."""

    def __init__(self, count: int, batch_size: int, seed: int, labels: Places | None, rank: int, world: int) -> None:
        self.count, self.batch_size, self.seed, self.labels = count, batch_size, seed, labels
        self.rank, self.world = rank, world
        self.epoch, self.start, self.last_epoch = 0, 0, 0

    def __iter__(self) -> Iterator[_Key]:
        start = self.start
        for epoch in range(self.epoch, max(self.epoch, self.last_epoch) + 1):
            batches = epoch_order(self.count, self.batch_size, self.seed, epoch, self.labels)
            copies = _copies(np.concatenate(batches)) if self.labels is not None else np.zeros(self.count, np.int64)
            ends = np.cumsum([len(places) for places in batches])
            for places, end in list(zip(batches, ends.tolist(), strict=True))[start:]:
                again = copies[end - len(places) : end]
                own = share(len(places), self.rank, self.world) if self.world > 1 else slice(None)
                yield epoch, places[own], again[own]
            start = 0


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    import cv2

    # A signal to the whole process group is the parent's to answer: it saves its state, then ends the workers.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # What a thread that hands tensors over says of a parent that left: an error of loading goes another way.
    sys.excepthook = _quiet_if_alone
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def _quiet_if_alone(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not isinstance(error, OSError | EOFError):
        sys.__excepthook__(kind, error, trace)


def _end_workers(held: list[Any]) -> None:
    # Not left to the collector: the traceback of an error may hold the loader for long.
    while held:
        source = held.pop()
        source._shutdown_workers()
        for worker in source._workers:
            if worker.is_alive():  # it does not listen to a SIGTERM
                worker.kill()
                worker.join()


class TrainBatches:
    """The training batches of every epoch: uint8 images (b, H, W, 3), labels (b,) and places (b,), both int64.

    workers: processes that load ahead; with 0 this one does, in its turn, on as many threads as torch has, up to four.
    last_epoch: up to which they go on with the next epoch while what comes between two of them is done.
    balanced: draw each class equally often (`epoch_order`).
    rank, world: which `share` of every batch is wanted; one with no image in a share has (0,) for all shapes.
    """

    def __init__(
        self,
        pixels: Pixels,
        augment: Augment,
        batch_size: int,
        seed: int,
        workers: int,
        pin_memory: bool,
        *,
        balanced: bool = False,
        rank: int = 0,
        world: int = 1,
        last_epoch: int = 0,
    ) -> None:
        self._count = len(_bounds(len(pixels), batch_size))
        self._order = _Order(len(pixels), batch_size, seed, pixels.y_true if balanced else None, rank, world)
        self._order.last_epoch = last_epoch
        self._next: tuple[int, int] | None = None  # epoch and number of the batch that the source gives next
        self._source: Iterator[Batch | ZooError] = iter(())
        self._running: Iterator[Batch] | None = None
        threads = 1 if workers else min(torch.get_num_threads(), MOST_THREADS)
        self._batches = _Batches(pixels, augment, threads)
        self._workers, self._pin_memory, self._closed = workers, pin_memory, False
        self._loader: DataLoader[Any] | None = None
        self._held: list[Any] = []  # torch's own iterator over the workers
        weakref.finalize(self, _end_workers, self._held)

    def __len__(self) -> int:
        return self._count

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch, from batch number `start` on; the epoch before must have ended.

        Raises ZooError where an own transform fails or a loading process dies. Closed in mid-epoch, the workers
        stop after what they have begun.
        """
        self._stop()
        self._running = self._yield(epoch, start)
        return self._running

    def _yield(self, epoch: int, start: int) -> Iterator[Batch]:
        if self._closed:
            raise ValueError("these batches are closed")
        if self._next != (epoch, start):
            self._order.epoch, self._order.start = epoch, start
            self._source = self._ask(self._begun)
        for number in range(start + 1, self._count + 1):
            self._next = None  # until it has come
            batch = self._ask(next, self._source)
            if isinstance(batch, ZooError):
                raise batch
            more = epoch < self._order.last_epoch
            self._next = (epoch, number) if number < self._count else (epoch + 1, 0) if more else None
            yield batch

    def _begun(self) -> Iterator[Batch | ZooError]:
        if not self._workers:
            return map(self._load, self._order)
        if self._loader is None:
            self._loader = DataLoader(
                self._batches,
                batch_size=None,
                sampler=self._order,
                num_workers=self._workers,
                collate_fn=_as_it_is,
                worker_init_fn=_start_worker,
                pin_memory=self._pin_memory,
                persistent_workers=True,
                generator=torch.Generator(),  # else it draws from the training's own random state
            )
        source = iter(self._loader)
        self._held[:] = [source]
        return source

    def _load(self, key: _Key) -> Batch | ZooError:
        batch = self._batches[key]
        if self._pin_memory and not isinstance(batch, ZooError):
            images, labels, places = (each.pin_memory() for each in batch)
            return images, labels, places
        return batch

    def _ask(self, question: Callable[..., Any], *about: Any) -> Any:
        try:
            return question(*about)
        except BaseException as error:
            # Ctrl-C may come between any two lines of torch's loader, which then waits for ever for what it lost.
            self._let_go()
            if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
                said = one_line(error, 160)
                raise ZooError(f"a loading process died ({said}); load with fewer: --set workers=0") from error
            raise

    def _stop(self) -> None:
        if self._running is not None:
            self._running.close()  # type: ignore[attr-defined]
        self._running = None

    def _let_go(self) -> None:
        self._loader, self._next = None, None
        _end_workers(self._held)

    def close(self) -> None:
        """End the workers and threads; no epoch can be had afterwards."""
        self._closed = True
        self._stop()
        self._let_go()
        self._batches.close()


def fixed_batches(pixels: Pixels, image_size: int, batch_size: int) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Yield a split's images, centre-cropped, in manifest order: uint8 arrays of shape (B, size, size, 3)."""
    from zoo.data.transforms import center_crop

    for start in range(0, len(pixels), batch_size):
        stop = min(start + batch_size, len(pixels))
        yield np.stack([center_crop(pixels[place], image_size) for place in range(start, stop)])
