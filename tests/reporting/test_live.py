from __future__ import annotations

import errno
import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.errors import ZooError
from zoo.reporting import plots
from zoo.reporting.live import LiveFigure
from zoo.training.loop import Tick, train
from zoo.training.plan import make_plan


def row(epoch: int, phase: str = "network", **more) -> dict:
    loss = 1 / epoch
    made = {"epoch": epoch, "phase": phase, "train_loss": loss, "val_loss": loss + 0.1, "val_top1": 0.5}
    return made | {"val_balanced_accuracy": 1 - loss / 2} | more


def tick(epoch: int, done: int, loss: float | None = 1.0, total: int = 100) -> Tick:
    return Tick("tiny--run--s0", "network", done, total, epoch, 12, loss, "", 143.21)


def folder(tmp_path: Path, *epochs: int) -> Path:
    """A run folder with the history of these epochs, its last line cut off by a crash."""
    place = tmp_path / "tiny--run--s0"
    place.mkdir()
    lines = [json.dumps(row(epoch)) for epoch in epochs]
    (place / "history.jsonl").write_text("\n".join([*lines, '{"epoch": 9, "tr']), encoding="utf-8")
    return place / "loss.png"


def curves(live: LiveFigure) -> list[list[tuple[float, float]]]:
    """The points of every line in the panel of the loss."""
    return [[tuple(point) for point in line.get_xydata()] for line in live.figure().axes[0].lines]


def texts(live: LiveFigure) -> str:
    figure = live.figure()
    figure.draw_without_rendering()
    return "\n".join(each.get_text() for each in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def test_loss_within_and_over_the_epochs_is_drawn(tmp_path):
    live = LiveFigure(tmp_path / "loss.png")
    live.epoch(row(1, "head"))
    for done in (50, 100):
        live.tick(tick(2, done, 2 - done / 100))
    live.epoch(row(2))
    live.tick(tick(3, 25, 0.7))
    within, now, train_loss, val_loss = curves(live)
    assert within == [(1.5, 1.5), (2.0, 1.0)] and now == [(2.25, 0.7)]
    assert train_loss == [(1, 1.0), (2, 0.5)] and val_loss == [(1, 1.1), (2, 0.6)]
    said = texts(live)
    assert "tiny--run--s0: network, epoch 3 of 12, 143 images/s" in said
    assert "best 0.750 in epoch 2" in said and "balanced accuracy" in said and "so far" in said


def test_less_is_better_for_some_metrics_and_top1_is_the_metric_of_rows_without_another(tmp_path):
    live = LiveFigure(tmp_path / "loss.png")
    for epoch, loss in ((1, 0.5), (2, 0.3), (3, 0.4)):
        made = row(epoch, val_log_loss=loss)
        del made["val_balanced_accuracy"]
        live.epoch(made)
    assert "best 0.300 in epoch 2" in texts(live) and "log loss (less is better)" in texts(live)
    plain = LiveFigure(tmp_path / "other.png")
    plain.epoch({"epoch": 1, "train_top1": 0.9, "val_top1": 0.8, "val_loss": float("nan"), "train_loss": None})
    assert "best 0.800 in epoch 1" in texts(plain) and len(plain.figure().axes[1].lines) == 3


def test_a_resumed_run_goes_on_from_its_history_and_what_is_done_again_replaces_what_was(tmp_path):
    live = LiveFigure(folder(tmp_path, 1, 2, 3))
    assert "tiny--run--s0" in texts(live)
    assert curves(live)[0] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    live.tick(tick(4, 80, 0.4))
    live.tick(tick(4, 50, 0.6))  # from a checkpoint in mid-epoch
    assert curves(live)[0] == [(3.5, 0.6)]
    live.epoch(row(2, train_loss=0.45))  # an earlier one: the rest belongs to the attempt before
    train_loss, _ = curves(live)
    assert train_loss == [(1, 1.0), (2, 0.45)]


def test_ticks_without_a_loss_are_passed_over(tmp_path):
    live = LiveFigure(tmp_path / "loss.png")
    for each in (tick(1, 1, None), tick(1, 1, float("nan")), tick(0, 1), tick(1, 0, total=0)):
        live.tick(each)
    live.close()
    assert not live.path.exists() and live.note is None


@pytest.mark.slow
def test_a_long_run_keeps_few_points_and_a_wild_start_does_not_flatten_the_rest(tmp_path):
    live = LiveFigure(tmp_path / "loss.png", every_s=1e6)
    for epoch in range(1, 201):
        for done in range(1, 1001, 5):
            live.tick(tick(epoch, done, 1e6 if epoch == done == 1 else 1.0, 1000))
    assert 1000 < sum(map(len, curves(live))) <= 4000
    assert live.figure().axes[0].get_ylim()[1] < 20


def test_it_is_drawn_seldom_and_at_the_end(tmp_path, monkeypatch):
    clock, drawn = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    cost = 0.1

    def save(figure, path):
        clock[0] += cost
        drawn.append(clock[0])

    monkeypatch.setattr(plots, "save_figure", save)
    live = LiveFigure(tmp_path / "loss.png", every_s=10)
    for epoch in range(1, 301):
        live.epoch(row(epoch))
        clock[0] += 0.5
    assert len(drawn) == pytest.approx(15, abs=1)
    assert min(np.diff(drawn)) >= 10
    cost, before = 1.0, len(drawn)  # a slow disk: 2 % of the time, not 10 %
    for epoch in range(301, 701):
        live.epoch(row(epoch))
        clock[0] += 0.5
    assert len(drawn) - before == pytest.approx(4, abs=1)
    live.close()
    count = len(drawn)
    live.close()  # nothing new
    assert len(drawn) == count


def test_the_picture_is_whole_and_in_the_style_of_the_others(tmp_path):
    live = LiveFigure(folder(tmp_path, 1, 2))
    live.epoch(row(3))
    with Image.open(live.path) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] == round(plots.WIDTH * plots.DPI)
    for colour in (plots.ORANGE, plots.BLUE):
        rgb = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
        assert (pixels == rgb).all(-1).sum() > 100
    assert sorted(path.name for path in live.path.parent.iterdir()) == ["history.jsonl", "loss.png"]


def test_what_goes_wrong_is_said_once_and_never_raised(tmp_path, monkeypatch):
    notes: list[str] = []
    live = LiveFigure(tmp_path / "loss.png", every_s=0, on_note=notes.append)

    def full(*_):
        raise ZooError("cannot write 'loss.png': No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(plots, "save_figure", full)
        for epoch in (1, 2, 3):
            live.epoch(row(epoch))
        live.close()
    assert notes == [live.note] and "No space left" in live.note and "loss.png" in live.note
    live.close()  # there is room again
    assert live.path.is_file() and len(notes) == 1


def test_a_full_disk_is_no_reason_to_stop(full_disk):
    run = full_disk / "run"
    run.mkdir()
    live = LiveFigure(run / "loss.png")
    with pytest.raises(OSError) as stopped:  # noqa: SIM117
        with (full_disk / "filler").open("wb") as stream:
            while True:
                stream.write(bytes(4096))
                stream.flush()
    assert stopped.value.errno == errno.ENOSPC
    live.epoch(row(1))
    assert live.note is not None and "No space left" in live.note
    assert not list(run.iterdir())


def test_an_unreadable_history_is_said(tmp_path):
    (tmp_path / "history.jsonl").write_text('{"no": "epoch"}\n', encoding="utf-8")
    live = LiveFigure(tmp_path / "loss.png")
    assert live.note is not None and "epoch" in live.note
    live.epoch(row(1))
    assert live.path.is_file()


def test_it_watches_a_real_run_and_changes_nothing(tiny, make_recipe):
    plain = train(make_recipe("plain"), "tiny", 0, tiny)
    plan = make_plan(make_recipe("watched"), "tiny", 0, tiny)
    live = LiveFigure(plan.run.path / "loss.png", every_s=0)
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    run = train(make_recipe("watched"), "tiny", 0, tiny, on_tick=live.tick)
    for each in run.history():
        live.epoch(each)
    live.close()
    assert run.path == plan.run.path and live.note is None
    assert len(curves(live)[-2]) == 2 and curves(live)[0][-1][0] == 1.0
    with Image.open(live.path) as image:
        image.verify()
    assert run.weights_file.read_bytes() == plain.weights_file.read_bytes()
