"""What a comparison says, in words: who is told apart from whom, by how much, and what cannot be said."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from zoo.errors import one_line
from zoo.evaluation.metrics import METRIC_SIGN
from zoo.reporting.comparison import Comparison
from zoo.runs import LEAKED_SOURCE

_NAMED = 4  # recipes in one sentence


def findings(comparison: Comparison) -> list[str]:
    """Return sentences for a report's head, the most important first; all of them hold at the stated 5 %."""
    scored = [row for row in comparison.rows if row["letters"]]
    if not scored and any(row["test_images"] for row in comparison.rows):
        return [f"test {comparison.metric} is not defined on this split: see how the classes stand in test."]
    if not scored:
        return ["No recipe has a score on test."]
    best = next(row for row in scored if row["recipe"] == comparison.relative_to)
    top = [best, *(row for row in scored if row is not best and set(row["letters"]) & set(best["letters"]))]
    found = [_ties(best, top, scored, comparison)]
    found += _beaten(best, top, [row for row in scored if row not in top], comparison)
    found += _floors(scored, comparison)
    found += _limits(comparison)
    failed = [row["recipe"] for row in comparison.rows if row["status"] != "finished"]
    if failed:
        found.append(f"Failed, in full or in part: {listed(failed)}.")
    found[:0] = [f"{note}." for note in comparison.notes if LEAKED_SOURCE in note]
    if comparison.leaks_accepted:
        found.insert(0, "LEAKS ACCEPTED: train, val and test of this split leak, so every score here is too good.")
    return found


def _ties(best: dict[str, Any], top: list[dict[str, Any]], scored: list[dict[str, Any]], c: Comparison) -> str:
    value = best[f"test_{c.metric}"]
    interval = best[f"test_{c.metric}_ci"]
    range_ = f" (95 % interval {interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
    of = f"{best['test_images']} test images"
    if best["test_groups"] and best["test_groups"] != best["test_images"]:
        of += f" of {best['test_groups']} groups"
    score = f"test {c.metric} {value:.3f}{range_} on {of}"
    if len(scored) == 1:
        return f"{best['recipe']}: {score}."
    if len(top) == len(scored):
        # The best mean may tie with two that do not tie with each other.
        told = "Nothing is told apart" if not any(pair["different"] for pair in c.pairs) else "The best ties with all"
        return f"{told}: {listed([row['recipe'] for row in top])}. The best mean has {best['recipe']}, {score}."
    if len(top) == 1:
        return f"{best['recipe']} is better than every other recipe: {score}."
    return f"{listed([row['recipe'] for row in top])} are not told apart; the best mean has {best['recipe']}, {score}."


def _beaten(best: dict[str, Any], top: list[dict[str, Any]], others: list[dict[str, Any]], c: Comparison) -> list[str]:
    """Say who beats whom by how much: first what all of the best beat, then what only the best mean beats."""
    apart = {frozenset((pair["one"], pair["two"])): pair for pair in c.pairs if pair["different"]}

    def gaps(winners: list[dict[str, Any]], row: dict[str, Any]) -> list[float]:
        pairs = [apart.get(frozenset((each["recipe"], row["recipe"]))) for each in winners]
        return [abs(pair["difference"]) for pair in pairs if pair]

    by_all = [row for row in others if len(gaps(top, row)) == len(top)]
    rest = [row for row in others if row not in by_all]
    found = []
    if by_all:
        who = best["recipe"] if len(top) == 1 else "both" if len(top) == 2 else f"all {len(top)}"
        verb = "beats" if len(top) == 1 else "beat"
        seen = [gap for row in by_all for gap in gaps(top, row)]
        found.append(
            f"{_capital(who)} {verb} {listed([row['recipe'] for row in by_all])} by {_points(seen, c.metric)}."
        )
    if rest:
        seen = [gap for row in rest for gap in gaps([best], row)]
        names = listed([row["recipe"] for row in rest])
        found.append(
            f"{best['recipe']} beats {names} by {_points(seen, c.metric)}; the others that tie with it may not."
        )
    return found


def _capital(text: str) -> str:
    return text[0].upper() + text[1:] if text in ("both",) or text.startswith("all ") else text


def _points(gaps: Sequence[float], metric: str) -> str:
    """Return a range of differences: points for fractions, plain numbers for a loss.

    >>> _points([0.062, 0.111], "top1"), _points([0.05], "top1"), _points([0.25], "log_loss")
    ('6 to 11 points', '5 points', '0.25')
    """
    scale, unit = (1, "") if metric in ("log_loss", "brier") else (100, " points")
    digits = 2 if scale == 1 else 0 if min(gaps) * scale >= 1 else 1
    low, high = (f"{end * scale:.{digits}f}" for end in (min(gaps), max(gaps)))
    return f"{low}{unit}" if low == high else f"{low} to {high}{unit}"


def _floors(scored: list[dict[str, Any]], c: Comparison) -> list[str]:
    known = [floor for floor in c.floors if floor.get(f"test_{c.metric}") is not None]
    if not known:
        return []
    sign = METRIC_SIGN[c.metric]
    highest = max(known, key=lambda floor: sign * floor[f"test_{c.metric}"])
    floor = f"{highest['name']} ({highest[f'test_{c.metric}']:.3f})"
    beats = [row["recipe"] for row in scored if row["beats_floors"]]
    if not beats:
        return [f"No recipe lies above every floor with its interval; the highest floor is {floor}."]
    if len(beats) == len(scored):
        return [f"Every recipe lies above every floor with its interval; the highest floor is {floor}."]
    verb = "lies" if len(beats) == 1 else "lie"
    return [f"Only {listed(beats)} {verb} above every floor with the interval; the highest floor is {floor}."]


def _limits(c: Comparison) -> list[str]:
    """Say how finely this test split tells recipes apart."""
    halves = [(pair["high"] - pair["low"]) / 2 for pair in c.pairs if pair["difference"] is not None]
    if not halves:
        return []
    equal = [pair for pair in c.pairs if pair["equivalent"]]
    found = [
        f"Differences between two recipes are known to about ±{_points([statistics.median(halves)], c.metric)} on this "
        "split, each pair for itself; with all pairs at once it takes more to tell two apart."
    ]
    if equal:
        margin = _points([equal[0]["margin"]], c.metric)
        names = "; ".join(f"{one_line(pair['one'])} and {one_line(pair['two'])}" for pair in equal[:_NAMED])
        more = f"; and {len(equal) - _NAMED} more pairs" if len(equal) > _NAMED else ""
        found.append(f"Shown to be equivalent within {margin}: {names}{more}.")
    return found


def listed(names: Sequence[str]) -> str:
    """Return names as a sentence has them, at most four of them.

    >>> listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"]), listed(list("abcdef"))
    ('a', 'a and b', 'a, b and c', 'a, b, c and 3 more')
    """
    shown = [one_line(name) for name in names]
    if len(shown) > _NAMED:
        shown = [*shown[: _NAMED - 1], f"{len(shown) - _NAMED + 1} more"]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
