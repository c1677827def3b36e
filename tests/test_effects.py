"""Keys that change nothing beside others are named, and only those."""

from __future__ import annotations

import tomllib

import pytest

from zoo.files import builtin_folder
from zoo.recipe import parse_recipe
from zoo.recipe.effects import NEEDS, effect_notes, value_of

PROBE = {"finetune.strategy": "linear-probe", "augment.policy": "none"}
FILES = sorted(builtin_folder("recipes").glob("*.toml"))


def notes(**changed):
    table = {"model": {"name": "simple_cnn", "weights": "scratch"}}
    return effect_notes(parse_recipe(table, "r", {key.replace("__", "."): value for key, value in changed.items()}))


@pytest.mark.parametrize(
    ("key", "value", "fix"),
    [
        ("optimizer.lr", 0.5, "set finetune.head_lr"),
        ("finetune.ema_decay", 0.9, "leave it out"),
        ("finetune.clip_grad", 1.0, "leave it out"),
        ("finetune.layer_decay", 0.75, "leave it out"),
        ("model.drop_rate", 0.5, "leave it out"),
        ("model.drop_path_rate", 0.1, "leave it out"),
    ],
)
def test_a_linear_probe_names_what_only_the_whole_network_uses(key, value, fix):
    assert notes(**PROBE, **{key: value}) == (
        f"{key} = {value} changes nothing where finetune.strategy = 'linear-probe'; {fix}",
    )
    for strategy in ("full", "lp-ft", "gradual"):
        assert notes(finetune__strategy=strategy, **{key: value}) == ()


def test_other_keys_need_others():
    assert notes(finetune__head_lr=0.1) == (
        "finetune.head_lr = 0.1 changes nothing where finetune.strategy = 'full'; set optimizer.lr",
    )
    assert notes(optimizer__momentum=0.5) == (
        "optimizer.momentum = 0.5 changes nothing where optimizer.name = 'adamw'; leave it out",
    )
    assert notes(schedule__min_lr=0.5, schedule__name="constant") == (
        "schedule.min_lr = 0.5 changes nothing where schedule.name = 'constant'; leave it out",
    )
    assert notes(optimizer__momentum=0.5, optimizer__name="sgd") == ()
    assert notes(schedule__min_lr=0.5) == notes(finetune__head_lr=0.1, finetune__strategy="lp-ft") == ()


def test_what_is_said_at_its_default_makes_the_same_recipe_and_is_not_spoken_of():
    assert notes(**PROBE, optimizer__lr=1e-3, finetune__layer_decay=1.0) == ()


def test_several_are_named_each():
    found = notes(**PROBE, optimizer__lr=0.5, optimizer__momentum=0.1, finetune__clip_grad=2.0)
    assert [note.split(" ")[0] for note in found] == ["optimizer.lr", "optimizer.momentum", "finetune.clip_grad"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_no_built_in_recipe_says_what_changes_nothing(file):
    assert effect_notes(parse_recipe(tomllib.loads(file.read_text(encoding="utf-8")), file.stem)) == ()


@pytest.mark.parametrize("key", NEEDS)
def test_every_need_names_a_value_that_a_recipe_may_have(key):
    need = NEEDS[key]
    for value in need.allowed:
        policy = {"augment.policy": "none"} if value == "linear-probe" else {}
        recipe = parse_recipe({"model": {"name": "simple_cnn"}}, "r", {need.key: value, **policy})
        assert value_of(recipe, need.key) == value


def test_a_cut_warm_up_is_named_with_its_phase():
    assert notes(finetune__strategy="lp-ft", epochs=8, head_epochs=2, warmup_epochs=2) == (
        "schedule.warmup_epochs = 2 is cut to 1 for the head, which has 2 epochs",
    )
    assert notes(epochs=1, warmup_epochs=0.5) == (
        "schedule.warmup_epochs = 0.5 is cut to 0 for the whole network, which has 1 epoch",
    )
    assert notes(epochs=3, warmup_epochs=2) == notes(**PROBE, epochs=3, warmup_epochs=2) == ()
