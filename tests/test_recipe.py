from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.errors import ZooError
from zoo.files import Home
from zoo.recipe import (
    METRICS,
    Recipe,
    full_key,
    known_keys,
    list_recipes,
    load_recipe,
    parse_assignment,
    parse_recipe,
)

NAN, INF = float("nan"), float("inf")


def table(**tables: Any) -> dict[str, Any]:
    return {"model": {"name": "simple_cnn"}, **tables}


def fault(given: dict[str, Any], overrides: dict[str, Any] | None = None) -> str:
    """What is said of a wrong recipe, one line, without its opening."""
    with pytest.raises(ZooError) as caught:
        parse_recipe(given, "mine", overrides)
    text = str(caught.value)
    assert text.startswith("recipe 'mine' has ")
    assert "\n" not in text
    return text.removeprefix("recipe 'mine' has ")


# Defaults


def test_the_smallest_recipe_names_a_model() -> None:
    recipe = parse_recipe(table(), "mine")
    assert recipe.name == "mine"
    assert recipe.model.weights == "pretrained"
    assert recipe.finetune.metric in METRICS
    assert recipe.policy == "light"


@pytest.mark.parametrize(
    ("finetune", "augment", "policy", "head_epochs"),
    [
        ({"strategy": "full"}, {}, "light", 0),
        ({"strategy": "linear-probe", "epochs": 60}, {}, "none", 60),
        ({"strategy": "lp-ft", "epochs": 12}, {}, "light", 3),
        ({"strategy": "gradual", "epochs": 3}, {}, "light", 1),
        ({"strategy": "lp-ft", "epochs": 12, "head_epochs": 5}, {"policy": "ct"}, "ct", 5),
        ({"strategy": "full"}, {"transforms": [{"name": "NoOp"}]}, "own", 0),
    ],
)
def test_policy_and_head_epochs_follow_from_the_strategy(
    finetune: Any, augment: Any, policy: str, head_epochs: int
) -> None:
    recipe = parse_recipe(table(finetune=finetune, augment=augment), "mine")
    assert (recipe.policy, recipe.head_epochs) == (policy, head_epochs)


# Faults


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({}, "1 fault: model is missing; give it a value"),
    ({"model": 3}, "1 fault: model must be a table. Got 3"),
    ({"model": {"name": ""}}, "1 fault: model.name must be text that is not empty. Got ''"),
    ({"model": {"name": 4}}, "1 fault: model.name must be text in quotes. Got 4"),
    (table(workers="two"), "1 fault: workers must be 'auto' or a whole number from 0 to 256. Got 'two'"),
    (table(workers="atuo"), "Got 'atuo'; did you mean 'auto'?"),
    (table(workers=-1), "1 fault: workers must be 'auto' or a whole number from 0 to 256. Got -1"),
    (table(workers=True), "1 fault: workers must be 'auto' or a whole number"),
    (table(device="cuba"), "'auto', 'cpu', 'mps', 'cuda' or 'cuda:N'. Got 'cuba'; did you mean 'cuda'?"),
    (table(device=3), "1 fault: device must be 'auto', 'cpu', 'mps', 'cuda' or 'cuda:N'. Got 3"),
    (table(precision="fp64"), "1 fault: precision must be 'auto', 'float32', 'bf16' or 'fp16', with '-nchw'"),
    (table(optimizer={"lr": "1e-3"}), "lr must be a number. Got '1e-3'; write a number without quotes"),
    (table(finetune={"epochs": "12"}), "epochs must be a whole number. Got '12'; write a number without"),
    (table(finetune={"epochs": 12.0}), "1 fault: finetune.epochs must be a whole number. Got 12.0"),
    (table(finetune={"epochs": True}), "1 fault: finetune.epochs must be a whole number. Got True"),
    (table(finetune={"epochs": 0}), "epochs must be greater than or equal to 1. Got 0"),
    (table(optimizer={"lr": NAN}), "1 fault: optimizer.lr must be a finite number. Got nan"),
    (table(optimizer={"lr": INF}), "1 fault: optimizer.lr must be a finite number. Got inf"),
    (table(augment={"mixup": -INF}), "1 fault: augment.mixup must be a finite number. Got -inf"),
    (table(finetune={"strategy": "lpft"}), "or 'gradual'. Got 'lpft'; did you mean 'lp-ft'?"),
    (table(model={"name": "x", "mean": [0.5, 0.5]}), "model.mean must be a list of three numbers"),
    (table(model={"name": "x", "mean": 0.5}), "model.mean must be a list of three numbers. Got 0.5"),
    (table(model={"name": "x", "mean": ["0.5", 0, 0]}), "model.mean[0] must be a number. Got '0.5'"),
    (table(model={"name": "x", "std": [1, 0, 1]}), "model.std[1] must be greater than 0. Got 0"),
    (table(model={"name": "x", "mean": [1, 1, NAN]}), "model.mean[2] must be a finite number. Got nan"),
    (table(model={"name": "x", "options": {"a": [1]}}), "1 fault: model.options.a must be text, a finite number"),
    (table(model={"name": "x", "options": {"a": NAN}}), "1 fault: model.options.a must be text, a finite number"),
    (table(augment={"policy": "none", "transforms": []}), "augment: give a policy or own transforms, not both"),
    (table(augment={"transforms": 3}), "augment.transforms must be a list. Got 3"),
    (table(augment={"transforms": [3]}), "augment.transforms[0] must be a table. Got 3"),
    (table(augment={"transforms": [{}, {"name": "Blur"}, {"name": 1}]}), "transforms[0], transforms[2] must have a"),
    (table(augment={"transforms": [{"name": "Blur", "p": NAN}]}), "augment.transforms[0].p must be a finite"),
    (table(optimiser={"lr": 1}), "1 fault: unknown key 'optimiser'; did you mean 'optimizer'?"),
    (table(lr=0.1), "1 fault: unknown key 'lr'; did you mean 'optimizer.lr'?"),
    (table(optimizer={"momentun": 0.9}), "unknown key 'optimizer.momentun'; did you mean 'optimizer.momentum'?"),
    (table(optimizer={"epochs": 9}), "unknown key 'optimizer.epochs'; did you mean 'finetune.epochs'?"),
    (table(loss={"zzz": 9}), "unknown key 'loss.zzz'; [loss] knows class_weights, gamma, label_smoothing, name"),
    (table(name="other"), "unknown key 'name'; a recipe has the name of its file"),
    (table(schedule={"warmup_epochs": 12}), "warmup_epochs must be below finetune.epochs (12). Got 12"),
    (table(schedule={"warmup_epochs": 12.5}), "warmup_epochs must be below finetune.epochs (12). Got 12.5"),
    (table(finetune={"strategy": "lp-ft", "head_epochs": 12}), "head_epochs must be below finetune.epochs (12)"),
    (table(finetune={"head_epochs": 2}), "head_epochs means nothing where finetune.strategy = 'full'"),
    (
        table(finetune={"strategy": "linear-probe"}, augment={"policy": "light"}),
        "augment must be policy = 'none' without mixup and cutmix where finetune.strategy = 'linear-probe'",
    ),
    (table(finetune={"strategy": "linear-probe"}, augment={"mixup": 0.2}), "augment must be policy = 'none'"),
    (table(search=3), "1 fault: search must be a table. Got 3"),
    (table(search={"lr": {"choices": [1]}}), "search: unknown key 'lr'; did you mean 'optimizer.lr'?"),
    (table(search={"optimizer.lr": 3}), "search.optimizer.lr must be a table. Got 3"),
    (table(search={"optimizer": {"choices": [1]}}), "search: 'optimizer' cannot be varied"),
    (table(search={"workers": {"choices": [1]}}), "search: 'workers' cannot be varied"),
    (table(search={"optimizer.lr": {"low": 1}}), "search: 'optimizer.lr' must have low and high"),
    (table(search={"optimizer.lr": {"low": 1, "high": 2, "logg": True}}), "must have low and high"),
    (table(search={"optimizer.lr": {"low": 2, "high": 1}}), "must have low below high"),
    (table(search={"optimizer.lr": {"low": 1, "high": "2"}}), "must have numbers as low and high"),
    (table(search={"optimizer.lr": {"low": 0, "high": 1, "log": True}}), "must have low above 0 where log"),
    (table(search={"optimizer.lr": {"low": -1, "high": 1}}), "search: optimizer.lr must be greater than 0. Got -1"),
    (table(search={"optimizer.lr": {"low": 0.1, "high": INF}}), "search.optimizer.lr.high must be a finite number"),
    (table(search={"augment.policy": {"choices": ["light", "heavy"]}}), "search: augment.policy must be 'none'"),
    (table(search={"finetune.epochs": {"choices": []}}), "must have choices = [...] that are not empty"),
]


@pytest.mark.parametrize(("given", "said"), FAULTS, ids=[said for _, said in FAULTS])
def test_a_fault_says_what_is_wrong_and_what_is_allowed(given: dict[str, Any], said: str) -> None:
    assert said in fault(given)


def test_all_faults_are_said_at_once() -> None:
    text = fault(
        {
            "model": {"name": "resnet18", "drop_rate": 1.5, "colour": "red"},
            "optimizer": {"lr": -1, "weight_decay": NAN, "learning_rate": 1},
            "finetune": {"epochs": "many"},
            "search": {"optimizer.lrr": {"choices": [1]}},
            "zzz": 1,
        },
        {"nonsense": 1},
    )
    assert text.startswith("9 faults: ")
    for key in ("drop_rate", "model.colour", "optimizer.lr ", "weight_decay", "learning_rate", "epochs"):
        assert key in text
    for key in ("optimizer.lrr", "'zzz'", "'nonsense'"):
        assert key in text


def test_control_characters_in_keys_and_values_are_escaped() -> None:
    text = fault(table(**{"k\x1b[31m": 1}, device="cpu\nrm"))
    assert "\x1b" not in text
    assert "\\x1b" in text


def test_a_name_that_cannot_stand_in_a_folder_is_refused() -> None:
    with pytest.raises(ZooError, match="recipe name must be"):
        parse_recipe(table(), "a/b")


def test_search_spaces_within_range_are_accepted() -> None:
    space = {
        "optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True},
        "finetune.epochs": {"low": 3, "high": 30},
        "augment.policy": {"choices": ["light", "strong"]},
        "model.drop_path_rate": {"low": 0.0, "high": 0.3},
    }
    assert parse_recipe(table(search=space), "mine").search == space


# Files


def test_bad_toml_names_the_file_and_the_line(root: Home) -> None:
    file = root.root / "bad.toml"
    file.write_text('[model]\nname = "x"\nlr = = 1\n')
    with pytest.raises(ZooError, match=r"bad\.toml' is no valid TOML: .*line 3"):
        load_recipe(file)


def test_a_newer_schema_is_refused_and_this_one_is_not(root: Home) -> None:
    file = root.root / "new.toml"
    file.write_text('schema_version = 99\n[model]\nname = "simple_cnn"\n')
    with pytest.raises(ZooError, match="schema_version 99; this zoo reads up to 1: update the zoo"):
        load_recipe(file)
    file.write_text('schema_version = 1\n[model]\nname = "simple_cnn"\n')
    assert load_recipe(file).name == "new"


def test_recipes_are_found_by_name_and_own_ones_come_first(root: Home) -> None:
    assert load_recipe("resnet18").model.name.startswith("resnet18.")
    root.recipes.mkdir()
    (root.recipes / "resnet18.toml").write_text('[model]\nname = "resnet34"\n')
    assert load_recipe("resnet18").model.name == "resnet34"
    assert list_recipes()["resnet18"].parent == root.recipes


def test_an_unknown_recipe_has_the_nearest_name(root: Home) -> None:
    with pytest.raises(ZooError, match=r"unknown recipe 'resnet81'; did you mean 'resnet18'"):
        load_recipe("resnet81")
    with pytest.raises(ZooError, match=r"there is no file '.*gone\.toml'"):
        load_recipe("gone.toml")


# --set


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("optimizer.lr=3e-4", "optimizer.lr", 3e-4),
        ("epochs = 3", "epochs", 3),
        ("strategy=lp-ft", "strategy", "lp-ft"),
        ("workers=auto", "workers", "auto"),
        ("device=cuda:0", "device", "cuda:0"),
        ("mean=[0.5, 0.5, 0.5]", "mean", [0.5, 0.5, 0.5]),
        ('summary="a = b"', "summary", "a = b"),
        ("weights=runs/a=b", "weights", "runs/a=b"),
        ("weights=2026-01-01", "weights", "2026-01-01"),
        ("model.options.flag=true", "model.options.flag", True),
        ("weights=", "weights", ""),
        ("weights=1\nx = 2", "weights", "1\nx = 2"),
    ],
)
def test_an_assignment_is_read_as_toml_or_as_text(text: str, key: str, value: Any) -> None:
    assert parse_assignment(text) == (key, value)


@pytest.mark.parametrize("text", ["optimizer.lr", "=3", " = 3", ""])
def test_an_assignment_without_key_or_sign_is_refused(text: str) -> None:
    with pytest.raises(ZooError, match="--set takes KEY=VALUE, such as optimizer"):
        parse_assignment(text)


def test_overrides_take_whole_keys_and_unambiguous_last_parts() -> None:
    changed = {"lr": 0.5, "finetune.epochs": 3, "strategy": "lp-ft", "model.options.width": 16, "workers": 2}
    recipe = parse_recipe(table(optimizer={"name": "sgd"}), "mine", changed)
    assert (recipe.optimizer.lr, recipe.optimizer.name) == (0.5, "sgd")
    assert (recipe.finetune.epochs, recipe.finetune.strategy) == (3, "lp-ft")
    assert (recipe.model.options, recipe.workers) == ({"width": 16}, 2)


def test_every_value_can_be_set_by_its_whole_key() -> None:
    leaves = [key for key, kind in known_keys().items() if kind is None]
    assert len(leaves) > 30
    assert [full_key(key) for key in leaves] == leaves


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("name", "'name' may mean any of model.name, optimizer.name, schedule.name, loss.name; write one of these"),
        ("lrr", "unknown key 'lrr'; did you mean 'optimizer.lr'?"),
        ("optimiser.lr", "unknown key 'optimiser.lr'; did you mean 'optimizer.lr'?"),
        ("finetune.epoch", "unknown key 'finetune.epoch'; did you mean 'finetune.epochs'?"),
        ("qqqqq", "1 fault: unknown key 'qqqqq'"),
    ],
)
def test_an_unknown_override_names_the_whole_nearest_key(key: str, said: str) -> None:
    assert said in fault(table(), {key: 1})


def test_an_override_out_of_range_is_refused() -> None:
    assert "optimizer.lr must be greater than 0. Got 0" in fault(table(), {"lr": 0})
    assert "model must be a table. Got 1" in fault(table(), {"model": 1})


# Identity


BASE = table(optimizer={"lr": 1e-3})


@pytest.mark.parametrize(
    "change",
    [
        {"workers": 3},
        {"device": "cpu"},
        {"summary": "words"},
        {"source": "a paper"},
        {"search": {"optimizer.lr": {"low": 1e-4, "high": 1e-2}}},
        {"finetune": {"epochs": 12}},  # the default, written out
        {"optimizer": {"lr": 0.001, "weight_decay": 0.05}},
    ],
    ids=str,
)
def test_the_digest_leaves_out_what_changes_no_number(change: dict[str, Any]) -> None:
    assert parse_recipe({**BASE, **change}, "other").digest == parse_recipe(BASE, "mine").digest


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "bf16"},
        {"model": {"name": "resnet18"}},
        {"model": {"name": "simple_cnn", "options": {"width": 16}}},
        {"optimizer": {"lr": 2e-3}},
        {"finetune": {"epochs": 13}},
        {"augment": {"policy": "ct"}},
        {"augment": {"transforms": [{"name": "NoOp"}]}},
        {"schedule": {"warmup_epochs": 1}},
        {"loss": {"label_smoothing": 0.1}},
    ],
    ids=str,
)
def test_the_digest_changes_with_what_changes_the_numbers(change: dict[str, Any]) -> None:
    assert parse_recipe({**BASE, **change}, "mine").digest != parse_recipe(BASE, "mine").digest


# Round trip


def fraction(top: float = 0.99) -> st.SearchStrategy[float]:
    return st.floats(0, top)


positive = st.floats(1e-12, 1e6)
words = st.text(max_size=30)  # any letters, control characters among them; TOML has no lone surrogates
plain = st.one_of(words, st.integers(-(2**40), 2**40), st.floats(-1e9, 1e9), st.booleans())
triple = st.tuples(positive, positive, positive).map(list)
keys = st.text(min_size=1, max_size=8)


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Any]:
    """Any recipe that is right, with some keys left out."""

    def some(**parts: st.SearchStrategy[Any]) -> dict[str, Any]:
        return {key: draw(part) for key, part in parts.items() if draw(st.booleans())}

    strategy = draw(st.sampled_from(["linear-probe", "full", "lp-ft", "gradual"]))
    epochs = draw(st.integers(2, 10_000))
    probe = strategy == "linear-probe"
    own = st.lists(st.dictionaries(keys, st.one_of(plain, st.lists(plain, max_size=3)), max_size=3), max_size=2)
    augment: dict[str, Any] = {}
    if not probe and draw(st.booleans()):
        augment = {"transforms": [{**each, "name": "NoOp"} for each in draw(own)]}
    elif not probe:
        augment = some(policy=st.sampled_from(["none", "light", "strong", "ct"]), mixup=fraction(), cutmix=fraction())
    phases = {"head_epochs": st.integers(1, epochs - 1)} if strategy in ("lp-ft", "gradual") else {}
    return {
        **some(summary=words, source=words, workers=st.integers(0, 256), device=st.just("cuda:1")),
        "model": {
            "name": draw(st.text(min_size=1, max_size=20)),
            **some(
                weights=st.text(min_size=1, max_size=20),
                image_size=st.integers(16, 2048),
                drop_rate=fraction(),
                mean=triple,
                std=triple,
                crop_pct=st.floats(0.01, 1),
                options=st.dictionaries(keys, plain, max_size=3),
            ),
        },
        "finetune": {
            "strategy": strategy,
            "epochs": epochs,
            **some(head_lr=positive, layer_decay=st.floats(0.01, 1), clip_grad=positive, **phases),
        },
        "augment": augment,
        "optimizer": some(lr=positive, weight_decay=positive, name=st.sampled_from(["sgd", "lamb"])),
        "schedule": some(warmup_epochs=st.floats(0, 1.5), min_lr=fraction()),
        "loss": some(label_smoothing=fraction(), class_weights=st.just("balanced")),
    }


@pytest.mark.slow
@settings(deadline=None, max_examples=120)
@given(tables())
def test_what_is_written_is_read_back_the_same(given: dict[str, Any]) -> None:
    recipe = parse_recipe(given, "mine")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mine.toml"
        recipe.write(file)
        again = load_recipe(file)
    assert isinstance(again, Recipe)
    assert again == recipe
    assert again.digest == recipe.digest
    assert again.table() == recipe.table()
