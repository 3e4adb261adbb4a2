# SPDX-License-Identifier: BSD-3-Clause
"""Runs the checks of this folder on 2 and on 4 of four Gloo ranks, and writes what went wrong; see test_over_ranks.py.

In each rank of torchrun, or of ranks.py, with the file to write as its argument.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta

import evaluation_checks
import gather_checks
import graph_checks
import loss_checks
import memory_checks
import mesh_checks
import metric_checks
import ranking_checks
import split_solve_checks
import torch.distributed as dist

MODULES = (
    evaluation_checks,
    gather_checks,
    graph_checks,
    loss_checks,
    memory_checks,
    mesh_checks,
    metric_checks,
    ranking_checks,
    split_solve_checks,
)
SIZES = (2, 4)
TIMEOUT = timedelta(seconds=60)

Check = Callable[[dist.ProcessGroup], None]


def checks(size: int) -> dict[str, Check]:
    """Every function named check_* of the modules, by its name, for a group of ``size``; for 2 alone those named
    check_on_two_*, which take long to start, and for 4 those named check_on_four_*, which take the default group.
    """
    other = {2: "check_on_four_", 4: "check_on_two_"}[size]
    return {
        name.removeprefix("check_"): function
        for module in MODULES
        for name, function in vars(module).items()
        if name.startswith("check_") and not name.startswith(other)
    }


def main(path: str) -> None:
    dist.init_process_group("gloo", timeout=5 * TIMEOUT)  # two ranks wait while the other two are at their checks
    rank = dist.get_rank()
    errors: dict[str, str | None] = {}
    for size in SIZES:
        group = dist.new_group(list(range(size)), timeout=TIMEOUT)
        for name, check in checks(size).items() if rank < size else ():
            try:
                check(group)
                errors[f"{name}-{size}"] = None
            except BaseException:
                errors[f"{name}-{size}"] = traceback.format_exc()
                break  # the ranks no longer agree on where they are
        with open(f"{path}.{rank}", "w") as results:
            json.dump(errors, results)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
