"""The memory that a step frees serves the next one."""

import subprocess
import sys

import pytest

STEPS = """
import resource
import torch
from panfm.training.engine import keep_freed_memory

def step():
    tensors = [torch.ones(10, 2**20) for _ in range(4)]  # 40 MiB each

def count_faults():
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 5

default = count_faults()
keep_freed_memory()
print(default, count_faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc is what it changes")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    printed = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, check=True, text=True).stdout
    default, kept = map(int, printed.split())
    assert kept * 10 < default, printed
