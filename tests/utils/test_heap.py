"""Freed memory stays with the process, so that the next activations need no new pages."""

import os
import subprocess
import sys

import pytest

RUN = """
import resource
from mos_cli.utils.heap import keep_freed_memory
{call}
import torch

def activations():
    tensors = [torch.ones(2**20) for _ in range(6)]
    del tensors

for _ in range(3):
    activations()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    activations()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 10 * 6 * 4 * 2**20 // 4096
"""That the activations take, if each is new."""


def faults(call: str, **environment: str) -> int:
    """Pages that the operating system had to provide, by a process of its own: the setting holds for all of it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    env |= {"OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", RUN.format(call=call)]
    return int(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_kept() -> None:
    assert faults("keep_freed_memory()") < PAGES / 10


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_what_the_user_has_set_stays() -> None:
    assert faults("keep_freed_memory()", MALLOC_TRIM_THRESHOLD_="1", MALLOC_MMAP_THRESHOLD_="65536") > PAGES / 2
