# SPDX-License-Identifier: BSD-3-Clause
"""How a process that trains on the CPU gets memory from the system."""

from __future__ import annotations

import ctypes
import os

KEPT_FREE = 256 * 2**20
LARGEST_KEPT = 32 * 2**20
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def keep_freed_memory() -> None:
    """Makes a step's memory cheap to have again: every step frees what the next one needs, in the same sizes.

    By default much of it goes back to the system, which clears it page by page when it is asked for again: a third of a
    step of SimMatch with a small Wide ResNet. From 2 MB on torch has huge pages of the system then, one page fault
    where there were 512, and glibc keeps smaller blocks, up to 256 MB that are free. The process has no more memory at
    its peak. What the environment says of either stays: ``THP_MEM_ALLOC_ENABLE``, ``MALLOC_TRIM_THRESHOLD_``,
    ``MALLOC_MMAP_THRESHOLD_``. Torch reads the first when it first allocates.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return  # not glibc
    if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        mallopt(_TRIM_THRESHOLD, KEPT_FREE)
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt(_MMAP_THRESHOLD, LARGEST_KEPT)
