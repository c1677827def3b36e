"""The compact letter display: who shares a letter was not told apart."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import chain, combinations
from string import ascii_letters


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
    columns = sorted(_sweep(columns), key=sorted)
    letters = list(zip(columns, _letters(), strict=False))
    return {name: "".join(letter for column, letter in letters if rank[name] in column) for name in order}


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
