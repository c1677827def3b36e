from __future__ import annotations

import resource
import sys
from pathlib import Path

import pytest
import torch

from zoo.training.memory import freed_memory_kept

SIZE = 24 * 2**20


def faults_of_an_allocation() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(SIZE, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_is_used_again_and_given_back_at_the_end():
    with freed_memory_kept() as kept:
        if not kept:
            pytest.skip("no glibc")
        torch.ones(8 * SIZE, dtype=torch.uint8)
        assert faults_of_an_allocation() < SIZE / 4096 / 10
        full = resident_mib()
    assert resident_mib() < full - 4 * SIZE / 2**20  # the 192 MiB that were free are the system's again


def test_an_error_passes_through():
    with pytest.raises(ZeroDivisionError), freed_memory_kept():
        _ = 1 / 0
