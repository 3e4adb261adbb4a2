# SPDX-License-Identifier: BSD-3-Clause
"""Work of the first rank, of which the others hear while they wait, however long it takes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ssmkernels.distributed import broadcast
from ssmkernels.trainers.loop import Fabric

T = TypeVar("T")
LONGEST = 5.0  # seconds between two messages


def on_first_rank(work: Callable[[], T], fabric: Fabric, timeout: float) -> T:
    """What ``work()`` gives on the first rank, on every rank; an exception that it raises there is raised on all.

    A collective ends with an error where a rank comes to it later than ``timeout`` seconds after another. So the first
    rank works in a thread, and tells the others every now and then that it goes on.

    Args:
        work: of tensors without gradients; its result is pickled.
        fabric: the ranks.
        timeout: ``run.timeout``.
    """
    if fabric.world_size == 1:
        with torch.no_grad():
            return work()
    outcome: list[Any] = []
    thread = threading.Thread(target=_run, args=(work, outcome), daemon=True)
    if fabric.is_global_zero:
        thread.start()
    is_done = torch.zeros(1, dtype=torch.int32, device=fabric.device)
    while not is_done:
        if fabric.is_global_zero:
            thread.join(min(LONGEST, timeout / 4))
            is_done.fill_(not thread.is_alive())
        broadcast(is_done)
    of_first: Any = fabric.broadcast(outcome)
    result, error = of_first
    if error is not None:
        raise error
    return result


@torch.no_grad()
def _run(work: Callable[[], Any], outcome: list[Any]) -> None:
    try:
        outcome.extend([work(), None])
    except BaseException as error:
        outcome.extend([None, error])
