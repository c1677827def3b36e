"""What a user's own network is, in code and in structure, so that a changed one is never taken for the old."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from zoo.files import digest_of

_KNOWN_PACKAGES = ("torch", "timm", "torchvision", "zoo")


def network_digest(model: nn.Module, build: Callable[..., Any]) -> str:
    """Return 64 hexadecimal digits that change with the builder, its module classes, or what it builds.

    Dropout is left out: its rate belongs to the recipe, and a network that is loaded has none. Byte code is read, as
    source is not to be had everywhere; another Python version therefore gives other digits.
    """
    classes = {type(module) for module in model.modules()}
    own = [each for each in classes if each.__module__.split(".")[0] not in _KNOWN_PACKAGES]
    code = [_code_of(build), *(_code_of(each) for each in sorted(own, key=lambda each: each.__qualname__))]
    structure = [
        [name, type(module).__qualname__, module.extra_repr()]
        for name, module in model.named_modules()
        if not type(module).__name__.startswith(("Drop", "Identity"))
    ]
    return digest_of([code, structure])


def _code_of(thing: Any) -> list[Any]:
    """Return what a function or the functions of a class do, as plain values."""
    if isinstance(thing, type):
        members = sorted(vars(thing).items())
        return [[name, _code_of(member)] for name, member in members if isinstance(member, types.FunctionType)]
    code = getattr(thing, "__code__", None)
    return list(_values(code)) if code is not None else [repr(type(thing))]


def _values(code: types.CodeType) -> Iterator[Any]:
    yield code.co_code.hex()
    yield list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield list(_values(constant))
        elif isinstance(constant, frozenset):
            yield sorted(map(repr, constant))  # a set's order differs from process to process
        else:
            yield repr(constant)
