"""Which keys of a recipe change nothing, or less than they say, beside others: for what is searched, and for notes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zoo.errors import one_line
from zoo.recipe.schema import Recipe, known_keys

_NETWORK = ("finetune.strategy", ("full", "lp-ft", "gradual"))


@dataclass(frozen=True)
class Need:
    """What a key needs to change anything: another key, and its values; instead: the key that does it there, or ''."""

    key: str
    allowed: tuple[Any, ...]
    instead: str = ""


NEEDS: dict[str, Need] = {
    "optimizer.lr": Need(*_NETWORK, "finetune.head_lr"),
    "optimizer.momentum": Need("optimizer.name", ("sgd", "rmsprop")),
    "schedule.min_lr": Need("schedule.name", ("cosine", "linear")),
    "finetune.head_lr": Need("finetune.strategy", ("linear-probe", "lp-ft", "gradual"), "optimizer.lr"),
    "finetune.layer_decay": Need(*_NETWORK),
    "finetune.ema_decay": Need(*_NETWORK),
    "finetune.clip_grad": Need(*_NETWORK),
    "model.drop_path_rate": Need(*_NETWORK),
    "model.drop_rate": Need(*_NETWORK),
}
# A few networks drop features within their classifier, so that the head alone has its share of it.
OF_SOME_NETWORKS = "model.drop_rate"


def value_of(recipe: Recipe, key: str) -> Any:
    """Return a recipe's value of a dotted key; None where it says nothing."""
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part)
    return value


def effect_notes(recipe: Recipe, *, classifier_drops: bool = False) -> tuple[str, ...]:
    """Return what is to be said of keys that change nothing in this recipe, and of a warm-up that is cut.

    A key at its default is not spoken of: the recipe is the same without it. They are not refused, because one
    override may go to recipes of several strategies. classifier_drops: whether `model.drop_rate` reaches the
    classifier.
    """
    notes = []
    for key, need in NEEDS.items():
        value, other = value_of(recipe, key), value_of(recipe, need.key)
        if value == _default(key) or other in need.allowed or (key == OF_SOME_NETWORKS and classifier_drops):
            continue
        fix = f"set {need.instead}" if need.instead else "leave it out"
        notes.append(f"{key} = {one_line(value, 40)} changes nothing where {need.key} = {other!r}; {fix}")
    return (*notes, *_cut_warmups(recipe))


def _default(key: str) -> Any:
    table, _, name = key.partition(".")
    kind = known_keys()[table]
    assert kind is not None
    return kind.model_fields[name].default


def _cut_warmups(recipe: Recipe) -> list[str]:
    """Return a note for each phase whose warm-up is shorter than asked for: its last epoch is none of warming up."""
    wanted, head = recipe.schedule.warmup_epochs, recipe.head_epochs
    lengths = {"head": head, "whole network": recipe.finetune.epochs - head}
    return [
        f"schedule.warmup_epochs = {wanted:g} is cut to {epochs - 1} for the {part}, which has {epochs} "
        f"epoch{'s' if epochs > 1 else ''}"
        for part, epochs in lengths.items()
        if epochs and wanted > epochs - 1
    ]
