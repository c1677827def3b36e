"""Images of all requests on their way: a bounded queue, a pool that decodes, one thread that computes in batches."""

from __future__ import annotations

import asyncio
import math
import random
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from zoo.deployment.answers import heat_of
from zoo.deployment.server.decoders import Decoder, Heavy
from zoo.deployment.server.limits import ClientGone, Limits, Refused, busy
from zoo.deployment.server.metrics import Metrics
from zoo.errors import ZooError, one_line

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Floats = np.ndarray[Any, np.dtype[np.float32]]

MOST_DECODERS = 8  # processes of some hundred MiB each, and one network is behind them all
_AWAY_S = 3.0  # for so long whoever was sent away counts as waiting


class Predicts(Protocol):
    """What is asked of a `zoo.deployment.predictor.Predictor`; its methods are called from several threads."""

    classes: list[str]
    preprocessing: Any

    def logits(self, images: Sequence[Pixels]) -> tuple[Floats, Floats | None]: ...  # noqa: D102
    def answers(self, logits: Floats) -> Sequence[Any]: ...  # noqa: D102


@dataclass(slots=True)
class Outcome:
    """One image's answer and its class map (h, w), or why there is none.

    size: height and width as it was resized. sides: both as its header gives them, in either order.
    """

    answer: Any = None
    heat: Floats | None = None
    size: tuple[int, int] = (0, 0)
    sides: tuple[int, int] = (0, 0)
    refused: Refused | None = None


@dataclass(slots=True)
class _Request:
    """All images of one request; `outcomes` fills up in the event loop's thread."""

    done: asyncio.Future[None]
    outcomes: list[Outcome | None]
    left: int
    gone: bool = False


@dataclass(slots=True)
class _Job:
    request: _Request
    index: int
    model: str
    data: bytes
    pixels: Pixels | None = None
    outcome: Outcome = field(default_factory=Outcome)


class _Pace:
    """How fast images leave the queue, and how many clients were sent away lately: when each should come again.

    Told one and the same second, hundreds would come back together and be sent away together.
    """

    def __init__(self) -> None:
        self.image_s, self._away, self._away_at, self._left_at = 0.05, 0.0, 0.0, 0.0
        self._draw = random.Random(0)

    def note(self, images: int, remaining: int) -> None:
        """Count images that left, of a queue that had more."""
        now = time.monotonic()
        if remaining and self._left_at:
            self.image_s += 0.05 * (min(10.0, (now - self._left_at) / images) - self.image_s)
        self._left_at = now if remaining else 0.0

    def come_again_s(self, waiting: int) -> float:
        """Return the seconds after which a client that is sent away now may find room."""
        now = time.monotonic()
        self._away = self._away * math.exp((self._away_at - now) / _AWAY_S) + 1
        self._away_at = now
        return (waiting / 2 + self._away) * self.image_s * self._draw.uniform(0.5, 1.5)


class WorkQueue:
    """Bounded: what does not fit is refused at once with 503, so that those in it are answered in time.

    An image is checked and decoded by one of a few processes, a thread beside each; big ones by a process of their own,
    one after the other. The network runs in one thread: whatever waits when it is free is computed together, up to
    `batch_images` of a model, without waiting for more.
    """

    def __init__(self, models: Mapping[str, Predicts], limits: Limits, metrics: Metrics, decoders: int) -> None:
        self.models, self.limits, self.metrics = models, limits, metrics
        self._pool_size = min(MOST_DECODERS, max(1, decoders))
        self.images = 0
        self._own = threading.local()
        self._started: list[Decoder] = []
        self._decoders = ThreadPoolExecutor(self._pool_size, "decode")
        self._heavy = ThreadPoolExecutor(1, "decode-heavy")
        self._waiting: deque[_Job] = deque()
        self._awake = threading.Condition()
        self._stopped = False
        self._pace = _Pace()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._compute, name="inference", daemon=True)

    def start(self) -> None:
        """Begin to work for the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        for _ in range(self._pool_size):
            self._decoders.submit(self._start_decoder)

    def stop(self) -> None:
        """End the threads; whatever is still in the queue is dropped. May be called again."""
        with self._awake:
            self._stopped = True
            self._awake.notify()
        for each in self._started:
            each.kill()
        for pool in (self._decoders, self._heavy):  # a thread waits for its process alone, and that is dead
            pool.shutdown(cancel_futures=True)
        for each in self._started:
            each.stop()

    def check_room(self, images: int = 1) -> None:
        """Raise Refused 503 where so many images have no room."""
        if self.images + images > self.limits.queue_images:
            self.metrics.full.inc()
            raise busy(self._pace.come_again_s(self.images))

    async def predict(self, model: str, images: Sequence[bytes], gone: asyncio.Future[Any]) -> list[Outcome]:
        """Return an outcome per image; `gone` ends when the client left, and then nothing more is computed for it.

        Raises Refused 503 where the queue is full or the deadline passed, ClientGone where the client left.
        """
        self.check_room(len(images))
        assert self._loop is not None
        request = _Request(self._loop.create_future(), [None] * len(images), len(images))
        self.images += len(images)
        jobs = [_Job(request, index, model, data) for index, data in enumerate(images)]
        for job in jobs:
            self._decoders.submit(self._decode, job, False)
        try:
            await asyncio.wait((request.done, gone), timeout=self.limits.deadline_s, return_when="FIRST_COMPLETED")
            if not request.done.done():
                if gone.done():
                    raise ClientGone
                raise busy(self._pace.come_again_s(self.images), "busy: no answer in time; try again")
        finally:
            request.gone = True
            for job in jobs:  # those that still wait would hold bytes that nobody counts any more
                job.data = b""
        return [outcome for outcome in request.outcomes if outcome is not None]

    def _start_decoder(self) -> Decoder:
        """Return the decoder of this thread, running."""
        if not hasattr(self._own, "decoder"):
            self._own.decoder = Decoder(self.limits.pixels, self.limits.decode_s)
            self._started.append(self._own.decoder)
        decoder: Decoder = self._own.decoder
        decoder.start()
        if self._stopped:  # `stop` may not have seen this process
            decoder.kill()
        return decoder

    def _decode(self, job: _Job, heavy: bool) -> None:
        """In a decoder's thread: from bytes to pixels, which the network's thread then finds waiting."""
        data = job.data
        try:
            if job.request.gone:  # asked after `data` was read, for that is emptied after this was set
                self._settle([job])
                return
            started = time.perf_counter()
            preprocessing = self.models[job.model].preprocessing
            job.pixels, job.outcome.sides = self._start_decoder().prepare(data, preprocessing, heavy)
            job.outcome.size = job.pixels.shape[:2]
            self.metrics.decode_seconds.observe(time.perf_counter() - started)
        except Heavy:
            if self._hand_over(job):
                return
        except Refused as refused:
            job.outcome.refused = refused
        except Exception as error:
            job.outcome.refused = _broken(error)
        job.data = b""
        if job.outcome.refused is not None:
            self._settle([job])
            return
        with self._awake:
            self._waiting.append(job)
            self._awake.notify()

    def _hand_over(self, job: _Job) -> bool:
        """Give a big image to the thread that decodes such; return whether it was taken."""
        try:
            self._heavy.submit(self._decode, job, True)
        except RuntimeError:  # the server ends
            job.outcome.refused = busy()
            return False
        return True

    def _compute(self) -> None:
        """In the network's thread."""
        while batch := self._next_batch():
            wanted = [job for job in batch if not job.request.gone]
            if wanted:
                started = time.perf_counter()
                self._run(wanted)
                seconds = time.perf_counter() - started
                self.metrics.batch.observe(len(wanted))
                self.metrics.inference_seconds.labels(batch[0].model).observe(seconds)
            self._settle(batch)
            batch = wanted = []  # while waiting, no image of anybody is kept

    def _next_batch(self) -> list[_Job]:
        """Wait for images; return those that came first and, of the same model, as many as go together."""
        with self._awake:
            while not self._waiting and not self._stopped:
                self._awake.wait()
            if self._stopped:
                return []
            model = self._waiting[0].model
            batch: list[_Job] = []
            passed: list[_Job] = []
            while self._waiting and len(batch) < self.limits.batch_images:
                job = self._waiting.popleft()
                (batch if job.model == model else passed).append(job)
            self._waiting.extendleft(reversed(passed))
            return batch

    def _run(self, jobs: list[_Job]) -> None:
        """Fill in the outcomes of a batch; where it fails, of each image alone, so that one spoils no other's."""
        try:
            predictor = self.models[jobs[0].model]
            logits, maps = predictor.logits([job.pixels for job in jobs if job.pixels is not None])
            answers = predictor.answers(logits)
            heats = None if maps is None else heat_of(maps, [predictor.classes.index(each.label) for each in answers])
            for place, (job, answer) in enumerate(zip(jobs, answers, strict=True)):
                job.outcome.answer, job.outcome.heat = answer, None if heats is None else heats[place]
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._run([job])
                return
            reason = Refused(422, one_line(error)) if isinstance(error, ZooError) else _broken(error)
            jobs[0].outcome.refused = reason

    def _settle(self, jobs: list[_Job]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._finish, jobs)
        except RuntimeError:  # the loop has ended
            return

    def _finish(self, jobs: list[_Job]) -> None:
        """In the event loop's thread: the only place where an image leaves the queue."""
        self.images -= len(jobs)
        self._pace.note(len(jobs), self.images)
        for job in jobs:
            request = job.request
            request.outcomes[job.index] = job.outcome
            request.left -= 1
            if request.left == 0 and not request.done.done():
                request.done.set_result(None)


def _broken(error: Exception) -> Refused:
    """Return 500; the error's words, which may hold what was sent, go nowhere."""
    from zoo.deployment.server.gate import log_broken

    log_broken(error)
    return Refused(500, "something in this server is broken; its log says where")
