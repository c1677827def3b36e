"""The error that a user can mend, and the words in which it is said."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_FROM_WORKER = re.compile(r"Caught \w+ in .*\.\nOriginal Traceback ")

EXIT_MISTAKE = 1
EXIT_SOME_RUNS_FAILED = 3
EXIT_SIGINT = 130
EXIT_SIGTERM = 143


class ZooError(Exception):
    """A mistake that the user can mend: one line that says what, got, allowed and fix."""

    def __init__(self, message: str = "") -> None:
        # A data loader raises a worker's error anew, by its class, with the traceback as its message.
        if _FROM_WORKER.match(message):
            message = message.rstrip().rsplit("\n", 1)[-1].partition(": ")[2]
        super().__init__(message)


class Hindered(ZooError):
    """What a run needs from outside is not there, or not as it must be, whatever its recipe says.

    An image, a cache, a file of weights, a run to go on from, room on the disk; or another process is at the run. The
    same command goes on once that is mended.
    """


class Interrupted(ZooError):
    """A run was stopped by a signal after its state was saved; the same command goes on."""

    def __init__(self, message: str, exit_code: int = EXIT_SIGINT) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return a hint `; did you mean 'x'?` for the closest allowed name, or an empty string.

    >>> nearest("resnet81", ["resnet18", "vit_tiny"])
    "; did you mean 'resnet18'?"
    >>> nearest("zzz", ["resnet18"])
    ''
    """
    names = list(allowed)
    by_lower = {each.lower(): each for each in names}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.6)
    return f"; did you mean {by_lower[close[0]]!r}?" if close else ""


def one_line(text: object, limit: int = 300) -> str:
    r"""Return text as one printable line of at most `limit` characters, control characters escaped.

    >>> one_line("a\nb\x1b[31m")
    'a b\\x1b[31m'
    """
    joined = " ".join(str(text).split())
    clean = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in joined)
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"
