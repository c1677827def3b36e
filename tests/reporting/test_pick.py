from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.errors import ZooError
from zoo.evaluation.metrics import compute_metrics
from zoo.evaluation.predictions import Predictions
from zoo.reporting.changes import rounded, what_would_change
from zoo.reporting.pareto import pareto_front, plot_pareto
from zoo.reporting.pick import (
    Candidate,
    Choosing,
    Limit,
    make_limits,
    nearest_misses,
    parse_minimum,
    parse_minimums,
)
from zoo.reporting.picked import candidate_rows, change_words, miss_words, notes_of, reason_of, words_of_test

CLASSES = ["ill", "well"]


def predictions(right, of=200, groups=50):
    """Predictions with so many of `of` right; all candidates are wrong on the first samples."""
    y_true = np.arange(of) % 2
    y_pred = np.where(np.arange(of) < of - right, 1 - y_true, y_true)
    ids = [f"s{each:03}" for each in range(of)]
    return Predictions(ids, [f"g{each % groups}" for each in range(of)], y_true, np.eye(2)[y_pred])


def candidate(name, right, latency=10.0, size=5.0, memory=100.0, **known):
    own = predictions(right)
    costs = {"latency": latency, "size": size, "memory": memory}
    return Candidate(name, known.pop("network", name), own, compute_metrics(own, CLASSES), costs, **known)


def test_the_cheapest_that_is_not_worse_is_chosen():
    choosing = Choosing([candidate("best", 190, 30), candidate("near", 190, 8), candidate("poor", 120, 1)])
    choice = choosing.choose([], 0.01)
    assert choice.best.name == "near" and choice.chosen.name == "near"  # of equals the cheaper
    assert choice.runner_up.name == "best"
    assert "near" in reason_of(choosing, choice, [], 0.01)


def test_a_margin_lets_the_worse_but_cheaper_in_only_where_the_whole_interval_is_inside():
    choosing = Choosing([candidate("best", 190, 30), candidate("cheap", 188, 3)])
    difference = choosing.choose([], 0.01).differences["cheap"]
    assert difference.value == pytest.approx(-0.01) and difference.low < -0.01
    assert choosing.choose([], 0.01).chosen.name == "best"  # the value is within a point, its interval is not
    assert choosing.choose([], rounded(-difference.low, up=True)).chosen.name == "cheap"


def test_limits_come_before_the_margin():
    rows = [candidate("best", 195, 30), candidate("slow", 194, 25), candidate("quick", 100, 5)]
    choosing, limits = Choosing(rows), make_limits(max_latency_ms=20)
    choice = choosing.choose(limits, 0.01)
    assert choice.chosen.name == "quick" and choice.fitting == ("quick",)
    reason = reason_of(choosing, choice, limits, 0.01)
    assert "1 of 3 candidates keep p50 latency at most 20 ms" in reason and "the only one" in reason


def test_nothing_fits_names_the_nearest_first():
    choosing = Choosing([candidate("far", 195, 90), candidate("near", 150, 11), candidate("both", 100, 12)])
    limits = make_limits(max_latency_ms=10, minimums={"top1": 0.7})
    choice = choosing.choose(limits, 0.01)
    assert choice.chosen is None and choice.runner_up is None
    rows = nearest_misses(choosing, choice)
    assert [row["name"] for row in rows] == ["near", "far", "both"]
    assert rows[0]["breaks"] == [
        {"limit": "p50 latency at most", "bound": 10.0, "value": 11.0, "by": 1.0, "unit": "ms"}
    ]
    assert miss_words(rows[0]) == "near: p50 latency at most 10 ms: has 11, off by 1 ms"
    assert reason_of(choosing, choice, limits, 0.01).startswith("nothing fits: 0 of 3 candidates keep")
    [first, *_] = what_would_change(choosing, limits, 0.01, choice)
    assert first.opens and first.pick.name == "near" and first.to == 11.0


def one_sided(name, label):
    """A candidate that keeps any limit, on a val of one class alone."""
    own = predictions(190)
    own = Predictions(own.sample_ids, own.groups, np.full(200, label), own.logits)
    return Candidate(name, name, own, compute_metrics(own, CLASSES, "well"), {"latency": 1.0})


@pytest.mark.parametrize(
    "metric, label, why",
    [
        ("sensitivity", 1, "it has no image of any class but the healthy one"),
        ("specificity", 0, "it has no image of the healthy class"),
        ("auroc", 0, "its images are of one class alone"),
        ("auprc", 1, "its images are of one class alone"),
    ],
)
def test_a_metric_that_is_not_defined_on_val_is_said_to_be(metric, label, why):
    choosing = Choosing([one_sided("a", label), one_sided("b", label)], metric=metric, negative=1)
    limits = make_limits(max_latency_ms=20)
    choice = choosing.choose(limits, 0.01)
    said = f"{metric} is not defined on val: {why}; split anew with `zoo data split`, or ask for another metric"
    assert choice.chosen is None and nearest_misses(choosing, choice) == []
    assert reason_of(choosing, choice, limits, 0.01) == (
        f"nothing fits: 2 of 2 candidates keep p50 latency at most 20 ms; {said}"
    )
    assert reason_of(choosing, choosing.choose([], 0.01), [], 0.01) == f"nothing fits: {said}"
    assert what_would_change(choosing, limits, 0.01, choice) == []

    rows = candidate_rows(choosing, choice, choosing.intervals())
    assert [row[f"val_{metric}_ci"] for row in rows] == [None, None]
    document = {"dataset": "d", "metric": metric, "cost": "latency", "percentile": "p50", "candidates": rows}
    assert f"{metric} is not defined on val" in [each.get_text() for each in plot_pareto(document).texts]

    ranked = Choosing([one_sided("a", label)], negative=1)  # by top1; the limit is what has no value
    limits = make_limits(minimums={metric: 0.5}, classes=CLASSES)
    reason = reason_of(ranked, ranked.choose(limits, 0.01), limits, 0.01)
    assert reason == f"nothing fits: 0 of 1 candidates keep {metric} at least 0.5; {said}"


def test_no_margin_is_told_that_the_command_would_refuse():
    rows = [candidate("best", 5, 30), candidate("poor", 1, 1)]
    few = predictions(5, of=6, groups=3), predictions(1, of=6, groups=3)
    rows = [
        Candidate(each.name, each.name, own, compute_metrics(own, CLASSES), each.costs)
        for each, own in zip(rows, few, strict=True)
    ]
    choosing = Choosing(rows)
    choice = choosing.choose([], 0.01)
    assert choice.chosen.name == "best" and choice.differences["poor"].low < -1  # intervals are not clipped
    assert what_would_change(choosing, [], 0.01, choice) == []
    assert "which may be worse by 1.000)" in reason_of(choosing, choice, [], 0.01)


@pytest.mark.parametrize(
    "sense, bound, values, told",
    [("at most", 20.0, (10.0, 5.0, 2.0), 9.9), ("at least", 0.4, (0.5, 0.6, 0.7), 0.501)],
)
def test_the_first_tightening_that_changes_the_choice_is_told_also_where_it_throws_out_the_best(
    sense, bound, values, told
):
    named = zip(("best", "near", "less"), (190, 188, 186), (9.0, 5.0, 2.0), values, strict=True)
    rows = [candidate(name, right, latency, memory=value) for name, right, latency, value in named]
    choosing, limit = Choosing(rows), Limit("memory", sense, bound, "it")
    # The margin lets `near` in beside `best`, and `less` only beside `near`.
    margin = rounded(-choosing.against(rows[1], rows[0]).low, up=True)
    assert -choosing.against(rows[2], rows[1]).low <= margin < -choosing.against(rows[2], rows[0]).low
    choice = choosing.choose([limit], margin)
    assert choice.chosen.name == "near" and choice.best.name == "best"
    [change] = [each for each in what_would_change(choosing, [limit], margin, choice) if each.limit]
    assert (change.to, change.pick.name, change.opens) == (told, "less", False)


def test_a_limit_on_what_is_not_known_is_not_kept():
    own = predictions(190)
    unknown = Candidate("x", "x", own, compute_metrics(own, CLASSES), {"latency": 1.0})
    choosing, limits = Choosing([unknown]), make_limits(max_memory_mb=100)
    choice = choosing.choose(limits, 0.01)
    assert choice.chosen is None
    assert miss_words(nearest_misses(choosing, choice)[0]).endswith("memory at most 100 MB: not known")


def test_two_formats_of_one_network_are_the_same():
    rows = [candidate("one", 190, 9, network="n"), candidate("two", 190, 7, network="n")]
    choosing = Choosing(rows)
    choice = choosing.choose([], 0.0)
    assert choice.chosen.name == "two" and choice.differences["one"].low == 0.0


def test_what_has_a_reason_is_no_choice_and_is_a_row():
    choosing = Choosing([candidate("good", 150), Candidate("lost", "lost", reason="its process died")])
    choice = choosing.choose([], 0.01)
    rows = candidate_rows(choosing, choice, choosing.intervals())
    assert [(row["name"], row["reason"]) for row in rows] == [("good", None), ("lost", "its process died")]
    assert rows[0]["val_top1"] == 0.75 and rows[0]["val_top1_ci"][0] < 0.75 < rows[0]["val_top1_ci"][1]
    assert rows[0]["latency_ms"] == 10.0 and rows[0]["size_mb"] == 5.0


def test_a_metric_of_which_less_is_better():
    def sure(name, scale, latency):
        own = predictions(180)
        own = Predictions(own.sample_ids, own.groups, own.y_true, own.logits * scale)
        return Candidate(name, name, own, compute_metrics(own, CLASSES), {"latency": latency})

    choosing = Choosing([sure("calm", 2.0, 30), sure("loud", 40.0, 3)], metric="log_loss")
    choice = choosing.choose([], 0.01)
    assert choice.best.name == choice.chosen.name == "calm"
    assert choice.differences["loud"].value < 0


@pytest.mark.parametrize("cost, name", [("latency", "a"), ("size", "b"), ("memory", "c")])
def test_the_cost_is_what_is_made_small(cost, name):
    rows = [candidate("a", 180, 1, 9, 9), candidate("b", 180, 9, 1, 9), candidate("c", 180, 9, 9, 1)]
    assert Choosing(rows, cost=cost).choose([], 0.01).chosen.name == name


def test_a_least_value_kept_by_luck_is_noted():
    choosing, limits = Choosing([candidate("one", 190)]), make_limits(minimums={"top1": 0.94})
    choice = choosing.choose(limits, 0.01)
    notes = notes_of(choosing, choice, limits, {"top1": choosing.intervals()})
    assert choice.chosen.name == "one" and any("not by its 95 % interval" in note for note in notes)


def test_latencies_that_overlap_are_noted():
    rows = [
        candidate("one", 190, 9, network="n", facts={"rounds_p50_ms": [8.0, 10.0]}),
        candidate("two", 190, 9.5, network="n", facts={"rounds_p50_ms": [9.0, 11.0]}),
    ]
    choosing = Choosing(rows)
    assert any("take either" in note for note in notes_of(choosing, choosing.choose([], 0.01), [], {}))


def test_the_words_of_the_test_score():
    test = {"top1": 0.9, "top1_ci": [0.8, 0.95], "images": 100, "groups": 40, "first_look": True}
    assert words_of_test(test, "top1") == (
        "test top1: 0.900, 95 % interval 0.800 to 0.950 (100 images of 40 groups; scored once, now)"
    )


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["top1", "top1=", "=0.9", "top1=high", ""])
def test_a_minimum_must_be_metric_and_value(text):
    with pytest.raises(ZooError, match=r"--min must be METRIC=V, e.g. sensitivity=0.95"):
        parse_minimum(text)


def test_a_minimum_that_comes_twice_is_refused():
    assert parse_minimums(["top1=0.5", "recall:a=b=0.9"]) == {"top1": 0.5, "recall:a=b": 0.9}
    with pytest.raises(ZooError, match=r"--min top1 is given twice, as 0.5 and 0.6; give it once"):
        parse_minimums(["top1=0.5", "top1=0.6"])


@pytest.mark.parametrize(
    "known, words",
    [
        ({"max_latency_ms": 0}, "the most latency must be a number of ms above 0. Got 0"),
        ({"max_size_mb": math.nan}, "the most size must be a number of MB above 0. Got nan"),
        ({"max_memory_mb": math.inf}, "the most memory must be a number of MB above 0"),
        ({"minimums": {"top1": 95}}, r"the least top1 must be in \[0, 1\]. Got 95; write 0.95"),
        ({"minimums": {"top1": 1.5}}, r"the least top1 must be in \[0, 1\]. Got 1.5$"),
        ({"minimums": {"top1": math.nan}}, r"must be in \[0, 1\]"),
        ({"minimums": {"topp1": 0.9}}, "must be of one of .* Got 'topp1'; did you mean 'top1'"),
        ({"minimums": {"log_loss": 0.9}}, "less is better, so it has no least value; --metric log_loss ranks by it"),
        ({"minimums": {"recall:bad": 0.9}}, "recall must be of one of ill, well, other. Got 'bad'"),
        ({"minimums": {"sensitivity": 0.9}}, "sensitivity is not defined: of 3 classes none is said to be healthy"),
    ],
)
def test_limits_that_make_no_sense_are_refused(known, words):
    with pytest.raises(ZooError, match=words):
        make_limits(**known, classes=["ill", "well", "other"])


def test_names_that_do_not_exist_are_refused():
    with pytest.raises(ZooError, match=r"metric must be one of .* did you mean 'top1'"):
        Choosing([], metric="top-1")
    with pytest.raises(ZooError, match=r"cost must be one of latency, size, memory. Got 'price'"):
        Choosing([], cost="price")
    with pytest.raises(ZooError, match=r"candidates must have different names. Got a, a"):
        Choosing([candidate("a", 150), candidate("a", 160)])
    for margin in (-0.1, math.nan, math.inf):
        with pytest.raises(ZooError, match=r"the margin must be 0 or more"):
            Choosing([candidate("a", 150)]).choose([], margin)


# What holds for any candidates ---------------------------------------------------------------------------------------

_ROWS = st.lists(
    st.tuples(st.integers(100, 200), st.floats(1, 50), st.floats(1, 50), st.floats(1, 50)), min_size=1, max_size=4
)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(_ROWS, st.floats(2, 60), st.floats(0, 0.2))
def test_a_choice_keeps_its_word(rows, most, margin):
    candidates = [candidate(f"c{place}", *row) for place, row in enumerate(rows)]
    choosing, limits = Choosing(candidates), [Limit("latency", "at most", most, "p50 latency")]
    choice = choosing.choose(limits, margin)
    fits = [each for each in candidates if each.costs["latency"] <= most]
    assert sorted(choice.fitting) == sorted(each.name for each in fits)
    if not fits:
        assert choice.chosen is None and len(nearest_misses(choosing, choice)) == len(rows)
        return
    assert choice.chosen in fits
    assert choice.best.val["top1"] == max(each.val["top1"] for each in fits)
    assert choice.differences[choice.chosen.name].low >= -margin - 1e-9
    for name in choice.not_worse:  # nobody who may be chosen is cheaper
        assert choosing.candidates[name].costs["latency"] >= choice.chosen.costs["latency"]
    again = Choosing(candidates[::-1]).choose(limits, margin)
    assert again.chosen.name == choice.chosen.name  # the order of candidates is no matter
    assert choice.runner_up is None or choice.runner_up.name != choice.chosen.name
    for change in what_would_change(choosing, limits, margin, choice):
        assert change_words(choosing, change, limits, margin)
        changed = limits if change.limit is None else [Limit("latency", "at most", change.to, "p50 latency")]
        redone = choosing.choose(changed, change.to if change.limit is None else margin).chosen
        assert (redone.name if redone else None) == (change.pick.name if change.pick else None)
        assert change.pick is None or change.pick.name != choice.chosen.name
        if change.limit is not None and not change.opens:  # nor does a smaller one, just past another's latency
            for value in (each.costs["latency"] for each in fits if change.to < each.costs["latency"]):
                bound = rounded(value, up=False, past=True)
                tried = choosing.choose([Limit("latency", "at most", bound, "p50 latency")], margin).chosen
                assert bound <= change.to or tried.name == choice.chosen.name


@given(st.floats(1e-6, 1e6), st.booleans())
def test_rounding_never_goes_to_the_wrong_side(value, up):
    found, past = rounded(value, up=up), rounded(value, up=up, past=True)
    assert found >= value if up else found <= value
    assert past > value if up else past < value
    assert abs(past - value) <= 0.0201 * value


@given(st.lists(st.tuples(st.floats(0, 9), st.floats(0, 9)), max_size=12))
def test_the_front_is_beaten_by_nobody_and_beats_the_rest(points):
    front = pareto_front(points)

    def beats(one, two):
        return one[0] <= two[0] and one[1] >= two[1] and one != two

    for place in front:
        assert not any(beats(each, points[place]) for each in points)
    for each in points:
        assert any(points[place] == each or beats(points[place], each) for place in front)


def test_the_figure_has_every_candidate_and_is_drawn_for_none():
    choosing = Choosing([candidate("d--r$1--s0--01234567--onnx-float32", 190, 30), candidate("b", 150, 8)])
    limits = make_limits(max_latency_ms=20)
    choice = choosing.choose(limits, 0.01)
    rows = candidate_rows(choosing, choice, choosing.intervals())
    document = {"dataset": "d", "metric": "top1", "cost": "latency", "percentile": "p50", "candidates": rows}
    document["floors"] = [{"name": "majority", "val_top1": 0.5}]
    figure = plot_pareto(document, limits)
    [axes] = figure.axes
    shown = [text.get_text().split() for text in axes.texts]  # a number at each dot, and beside the plot its name
    assert sorted(words[0] for words in shown) == ["1", "1", "2", "2"]
    assert sum(len(words) > 1 for words in shown) == 2 and axes.get_xlim()[1] > 30
    assert [text.get_text() for text in figure.legends[0].get_texts()][-2:] == ["limit", "strongest floor"]
    assert not plot_pareto({**document, "candidates": []}).legends
