from __future__ import annotations

import subprocess
import sys
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from zoo.errors import ZooError
from zoo.evaluation.predictions import read_predictions
from zoo.models.registry import register_model
from zoo.models.spec import own_models
from zoo.runs import list_runs
from zoo.training.averaging import reestimate_batch_norm
from zoo.training.features import FORWARD_BATCH
from zoo.training.loop import train
from zoo.training.memory import freed_memory_kept, images_at_a_time, in_pieces
from zoo.training.scoring import evaluate

# In a process of its own: one that has run other tests holds free memory between what it still uses.
PROGRAM = """
import resource
from pathlib import Path

import torch

from zoo.training.memory import freed_memory_kept

SIZE = 24 * 2**20


def faults_of_an_allocation() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(SIZE, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


with freed_memory_kept() as kept:
    if kept:
        torch.ones(8 * SIZE, dtype=torch.uint8)
        assert faults_of_an_allocation() < SIZE / 4096 / 10
        full = resident_mib()
if kept:
    assert resident_mib() < full - 4 * SIZE / 2**20, (full, resident_mib())  # most of the 192 MiB went back
print("kept" if kept else "no glibc")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_is_used_again_and_given_back_at_the_end():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("kept", "no glibc")


def test_an_error_passes_through():
    with pytest.raises(ZeroDivisionError), freed_memory_kept():
        _ = 1 / 0


# Where it is short ----------------------------------------------------------------------------------------------------


class Hungry(nn.Module):
    """Has no memory for more than `most` images where it is not trained."""

    most = FORWARD_BATCH
    scored: ClassVar[list[int]] = []
    trained: ClassVar[list[int]] = []

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, num_classes)

    def forward(self, images):
        real = images.device.type != "meta" and bool(images.any())  # as it is built, blank ones go through
        if real:
            (self.trained if self.training else self.scored).append(len(images))
        activations = self.stem(images).mean((2, 3))
        if real and not self.training and len(images) > self.most:
            raise MemoryError("no room")
        return self.head(activations)


@pytest.fixture
def hungry():
    register_model("hungry_net")(Hungry)
    yield Hungry
    del own_models["hungry_net"]
    Hungry.most = FORWARD_BATCH
    Hungry.scored, Hungry.trained = [], []


KINDS = [
    {},
    {"strategy": "linear-probe"},
    {"ema_decay": 0.9},
    {"freeze": ["stem"]},
    {"freeze": ["stem"], "most": 4},
    {"average__method": "swa", "average__last_epochs": 3},
]


@pytest.mark.slow
@pytest.mark.parametrize("more", KINDS)
def test_scoring_that_memory_does_not_suffice_for_takes_fewer_images_and_trains_nothing_again(
    tiny, make_recipe, hungry, more, monkeypatch
):
    monkeypatch.setattr("zoo.training.boundary.Boundary.pays", lambda *_: True)
    most = more.get("most", 2)
    more = {key: value for key, value in more.items() if key != "most"}
    keys = {"model__name": "hungry_net", "policy": "none", "epochs": 3, "device": "cpu", **more}
    whole = train(make_recipe("whole", **keys), "tiny", 0, tiny)
    evaluate(whole, "test", tiny)
    updates, hungry.trained, hungry.scored, hungry.most = len(hungry.trained), [], [], most
    pieces = train(make_recipe("pieces", **keys), "tiny", 0, tiny)
    assert len(hungry.trained) <= updates  # of frozen stages none is looked for
    assert sum(count > most for count in hungry.scored) <= 10  # the size that sufficed is not looked for in each batch
    evaluate(pieces, "test", tiny)
    assert not any("memory" in note for note in whole.record.notes)
    said = f"trained again it may have other bits: memory sufficed for scoring {3 if most == 4 else 2} images at a time"
    assert said in pieces.record.notes
    ours, theirs = load_file(pieces.weights_file), load_file(whole.weights_file)
    for key, value in theirs.items():
        # The variance of few images is another estimate than that of many.
        near = {"rtol": 0.3, "atol": 0.05} if "average__method" in more else {"rtol": 1e-4, "atol": 1e-6}
        if value.is_floating_point():
            torch.testing.assert_close(ours[key], value, **near)
    if "average__method" not in more:
        for split in ("val", "test"):
            logits = [read_predictions(run.predictions_file(split)).logits for run in (pieces, whole)]
            np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["full", "linear-probe"])
def test_an_image_that_memory_does_not_suffice_for_is_said_at_once(tiny, make_recipe, hungry, strategy):
    hungry.most = 0
    keys = {"model__name": "hungry_net", "policy": "none", "strategy": strategy}
    with pytest.raises(ZooError, match=r"^out of memory even with one image at a time \(no room\); take a smaller"):
        train(make_recipe("none", **keys), "tiny", 0, tiny)
    assert len(hungry.trained) == (3 if strategy == "full" else 0)  # one epoch


@pytest.mark.parametrize("tta", ["none", "flip"])
def test_a_test_split_that_memory_does_not_suffice_for_is_scored_in_pieces(trained, monkeypatch, tta):
    from zoo.models.nets import SimpleCNN

    run = next(run for run in list_runs(trained) if run.record.model == "simple_cnn")
    if tta != "none":
        run.write_record(run.record.model_copy(update={"tta": tta}))
        for file in (run.predictions_file("test"), run.metrics_file("test")):
            file.unlink()
        evaluate(run, "test", trained)
    before = read_predictions(run.predictions_file("test")).logits
    for file in (run.predictions_file("test"), run.metrics_file("test")):
        file.unlink()
    forward, seen = SimpleCNN.forward, []

    def short(self, images):
        seen.append(len(images))
        if len(images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, images)

    monkeypatch.setattr(SimpleCNN, "forward", short)
    evaluate(run, "test", trained)
    assert seen[seen.index(9) :] == [9, 5, 3, 3, 3] + (tta != "none") * [3, 3, 3]
    np.testing.assert_allclose(read_predictions(run.predictions_file("test")).logits, before, rtol=1e-4, atol=1e-5)


def test_memory_that_falls_short_elsewhere_than_in_an_update_is_no_reason_to_train_again(
    tiny, make_recipe, hungry, monkeypatch
):
    def short(*_):
        raise MemoryError("no room for an average")

    monkeypatch.setattr("zoo.training.trainer.make_ema", short)
    phases = []
    with pytest.raises(ZooError, match=r"^out of memory \(no room for an average\); take a smaller"):
        train(
            make_recipe("none", model__name="hungry_net", ema_decay=0.9),
            "tiny",
            0,
            tiny,
            on_tick=lambda tick: phases.append(tick.phase),
        )
    assert phases.count("begins") == 1


def test_pieces_are_in_order_no_smaller_than_asked_for_and_remembered():
    model, asked = nn.Identity(), []

    def forward(part):
        asked.append(len(part))
        if len(part) > most:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return list(part)

    most = 3
    assert list(in_pieces(model, range(10), forward)) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert asked == [10, 5, 3, 3, 3, 1]
    assert (images_at_a_time(model, 10), images_at_a_time(model, 2), images_at_a_time(nn.Identity(), 10)) == (3, 2, 10)
    most, other = 3, nn.Identity()
    assert list(in_pieces(other, range(8), forward, least=2)) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    most, other = 4, nn.Identity()
    assert list(in_pieces(other, range(9), forward, least=2)) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    most, other = 1, nn.Identity()
    assert list(in_pieces(other, range(2), forward)) == [[0], [1]]
    most = 10
    assert list(in_pieces(other, range(5), forward, least=2)) == [[0, 1], [2, 3, 4]]
    most = 1
    with pytest.raises(ZooError, match="out of memory even with 2 images at a time"):
        list(in_pieces(nn.Identity(), range(8), forward, least=2))
    with pytest.raises(RuntimeError, match="shapes"):
        list(in_pieces(model, range(8), lambda _: (_ for _ in ()).throw(RuntimeError("shapes do not fit"))))


def test_batch_statistics_in_pieces_are_those_of_smaller_batches():
    torch.manual_seed(0)
    batches = [torch.randn(8, 3, 4, 4), torch.randn(5, 3, 4, 4)]

    def statistics(batches, most):
        model = nn.Sequential(nn.BatchNorm2d(3), nn.Identity(), nn.BatchNorm2d(3))

        def forward(batch):
            middle = model[0](batch)
            if len(batch) > most:
                raise MemoryError
            model[2](middle)

        reestimate_batch_norm(model, batches, forward)
        return model.state_dict()

    found = statistics(batches, most=4)
    wanted = statistics([*batches[0].split(4), *batches[1].split([3, 2])], most=8)
    for key, value in wanted.items():
        assert torch.equal(found[key], value), key
