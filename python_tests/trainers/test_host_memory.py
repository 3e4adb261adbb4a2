# SPDX-License-Identifier: BSD-3-Clause
"""Memory that a step frees is there for the next one."""

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from ssmkernels.trainers import host_memory

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
VARIABLES = ("THP_MEM_ALLOC_ENABLE", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_a_step_finds_the_memory_of_the_last_one():
    """Of 20 steps that take 38 MB each: less than one page fault a megabyte, where there are 256 without huge pages."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment["THP_MEM_ALLOC_ENABLE"] = "0"
    command = [sys.executable, "-c", FAULTS, host_memory.__file__]
    faults = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert int(faults) < 20 * 38


@pytest.mark.parametrize("given", [(), VARIABLES[:1], VARIABLES[1:2], VARIABLES[2:], VARIABLES], ids=str)
def test_what_the_environment_says_stays(given, monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "0")  # so that what is set below is taken back
        if name not in given:
            monkeypatch.delenv(name)
    calls = {}
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=calls.__setitem__))
    host_memory.keep_freed_memory()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == ("0" if VARIABLES[0] in given else "1")
    options = {VARIABLES[1]: (-1, host_memory.KEPT_FREE), VARIABLES[2]: (-3, host_memory.LARGEST_KEPT)}
    assert calls == dict(value for name, value in options.items() if name not in given)
