"""Signals that wait for the end of a training step, so that what is saved is whole."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from zoo.errors import EXIT_SIGINT, EXIT_SIGTERM

PATIENCE_S = 5.0  # a step that takes longer is given up; the checkpoint before it stays
ONE_WISH_S = 1.0  # signals nearer than that count as one
_CODES = {signal.SIGINT: EXIT_SIGINT, signal.SIGTERM: EXIT_SIGTERM}


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM, with the exit code that belongs to it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = _CODES.get(signal.Signals(number), 128 + number)


class Interruption:
    """Within `with interruption:` SIGINT and SIGTERM raise Stopped, but in a step only at its end.

    In threads other than the main one, where Python allows no handlers, nothing is changed. A second signal, and a step
    that does not end within PATIENCE_S seconds, raise at once.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._in_step = False
        self._old: dict[int, Any] = {}
        self._timer: threading.Timer | None = None
        self._since = 0.0

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in _CODES:
                # Where a parent has the signal ignored (nohup, a background job), it stays ignored.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_timer()
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old.clear()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        # A service manager may signal both the process and its group: that is one wish.
        again = self.requested is not None and time.monotonic() - self._since > ONE_WISH_S
        if self.requested is None:
            self._since = time.monotonic()
        self.requested = self.requested or number
        if not self._in_step or again:
            self._stop_timer()
            raise Stopped(number)
        if self._timer is not None:
            return
        self._timer = threading.Timer(PATIENCE_S, os.kill, (os.getpid(), number))
        self._timer.daemon = True
        self._timer.start()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Let the block end before a signal raises; it raises after the block, by `check`. Blocks may lie in blocks."""
        outer, self._in_step = self._in_step, True
        try:
            yield
        finally:
            self._in_step = outer

    def check(self, number: int | None = None) -> None:
        """Raise Stopped where a signal has come during a step, to this process or, by its number, to another."""
        number = number or self.requested
        if number:
            self._stop_timer()
            raise Stopped(number)
