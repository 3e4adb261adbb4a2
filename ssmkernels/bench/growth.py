# SPDX-License-Identifier: BSD-3-Clause
"""Benchmark cases of growth: each op alone over three orders of magnitude of what it counts, to see cost and memory
per unit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from ssmkernels.bench import graph, memory, pairs, ranking
from ssmkernels.bench.case import Case

SLOTS = [1_000, 10_000, 100_000, 1_000_000]
ENTRIES = [10_000, 100_000, 1_000_000, 10_000_000]
ROWS = [256, 1024, 4096, 8192]
OPS = (
    "instance_matching",
    "aggregate",
    "unfold",
    "leave_one_edge_out",
    "laplacian_solve",
    "pair_focal_loss",
    "pair_ranking_loss",
    "mined_pair_ranking_loss",
    "similarity_moments",
)


def cases(*, device: str = "cpu", dtype: torch.dtype = torch.float32, quick: bool = False) -> Iterator[Case]:
    """Every op, from its smallest size to its largest, without peers."""
    count = 2 if quick else 4
    for slots in SLOTS[:count]:
        for case in memory.cases_of_size(64, slots, 10, device, dtype):
            if case.op in OPS:
                yield _alone(case)
    if device == "cpu":
        for entries in ENTRIES[:count]:
            yield from map(_alone, graph.growth_cases(entries))
    for rows in ROWS[:count]:
        yield _alone(pairs.case_of_size("concat", rows, 128, None, device, dtype))
        yield _alone(
            ranking.loss_case(rows, 128, ranking.ALL_ACTIVE_MARGIN, "forward + backward, all active", device, dtype)
        )
        yield _alone(ranking.mined_case(rows, 128, device, dtype))
        yield _alone(ranking.moments_case(16 * rows, 128, device, dtype))


def _alone(case: Case) -> Case:
    return dataclasses.replace(case, phase=f"{case.phase}, growth", peers={}, products={}, product_counts={})
