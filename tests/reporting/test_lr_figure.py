from __future__ import annotations

import pytest

import zoo
from zoo.files import sha256_file
from zoo.reporting.lr_range import find_lr, lr_range_text, plot_lr_range
from zoo.reporting.plots import save_figure
from zoo.training.lr_range import LrRange

LRS = [1e-6 * 10 ** (number / 10) for number in range(60)]
FALL = [1.0 - 0.01 * number for number in range(60)]
FOUND = LrRange("optimizer.lr", 1e-3, LRS, FALL, FALL, 2e-3, 0.1, 2e-3, "the loss diverged at 0.8")
NOTHING = LrRange("optimizer.lr", 1e-3, LRS, FALL, FALL, None, None, None, "the last, at 10")


def test_the_figure_marks_the_suggestion_and_the_recipe_s_own(tmp_path):
    figure = plot_lr_range(FOUND, "a title")
    at = [line.get_xdata()[0] for line in figure.axes[0].get_lines() if len(set(line.get_xdata())) == 1]
    assert at == [2e-3, 1e-3]
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert said == ["loss of each update", "smoothed", "suggested 0.002", "of the recipe 0.001"]
    save_figure(figure, tmp_path / "one.png")
    assert len(plot_lr_range(NOTHING).legends[0].get_texts()) == 3


@pytest.mark.parametrize("count", [1, 2])
def test_few_losses_before_the_first_that_is_no_number_make_a_figure(tmp_path, count):
    lrs, losses = LRS[:count], FALL[:count]
    few = LrRange("optimizer.lr", 1e-3, lrs, losses, losses, None, None, None, "the loss was no number at 1e-06")
    save_figure(plot_lr_range(few), tmp_path / "few.png")
    assert lr_range_text(few).startswith(
        f"optimizer.lr is 0.001 in the recipe; {count} update{'s'[: count - 1]} from 1e-06 up"
    )


def test_the_sentence_says_how():
    assert lr_range_text(FOUND) == (
        "optimizer.lr is 0.001 in the recipe; 60 updates from 1e-06 up, until the loss diverged at 0.8. Suggested: "
        "optimizer.lr=0.002, the smaller of where the loss falls fastest (0.002) and a tenth of where it is lowest "
        "(0.1)"
    )
    assert lr_range_text(NOTHING).endswith(
        "The loss never fell clearly, so there is nothing to suggest: see the figure"
    )


@pytest.mark.filterwarnings("error")
def test_nothing_but_the_figure_changes_in_a_run(trained):
    run = next(run for run in zoo.list_runs(trained) if "--tiny--s0" in run.name)
    before = {each.name: sha256_file(each) for each in run.path.iterdir()}
    found, file = find_lr("tiny", "tiny", 0, trained, updates=30)
    assert file == run.path / "lr-find.png" and len(found.lrs) >= 20
    assert {each.name: sha256_file(each) for each in run.path.iterdir() if each != file} == before
    first = file.read_bytes()
    assert zoo.find_lr("tiny", "tiny", 0, trained, updates=30)[0] == found
    assert file.read_bytes() == first
