import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.cbook import is_math_text
from matplotlib.figure import Figure
from PIL import Image

from zoo.errors import ZooError
from zoo.evaluation.predictions import Predictions
from zoo.reporting.plots import (
    GREEN,
    ORANGE,
    choose_samples,
    plot_confusion_matrices,
    plot_learning_curves,
    plot_samples,
    plot_test_scores,
    save_figure,
)

HOSTILE = ["$\\frac{1}$", "a_b^c", "<b>bold</b>", "new\nline", "$", "肺癌", "x" * 300, "\x1b[31mred", "{}%s\\", ""]


def history(epochs=6, head=2, start=1.0):
    return [
        {
            "epoch": epoch,
            "phase": "head" if epoch <= head else "network",
            "train_loss": start / epoch,
            "val_loss": start / epoch + 0.1,
            "train_top1": 1 - 0.5 / epoch,
            "val_top1": 0.9 - 0.5 / epoch,
        }
        for epoch in range(1, epochs + 1)
    ]


def row(recipe, mean=0.8, **more):
    return {
        "recipe": recipe,
        "status": "finished",
        "reason": None,
        "letters": "a",
        "test_top1": mean,
        "test_top1_ci": [mean - 0.05, mean + 0.04],
        "test_top1_seeds": [mean - 0.01, mean, mean + 0.01],
    } | more


def failed(recipe="broken", reason="out of memory: $5"):
    return {"recipe": recipe, "status": "failed", "reason": reason, "test_top1": None, "test_top1_ci": None}


def predictions(n=12, c=3, seed=0):
    rng = np.random.default_rng(seed)
    ids = np.array([f"case/{i}" for i in range(n)])
    return Predictions(ids, ids, rng.integers(0, c, n), rng.normal(size=(n, c)))


def texts(figure: Figure) -> str:
    """Everything that stands in the figure once it is laid out, one text a line."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        figure.draw_without_rendering()
    found = [each.get_text() for each in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
    return "\n".join(found)


def drawn(figure: Figure, path: Path) -> np.ndarray:
    save_figure(figure, path)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def every_figure(names, classes, title):
    matrix = np.arange(len(classes) ** 2).reshape(len(classes), -1)
    some = predictions(c=len(classes))
    some = Predictions(np.array([title + str(i) for i in range(12)]), some.groups, some.y_true, some.logits)
    return {
        "curves": plot_learning_curves({name: [history(), history(start=2)] for name in names}, title),
        "scores": plot_test_scores(
            [*(row(name) for name in names), failed(title)],
            floors=[{"name": title, "test_top1": 0.5}],
            title=title,
        ),
        "matrices": plot_confusion_matrices({name: [matrix, matrix] for name in names}, classes, title),
        "samples": plot_samples([np.zeros((8, 8, 3), np.uint8)] * 12, some, classes, title),
    }


# All figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 7, 13])
def test_nothing_is_cut_off_or_covers_another_panel(count):
    classes = ["normal", "benign", "malignant with a rather long name"]
    names = [f"mobilenetv3_small_100-linear-probe-{i}" for i in range(count)]
    for key, figure in every_figure(names, classes, "a title").items():
        figure.draw_without_rendering()
        width, height = figure.bbox.size
        boxes = [axes.get_tightbbox() for axes in figure.axes if axes.axison]
        for box in boxes:
            assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, key
        for place, one in enumerate(boxes):
            for two in boxes[place + 1 :]:
                across = min(one.x1, two.x1) - max(one.x0, two.x0)
                along = min(one.y1, two.y1) - max(one.y0, two.y0)
                assert min(across, along) <= 3, key  # pixels


@pytest.mark.slow
def test_hostile_names_are_shown_as_they_are(tmp_path):
    for key, figure in every_figure(HOSTILE, HOSTILE, " ".join(HOSTILE)).items():
        assert drawn(figure, tmp_path / f"{key}.png").std() > 0
        shown = texts(figure).split("\n")
        assert not any(is_math_text(each) for each in shown), key
        assert any(r"\$\frac{1}\$" in each for each in shown), key
        assert all(each.isprintable() for each in shown), key


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes(tmp_path):
    for number in (1, 2):
        for key, figure in every_figure(["a", "b"], ["x", "y"], "title").items():
            save_figure(figure, tmp_path / f"{key}{number}.png")
    for key in ("curves", "scores", "matrices", "samples"):
        first = (tmp_path / f"{key}1.png").read_bytes()
        assert first == (tmp_path / f"{key}2.png").read_bytes()
        assert b"matplotlib" not in first.lower()


@pytest.mark.slow
def test_a_figure_fits_a_readme_page(tmp_path):
    for key, figure in every_figure(["a", "b", "c", "d", "e"], ["x", "y", "z"], "title").items():
        assert drawn(figure, tmp_path / f"{key}.png").shape[1] <= 1020


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ZooError, match="cannot write"):
        save_figure(plot_learning_curves({}), tmp_path / "file" / "a.png")


def test_titles_are_shown_and_dollars_stay_dollars():
    for figure in every_figure(["a"], ["x", "y"], "LEAKS ACCEPTED $x$").values():
        # matplotlib shows an escaped dollar as a dollar, a bare pair as mathematics.
        assert r"LEAKS ACCEPTED \$x\$" in texts(figure)


def test_nothing_to_show_is_said(tmp_path):
    empty = predictions(0)
    assert "no learning curves" in texts(plot_learning_curves({}))
    assert "no confusion matrices" in texts(plot_confusion_matrices({}, ["a", "b"]))
    assert "no sample predictions" in texts(plot_samples([], empty, ["a", "b", "c"]))
    assert "failed: out of memory" in texts(plot_test_scores([failed()]))
    assert drawn(plot_test_scores([]), tmp_path / "a.png").size


def test_neither_torch_nor_pyplot_is_loaded():
    code = "import sys, zoo.reporting.plots; print([m for m in ('torch', 'matplotlib.pyplot') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# Learning curves ------------------------------------------------------------------------------------------------------


def lines(axes, colour):
    return [line for line in axes.get_lines() if line.get_color() == colour]


def test_curves_show_every_seed_and_their_mean():
    figure = plot_learning_curves({"one": [history(start=1), history(start=3)]})
    loss, top1 = figure.axes
    *seeds, mean = lines(loss, ORANGE)
    assert [line.get_ydata()[0] for line in seeds] == [1, 3]
    assert list(mean.get_ydata()) == pytest.approx([2 / epoch for epoch in range(1, 7)])
    assert list(mean.get_xdata()) == [1, 2, 3, 4, 5, 6]
    assert len(lines(top1, ORANGE)) == 3
    assert "training" in texts(figure)
    assert "next phase" in texts(figure)


def test_the_mean_is_over_the_seeds_that_reached_an_epoch():
    figure = plot_learning_curves({"one": [history(epochs=4), history(epochs=2, start=3)]})
    mean = lines(figure.axes[0], ORANGE)[-1]
    assert list(mean.get_ydata()) == pytest.approx([2, 1, 1 / 3, 1 / 4])


def test_a_new_phase_is_marked():
    (where,) = [
        line for line in plot_learning_curves({"a": [history(head=2)]}).axes[0].get_lines() if line.get_ls() == ":"
    ]
    assert where.get_xdata()[0] == 2.5
    assert "next phase" not in texts(plot_learning_curves({"a": [history(head=0)]}))


def test_missing_and_broken_values_are_left_out(tmp_path):
    rows = [{"epoch": 1, "val_loss": None}, {"epoch": 2, "val_loss": float("nan")}, {"epoch": 3, "val_loss": 0.5}, {}]
    figure = plot_learning_curves({"a": [rows], "b": [[]], "c": []})
    curve = lines(figure.axes[0], "#0072B2")[0]
    assert (list(curve.get_xdata()), list(curve.get_ydata())) == ([3], [0.5])
    assert drawn(figure, tmp_path / "a.png").std() > 0


def test_one_recipe_that_diverged_does_not_flatten_the_others():
    figure = plot_learning_curves({"a": [history()], "b": [history()], "wild": [history(start=1e6)]})
    assert figure.axes[0].get_ylim()[1] < 5
    # All panels of a kind can be compared.
    assert len({axes.get_ylim() for axes in figure.axes[:3]}) == 1


# Test scores ----------------------------------------------------------------------------------------------------------


def order(figure):
    figure.draw_without_rendering()
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def test_the_best_recipe_is_first_and_failures_are_last():
    rows = [row("poor", 0.5), failed(), row("best", 0.9), row("good", 0.8)]
    figure = plot_test_scores(rows)
    assert order(figure) == ["best", "good", "poor", "broken"]
    assert r"failed: out of memory: \$5" in texts(figure)
    assert "0.900  a" in texts(figure)


def test_where_less_is_better_the_least_is_first():
    rows = [{"recipe": name, "test_log_loss": value} for name, value in (("worse", 0.9), ("better", 0.2))]
    figure = plot_test_scores(rows, "test_log_loss")
    assert order(figure) == ["better", "worse"]
    assert "test log loss (less is better)" in texts(figure)


def test_interval_seeds_and_floors_lie_where_they_belong():
    floors = [{"name": "1-NN", "test_top1": 0.31}, {"name": "majority", "test_top1": 0.3}]
    figure = plot_test_scores([row("a", 0.8)], floors=floors)
    (axes,) = figure.axes
    where = [list(line.get_xdata()) for line in axes.get_lines()]
    assert [0.75, pytest.approx(0.84)] in where
    assert [pytest.approx(0.79), 0.8, pytest.approx(0.81)] in where
    assert [0.3, 0.3] in where
    assert [0.31, 0.31] in where
    low, high = axes.get_xlim()
    assert low < 0.3
    assert high > 0.84
    # Floors that are close have their names at different heights.
    heights = [text.xyann[1] for text in axes.texts if hasattr(text, "xyann")]
    assert len(set(heights)) == 2


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_floors_leave_room_for_few_recipes(count, tmp_path):
    floors = [{"name": name, "test_top1": value} for name, value in (("majority", 0.3), ("a long name", 1.0), ("x", 1))]
    figure = plot_test_scores([row(f"r{place}", 0.8) for place in range(count)], floors=floors, title="few")
    save_figure(figure, tmp_path / "few.png")  # a layout that cannot be kept is a warning, hence an error
    (axes,) = figure.axes
    assert axes.get_position().height * figure.get_figheight() > 0.2


def test_without_an_interval_the_spread_over_seeds_is_shown():
    figure = plot_test_scores([{"recipe": "a", "test_macro_f1": 0.7, "test_macro_f1_sd": 0.1}], "test_macro_f1")
    assert "mean ± sd over seeds" in texts(figure)
    assert "one seed" not in texts(figure)


def test_a_recipe_of_which_a_seed_failed_says_so():
    assert "(partly failed)" in texts(plot_test_scores([row("a", status="partly failed")]))


# Confusion matrices ---------------------------------------------------------------------------------------------------


def test_counts_are_summed_over_seeds_and_coloured_by_the_true_class():
    figure = plot_confusion_matrices({"a": [[[8, 0], [1, 1]], [[8, 4], [1, 1]]]}, ["x", "y"])
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["16", "4", "2", "2"]
    assert axes.images[0].get_array().tolist() == [[0.8, 0.2], [0.5, 0.5]]


def test_a_class_that_never_occurs_is_white():
    figure = plot_confusion_matrices({"a": [np.array([[3, 0], [0, 0]])]}, ["x", "y"])
    assert figure.axes[0].images[0].get_array().tolist() == [[1, 0], [0, 0]]


def test_of_a_hundred_classes_only_some_are_named_and_no_count_is_crammed_in(tmp_path):
    names = [f"class {i}" for i in range(100)]
    figure = plot_confusion_matrices({"a": [np.eye(100, dtype=int)]}, names)
    drawn(figure, tmp_path / "a.png")
    axes = figure.axes[0]
    assert not axes.texts
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert 20 < len(boxes) < 100
    assert all(upper.y0 > lower.y0 + 0.7 * lower.height for upper, lower in pairwise(boxes))


def test_long_class_names_end_in_an_ellipsis():
    assert "adenocarcinoma_le…" in texts(
        plot_confusion_matrices({"a": [np.eye(2)]}, ["adenocarcinoma_left.lower.lobe", "b"])
    )


def test_long_recipe_names_stay_different():
    shown = texts(
        plot_learning_curves({f"mobilenetv3_{size}_100-linear-probe": [history()] for size in ("small", "large")})
    )
    assert "small" in shown
    assert "large" in shown


# Samples --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20, 30, 3), (20, 30), (20, 30, 1)])
def test_samples_say_what_is_right_and_what_is_wrong(shape):
    pair = Predictions(
        np.array(["case/1", "case_$2"]), np.array(["", ""]), np.array([0, 0]), np.log([[0.75, 0.25], [0.1, 0.9]])
    )
    figure = plot_samples([np.full(shape, 200, np.uint8)] * 2, pair, ["normal", "benign"])
    right, wrong = figure.axes[:2]
    assert right.get_title() == "✓ normal 0.75"
    assert wrong.get_title() == "✗ benign 0.90"
    assert wrong.get_xlabel() == "true: normal\ncase_\\$2"
    assert matplotlib_colour(right) == GREEN.lower()
    assert matplotlib_colour(wrong) == ORANGE.lower()


def matplotlib_colour(axes):
    from matplotlib.colors import to_hex

    return to_hex(axes.spines["left"].get_edgecolor())


def test_a_grey_image_keeps_its_greys(tmp_path):
    one = predictions(1)
    dark = drawn(plot_samples([np.full((9, 9), 10, np.uint8)], one, ["a", "b", "c"]), tmp_path / "dark.png")
    light = drawn(plot_samples([np.full((9, 9), 240, np.uint8)], one, ["a", "b", "c"]), tmp_path / "light.png")
    middle = dark.shape[0] // 2, dark.shape[1] // 2
    assert dark[middle].tolist() == [10] * 3
    assert light[middle].tolist() == [240] * 3


def test_chosen_samples_are_half_wrong_spread_over_the_classes_and_the_same_again():
    many = predictions(300)
    chosen = choose_samples(many, 12)
    wrong = (many.y_pred != many.y_true)[chosen]
    assert wrong.tolist() == [True] * 6 + [False] * 6
    assert np.bincount(many.y_true[chosen]).tolist() == [4, 4, 4]
    assert len(set(chosen.tolist())) == 12
    assert np.array_equal(chosen, choose_samples(many, 12))
    assert not np.array_equal(chosen, choose_samples(many, 12, seed=1))


@pytest.mark.parametrize(
    ("right", "wrong", "expected_wrong"), [(20, 2, 2), (1, 20, 7), (0, 3, 3), (3, 0, 0), (0, 0, 0)]
)
def test_where_one_kind_is_rare_the_other_fills_the_page(right, wrong, expected_wrong):
    n = right + wrong
    logits = np.zeros((n, 2))
    logits[np.arange(n), (np.arange(n) >= right).astype(int)] = 1
    made = Predictions(np.arange(n).astype(str), np.arange(n).astype(str), np.zeros(n, int), logits)
    chosen = choose_samples(made, 8)
    assert (made.y_pred != made.y_true)[chosen].sum() == expected_wrong
    assert len(chosen) == min(8, n)
