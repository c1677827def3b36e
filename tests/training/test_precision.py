from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from zoo.errors import Interrupted, ZooError
from zoo.models.registry import register_model
from zoo.models.spec import own_models
from zoo.recipe import PRECISIONS
from zoo.training import speed
from zoo.training.loop import train
from zoo.training.plan import make_plan
from zoo.training.precision import (
    PrecisionPlan,
    begun_plan,
    candidates,
    choose_device,
    choose_plan,
    choose_workers,
    cores,
    fitting_plan,
    keep_plan,
    known_plan,
    measured_plan,
    plan_file,
    set_threads,
)

CPU = torch.device("cpu")


def test_a_cpu_computes_in_float32_unless_asked_otherwise():
    assert choose_plan("auto", CPU) == choose_plan("float32", CPU) == PrecisionPlan("float32", channels_last=True)
    assert choose_plan("bf16", CPU).facts() == {"dtype": "bf16", "channels_last": True}


def test_the_forward_pass_is_in_the_plan_s_format():
    layer = torch.nn.Linear(4, 2)
    for dtype, kind in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        with PrecisionPlan(dtype, channels_last=True).autocast(CPU):
            assert layer(torch.ones(1, 4)).dtype == kind
    images = torch.arange(48.0).reshape(1, 3, 4, 4)
    placed = PrecisionPlan("float32", channels_last=True).place(images)
    assert placed.is_contiguous(memory_format=torch.channels_last) and torch.equal(placed, images)
    assert PrecisionPlan("float32", channels_last=False).place(placed).is_contiguous()


def test_the_device_is_one_that_is_there():
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert choose_device("auto").type == best
    assert choose_device("cpu") == CPU
    for wanted in ("cuda:99", "mps"):
        if wanted.split(":")[0] != best or wanted == "cuda:99":
            with pytest.raises(ZooError, match=f"device '{wanted}' is not on this machine; take auto or one of .*cpu"):
                choose_device(wanted)


@pytest.mark.parametrize(
    ("local", "cards", "found"), [("0", 1, "cuda:0"), ("1", 1, "cuda:0"), ("3", 2, "cuda:1"), ("", 2, "cuda")]
)
def test_processes_of_torchrun_share_out_the_cards(monkeypatch, local, cards, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setenv("LOCAL_RANK", local)
    assert choose_device("auto") == choose_device("cuda") == torch.device(found)
    assert choose_device("cuda:0") == torch.device("cuda:0") and choose_device("cpu") == CPU


@pytest.mark.parametrize("wanted", ["gpu", "", "cpu:x", "cuda:-1", "meta", "cpu:1", "cpu:²"])
def test_a_device_that_does_not_exist_is_refused(wanted):
    with pytest.raises(ZooError, match="is not on this machine"):
        choose_device(wanted)


def test_workers_and_threads_fit_the_machine():
    assert choose_workers("auto", CPU) == 0
    assert choose_workers(3, CPU) == 3
    assert 0 <= choose_workers("auto", torch.device("cuda")) <= 8
    assert 1 <= cores() <= (os.cpu_count() or 1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(cores() + 3)
        assert set_threads() == torch.get_num_threads() == cores()
        torch.set_num_threads(1)
        assert set_threads() == 1
    finally:
        torch.set_num_threads(before)


# Measured plans ---------------------------------------------------------------------------------------------------

FLOAT, FLOAT_NCHW, BF16 = (
    PrecisionPlan("float32", channels_last=True),
    PrecisionPlan("float32", channels_last=False),
    PrecisionPlan("bf16", channels_last=True),
)


def pretended(seconds: dict[str, float], losses: dict[str, float] | None = None):
    """Steps that take what they are said to take, and a list of the plans that were asked for."""
    asked: list[str] = []

    def steps(plan: PrecisionPlan, count: int) -> list[tuple[float, float]]:
        asked.append(plan.name)
        if plan.name not in seconds:
            raise RuntimeError("not here")
        return [(9.0, 1.0), *[(seconds[plan.name], (losses or {}).get(plan.name, 1.0))] * (count - 1)]

    return steps, asked


@pytest.mark.parametrize(
    ("seconds", "losses", "chosen"),
    [
        ({"float32-channels-last": 1.0, "float32-nchw": 1.2, "bf16-channels-last": 0.5}, {}, BF16),
        ({"float32-channels-last": 1.0, "float32-nchw": 0.7, "bf16-channels-last": 3.0}, {}, FLOAT_NCHW),
        ({"float32-channels-last": 1.0, "float32-nchw": 0.95, "bf16-channels-last": 0.93}, {}, FLOAT),
        ({"float32-channels-last": 1.0, "float32-nchw": 0.62, "bf16-channels-last": 0.6}, {}, FLOAT_NCHW),
        ({"float32-channels-last": 1.0, "bf16-channels-last": 0.5}, {"bf16-channels-last": float("nan")}, FLOAT),
        ({"float32-channels-last": 1.0, "bf16-channels-last": 0.5}, {"bf16-channels-last": 1.2}, FLOAT),
        ({"float32-channels-last": 1.0, "bf16-channels-last": 0.5}, {"bf16-channels-last": 1.03}, BF16),
    ],
)
def test_the_fastest_plan_that_keeps_the_loss_is_taken_and_the_usual_one_unless_clearly_beaten(seconds, losses, chosen):
    steps, _ = pretended(seconds, losses)
    found = measured_plan(steps, [FLOAT, FLOAT_NCHW, BF16], 32)
    assert found == chosen and found.source == "measured"
    assert found.measured["float32-channels-last"] == 32.0
    if losses and chosen != BF16:
        assert found.measured["bf16-channels-last"] is None


def test_a_hopeless_plan_is_tried_once():
    steps, asked = pretended({"float32-channels-last": 1.0, "float32-nchw": 1.2, "bf16-channels-last": 5.0})
    measured_plan(steps, [FLOAT, FLOAT_NCHW, BF16], 32)
    # Of all but the first, one step alone comes before.
    assert asked.count("bf16-channels-last") == 1 + 1 and asked.count("float32-nchw") == 1 + 3


def test_a_plan_that_is_stuck_makes_one_step():
    asked = []

    def steps(plan, count):
        asked.append((plan, count))
        return [(11.0 if plan == BF16 else 0.1, 1.0)] * count

    found = measured_plan(steps, [FLOAT, BF16, FLOAT_NCHW], 32)
    assert [count for plan, count in asked if plan == BF16] == [1]
    assert len([plan for plan, _ in asked if plan == FLOAT_NCHW]) == 1 + 3
    assert found == FLOAT and found.measured["bf16-channels-last"] == pytest.approx(32 / 11, abs=0.01)


@pytest.mark.parametrize(
    ("flags", "known"), [({"avx512_fp16", "avx512f"}, False), ({"amx_fp16"}, True), ({"fphp"}, True), (set(), False)]
)
def test_fp16_is_tried_where_a_processor_has_its_gradients_too(monkeypatch, flags, known):
    monkeypatch.setattr("zoo.training.precision.cpu_flags", lambda: flags)
    assert ("fp16-channels-last" in [plan.name for plan in candidates(CPU)]) == known


def test_compiling_is_tried_for_long_runs_and_taken_where_it_saves_more_than_it_costs():
    seconds = {"float32-channels-last": 1.0, "float32-channels-last-compile": 0.5}
    for steps_left, wanted in ((100, False), (10_000, True)):
        steps, asked = pretended(seconds)
        found = measured_plan(steps, [FLOAT], 32, lambda step_s, left=steps_left: left * step_s)
        assert found.compiled == wanted == ("float32-channels-last-compile" in asked)
    steps, _ = pretended({"float32-channels-last": 1.0})  # no compiler
    found = measured_plan(steps, [FLOAT], 32, lambda step_s: 10_000 * step_s)
    assert not found.compiled and found.measured["float32-channels-last-compile"] is None


def at(seconds):
    return lambda step_s: seconds * step_s


def test_a_known_plan_is_compiled_for_the_runs_alone_that_are_long_enough(tiny, make_recipe, monkeypatch):
    name = "float32-channels-last"
    steps, asked = pretended({name: 1.0, f"{name}-compile": 0.5})
    monkeypatch.setattr(speed, "training_steps", lambda *_: steps)
    monkeypatch.setattr(speed, "candidates", lambda _: [FLOAT])
    plan = make_plan(make_recipe(), "tiny", 0, tiny)
    model = plan.model()[0]

    def found(steps_of_run):
        asked.clear()
        chosen = speed.plan_precision(plan, model, CPU, steps_of_run)
        return chosen.name, chosen.source, f"{name}-compile" in asked

    assert found(300) == (name, "measured", False)  # five minutes
    assert found(400) == (name, "cached", False)
    assert found(10_000) == (f"{name}-compile", "measured", True)  # not tried before, though a plan was known
    assert found(20_000) == (f"{name}-compile", "cached", False)
    assert found(300) == (name, "cached", False)  # seconds of a run are not worth a compiler
    assert found(10_000) == (f"{name}-compile", "cached", False)
    assert found(speed.FEWEST_STEPS - 1) == (name, "default", False)


def test_what_compiling_costs_is_weighed_against_each_run(tiny):
    rates = {"float32-channels-last": 32.0, "float32-channels-last-compile": 64.0}
    known = PrecisionPlan("float32", channels_last=True, source="cached", measured=rates, compile_s=400.0)

    def never(plan, count):
        raise AssertionError("measured again")

    for seconds, compiled in ((1000, False), (1500, False), (1700, True), (100_000, True)):
        for begun in (known, replace(known, compiled=True)):
            assert fitting_plan(begun, never, FLOAT, 32, at(seconds)).compiled == compiled
    assert not fitting_plan(replace(known, compiled=True), never, FLOAT, 32, None).compiled
    broken = replace(known, measured={**rates, "float32-channels-last-compile": None})
    assert not fitting_plan(broken, never, FLOAT, 32, at(100_000)).compiled
    keep_plan({"a": 1}, known)
    assert known_plan({"a": 1}).record() == known.record()
    assert begun_plan(known.record()).compile_s == 400.0


def test_a_compiled_plan_whose_cost_nobody_kept_is_measured_again():
    rates = {"bf16-channels-last": 32.0, "bf16-channels-last-compile": 64.0}
    known = PrecisionPlan("bf16", channels_last=True, compiled=True, source="cached", measured=rates)
    steps, asked = pretended({"float32-channels-last": 2.0, "bf16-channels-last-compile": 0.9})
    found = fitting_plan(known, steps, FLOAT, 32, at(100_000))
    assert found.compiled and asked == ["float32-channels-last", "bf16-channels-last-compile"]
    assert found.measured["bf16-channels-last-compile"] == 35.56 and found.compile_s is not None
    wrong, _ = pretended({"float32-channels-last": 2.0, "bf16-channels-last-compile": 0.1}, {FLOAT.name: 2.0})
    assert not fitting_plan(known, wrong, FLOAT, 32, at(100_000)).compiled


@pytest.mark.slow
def test_a_real_network_is_measured_once_and_its_plan_kept_recorded_and_used(tiny, make_recipe, monkeypatch):
    monkeypatch.setattr(speed, "FEWEST_STEPS", 4)
    run = train(make_recipe("one", batch_size=6, epochs=2), "tiny", 0, tiny)
    plan = run.record.precision
    assert plan["source"] == "measured" and plan["name"] in PRECISIONS
    assert {name for name, rate in plan["images_per_s"].items() if rate} >= {"float32-channels-last", "float32-nchw"}
    assert all(rate is None or rate > 0 for rate in plan["images_per_s"].values())
    again = train(make_recipe("two", epochs=2), "tiny", 1, tiny)
    assert again.record.precision == {**plan, "source": "cached"}
    other = train(make_recipe("three", epochs=2, image_size=48), "tiny", 0, tiny)
    assert other.record.precision["source"] == "measured"
    forced = train(make_recipe("four", epochs=2, precision="bf16-nchw"), "tiny", 0, tiny)
    assert forced.record.precision == {"dtype": "bf16", "channels_last": False, "name": "bf16-nchw", "source": "forced"}
    monkeypatch.setattr(speed, "FEWEST_STEPS", 1000)
    short = train(make_recipe("five", epochs=1), "tiny", 0, tiny)
    assert (short.record.precision["name"], short.record.precision["source"]) == ("float32-channels-last", "default")


def test_a_format_that_breaks_the_network_is_left_out(tiny, make_recipe, monkeypatch):
    from torch import nn

    @register_model("proud_net")
    def proud_net(num_classes: int) -> nn.Module:
        class Proud(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, num_classes)

            def forward(self, images):
                maps = self.conv(images)
                if maps.dtype != torch.float32:
                    maps = maps * float("nan")
                return self.head(maps.mean((2, 3)))

        return Proud()

    monkeypatch.setattr(speed, "FEWEST_STEPS", 4)
    try:
        run = train(make_recipe(model__name="proud_net", epochs=2), "tiny", 0, tiny)
    finally:
        del own_models["proud_net"]
    plan = run.record.precision
    assert plan["dtype"] == "float32"
    assert plan["images_per_s"]["bf16-channels-last"] is None


def test_a_format_that_is_finite_but_wrong_is_left_out_behind_a_fresh_head_too(tiny, make_recipe, monkeypatch):
    from torch import nn

    @register_model("loud_net")
    def loud_net(num_classes: int) -> nn.Module:
        class Loud(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, num_classes)

            def get_classifier(self):
                return self.fc

            def forward(self, images):
                maps = self.conv(images)
                return self.fc((maps if maps.dtype == torch.float32 else 500 * maps).mean((2, 3)))

        return Loud()

    monkeypatch.setattr(speed, "FEWEST_STEPS", 1)
    try:
        for strategy, policy in (("lp-ft", "light"), ("linear-probe", "none")):
            recipe = make_recipe(model__name="loud_net", epochs=2, strategy=strategy, policy=policy)
            plan = make_plan(recipe, "tiny", 0, tiny)
            model = plan.model()[0]
            assert not any(parameter.any() for parameter in model.fc.parameters())
            found = speed.plan_precision(plan, model, CPU, 1000, training=strategy == "lp-ft")
            assert found.dtype == "float32" and found.measured["bf16-channels-last"] is None, strategy
    finally:
        del own_models["loud_net"]


def test_nothing_is_kept_where_no_plan_could_be_measured(tiny, make_recipe, monkeypatch):
    def broken(*_):
        def steps(plan, count):
            raise RuntimeError("out of memory")

        return steps

    monkeypatch.setattr(speed, "training_steps", broken)
    plan = make_plan(make_recipe(), "tiny", 0, tiny)
    assert speed.plan_precision(plan, plan.model()[0], CPU, 1000) == FLOAT
    assert known_plan(speed.plan_identity(plan, CPU, training=True)) is None
    steps, _ = pretended({"bf16-channels-last": 0.5}, {"bf16-channels-last": float("nan")})
    assert measured_plan(steps, [FLOAT, BF16], 32).measured == {
        "float32-channels-last": None,
        "bf16-channels-last": None,
    }


def test_an_interrupted_run_keeps_the_plan_that_it_began_with(tiny, make_recipe, monkeypatch):
    def stop(tick):
        if tick.phase == "network" and tick.epoch == 2:
            raise KeyboardInterrupt

    recipe = make_recipe(epochs=3, device="cpu")
    monkeypatch.setattr(speed, "FEWEST_STEPS", 4)
    plan = make_plan(recipe, "tiny", 0, tiny)
    begun = PrecisionPlan("bf16", channels_last=False, source="measured", measured={"bf16-nchw": 9.0})
    keep_plan(speed.plan_identity(plan, CPU, training=True), begun)
    with pytest.raises(Interrupted):
        train(recipe, "tiny", 0, tiny, on_tick=stop)
    plan_file(speed.plan_identity(plan, CPU, training=True)).write_text("{ damaged")
    run = train(recipe, "tiny", 0, tiny)
    assert (run.record.precision["name"], run.record.precision["source"]) == ("bf16-nchw", "cached")


def test_a_plan_that_cannot_be_kept_is_measured_again(tiny, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_plan({"a": 1}, BF16)
    assert known_plan({"a": 1}) is None


@pytest.mark.slow
def test_a_compiled_network_trains_as_the_plain_one(tiny, make_recipe):
    plain = train(make_recipe("plain", epochs=1, policy="none", optimizer__name="sgd"), "tiny", 0, tiny)
    recipe = make_recipe("compiled", epochs=1, policy="none", optimizer__name="sgd", precision="float32-compile")
    run = train(recipe, "tiny", 0, tiny)
    assert run.record.precision["compiled"] is True
    ours, theirs = load_file(run.weights_file), load_file(plain.weights_file)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-5)
