from __future__ import annotations

import math

import numpy as np
import pytest
from torch import nn

from zoo.data.manifest import load_dataset
from zoo.errors import ZooError
from zoo.training.loop import train
from zoo.training.lr_range import HIGH, LOW, lr_range, smooth
from zoo.training.lr_range import _found as found_in
from zoo.training.plan import make_plan
from zoo.training.step import NonFiniteLossError


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"strategy": "linear-probe", "policy": "none"},
        {"strategy": "lp-ft", "epochs": 4, "layer_decay": 0.5},
        {"strategy": "gradual", "epochs": 4},
        {"loss.name": "focal", "accumulate": 2, "mixup": 0.3, "clip_grad": 1.0, "optimizer.name": "sgd"},
        {"sampler": "balanced", "epochs": 4, "image_sizes": [16, 32], "freeze": ["stem"]},
    ],
)
def test_every_strategy_can_be_tested_and_gives_the_same_again(tiny, make_recipe, overrides):
    dataset = load_dataset("tiny", tiny)
    for split in ("val", "test"):
        for path in dataset.of_split(split)["path"]:
            dataset.image_path(path).unlink()
    plan = make_plan(make_recipe(**overrides), "tiny", 0, tiny)
    first = lr_range(plan, 60)
    assert first == lr_range(plan, 60)
    probe = overrides.get("strategy") == "linear-probe"
    assert first.key == ("finetune.head_lr" if probe else "optimizer.lr")
    assert first.own == 3e-3
    assert first.lrs[0] == LOW and first.lrs[-1] <= HIGH
    np.testing.assert_allclose(np.diff(np.log(first.lrs)), math.log(HIGH / LOW) / 59)
    assert len(first.lrs) == len(first.losses) == len(first.smoothed) >= 20
    assert not plan.run.path.exists(), "nothing is left"
    assert lr_range(make_plan(make_recipe(**overrides), "tiny", 1, tiny), 60).losses != first.losses


@pytest.mark.slow
def test_the_suggestion_trains_better_than_its_extremes(tiny, make_recipe):
    from zoo.training.loop import train

    recipe = make_recipe(policy="none", epochs=3)
    found = lr_range(make_plan(recipe, "tiny", 0, tiny))
    assert LOW < found.suggested < HIGH and found.suggested <= found.steepest <= found.lowest
    losses = {}
    for lr in (LOW, found.suggested, HIGH / 10):
        try:
            run = train(make_recipe(f"at-{lr:g}", policy="none", epochs=3, lr=lr), "tiny", 0, tiny)
            losses[lr] = run.history()[-1]["train_loss"]
        except ZooError:
            losses[lr] = math.inf
    assert losses[found.suggested] < 0.8 * losses[LOW]
    assert losses[found.suggested] < losses[HIGH / 10]


@pytest.mark.slow
def test_the_test_ends_where_the_loss_diverges(tiny, make_recipe):
    found = lr_range(
        make_plan(make_recipe(policy="none", **{"optimizer.name": "sgd", "momentum": 0.99}), "tiny", 0, tiny)
    )
    assert found.lrs[-1] < HIGH
    assert found.stopped.startswith(("the loss diverged at", "the loss was no number at"))


def drawn(curve, updates=100):
    lrs = [LOW * (HIGH / LOW) ** (number / (updates - 1)) for number in range(updates)]
    return lrs, [curve(math.log10(lr)) for lr in lrs]


def test_the_suggestion_is_the_smaller_of_two_rates():
    # A fall around 1e-3, a floor to 1e-1, then a rise: the fall's middle is far below a tenth of the lowest.
    lrs, losses = drawn(lambda x: 1 - math.tanh(3 * (x + 3)) / 2 + max(0.0, x + 1) * 4 - 0.01 * x)
    found = found_in("optimizer.lr", 1e-3, lrs, losses, "")
    assert math.log10(found.steepest) == pytest.approx(-3, abs=0.1)
    assert -2 < math.log10(found.lowest) < -0.8
    assert found.suggested == float(f"{found.steepest:.2g}")
    # A fall right before the rise: a tenth of the lowest is the smaller.
    lrs, losses = drawn(lambda x: 1 - max(0.0, x + 2) if x < -1 else 10 * (x + 1))
    found = found_in("optimizer.lr", 1e-3, lrs, losses, "")
    assert found.suggested == float(f"{found.lowest / 10:.2g}") < found.steepest


def test_a_second_fall_after_a_clear_rise_counts_for_nothing():
    lrs, losses = drawn(lambda x: 1 - 0.5 * math.exp(-((x + 4) ** 2)) - 0.9 * math.exp(-((x - 0.5) ** 2)))
    found = found_in("optimizer.lr", 1e-3, lrs, losses, "")
    assert math.log10(found.lowest) == pytest.approx(-4, abs=0.2)


@pytest.mark.parametrize("seed", range(20))
def test_where_only_batches_scatter_nothing_is_suggested(seed):
    draw = np.random.default_rng(seed)
    lrs, losses = drawn(lambda x: 1 + 0.1 * draw.standard_normal() + max(0.0, x) * 3)
    found = found_in("optimizer.lr", 1e-3, lrs, losses, "")
    assert found.suggested is found.steepest is found.lowest is None


def test_smoothing_has_no_lag_and_no_outliers():
    straight = [float(number) for number in range(30)]
    np.testing.assert_allclose(smooth(straight)[10:20], straight[10:20], rtol=1e-3)
    assert smooth([1.0] * 10 + [50.0] + [1.0] * 10) == [1.0] * 21


@pytest.mark.parametrize("overrides", [{}, {"strategy": "linear-probe", "policy": "none"}])
def test_where_no_loss_is_finite_it_is_said_as_training_says_it(tiny, make_recipe, overrides):
    recipe = make_recipe(std=[1e-39, 1e-39, 1e-39], **overrides)
    with pytest.raises(NonFiniteLossError, match=r"^the loss was not finite at the lowest learning rate of the test"):
        lr_range(make_plan(recipe, "tiny", 0, tiny))
    with pytest.raises(NonFiniteLossError, match=r"^the loss was not finite in epoch 1"):
        train(recipe, "tiny", 0, tiny)


def test_mistakes_are_said(tiny, make_recipe):
    plan = make_plan(make_recipe(), "tiny", 0, tiny)
    with pytest.raises(ZooError, match=r"a range test needs at least 20 updates. Got 3"):
        lr_range(plan, 3)
    dataset = load_dataset("tiny", tiny)
    dataset.image_path(dataset.of_split("train")["path"][0]).unlink()
    with pytest.raises(ZooError, match=r"split 'train': gone"):
        lr_range(plan)


def test_a_network_that_needs_too_much_memory_is_no_traceback(tiny, make_recipe):
    from zoo.models.registry import register_model
    from zoo.models.spec import own_models

    class Hungry(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.head = nn.Linear(3, classes)

        def forward(self, images):
            if self.training and len(images) > 2:
                images.new_empty(2**60)
            return self.head(images.mean((2, 3)))

    @register_model("hungry_net")
    def hungry_net(num_classes: int) -> nn.Module:
        return Hungry(num_classes)

    try:
        with pytest.raises(ZooError, match=r"the range test ran out of memory; lower finetune.batch_size"):
            lr_range(make_plan(make_recipe(model__name="hungry_net"), "tiny", 0, tiny))
    finally:
        own_models.pop("hungry_net", None)
