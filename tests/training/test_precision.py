from __future__ import annotations

import os

import pytest
import torch

from zoo.errors import ZooError
from zoo.training.precision import (
    PrecisionPlan,
    choose_device,
    choose_plan,
    choose_workers,
    cores,
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
