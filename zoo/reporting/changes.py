"""What would change a choice: the smallest change of the margin, and of each limit, each tried out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from zoo.reporting.pick import Candidate, Choice, Choosing, Limit, largest_margin


@dataclass(frozen=True)
class Change:
    """One thing that, set to `to`, would make the choice another: `pick`, None where nothing would fit.

    limit: None where the margin is meant. opens: whether more is let in than before.
    """

    limit: Limit | None
    to: float
    pick: Candidate | None
    opens: bool


def what_would_change(choosing: Choosing, limits: Sequence[Limit], margin: float, choice: Choice) -> list[Change]:
    """Return the smallest change of the margin, and of each limit, that would change the choice; each was tried out."""
    found = [*_by_margin(choosing, limits, margin, choice)]
    for place, limit in enumerate(limits):

        def tried(bound: float, limit: Limit = limit, place: int = place) -> Candidate | None:
            changed = [*limits[:place], replace(limit, bound=bound), *limits[place + 1 :]]
            return choosing.choose(changed, margin).chosen

        found += [*_by_opening(choosing, limits, limit, tried, choice), *_by_tightening(choosing, limit, tried, choice)]
    return found


_Tried = Callable[[float], Candidate | None]


def _by_opening(
    choosing: Choosing, limits: Sequence[Limit], limit: Limit, tried: _Tried, choice: Choice
) -> Iterable[Change]:
    """Return the first bound, of those that let one more candidate in, that changes the choice."""
    name = choice.chosen.name if choice.chosen else None
    others = [each for each in limits if each is not limit]
    ready = [each for each in choosing.ready if all(one.keeps(each.value(one.key)) for one in others)]
    values = {each.value(limit.key) for each in ready if math.isfinite(each.value(limit.key))}
    for value in sorted((each for each in values if not limit.keeps(each)), key=limit.excess):
        bound = rounded(value, up=limit.sense == "at most")
        other = tried(bound)
        if other is not None and other.name != name:
            return [Change(limit, bound, other, True)]
    return []


def _by_tightening(choosing: Choosing, limit: Limit, tried: _Tried, choice: Choice) -> Iterable[Change]:
    """Return the first bound, of those that throw one more candidate out, that changes the choice.

    Not the chosen alone matters: without the best, what is left is held against another.
    """
    if choice.chosen is None:
        return []
    values = {choosing.candidates[name].value(limit.key) for name in choice.fitting}
    for value in sorted(values, key=lambda each: abs(each - limit.bound)):
        bound = rounded(value, up=limit.sense != "at most", past=True)
        if bound <= 0 or (limit.sense == "at least" and bound > 1):
            continue
        other = tried(bound)
        if other is None or other.name != choice.chosen.name:
            return [Change(limit, bound, other, False)]
    return []


def _by_margin(choosing: Choosing, limits: Sequence[Limit], margin: float, choice: Choice) -> Iterable[Change]:
    if choice.chosen is None:
        return
    needed = {name: max(0.0, -each.low) for name, each in choice.differences.items()}
    for value in sorted({each for each in needed.values() if each > margin}):
        to = rounded(value, up=True)
        if to > largest_margin(choosing.metric):  # a paired interval may go beyond what the metric can
            break
        other = choosing.choose(limits, to).chosen
        if other is not None and other.name != choice.chosen.name:
            yield Change(None, to, other, True)
            break
    own = needed[choice.chosen.name]
    if own > 0:
        to = max(0.0, rounded(own, up=False, past=True))
        other = choosing.choose(limits, to).chosen
        if other is not None and other.name != choice.chosen.name:
            yield Change(None, to, other, False)


def rounded(value: float, *, up: bool, past: bool = False) -> float:
    """Return a number of three digits that is not below (up) or above a value; `past` it: beyond, not equal.

    >>> rounded(31.415, up=True), rounded(31.415, up=False), rounded(31.4, up=True), rounded(31.4, up=True, past=True)
    (31.5, 31.4, 31.4, 31.5)
    """
    if value == 0 or not math.isfinite(value):
        return value
    digits = 2 - math.floor(math.log10(abs(value)))
    found, step = round(value, digits), 10.0**-digits
    while (found <= value if past else found < value) if up else (found >= value if past else found > value):
        found = round(found + (step if up else -step), digits)
    return found
