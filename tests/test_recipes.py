"""The contract of every built-in recipe, and of the page that lists them."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from zoo.data.transforms import POLICIES, make_augment
from zoo.files import builtin_folder
from zoo.models.carried import carried_weights
from zoo.models.registry import classifier_of, create_model, find_model, preprocessing_for
from zoo.models.spec import ModelSpec
from zoo.recipe import Recipe, known_keys, parse_recipe

FOLDER = builtin_folder("recipes")
FILES = sorted(FOLDER.glob("*.toml"))
NAMES = [file.stem for file in FILES]
# Weights outside timm, which ZOO_WEIGHTS must hold.
EXTERNAL = {
    "mobilenetv2_035.keras_in1k_notop",
    "mobilenetv2_100.tf2_in1k_ptq",
    "tf_mobilenetv3_small_100.keras_in1k_int8",
}
SUFFIXES = {"lp": "linear-probe", "lpft": "lp-ft", "gradual": "gradual"}
CARRIED = set(carried_weights())
every_recipe = pytest.mark.parametrize("name", NAMES)


@cache
def recipe_of(name: str) -> Recipe:
    return parse_recipe(tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8")), name)


@cache
def spec_of(model: str) -> ModelSpec:
    return find_model(model)


# What a recipe uses, and the paper that it comes from.
PAPERS: dict[str, tuple[str, Callable[[Recipe], bool]]] = {
    "LP-FT": ("2202.10054", lambda recipe: recipe.finetune.strategy == "lp-ft"),
    "gradual unfreezing": ("1801.06146", lambda recipe: recipe.finetune.strategy == "gradual"),
    "layer-wise decay": ("2106.08254", lambda recipe: recipe.finetune.layer_decay < 1),
    "drop-path": ("1603.09382", lambda recipe: recipe.model.drop_path_rate > 0),
    "mixup": ("1710.09412", lambda recipe: recipe.augment.mixup > 0),
    "cutmix": ("1905.04899", lambda recipe: recipe.augment.cutmix > 0),
    "warm-up": ("1706.02677", lambda recipe: recipe.schedule.warmup_epochs > 0),
    "label smoothing": ("1512.00567", lambda recipe: recipe.loss.label_smoothing > 0),
}


def suffix_of(name: str) -> str:
    return name.rpartition("-")[2] if "-" in name else ""


def row_of(name: str) -> str:
    recipe = recipe_of(name)
    return f"| `{name}` | `{recipe.model.name}` | {recipe.finetune.strategy} | {recipe.summary} |"


def test_there_are_recipes_of_each_kind() -> None:
    recipes = [recipe_of(name) for name in NAMES]
    modern = {recipe.model.name for recipe in recipes if recipe.model.weights == "pretrained"} - EXTERNAL
    assert len(modern) >= 14
    assert len(NAMES) >= 16
    assert {recipe.finetune.strategy for recipe in recipes} == {"linear-probe", "full", "lp-ft", "gradual"}
    assert {recipe.model.name for recipe in recipes} >= EXTERNAL | CARRIED | {"simple_cnn"}
    assert len({recipe.digest for recipe in recipes}) == len(recipes), "two recipes are the same"


@every_recipe
def test_a_recipe_is_right_and_says_what_it_is(name: str) -> None:
    recipe = recipe_of(name)
    assert recipe.summary
    assert not recipe.summary.endswith(".")
    assert re.search(r"arXiv \d{4}\.\d{4,5}", recipe.source), "the literature is named"
    unsaid = [what for what, (paper, used) in PAPERS.items() if used(recipe) and paper not in recipe.source]
    assert not unsaid, f"the source of {unsaid} is not named"
    assert recipe.finetune.batch_size == 32
    assert (recipe.workers, recipe.device, recipe.precision) == ("auto", "auto", "auto")


@every_recipe
def test_a_recipes_name_says_model_and_strategy(name: str) -> None:
    recipe, suffix = recipe_of(name), suffix_of(name.removesuffix("-scratch"))
    assert recipe.finetune.strategy == SUFFIXES.get(suffix, "full")
    assert name.partition("-")[0] in recipe.model.name
    base = name.partition("-")[0]
    if name.endswith("-scratch"):
        # The same in all but the weights, so that a difference is theirs.
        other, own = recipe_of(name.removesuffix("-scratch")).table(), recipe.table()
        assert own["model"].pop("weights") == "scratch"
        assert other["model"].pop("weights") == "pretrained"
        assert {**own, "summary": ""} == {**other, "summary": ""}
        return
    if base in NAMES:
        alike = recipe_of(base).model
        assert (recipe.model.name, recipe.model.weights) == (alike.name, alike.weights), f"not that of {base}"


@every_recipe
def test_a_recipes_model_exists_with_its_weights(name: str) -> None:
    import timm

    model = recipe_of(name).model
    assert spec_of(model.name).arch == model.name.partition(".")[0]
    if model.weights == "pretrained":
        assert model.name in EXTERNAL | CARRIED or model.name in timm.list_pretrained()
    else:
        assert model.weights == "scratch"
    if model.name in EXTERNAL:
        assert model.mean == model.std == (0.5, 0.5, 0.5)
        assert (model.options.get("pad_type") == "same") == model.name.startswith("mobilenetv2_035.")


@every_recipe
def test_a_recipes_augmentation_can_be_made(name: str) -> None:
    recipe = recipe_of(name)
    size = recipe.model.image_size or spec_of(recipe.model.name).preprocessing.image_size
    assert callable(make_augment(recipe.policy, recipe.augment.transforms, size, seed=0))


@cache
def network_of(name: str, size: int | None, drop_path_rate: float, options: tuple[tuple[str, object], ...]) -> object:
    import torch

    size = preprocessing_for(spec_of(name), image_size=size).image_size
    with torch.device("meta"):
        return create_model(spec_of(name), 3, size, 0.0, drop_path_rate, dict(options))


@pytest.mark.slow
@every_recipe
def test_a_recipes_network_can_be_built_and_its_strategy_followed(name: str) -> None:
    import torch

    wanted, tune = recipe_of(name).model, recipe_of(name).finetune
    options = tuple(wanted.options.items())
    network = network_of(wanted.name, wanted.image_size, wanted.drop_path_rate, options)
    assert isinstance(network, torch.nn.Module)
    if tune.strategy != "full":
        classifier_of(network)
    if tune.layer_decay < 1 or tune.strategy == "gradual":
        assert hasattr(network, "group_matcher")


# README.md


def readme() -> str:
    return (Path(FOLDER) / "README.md").read_text(encoding="utf-8")


def test_the_readme_lists_every_recipe_as_it_is() -> None:
    table = readme().partition("\n## ")[0]
    listed = [line for line in table.splitlines() if line.startswith("| `")]
    wanted = [row_of(name) for name in NAMES]
    missing, stale = set(wanted) - set(listed), set(listed) - set(wanted)
    assert not missing | stale, "put in:\n" + "\n".join(sorted(missing)) + "\ntake out:\n" + "\n".join(sorted(stale))
    assert len(listed) == len(NAMES)


def test_the_readmes_example_is_a_right_recipe() -> None:
    examples = re.findall(r"```toml\n(.*?)```", readme(), re.DOTALL)
    assert len(examples) == 2
    for text in examples:
        recipe = parse_recipe(tomllib.loads(text), "example")
        assert callable(make_augment(recipe.policy, recipe.augment.transforms, 224, seed=0))


def test_the_readme_names_every_key_and_policy() -> None:
    text = readme()
    assert all(f"| `{policy}` |" in text for policy in POLICIES)
    for key in known_keys():
        last = key.rpartition(".")[2]
        assert re.search(rf"\b{last}\b", text), f"{key} is not in recipes/README.md"
