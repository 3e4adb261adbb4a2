# SPDX-License-Identifier: BSD-3-Clause
"""Memory that a step frees is there for the next one."""

import ctypes
import os
import subprocess
import sys

import pytest

from ssmkernels.trainers import host_memory

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")

FAULTS = """
import resource, runpy, sys, torch
runpy.run_path(sys.argv[1])["keep_freed_memory"]()
def step():
    for size in (3, 11, 24):
        torch.ones(size * 2**18)
for number in range(24):
    if number == 4:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults_of(**environment: str) -> int:
    command = [sys.executable, "-c", FAULTS, host_memory.__file__]
    return int(subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True).stdout)


def test_a_step_finds_the_memory_of_the_last_one():
    """Of 20 steps that take 38 MB each: less than one page fault a megabyte, where there are 256 without huge pages."""
    assert faults_of(THP_MEM_ALLOC_ENABLE="0") < 20 * 38


def test_what_the_environment_says_stays():
    given = {"THP_MEM_ALLOC_ENABLE": "0", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
    assert faults_of(**given) >= 20 * 38 * 256 // 2
