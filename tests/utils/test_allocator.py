"""Freed memory stays with the process that asked to keep it."""

import ctypes
import os
import subprocess
import sys

import pytest

from kdq.cli import app
from kdq.stages import worker

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="mallopt is glibc's"
)

CODE = """
import resource, sys, torch
from kdq.utils.cpu import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for size in (2**20, 2**24):  # blocks of 4 and of 64 MB
    for _ in range(10):  # the heap grows first
        torch.ones(size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(size)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **environment: str) -> list[int]:
    """Page faults of ten tensors one after the other, by size."""
    told = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | environment
    command = [sys.executable, "-c", CODE, how]
    found = subprocess.run(command, env=told, check=True, capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def test_blocks_of_any_size_are_used_again() -> None:
    assert max(faults("keep")) < 100
    # 64 MB are 16 384 pages of 4 KB, or 32 of 2 MB: left to itself, glibc maps each block anew.
    assert faults("leave")[1] > 300


def test_what_the_user_says_counts() -> None:
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="131072")[1] > 300


def test_every_job_and_every_process_of_a_training_asks_for_it() -> None:
    assert "keep_freed_memory" in app._job.__code__.co_names
    assert "keep_freed_memory" in worker._worker.__code__.co_names
