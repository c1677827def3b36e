from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from zoo.data.cache import open_pixels
from zoo.data.manifest import load_dataset
from zoo.data.resplit import resplit_dataset
from zoo.data.sources import import_dataset
from zoo.errors import Interrupted, ZooError
from zoo.evaluation.metrics import compute_metrics
from zoo.evaluation.predictions import Predictions, read_predictions, write_predictions
from zoo.files import read_toml, sha256_file, write_json
from zoo.recipe import Recipe, load_recipe, parse_recipe
from zoo.runs import Run, find_run, list_runs, run_lock
from zoo.training.checkpoint import load_checkpoint
from zoo.training.features import forward_pixels
from zoo.training.loop import train, train_plan
from zoo.training.plan import make_plan
from zoo.training.precision import PrecisionPlan, choose_device
from zoo.training.scoring import evaluate, load_model

LEFT = {
    "history.jsonl",
    "metrics-val.json",
    "predictions-val.npz",
    "recipe.toml",
    "run.json",
    "weights.safetensors",
}
STRATEGIES = ("linear-probe", "full", "lp-ft", "gradual")
DEVICE = choose_device("auto")
# A card multiplies in TF32, and another kernel rounds otherwise.
NEAR = {"rtol": 1e-4, "atol": 1e-5} if DEVICE.type == "cpu" else {"rtol": 1e-2, "atol": 1e-3}


def bits(run: Run) -> str:
    return sha256_file(run.weights_file)


def interrupt_at(epoch: int, phase: str = "network"):
    def stop(tick):
        if tick.epoch == epoch and tick.phase == phase:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_trains_and_leaves_a_whole_run_without_the_test_images(tiny, make_recipe, strategy):
    dataset = load_dataset("tiny", tiny)
    for path in dataset.of_split("test")["path"]:
        dataset.image_path(path).unlink()
    head = {"augment.policy": "none"} if strategy == "linear-probe" else {}
    recipe = make_recipe(strategy=strategy, epochs=3, **head)
    run = train(recipe, "tiny", 0, tiny)
    assert {each.name for each in run.path.iterdir()} == LEFT
    record = run.record
    assert (record.status, record.strategy, record.images) == ("finished", strategy, {"train": 18, "val": 9})
    assert record.split_digest == dataset.split_digest
    assert record.train_s > 0 and record.images_per_s > 0 and record.params > 0
    assert (record.params_trained < record.params) == (strategy == "linear-probe")
    assert Recipe.model_validate(read_toml(run.path / "recipe.toml")).digest == recipe.digest
    history = run.history()
    assert [row["epoch"] for row in history] == [1, 2, 3]
    heads = {"linear-probe": 3, "full": 0}.get(strategy, 1)
    assert [row["phase"] for row in history] == ["head"] * heads + ["network"] * (3 - heads)
    best = max(history, key=lambda row: row["val_balanced_accuracy"])
    assert record.best_epoch == best["epoch"]
    # What is kept is what was scored.
    pixels = open_pixels(dataset, "val", record.preprocessing)
    model = load_model(run, device=DEVICE.type)
    _, logits = forward_pixels(model, pixels, record.preprocessing, PrecisionPlan("float32", True), DEVICE)
    stored = read_predictions(run.predictions_file("val"))
    np.testing.assert_allclose(logits.numpy(), stored.logits, **NEAR)
    found = compute_metrics(
        Predictions(pixels.sample_ids, pixels.groups, pixels.y_true, logits.numpy()), record.classes
    )
    metrics = run.metrics("val")
    assert {key: metrics[key] for key in ("top1", "confusion_matrix")} == {
        key: found[key] for key in ("top1", "confusion_matrix")
    }
    assert metrics["balanced_accuracy"] == pytest.approx(best["val_balanced_accuracy"])
    with pytest.raises(ZooError, match=r"split 'test': gone"):
        evaluate(run, "test", tiny)
    assert not run.metrics_file("test").exists()


def test_more_epochs_learn_the_colours(tiny, make_recipe):
    run = train(make_recipe(epochs=12, policy="none"), "tiny", 0, tiny)
    losses = [row["train_loss"] for row in run.history()]
    assert losses[-1] < 0.7 * losses[0]
    assert evaluate(run, "test", tiny)["top1"] > 0.6


def test_the_same_recipe_and_seed_give_the_same_bits_for_any_number_of_workers(tiny, make_recipe):
    runs = {}
    for name, workers, seed in (("a", 0, 0), ("b", 0, 0), ("c", 2, 0), ("d", 0, 1)):
        runs[name] = train(make_recipe(name, workers=workers, drop_rate=0.2, mixup=0.2), "tiny", seed, tiny)
    assert bits(runs["a"]) == bits(runs["b"]) == bits(runs["c"])
    assert bits(runs["a"]) != bits(runs["d"])
    files = [runs[name].predictions_file("val").read_bytes() for name in "abc"]
    assert files[0] == files[1] == files[2]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lamb"])
def test_an_interrupted_run_ends_with_the_same_bits(tiny, make_recipe, optimizer):
    more = {"ema_decay": 0.9, "mixup": 0.3, "cutmix": 0.3, "drop_rate": 0.2, "warmup_epochs": 1, "clip_grad": 1.0}
    recipes = {name: make_recipe(name, epochs=4, optimizer__name=optimizer, **more) for name in ("whole", "broken")}
    whole = train(recipes["whole"], "tiny", 0, tiny)
    plan = make_plan(recipes["broken"], "tiny", 0, tiny)
    for epoch in (2, 3):
        with pytest.raises(Interrupted, match="goes on where it stopped with the same command") as stop:
            train(recipes["broken"], "tiny", 0, tiny, on_tick=interrupt_at(epoch))
        assert stop.value.exit_code == 130
        assert not (plan.run.path / "run.json").exists()
        checkpoint = load_checkpoint(plan.run.path / "checkpoint", plan.digest)
        assert checkpoint.progress.epoch == epoch - 1
    epochs = []
    broken = train(recipes["broken"], "tiny", 0, tiny, on_tick=lambda tick: epochs.append(tick.epoch))
    assert min(each for each in epochs if each) == 3
    assert bits(broken) == bits(whole)
    assert broken.predictions_file("val").read_bytes() == whole.predictions_file("val").read_bytes()
    assert {each.name for each in broken.path.iterdir()} == LEFT

    def lasting(run):
        timed = ("images_per_s",)
        return [{key: value for key, value in row.items() if key not in timed} for row in run.history()]

    assert lasting(broken) == lasting(whole)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["lp-ft", "gradual"])
@pytest.mark.parametrize("phase", ["head", "network"])
def test_two_phases_go_on_with_the_same_bits(tiny, make_recipe, strategy, phase):
    recipes = [make_recipe(name, strategy=strategy, epochs=4, head_epochs=2) for name in ("whole", "broken")]
    whole = train(recipes[0], "tiny", 0, tiny)
    with pytest.raises(Interrupted):
        train(recipes[1], "tiny", 0, tiny, on_tick=interrupt_at(2 if phase == "head" else 4, phase))
    assert bits(train(recipes[1], "tiny", 0, tiny)) == bits(whole)


def test_a_head_without_bias_goes_on_too(tiny, make_recipe):
    from torch import nn

    from zoo.models.registry import register_model
    from zoo.models.spec import own_models

    @register_model("no_bias_net")
    def no_bias_net(num_classes: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes, bias=False)
        )

    try:
        recipes = [
            make_recipe(name, model__name="no_bias_net", strategy="lp-ft", epochs=4) for name in ("whole", "broken")
        ]
        whole = train(recipes[0], "tiny", 0, tiny)
        with pytest.raises(Interrupted):
            train(recipes[1], "tiny", 0, tiny, on_tick=interrupt_at(3))
        broken = train(recipes[1], "tiny", 0, tiny)
        assert bits(broken) == bits(whole)
        assert load_model(broken).get_submodule("3").bias is not None
    finally:
        del own_models["no_bias_net"]


def test_a_finished_run_is_not_trained_again(tiny, make_recipe):
    first = train(make_recipe(), "tiny", 0, tiny)
    stat = first.weights_file.stat().st_mtime_ns
    again = train(make_recipe(), "tiny", 0, tiny, on_tick=lambda _: pytest.fail("trained again"))
    assert again == first
    assert again.weights_file.stat().st_mtime_ns == stat
    first.weights_file.unlink()
    assert train(make_recipe(), "tiny", 0, tiny).weights_file.is_file()
    assert train(make_recipe(lr=1e-3), "tiny", 0, tiny) != first


def test_a_loss_that_is_no_number_is_a_failed_run_that_names_epoch_and_step(tiny, make_recipe):
    recipe = load_recipe("wild", root=tiny)
    for _ in range(2):  # a failed run starts anew
        with pytest.raises(ZooError, match=r"not finite in epoch 1, step [23]; lower optimizer\.lr"):
            train(recipe, "tiny", 0, tiny)
    (run,) = list_runs(tiny)
    assert run.record.status == "failed" and not run.finished
    assert "epoch 1, step" in run.record.reason
    assert not run.weights_file.exists()
    with pytest.raises(ZooError, match=r"did not finish: .*epoch 1, step"):
        evaluate(run, "test", tiny)


def test_a_head_whose_loss_is_no_number_says_so(tiny, make_recipe):
    recipe = make_recipe(strategy="linear-probe", policy="none", head_lr=1e38, optimizer__name="sgd")
    with pytest.raises(ZooError, match=r"not finite.*epoch 1"):
        train(recipe, "tiny", 0, tiny)


@pytest.mark.parametrize("kind", [RuntimeError, IndexError, AssertionError])
def test_a_network_that_breaks_is_a_failed_run_with_its_traceback_kept(tiny, make_recipe, kind):
    from torch import nn

    from zoo.models.registry import register_model
    from zoo.models.spec import own_models

    class Breaks(nn.Module):
        def __init__(self, num_classes: int) -> None:
            super().__init__()
            self.head = nn.Linear(3, num_classes)

        def forward(self, images):
            if images.device.type != "meta" and self.training:
                raise kind("out of\nluck")
            return self.head(images.mean((2, 3)))

    register_model("breaking_net")(Breaks)
    try:
        with pytest.raises(ZooError, match=rf"failed: {kind.__name__}: out of luck; the traceback is in '.*'$"):
            train(make_recipe(model__name="breaking_net"), "tiny", 0, tiny)
    finally:
        del own_models["breaking_net"]
    run = list_runs(tiny)[0]
    assert run.record.reason == f"{kind.__name__}: out of luck"
    assert "in forward" in (run.path / "traceback.txt").read_text(encoding="utf-8")


def test_patience_stops_a_run_early(tiny, make_recipe):
    run = train(make_recipe(epochs=30, patience=2, lr=1e-12, policy="none"), "tiny", 0, tiny)
    history = run.history()
    assert len(history) < 30
    assert run.record.epochs == len(history) == run.record.best_epoch + 2


def test_a_probe_that_stops_early_says_how_many_epochs_it_had(tiny, make_recipe):
    recipe = make_recipe(strategy="linear-probe", epochs=30, patience=2, head_lr=1e-12, policy="none")
    run = train(recipe, "tiny", 0, tiny)
    assert run.record.epochs == len(run.history()) == run.record.best_epoch + 2


def test_the_weights_of_a_run_go_on(trained, make_recipe):
    source = next(run for run in list_runs(trained) if "--tiny--s0" in run.name)
    recipe = make_recipe("more", weights=source.name, image_size=32, lr=1e-12, epochs=1, policy="none")
    run = train(recipe, "tiny", 3, trained)
    assert run.record.weights["from"] == "run"
    assert run.record.weights["sha256"] == bits(source)
    assert run.record.weights["label"] == f"run {source.name}"
    before, after = load_file(source.weights_file), load_file(run.weights_file)
    assert before.keys() == after.keys()
    for key, value in before.items():
        if not key.endswith(("running_mean", "running_var", "num_batches_tracked")):
            torch.testing.assert_close(after[key], value, rtol=0, atol=1e-6)


def test_a_run_of_another_split_is_refused(trained, make_recipe):
    source = list_runs(trained)[0]
    resplit_dataset("tiny", trained, seed=5)
    with pytest.raises(ZooError, match=r"was trained on another split of 'tiny'.*train it on this split first"):
        train(make_recipe(weights=source.name), "tiny", 0, trained)
    with pytest.raises(ZooError, match="was trained on another split of 'tiny'"):
        source.metrics_file("test").unlink()
        evaluate(source, "test", trained)


def test_skipped_images_are_counted_and_fail_names_them(tiny, make_recipe):
    dataset = load_dataset("tiny", tiny)
    bad = dataset.of_split("train")["path"].iloc[3]
    dataset.image_path(bad).write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(ZooError, match=r"changed since the import.*--bad-images skip") as refused:
        train(make_recipe(), "tiny", 0, tiny)
    assert Path(bad).name in str(refused.value)
    run = train(make_recipe(), "tiny", 0, tiny, bad_images="skip")
    assert run.record.images == {"train": 17, "val": 9}
    assert run.record.images_skipped == {"train": [f"{bad}: changed since the import"]}


def test_a_class_without_readable_images_is_refused(tiny, make_recipe):
    dataset = load_dataset("tiny", tiny)
    rows = dataset.of_split("train")
    for path in rows[rows["label"] == "normal"]["path"]:
        dataset.image_path(path).unlink()
    with pytest.raises(ZooError, match="'train' has no readable image of class normal"):
        train(make_recipe(), "tiny", 0, tiny, bad_images="skip")


def test_a_run_that_is_being_trained_is_refused(tiny, make_recipe):
    plan = make_plan(make_recipe(), "tiny", 0, tiny)
    refused = pytest.raises(ZooError, match=f"is being trained by process {os.getpid()} on ")
    with run_lock(tiny, plan.run.name), refused:
        train(make_recipe(), "tiny", 0, tiny)
    train(make_recipe(), "tiny", 0, tiny)


def test_another_process_may_finish_first(tiny, make_recipe, monkeypatch):
    from zoo.training import loop

    plan = make_plan(make_recipe(), "tiny", 0, tiny)
    really = loop.run_lock

    def late(home, name):
        monkeypatch.setattr(loop, "run_lock", really)
        train(make_recipe(), "tiny", 0, tiny)  # what the other process does meanwhile
        return really(home, name)

    monkeypatch.setattr(loop, "run_lock", late)
    run = loop.train_plan(plan, lambda _: pytest.fail("trained again"))
    assert run.finished


def test_two_classes_and_one_image_a_batch(root, make_recipe, image_folder):
    import_dataset(image_folder, "one", root)
    model = {"name": "simple_cnn", "weights": "scratch", "image_size": 32}
    whole = parse_recipe({"model": model, "finetune": {"epochs": 1}}, "whole")
    run = train(whole, "one", 0, root)  # 32 images a batch are more than there are, and were not asked for
    assert run.record.epochs == 1
    assert find_run(run.name, root) == run


def test_a_metric_that_val_cannot_define_keeps_the_first_epoch_only_until_one_is_defined(
    tiny, make_recipe, monkeypatch
):
    values = iter([float("nan"), 0.4, float("nan")])
    monkeypatch.setattr("zoo.training.trainer.selection_score", lambda *_: next(values))
    run = train(make_recipe("undefined", epochs=3), "tiny", 0, tiny)
    assert run.record.best_epoch == 2


@pytest.mark.slow
def test_a_network_that_runs_out_of_memory_image_by_image_says_so(tiny, make_recipe):
    from torch import nn

    from zoo.models.registry import register_model
    from zoo.models.spec import own_models

    seen = []

    class Hungry(nn.Module):
        def __init__(self, num_classes: int) -> None:
            super().__init__()
            self.head = nn.Linear(3, num_classes)

        def forward(self, images):
            if images.device.type != "meta" and self.training:
                seen.append(len(images))
                if len(images) > most:
                    raise MemoryError("no room")
            return self.head(images.mean((2, 3)))

    register_model("hungry_net")(Hungry)
    try:
        most = 0
        with pytest.raises(ZooError, match=r"out of memory even with one image at a time \(no room\)"):
            train(make_recipe("none", model__name="hungry_net"), "tiny", 0, tiny)
        assert seen == [6, 3, 2, 1]
        most = 6
        whole = train(make_recipe("whole", model__name="hungry_net"), "tiny", 0, tiny)
        most, phases = 2, []
        parts = train(
            make_recipe("parts", model__name="hungry_net"),
            "tiny",
            0,
            tiny,
            on_tick=lambda tick: phases.append(tick.phase),
        )
    finally:
        del own_models["hungry_net"]
    assert "out of memory: batches in 4 parts" in phases
    assert whole.record.notes == []
    assert "a batch of 6 needed more memory than there is: computed in 4 parts" in parts.record.notes[0]
    ours, theirs = load_file(parts.weights_file), load_file(whole.weights_file)
    for key, value in theirs.items():  # the gradients of the parts are those of the whole
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-6)


def test_a_batch_that_the_allocator_refuses_is_computed_in_parts(tiny, make_recipe):
    import resource

    from torch import nn

    from zoo.models.registry import register_model
    from zoo.models.spec import own_models

    class Wide(nn.Module):
        def __init__(self, num_classes: int) -> None:
            super().__init__()
            self.head = nn.Linear(3, num_classes)

        def forward(self, images):
            if images.device.type != "meta" and self.training:
                torch.empty(len(images), 2**28)  # a GiB for each image, asked for and never touched
            return self.head(images.mean((2, 3)))

    register_model("wide_net")(Wide)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    try:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (9 << 29), hard))
        run = train(make_recipe(model__name="wide_net", policy="none"), "tiny", 0, tiny)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        del own_models["wide_net"]
    assert "computed in 2 parts" in run.record.notes[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"ema_decay": 0.9, "mixup": 0.3, "cutmix": 0.3, "drop_rate": 0.2, "clip_grad": 1.0, "optimizer__name": "lamb"},
        {"accumulate": 2, "workers": 2, "sampler": "balanced", "image_sizes": [24, 32]},
        {"strategy": "lp-ft", "head_epochs": 1, "freeze": ["stem"], "loss__name": "focal"},
        {"strategy": "gradual", "head_epochs": 1, "precision": "bf16-nchw"},
        {"precision": "fp16"},
    ],
)
def test_a_run_stopped_in_the_middle_of_an_epoch_goes_on_with_the_same_bits(tiny, make_recipe, monkeypatch, more):
    monkeypatch.setattr("zoo.training.step.CHECK_EVERY", 1)  # on a card, too, after every step
    recipes = {
        name: make_recipe(name, epochs=3, batch_size=4, checkpoint_minutes=minutes, **more)
        for name, minutes in (("whole", 5.0), ("broken", 0.0))
    }
    whole = train(recipes["whole"], "tiny", 0, tiny)
    plan = make_plan(recipes["broken"], "tiny", 0, tiny)
    network = []
    for stop in (1, 2, 4, 5, 6, 8, 9):

        def tick(tick, stop=stop):
            if tick.phase == "network":
                network.append((tick.epoch, tick.done))
                if len(set(network)) == stop:
                    raise KeyboardInterrupt

        try:
            train(recipes["broken"], "tiny", 0, tiny, on_tick=tick)
            break
        except Interrupted:
            found = load_checkpoint(plan.run.path / "checkpoint", plan.digest)
            assert (found.progress.epoch + 1, found.progress.step) == network[-1] or found.progress.step == 0
    else:
        train(recipes["broken"], "tiny", 0, tiny)
    assert len(set(network)) >= 5, "it was never stopped within an epoch"
    broken = plan.run
    assert bits(broken) == bits(whole)
    assert broken.predictions_file("val").read_bytes() == whole.predictions_file("val").read_bytes()
    rows = [[{**row, "images_per_s": 0} for row in run.history()] for run in (whole, broken)]
    assert rows[0] == rows[1]
    assert {each.name for each in broken.path.iterdir()} == LEFT


def test_accumulated_batches_are_one_large_batch(tiny, make_recipe):
    """Without batch normalisation, which sees each batch alone, the weights are the same up to rounding."""
    common = {"model__name": "test_vit", "model__image_size": 160, "epochs": 1, "loss__class_weights": "balanced"}
    one = train(make_recipe("one", batch_size=18, **common), "tiny", 0, tiny)
    two = train(make_recipe("two", batch_size=5, accumulate=3, **common), "tiny", 0, tiny)
    assert two.history()[0]["train_loss"] == pytest.approx(one.history()[0]["train_loss"], rel=0.2)
    common["policy"], common["optimizer__name"] = "none", "sgd"
    whole = train(make_recipe("whole", batch_size=18, **common), "tiny", 0, tiny)
    parts = train(make_recipe("parts", batch_size=6, accumulate=3, **common), "tiny", 0, tiny)
    assert parts.history()[0]["train_loss"] == pytest.approx(whole.history()[0]["train_loss"], rel=1e-5)
    ours, theirs = load_file(parts.weights_file), load_file(whole.weights_file)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-6)


def test_frozen_stages_stay_as_they_were(trained, make_recipe):
    source = next(run for run in list_runs(trained) if "--tiny--s0" in run.name)
    recipe = make_recipe("frozen", weights=source.name, image_size=32, epochs=2, freeze=["stem", "stages.0"])
    run = train(recipe, "tiny", 0, trained)
    before, after = load_file(source.weights_file), load_file(run.weights_file)
    same = {key for key in before if torch.equal(before[key], after[key])}
    assert same == {key for key in before if key.startswith(("stem.", "stages.0."))}  # batch statistics too
    assert 0 < run.record.params_trained < run.record.params


def test_each_epoch_is_told_of_and_may_end_the_run(tiny, make_recipe):
    from zoo.training.loop import StopRun

    rows = []
    run = train(make_recipe(epochs=3), "tiny", 0, tiny, on_epoch=rows.append)
    assert rows == run.history()

    def stop(row):
        if row["epoch"] == 2:
            raise StopRun

    plan = make_plan(make_recipe("stopped", epochs=3), "tiny", 0, tiny)
    with pytest.raises(StopRun):
        train(make_recipe("stopped", epochs=3), "tiny", 0, tiny, on_epoch=stop)
    assert not (plan.run.path / "run.json").exists()
    assert load_checkpoint(plan.run.path / "checkpoint", plan.digest).progress.epoch == 2


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused_before_work(tiny, make_recipe):
    import shutil

    recipe = make_recipe(epochs=3)
    plan = make_plan(recipe, "tiny", 0, tiny)
    with pytest.raises(Interrupted):
        train(recipe, "tiny", 0, tiny, on_tick=interrupt_at(2))
    other = make_plan(recipe, "tiny", 1, tiny)
    shutil.copytree(plan.run.path / "checkpoint", other.run.path / "checkpoint")
    with pytest.raises(
        ZooError, match=r"holds the checkpoint of another run .*: of another recipe, split or seed; move"
    ):
        train(recipe, "tiny", 1, tiny, on_tick=lambda _: pytest.fail("work was begun"))
    (tensors,) = (plan.run.path / "checkpoint").glob("epoch-*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-100])
    with pytest.raises(ZooError, match=r"no checkpoint in '.*' is whole \(epoch-.*ValueError\); move the folder away"):
        train(recipe, "tiny", 0, tiny, on_tick=lambda _: pytest.fail("work was begun"))
    assert tensors.is_file()


@pytest.mark.parametrize("strategy", ["full", "lp-ft"])
def test_frozen_stages_run_once_where_images_do_not_change_and_nothing_else_does(
    tiny, make_recipe, monkeypatch, strategy
):
    from zoo.models.nets import SimpleCNN
    from zoo.training import boundary

    common = {"strategy": strategy, "policy": "none", "epochs": 4, "batch_size": 6, "freeze": ["stem", "stages.0"]}
    passes: list[bool] = []
    whole_forward = SimpleCNN.forward_features

    def counting(self, x):
        passes.append("forward" in self.stem.__dict__)  # replaced: skipped
        return whole_forward(self, x)

    monkeypatch.setattr(SimpleCNN, "forward_features", counting)
    monkeypatch.setattr(boundary, "WORTH", dict.fromkeys(("cpu", "cuda"), 1e12))  # never
    plain = train(make_recipe("plain", **common), "tiny", 0, tiny)
    assert sum(passes) <= 3  # the proof that it could be done
    passes.clear()
    monkeypatch.setattr(boundary, "WORTH", dict.fromkeys(("cpu", "cuda"), 0.0))
    kept = train(make_recipe("kept", **common), "tiny", 0, tiny)
    assert sum(passes) > 3 * (3 if strategy == "lp-ft" else 4)  # three updates and val, each epoch of the network
    assert not (kept.path / "checkpoint").exists()
    ours, theirs = load_file(kept.weights_file), load_file(plain.weights_file)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-5)
    broken = make_recipe("broken", **common)
    for epoch in (3, 4):
        with pytest.raises(Interrupted):
            train(broken, "tiny", 0, tiny, on_tick=interrupt_at(epoch))
    assert bits(train(broken, "tiny", 0, tiny)) == bits(kept)


@pytest.mark.slow
def test_frozen_stages_run_anew_where_the_disk_has_no_room_for_what_they_give_and_the_run_says_so(
    tiny, make_recipe, monkeypatch, full_disk
):
    from zoo.training import boundary

    monkeypatch.setattr(boundary, "WORTH", dict.fromkeys(("cpu", "cuda"), 0.0))
    subprocess.run(["mount", "-o", "remount,size=16m", str(full_disk)], check=True)
    common = {"policy": "none", "epochs": 3, "freeze": ["stem", "stages.0"], "image_size": 256, "precision": "float32"}
    plan = replace(make_plan(make_recipe("roomless", **common), "tiny", 0, tiny), place=full_disk)

    def none_kept(tick):
        assert not list(full_disk.glob("*/checkpoint/boundary-*"))

    with pytest.raises(Interrupted):
        train_plan(plan, interrupt_at(2))
    # What has room now had none when the run began, whose bits hang on it.
    subprocess.run(["mount", "-o", "remount,size=200m", str(full_disk)], check=True)
    run = train_plan(plan, none_kept)
    assert run.record.notes == [
        "the disk had no room to keep what the frozen stages make of val and train: computed anew in every "
        "epoch, which may show in the last bits of the weights"
    ]
    monkeypatch.setattr(boundary, "WORTH", dict.fromkeys(("cpu", "cuda"), 1e12))  # never
    assert bits(train(make_recipe("never", **common), "tiny", 0, tiny)) == bits(run)


@pytest.mark.parametrize("lost", ["weights", "a byte", "record"])
def test_scores_of_weights_that_were_replaced_are_not_taken_for_those_of_the_new(tiny, make_recipe, lost):
    run = train(make_recipe(), "tiny", 0, tiny)
    before = {split: evaluate(run, split, tiny) for split in ("train", "val", "test")}
    # What other weights would have left here: worse scores, and none that says of which weights.
    for split, found in before.items():
        good = read_predictions(run.predictions_file(split))
        stale = Predictions(good.sample_ids, good.groups, good.y_true, -good.logits)
        write_predictions(run.predictions_file(split), stale)
        write_json(run.metrics_file(split), {**found, "top1": -1.0, "weights_sha256": None})
    kept = run.path / "exports" / "onnx-float32" / "parity.json"
    write_json(kept, {"digest": "of a bundle"})
    weights = run.weights_file.read_bytes()
    if lost == "weights":
        run.weights_file.unlink()
    elif lost == "a byte":
        run.weights_file.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    else:
        (run.path / "run.json").write_text("{")
    train(make_recipe(), "tiny", 0, tiny)
    assert run.weights_file.read_bytes() == weights
    assert not run.scored("test") and not run.scored("train")
    assert {split: evaluate(run, split, tiny) for split in before} == before
    assert kept.is_file()  # it names what it is of
    lines = tiny.ledger.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2  # test was looked at twice
