"""A choice in words and rows: why this one, what was next, what would change it, and by how much the others miss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from zoo.evaluation.resampling import METRICS
from zoo.evaluation.statistics import Interval
from zoo.reporting.changes import Change
from zoo.reporting.pick import COSTS, Candidate, Choice, Choosing, Limit, largest_margin


def short_name(name: str) -> str:
    """Return a bundle's name without dataset and digest.

    >>> short_name("digits--resnet18-lp--s0--01234567--onnx-int8")
    'resnet18-lp s0 onnx-int8'
    """
    parts = name.split("--")
    return f"{parts[1]} {parts[2]} {parts[4]}" if len(parts) == 5 else name


def quantity(key: str, value: float) -> str:
    """Return a value with its unit: three digits of a cost, three places of a metric.

    >>> quantity("latency", 12.345), quantity("size", 0.0123), quantity("top1", 0.95)
    ('12.3 ms', '0.0123 MB', '0.950')
    """
    if not math.isfinite(value):
        return "unknown"
    if key not in COSTS:
        return f"{value:.3f}"
    return f"{value:.3g} {COSTS[key]}" if value < 1000 else f"{value:.0f} {COSTS[key]}"


def limit_words(limit: Limit, bound: float | None = None) -> str:
    """Return a limit in words, with its own bound or another."""
    value = limit.bound if bound is None else bound
    number = f"{value:g} {COSTS[limit.key]}" if limit.key in COSTS else f"{value:g}"
    return f"{limit.name} {limit.sense} {number}"


def reason_of(choosing: Choosing, choice: Choice, limits: Sequence[Limit], margin: float) -> str:
    """Return in words why the choice is what it is."""
    ready, metric = len(choosing.ready), choosing.metric
    keeping = sum(not broken for broken in choice.misses.values())
    kept = f"{keeping} of {ready} candidates keep {_limits_words(limits)}" if limits else ""
    if choice.chosen is None:
        why = undefined_words(choosing, [metric, *(limit.key for limit in limits)])
        if not ready:
            kept = "there is no candidate that could be measured"
        return f"nothing fits: {'; '.join(each for each in (kept, why) if each)}"
    assert choice.best is not None
    chosen, best = choice.chosen, choice.best
    first = f"{kept}; of these" if kept else f"of {ready} candidate{'s' if ready != 1 else ''}"
    lead = f"{short_name(chosen.name)}: {first}"
    if len(choice.fitting) == 1:
        return f"{lead}, it is the only one{'' if limits else ' that there is'} ({_said(choosing, chosen)})"
    if chosen.name == best.name:
        cheaper = [name for name in choice.fitting if choosing.cheaper(choosing.candidates[name], best)]
        text = f"{lead}, it is the best on val ({_said(choosing, chosen)})"
        if not cheaper:
            return f"{text}, and none is cheaper"
        nearest = max(cheaper, key=lambda name: choice.differences[name].low)
        worse = min(-choice.differences[nearest].low, largest_margin(metric))
        return (
            f"{text}, and of {len(cheaper)} cheaper none is shown to be not worse by more than {margin:g} (nearest: "
            f"{short_name(nearest)}, which may be worse by {worse:.3f})"
        )
    difference = choice.differences[chosen.name]
    if chosen.network == best.network:
        why = "is the same network"
    else:
        why = (
            f"is not worse by more than {margin:g} (difference {difference.value:+.3f}, 95 % interval "
            f"{difference.low:+.3f} to {difference.high:+.3f})"
        )
    return (
        f"{lead}, the best on val is {short_name(best.name)} ({_said(choosing, best)}); {short_name(chosen.name)} "
        f"{why} and costs the least of {len(choice.not_worse)} such ({metric} {chosen.value(metric):.3f}, "
        f"{choosing.cost} {quantity(choosing.cost, chosen.value(choosing.cost))})"
    )


def undefined_words(choosing: Choosing, metrics: Iterable[str]) -> str | None:
    """Return which metrics have no value on val, why, and what to do; None where there is none such."""
    lacking = [
        key
        for key in dict.fromkeys(metrics)
        if key in METRICS and choosing.ready and not any(math.isfinite(each.value(key)) for each in choosing.ready)
    ]
    if not lacking:
        return None
    why = {
        "sensitivity": "it has no image of any class but the healthy one",
        "specificity": "it has no image of the healthy class",
        **dict.fromkeys(("auroc", "auprc"), "its images are of one class alone"),
    }
    said = [f"{key} is not defined on val: {why.get(key, 'no candidate has a value')}" for key in lacking]
    return f"{'; '.join(said)}; split anew with `zoo data split`, or ask for another metric"


def _limits_words(limits: Sequence[Limit]) -> str:
    return " and ".join(limit_words(limit) for limit in limits)


def _said(choosing: Choosing, candidate: Candidate) -> str:
    cost = quantity(choosing.cost, candidate.value(choosing.cost))
    return f"{choosing.metric} {candidate.value(choosing.metric):.3f}, {choosing.cost} {cost}"


def change_words(choosing: Choosing, change: Change, limits: Sequence[Limit], margin: float) -> str:
    """Return in words what a change would do."""
    what = f"it would be {short_name(change.pick.name)} ({_said(choosing, change.pick)})" if change.pick else ""
    if change.limit is None:
        return f"with a margin of {change.to:g} instead of {margin:g} {what}"
    instead = limit_words(change.limit, change.to)
    own = f"{change.limit.bound:g}"
    if change.opens:
        return f"allowing {instead} instead of {own} {what}"
    return f"asking for {instead} instead of {own} {what or 'nothing would fit'}"


def miss_words(row: Mapping[str, Any]) -> str:
    """Return in words by how much a candidate misses the limits that it breaks."""
    parts = []
    for each in row["breaks"]:
        unit = f" {each['unit']}" if each["unit"] else ""
        if each["value"] is None:
            parts.append(f"{each['limit']} {each['bound']:.3g}{unit}: not known")
        else:
            parts.append(
                f"{each['limit']} {each['bound']:.4g}{unit}: has {each['value']:.3g}, off by {each['by']:.2g}{unit}"
            )
    return f"{short_name(row['name'])}: {'; '.join(parts)}"


def candidate_rows(
    choosing: Choosing, choice: Choice, intervals: Mapping[str, Interval | None]
) -> list[dict[str, Any]]:
    """Return a row for each candidate: the chosen first, then what fits by cost, misses, and those with a reason."""
    metric, rows = choosing.metric, []
    for name, each in choosing.candidates.items():
        interval, difference = intervals.get(name), choice.differences.get(name)
        role = "chosen" if choice.chosen and name == choice.chosen.name else None
        role = "runner-up" if choice.runner_up and name == choice.runner_up.name else role
        value = each.value(metric)
        rows.append(
            {
                "name": name,
                **each.facts,
                "role": role,
                "best_on_val": choice.best is not None and name == choice.best.name,
                f"val_{metric}": None if math.isnan(value) else value,
                f"val_{metric}_ci": [interval.low, interval.high] if interval else None,
                **{f"{key}_{unit.lower()}": each.costs.get(key) for key, unit in COSTS.items()},
                "fits": name in choice.fitting,
                "breaks": [limit_words(limit) for limit in choice.misses.get(name, ())],
                "difference": difference.value if difference else None,
                "difference_ci": [difference.low, difference.high] if difference else None,
                "not_worse": name in choice.not_worse if difference else None,
                "reason": each.reason,
            }
        )
    order = {"chosen": 0, "runner-up": 1, None: 2}
    cost = f"{choosing.cost}_{COSTS[choosing.cost].lower()}"
    return sorted(
        rows,
        key=lambda row: (
            row["reason"] is not None,
            not row["fits"],
            order[row["role"]],
            row[cost] if row[cost] is not None else math.inf,
            row["name"],
        ),
    )


def notes_of(
    choosing: Choosing,
    choice: Choice,
    limits: Sequence[Limit],
    intervals: Mapping[str, Mapping[str, Interval | None]],
) -> list[str]:
    """Return what must be known beside a choice.

    intervals: metric to name to its interval on val, of the metrics of the least values that were asked for.
    """
    chosen = choice.chosen
    if chosen is None:
        return []
    notes = []
    if len(choosing.ready) > 1:
        notes.append(
            f"the choice was made on val, so the val scores of what is the best of {len(choosing.ready)} are too good "
            "on average; the score on test is the one to quote"
        )
    for limit in limits:
        interval = intervals.get(limit.key, {}).get(chosen.name)
        if interval is None or limit.sense == "at most":
            continue
        if interval.low < limit.bound:
            notes.append(
                f"{limit_words(limit)} is kept by the value on val, {interval.value:.3f}, and not by its 95 % "
                f"interval, {interval.low:.3f} to {interval.high:.3f}"
            )
    second = choice.runner_up
    if choosing.cost == "latency" and second is not None and second.name in choice.not_worse:
        one, two = chosen.facts.get("rounds_p50_ms"), second.facts.get("rounds_p50_ms")
        if one and two and min(max(one), max(two)) >= max(min(one), min(two)):
            notes.append(
                f"the latencies of {short_name(chosen.name)} and {short_name(second.name)} overlap from round to round "
                f"({min(one):.3g} to {max(one):.3g} ms and {min(two):.3g} to {max(two):.3g} ms): take either"
            )
    return notes


def words_of_test(test: Mapping[str, Any], metric: str) -> str:
    """Return in words what a choice's test scores are, with the interval of the metric."""
    value, interval = test.get(metric), test.get(f"{metric}_ci")
    said = "unknown" if value is None else f"{value:.3f}"
    ends = f", 95 % interval {interval[0]:.3f} to {interval[1]:.3f}" if interval else ""
    groups = f" of {test['groups']} groups" if test["groups"] < test["images"] else ""
    look = "scored once, now" if test["first_look"] else "scored before, not again"
    return f"test {metric}: {said}{ends} ({test['images']} images{groups}; {look})"
