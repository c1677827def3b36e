from __future__ import annotations

import subprocess
import sys

import pytest

from zoo.training.memory import freed_memory_kept

# In a process of its own: one that has run other tests holds free memory between what it still uses.
PROGRAM = """
import resource
from pathlib import Path

import torch

from zoo.training.memory import freed_memory_kept

SIZE = 24 * 2**20


def faults_of_an_allocation() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(SIZE, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


with freed_memory_kept() as kept:
    if kept:
        torch.ones(8 * SIZE, dtype=torch.uint8)
        assert faults_of_an_allocation() < SIZE / 4096 / 10
        full = resident_mib()
if kept:
    assert resident_mib() < full - 4 * SIZE / 2**20, (full, resident_mib())  # most of the 192 MiB went back
print("kept" if kept else "no glibc")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_is_used_again_and_given_back_at_the_end():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("kept", "no glibc")


def test_an_error_passes_through():
    with pytest.raises(ZeroDivisionError), freed_memory_kept():
        _ = 1 / 0
