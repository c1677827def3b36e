from __future__ import annotations

import errno
import os
import shutil

import pytest

from zoo.data.manifest import load_dataset
from zoo.data.sources import import_dataset
from zoo.errors import ZooError
from zoo.files import Home, write_json
from zoo.runs import Run, list_runs, runs_on_split
from zoo.training.loop import train
from zoo.training.plan import failed_record, finished_run, make_plan


def test_a_plan_decides_all_and_writes_nothing(tiny, make_recipe):
    plan = make_plan(make_recipe(), "tiny", 3, tiny)
    assert plan.run.name == f"tiny--tiny--s3--{plan.digest[:8]}"
    assert plan.run.path.parent == tiny.runs
    assert (plan.weights, plan.weights_label, plan.spec.name) == (None, "scratch", "simple_cnn")
    assert plan.preprocessing.image_size == 32
    assert list(tiny.runs.iterdir()) == [] and finished_run(plan) is None


def test_the_identity_is_what_changes_the_numbers(tiny, make_recipe):
    def digest(seed=0, bad_images=None, **overrides):
        return make_plan(make_recipe(**overrides), "tiny", seed, tiny, bad_images=bad_images).digest

    plain = digest()
    assert plain == digest() == digest(workers=2) == digest(summary="other words")
    others = {
        digest(seed=1),
        digest(lr=1e-4),
        digest(image_size=40),
        digest(policy="none"),
        digest(bad_images="skip"),
        digest(mean=[0.1, 0.2, 0.3]),
        plain,
    }
    assert len(others) == 7
    plan = make_plan(make_recipe(), "tiny", 0, tiny)
    assert plan.with_seed(1) == make_plan(make_recipe(), plan.dataset, 1, tiny)


def test_the_same_seed_starts_from_the_same_weights(tiny, make_recipe):
    plan = make_plan(make_recipe(), "tiny", 0, tiny)
    one, two, other = (each.model()[0].state_dict() for each in (plan, plan, plan.with_seed(1)))
    assert all(one[key].equal(two[key]) for key in one)
    assert not all(one[key].equal(other[key]) for key in one)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"model.name": "resnet81"}, "resnet81.*did you mean"),
        (
            {"model.weights": "nothing"},
            "model.weights must be 'pretrained', 'scratch', .* Got 'nothing'; there is no run",
        ),
        ({"model.weights": "gone.safetensors"}, "gone.safetensors"),
        ({"workers": 200}, "workers must be from 0 to [0-9]+ on this machine of [0-9]+ cores. Got 200"),
        ({"batch_size": 19}, "finetune.batch_size must be at most the 18 training images of 'tiny'. Got 19; set"),
        ({"batch_size": 6, "accumulate": 4}, r"at most the 18 training images of 'tiny'. Got 6 x 4 \(finetune.accum"),
        (
            {"freeze": ["stam"]},
            "finetune.freeze names 'stam', which is no part .*it has stem, .*; did you mean 'stem'",
        ),
        ({"freeze": ["stem", "fc"]}, r"finetune.freeze must leave the classifier \(fc.bias, fc.weight\) to be trained"),
        ({"image_sizes": [16, 24]}, r"must end at the model's image size, 32 pixels. Got \[16, 24\]; add 32, or set"),
        (
            {"model.name": "vit_tiny_patch16_224", "image_sizes": [16, 32]},
            "model 'vit_tiny.*' cannot take images of 16 pixels .*; leave finetune.image_sizes out",
        ),
        ({"device": "mps"}, "device 'mps' is not on this machine"),
        ({"augment.transforms": [{"name": "HorizontalFlop"}], "augment.policy": None}, "did you mean 'HorizontalFlip'"),
    ],
)
def test_what_cannot_be_trained_is_said_before_work(tiny, make_recipe, overrides, said):
    import torch

    if torch.backends.mps.is_available() and overrides.get("device") == "mps":
        pytest.skip("this machine has it")
    with pytest.raises(ZooError, match=said) as refused:
        make_plan(make_recipe(**overrides), "tiny", 0, tiny)
    assert "\n" not in str(refused.value)
    assert not (tiny.runs).is_dir() or list(tiny.runs.iterdir()) == []


@pytest.mark.parametrize("seed", [-1, 2**31])
def test_a_seed_out_of_range_is_refused(tiny, make_recipe, seed):
    with pytest.raises(ZooError, match=f"seed must be from 0 to 2147483647. Got {seed}"):
        make_plan(make_recipe(), "tiny", seed, tiny)


@pytest.mark.parametrize("overrides", [{"strategy": "gradual", "epochs": 4}, {"layer_decay": 0.5}])
def test_a_network_that_does_not_name_its_stages_cannot_be_opened_by_them(tiny, make_recipe, overrides):
    from torch import nn

    from zoo.models.registry import register_model
    from zoo.models.spec import own_models

    register_model("plain_net")(
        lambda num_classes: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))
    )
    try:
        with pytest.raises(ZooError, match="'plain_net' does not say which layer comes first"):
            make_plan(make_recipe(model__name="plain_net", **overrides), "tiny", 0, tiny)
    finally:
        del own_models["plain_net"]


def test_a_home_that_cannot_be_written_is_found_before_work(tiny, make_recipe):
    dataset = load_dataset("tiny", tiny)
    shutil.rmtree(tiny.root / "models", ignore_errors=True)
    (tiny.root / "models").write_text("in the way")
    with pytest.raises(ZooError, match=r"cannot write .*check the path"):
        make_plan(make_recipe(), dataset, 0, Home(tiny.root))


def test_failed_runs_are_listed_until_one_is_finished(trained):
    dataset = load_dataset("tiny", trained)
    record = failed_record("tiny", dataset, 0, "no weights")
    assert (record.status, record.reason, record.recipe) == ("failed", "no weights", "tiny")
    for seed, recipe in ((0, "tiny"), (7, "tiny")):
        failed = failed_record(recipe, dataset, seed, "no weights")
        run = Run(trained.runs / failed.run)
        run.path.mkdir()
        run.write_record(failed)
    assert len(list_runs(trained)) == 5
    found = runs_on_split(dataset.name, dataset.split_digest, trained)
    assert sorted((run.record.recipe, run.record.seed) for run in found) == [
        ("tiny", 0),
        ("tiny", 1),
        ("tiny", 7),
        ("tiny-lp", 0),
    ]
    write_json(found[0].path / "run.json", {"status": "finished"})
    with pytest.raises(ZooError, match="is damaged at 'run': Field required; train the run again"):
        _ = found[0].record
    assert not found[0].finished
    assert found[0] not in runs_on_split(dataset.name, dataset.split_digest, trained)


def test_a_changed_own_network_is_another_run_and_old_weights_do_not_enter_it(tiny, make_recipe):
    from torch import nn

    from zoo.models.registry import register_model
    from zoo.models.spec import own_models
    from zoo.training.loop import train
    from zoo.training.scoring import load_model

    def net(act):
        def build(num_classes: int) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(3, 4, 3), act(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)
            )

        return build

    recipe = make_recipe(model__name="changing_net", drop_rate=0.0)
    try:
        register_model("changing_net", image_size=32)(net(nn.ReLU))
        run = train(recipe, "tiny", 0, tiny)
        assert load_model(run, tiny) is not None
        own_models.pop("changing_net")
        register_model("changing_net", image_size=32)(net(nn.Tanh))
        assert make_plan(recipe, "tiny", 0, tiny).run.name != run.name
        with pytest.raises(ZooError, match="is no longer the one that run"):
            load_model(run, tiny)
    finally:
        own_models.pop("changing_net", None)


def test_a_window_is_the_recipes_else_the_datasets_and_is_checked_before_work(tiny, make_recipe):
    from zoo.files import read_toml, write_toml

    file = tiny.data / "tiny" / "dataset.toml"
    plain = make_plan(make_recipe(), "tiny", 0, tiny)
    write_toml(file, read_toml(file) | {"window": "lung", "rescale": "1,-1024"})
    named = make_plan(make_recipe(), "tiny", 0, tiny)
    assert (plain.preprocessing.window, named.preprocessing.window) == (None, "lung")
    assert named.preprocessing.rescale_intercept == -1024
    own = make_plan(make_recipe(model__window="lung,mediastinum,bone"), "tiny", 0, tiny)
    assert own.preprocessing.window == "lung,mediastinum,bone"
    assert len({plain.digest, named.digest, own.digest}) == 3
    with pytest.raises(ZooError, match="window must be lung"):
        make_plan(make_recipe(model__window="lunge"), "tiny", 0, tiny)


def probe(make_recipe, name="probe", **overrides):
    return make_recipe(name, **{"strategy": "linear-probe", "policy": "none", "optimizer.lr": 1e-3, **overrides})


@pytest.mark.parametrize(
    ("key", "value", "base"),
    [
        ("optimizer.lr", 0.5, {}),
        ("finetune.ema_decay", 0.9, {}),
        ("finetune.clip_grad", 0.01, {}),
        ("finetune.layer_decay", 0.1, {}),
        ("model.drop_rate", 0.9, {}),
        ("optimizer.momentum", 0.1, {}),
        ("model.drop_path_rate", 0.9, {"model.name": "test_efficientnet"}),
        ("finetune.head_lr", 0.5, {"strategy": "full"}),
        ("schedule.min_lr", 0.5, {"strategy": "full", "schedule.name": "constant"}),
    ],
)
def test_a_key_without_effect_is_a_note_of_the_plan_and_of_the_run_and_changes_no_bit(
    tiny, make_recipe, key, value, base
):
    plain = train(probe(make_recipe, **base), "tiny", 0, tiny)
    recipe = probe(make_recipe, "other", **base, **{key: value})
    plan = make_plan(recipe, "tiny", 0, tiny)
    assert [note.startswith(f"{key} = {value} changes nothing where") for note in plan.notes] == [True]
    run = train(recipe, "tiny", 0, tiny)
    assert run.record.notes[:1] == list(plan.notes) and plain.record.notes == run.record.notes[1:]
    assert plan.record("failed", "why").notes == list(plan.notes)
    assert run.weights_file.read_bytes() == plain.weights_file.read_bytes()


def test_dropout_within_the_classifier_is_no_key_without_effect(tiny, make_recipe):
    from torch import nn

    from zoo.models.registry import register_model
    from zoo.models.spec import own_models

    @register_model("dropping_net")
    def dropping_net(num_classes: int, drop_rate: float = 0.0) -> nn.Module:
        class Dropping(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.head = nn.Sequential(nn.Dropout(drop_rate), nn.Linear(3, num_classes))

            def get_classifier(self):
                return self.head

            def forward(self, images):
                return self.head(images.mean((2, 3)))

        return Dropping()

    try:
        recipe = probe(make_recipe, model__name="dropping_net", drop_rate=0.5)
        assert make_plan(recipe, "tiny", 0, tiny).notes == ()
    finally:
        del own_models["dropping_net"]


@pytest.fixture
def lopsided(root, write_scenes, tmp_path):
    """A home with the dataset `lopsided`, of classes a, b and c, whose val has those that are asked for."""

    def make(val):
        parts = {f"train/{name}": range(10 * place, 10 * place + 6) for place, name in enumerate("abc")}
        parts |= {f"val/{name}": range(40 + 4 * place, 43 + 4 * place) for place, name in enumerate(val)}
        parts |= {f"test/{name}": [60 + place] for place, name in enumerate("abc")}
        folder = write_scenes(tmp_path / "scenes", parts)
        rows = [(each.relative_to(folder), *each.parts[-2:-4:-1]) for each in sorted(folder.rglob("*.png"))]
        lines = ["path,label,split", *(",".join(map(str, row)) for row in rows)]
        (folder / "images.csv").write_text("\n".join(lines) + "\n")
        import_dataset(folder / "images.csv", "lopsided", root, copy=True)
        return root

    return make


def test_a_metric_that_val_cannot_define_is_refused_before_work(lopsided, make_recipe):
    home = lopsided("b")
    with pytest.raises(
        ZooError, match=r"^val cannot define auroc; .* \(split 'val' of 'lopsided' has class b alone, of 3"
    ):
        make_plan(make_recipe(metric="auroc"), "lopsided", 0, home)
    for metric in ("top1", "balanced_accuracy", "macro_f1", "log_loss"):
        make_plan(make_recipe(metric=metric), "lopsided", 0, home)


def test_a_metric_that_val_can_define_for_some_classes_is_taken(lopsided, make_recipe):
    home = lopsided("ab")
    run = train(make_recipe(metric="auroc", epochs=1), "lopsided", 0, home)
    assert run.history()[-1]["val_auroc"] >= 0
    assert run.record.notes == []


def test_where_only_reading_the_images_shows_it_the_run_says_so(lopsided, make_recipe):
    home = lopsided("ab")
    dataset = load_dataset("lopsided", home)
    for path in dataset.of_split("val").query("label == 'a'")["path"]:
        (dataset.root / path).write_bytes(b"no image")
    run = train(make_recipe(metric="auroc", epochs=3, patience=1), "lopsided", 0, home, bad_images="skip")
    assert (run.record.best_epoch, run.record.epochs) == (1, 2)
    assert run.record.notes == [
        "val cannot define auroc: no epoch had a value, and the first is kept; set another finetune.metric"
    ]


def test_weights_that_cannot_be_read_cost_no_finished_run(tiny, make_recipe, monkeypatch):
    plan = make_plan(make_recipe(), "tiny", 0, tiny)
    run = train(make_recipe(), "tiny", 0, tiny)
    before = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}

    def broken(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))  # as a disk or a share may answer for a while

    monkeypatch.setattr("zoo.training.plan.sha256_file", broken)
    with pytest.raises(ZooError, match=r"weights of run .* cannot be read: Input/output error; check '.*safetensors'"):
        train(make_recipe(), "tiny", 0, tiny)
    assert {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()} == before
    monkeypatch.undo()
    assert finished_run(plan) is not None
