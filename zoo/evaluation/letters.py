"""The compact letter display: who shares a letter was not told apart."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import chain, combinations
from string import ascii_letters

_MOST_COLUMNS = 256  # the shortest display can take as many columns as 2 to the number of differences


def compact_letters(order: Sequence[str], different: Collection[tuple[str, str]]) -> dict[str, str]:
    """Return letters such that two names share one just where they are not a pair of `different`.

    order: names, best first; "a" goes with the first. Insert and absorb, then sweep (Piepho 2004,
    doi 10.1198/1061860043515).

    >>> compact_letters(["x", "y", "z"], [("x", "z")])
    {'x': 'a', 'y': 'ab', 'z': 'b'}
    """
    rank = {name: index for index, name in enumerate(order)}
    columns = [frozenset(rank.values())] if rank else []
    for one, two in sorted(tuple(sorted((rank[one], rank[two]))) for one, two in different):
        columns = _split(columns, one, two)
        if len(columns) > _MOST_COLUMNS:
            columns = _pairwise(len(rank), {(rank[a], rank[b]) for a, b in different})
            break
    columns = sorted(columns if len(columns) > _MOST_COLUMNS else _sweep(columns), key=sorted)
    letters = list(zip(columns, _letters(), strict=False))
    return {name: "".join(letter for column, letter in letters if rank[name] in column) for name in order}


def _pairwise(count: int, different: set[tuple[int, int]]) -> list[frozenset[int]]:
    """Return a column for every two that do not differ, and for each that differs from all: right, if not short."""
    apart = different | {(two, one) for one, two in different}
    pairs = [frozenset(pair) for pair in combinations(range(count), 2) if pair not in apart]
    alone = set(range(count)) - set().union(*pairs)
    return [*pairs, *(frozenset({each}) for each in sorted(alone))]


def _split(columns: list[frozenset[int]], one: int, two: int) -> list[frozenset[int]]:
    """Insert: a column with both becomes two with one each. Absorb: a column within another goes."""
    kept = [column for column in columns if not {one, two} <= column]
    halves = {column - {gone} for column in columns if {one, two} <= column for gone in (one, two)}
    for half in sorted(halves, key=lambda column: (-len(column), sorted(column))):
        if not any(half <= column for column in kept):
            kept.append(half)
    return kept


def _sweep(columns: list[frozenset[int]]) -> list[frozenset[int]]:
    """Leave out columns whose pairs all lie together in other columns."""
    kept = sorted(columns, key=sorted)
    for column in reversed(kept.copy()):
        others = [other for other in kept if other != column]
        pairs = combinations(sorted(column), 2) if len(column) > 1 else [tuple(column) * 2]
        if all(any({one, two} <= other for other in others) for one, two in pairs):
            kept = others
    return kept


def _letters() -> Iterator[str]:
    further = (chr(code) for code in range(0xC0, 0x2FFFF) if chr(code).isalpha())
    return chain(ascii_letters, further)
