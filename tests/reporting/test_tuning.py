from __future__ import annotations

import numpy as np
import pytest

from zoo.reporting.plots import save_figure
from zoo.reporting.tuning import (
    TOP,
    comparison_text,
    figures,
    importance_text,
    plot_history,
    plot_importance,
    plot_parallel_coordinate,
    table,
)

SPACE = {
    "optimizer.lr": {"low": 1e-5, "high": 1e-1, "log": True},
    "finetune.batch_size": {"low": 4, "high": 18},
    "augment.policy": {"choices": ["none", "light", "$strong_{1}$"]},
}


def trial(number, value, state="complete", **params):
    draw = np.random.default_rng(number)
    own = {"optimizer.lr": float(10 ** draw.uniform(-5, -1)), "finetune.batch_size": int(draw.integers(4, 19))}
    own["augment.policy"] = ["none", "light", "$strong_{1}$"][number % 3]
    return {
        "number": number,
        "state": state,
        "value": value,
        "params": own | params,
        "epochs": 6 if state == "complete" else 1,
        "seconds": 1.25 * number,
        "reason": None,
        "digest": str(number),
    }


def document(rows, sign=1, space=SPACE, **more):
    complete = [row for row in rows if row["state"] == "complete"]
    best = max(complete, key=lambda row: sign * row["value"])
    states = [row["state"] for row in rows]
    facts = {
        "study": "tiny--tiny--01234567",
        "dataset": "tiny",
        "recipe": "tiny",
        "tuned_recipe": "tiny-tuned",
        "metric": "balanced_accuracy" if sign > 0 else "log_loss",
        "sign": sign,
        "space": space,
        "best": best,
        "default": rows[0],
        "counts": {state: states.count(state) for state in ("complete", "pruned", "failed", "running")},
        "comparison": None,
        "importance": {"optimizer.lr": 0.7, "finetune.batch_size": 0.2, "augment.policy": 0.0},
        "trials": rows,
        "notes": [],
        "next": "",
    }
    return facts | more


ROWS = [
    trial(0, 0.5),
    trial(1, 0.4),
    trial(2, 0.2, "pruned"),
    trial(3, None, "failed"),
    trial(4, 0.8),
    trial(5, None, "pruned"),
    trial(6, 0.6),
    trial(7, None, "running"),
]


def lines(figure):
    return figure.axes[0].get_lines()


def test_the_history_shows_every_trial_and_the_best_so_far():
    figure = plot_history(document(ROWS))
    points = {tuple(zip(*line.get_data(), strict=True)) for line in lines(figure) if line.get_linestyle() == "None"}
    assert {(0, 0.5), (1, 0.4), (4, 0.8), (6, 0.6)} in [set(each) for each in points]
    assert {(2, 0.2)} in [set(each) for each in points]
    assert [each[0] for each in next(each for each in points if {height for _, height in each} == {0.03})] == [3, 5]
    step = next(line for line in lines(figure) if line.get_drawstyle() == "steps-post")
    assert list(step.get_ydata()) == [0.5, 0.5, 0.8, 0.8, 0.8]
    assert list(step.get_xdata()) == [0, 1, 4, 6, 7]
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert said == [
        "best complete so far",
        "the recipe as it is",
        "pruned, at its last epoch",
        "complete",
        "failed, or refused",
    ]


def test_where_lower_is_better_the_best_falls_and_the_axis_says_so():
    figure = plot_history(document(ROWS, sign=-1))
    step = next(line for line in lines(figure) if line.get_drawstyle() == "steps-post")
    assert list(step.get_ydata()) == [0.5, 0.4, 0.4, 0.4, 0.4]
    assert figure.axes[0].get_ylabel() == "val log_loss (lower is better)"


def test_a_line_goes_through_the_places_of_its_trial():
    rows = [trial(0, 0.0, **{"optimizer.lr": 1e-3, "finetune.batch_size": 18, "augment.policy": "none"}), *ROWS[1:]]
    figure = plot_parallel_coordinate(document(rows))
    drawn = [list(line.get_ydata()) for line in lines(figure) if len(line.get_xdata()) == 4]
    assert [pytest.approx(each) for each in [0.5, 1.0, 0.0, 0.0]] in drawn
    assert sum(len(line.get_xdata()) == 3 for line in lines(figure)) == 2, "two were pruned"
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert {"1e-05", "0.001", "0.1", "4", "18", "none", "light"} <= set(texts)
    assert r"\$strong_{1}\$" in texts, "names are no mathematics"


def test_the_best_is_the_darkest():
    figure = plot_parallel_coordinate(document(ROWS))
    whole = [line for line in lines(figure) if len(line.get_xdata()) == 4 and line.get_linewidth() == 1]
    by_value = sorted(whole, key=lambda line: line.get_ydata()[-1])
    brightness = [sum(line.get_color()[:3]) for line in by_value]
    assert brightness == sorted(brightness, reverse=True)
    lower = plot_parallel_coordinate(document(ROWS, sign=-1))
    whole = [line for line in lower.axes[0].get_lines() if len(line.get_xdata()) == 4 and line.get_linewidth() == 1]
    by_value = sorted(whole, key=lambda line: line.get_ydata()[-1])
    brightness = [sum(line.get_color()[:3]) for line in by_value]
    assert brightness == sorted(brightness)


def test_importances_are_bars_the_largest_on_top():
    figure = plot_importance(document(ROWS))
    axes = figure.axes[0]
    assert [bar.get_width() for bar in axes.patches] == [0.0, 0.2, 0.7]
    assert [tick.get_text() for tick in axes.get_yticklabels()][-1] == "optimizer.lr"


@pytest.mark.slow
def test_figures_of_any_study_can_be_written(tmp_path):
    alone = {"optimizer.name": {"choices": ["sgd"]}}
    lone = [{**trial(0, 0.5), "params": {"optimizer.name": "sgd"}}]
    lacking = [{**trial(0, 0.5), "params": {}}, *ROWS[1:]]
    odd = {"a" * 40 + ".b": {"low": 0.30, "high": 0.31}, "x.flag": {"choices": [True, False]}}
    strange = [{**trial(n, 0.5), "params": {"a" * 40 + ".b": 0.305, "x.flag": n % 2 == 0}} for n in range(3)]
    for number, each in enumerate(
        (
            document(ROWS),
            document(ROWS, importance=None),
            document(lone, space=alone, importance=None),
            document(lacking),
            document(strange, space=odd),
        )
    ):
        found = figures(each)
        assert ("importance" in found) == bool(each["importance"])
        for name, figure in found.items():
            save_figure(figure, tmp_path / f"{number}-{name}.png")
            first = (tmp_path / f"{number}-{name}.png").read_bytes()
            save_figure(figures(each)[name], tmp_path / f"{number}-{name}.png")
            assert (tmp_path / f"{number}-{name}.png").read_bytes() == first


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_has_the_best_first_and_the_default_in_any_case(width):
    rows = [trial(0, 0.1), *(trial(number, 0.2 + number / 100) for number in range(1, 15)), trial(15, 0.9, "pruned")]
    heads, cells = table(document(rows), width)
    assert [line[0] for line in cells] == [str(number) for number in range(14, 4, -1)] + ["0 default"]
    assert len(cells) == TOP + 1
    assert ("parameters" in heads) == (width <= 80)
    assert all(len(line) == len(heads) for line in cells)
    if width <= 80:
        assert "batch_size" in cells[0][2] and "lr" in cells[0][2]
    else:
        assert heads == ["trial", "val", "lr", "batch_size", "policy", "state", "epochs", "s"]


def test_what_is_not_known_is_a_dash():
    rows = [trial(0, 0.5), {**trial(1, None, "failed"), "params": {}, "epochs": 0, "seconds": None}]
    _, cells = table(document(rows), 120)
    assert cells[1] == ["1", "–", "–", "–", "–", "failed", "–", "–"]


def test_the_comparison_is_a_sentence():
    found = {
        "metric": "top1",
        "images": 40,
        "groups": 12,
        "tuned": 0.9,
        "default": 0.8,
        "tuned_ci": [0.8, 0.95],
        "default_ci": None,
        "difference": 0.1,
        "ci": [-0.02, 0.22],
    }
    assert comparison_text(document(ROWS, comparison=found)) == (
        "val top1, 40 images of 12 groups: tuned 0.9000 (0.800–0.950), default 0.8000; tuned − default +0.1000 "
        "(95% CI -0.0200 to +0.2200)"
    )
    failed = [{**trial(0, None, "failed"), "reason": "out of memory"}, *ROWS[1:]]
    assert comparison_text(document(failed)) == (
        "the recipe as it is failed (out of memory), so there is nothing to compare with"
    )
    assert importance_text(document(ROWS)) == "optimizer.lr 0.70, finetune.batch_size 0.20, augment.policy 0.00"
    assert importance_text(document(ROWS, importance=None)) == ""
