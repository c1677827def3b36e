"""An own network's identity changes with its code and structure, and with nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo.models.fingerprint import network_digest


def build(act=nn.ReLU, stride=1, drop=0.0):
    layers = [nn.Conv2d(3, 4, 3, stride=stride), act(), nn.Dropout(drop) if drop else nn.Identity()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


class Plus(nn.Module):
    def forward(self, images):
        return images + 1


class Minus(nn.Module):
    def forward(self, images):
        return images - 1


Minus.__qualname__ = "Plus"


def test_the_same_network_has_the_same_digest_whatever_its_weights_and_dropout():
    torch.manual_seed(0)
    one = network_digest(build(), build)
    torch.manual_seed(1)
    assert network_digest(build(), build) == one
    assert network_digest(build(drop=0.5), build) == one
    with torch.device("meta"):
        assert network_digest(build(), build) == one


@pytest.mark.parametrize("changed", [{"act": nn.Tanh}, {"stride": 2}])
def test_another_structure_has_another_digest(changed):
    assert network_digest(build(**changed), build) != network_digest(build(), build)


def test_another_forward_or_builder_has_another_digest():
    def other():
        return build()

    assert network_digest(Plus(), Plus) != network_digest(Minus(), Plus)
    assert network_digest(build(), other) != network_digest(build(), build)
