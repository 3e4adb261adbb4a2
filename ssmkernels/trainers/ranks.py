# SPDX-License-Identifier: BSD-3-Clause
"""What ``torchrun`` says to a process: which rank of how many it is, and which call of ``torchrun`` it belongs to."""

from __future__ import annotations

import functools
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

_OF_TORCHRUN = re.compile("RANK|WORLD_SIZE|LOCAL_.*|GROUP_.*|ROLE_.*|MASTER_.*|TORCHELASTIC_.*")


def this_rank() -> tuple[int, int]:
    """The rank of this process and the number of ranks."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def alone() -> Iterator[None]:
    """Within it a trainer takes this process for the only one."""
    before = dict(os.environ)
    for name in before:
        if _OF_TORCHRUN.fullmatch(name):
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def this_launch() -> str | None:
    """What all ranks of a call of ``torchrun``, and no others, have in common; None for a process alone."""
    return _name_of_launch() if this_rank()[1] > 1 else None


@functools.cache
def _name_of_launch() -> str:
    store, rank, _ = next(dist.rendezvous("env://"))  # the store that torchrun keeps; no process group is made
    if rank == 0:
        store.set("ssmkernels/launch", uuid.uuid4().hex)
    return str(store.get("ssmkernels/launch").decode())
