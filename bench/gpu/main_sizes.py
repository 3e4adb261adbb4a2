# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark's cases at one main size per op: those of the predictions in docs/performance-*-cuda.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from bench.gpu.rows import Rows
from ssmkernels.bench import graph, memory, pairs, ranking
from ssmkernels.bench.case import Case

Build = Callable[[str, torch.dtype], list[Case]]
HALF_TYPES = (torch.bfloat16, torch.float16)


def _memory(device: str, dtype: torch.dtype) -> list[Case]:
    size = (320, 128_000, 1000) if device == "cuda" else memory.QUICK_SIZES[0]
    return list(memory.cases_of_size(*size, device, dtype))


def _graph(device: str, dtype: torch.dtype) -> list[Case]:
    if dtype in HALF_TYPES:
        return []  # computed in float32
    nodes, classes = (60_000, 100) if device == "cuda" else (300, 5)
    points = graph.clustered(nodes, classes, device)
    draw = torch.Generator().manual_seed(0)
    propagated = F.softmax(3 * torch.randn(nodes, classes, generator=draw), dim=1).to(device, dtype)
    return [
        graph.edges_case(points.graph.to(dtype).to(device), propagated, backward=True),
        graph.solve_case(points, dtype, device),
    ]


def _pairs(device: str, dtype: torch.dtype) -> list[Case]:
    nodes, rows, listed = (4096, 16_384, 4_000_000) if device == "cuda" else (32, 32, 100)
    cases = [
        pairs.case_of_size(interaction, nodes, 128, None, device, dtype)
        for interaction in ("concat", "absdiff", "product")
    ]
    return [*cases, pairs.case_of_size("concat", rows, 128, listed, device, dtype)]


def _ranking(device: str, dtype: torch.dtype) -> list[Case]:
    size = (4096, 128) if device == "cuda" else ranking.QUICK_SIZES[0]
    return [
        ranking.loss_case(*size, ranking.MARGIN, "forward + backward", device, dtype),
        ranking.loss_case(*size, ranking.ALL_ACTIVE_MARGIN, "forward + backward, all active", device, dtype),
        ranking.mined_case(*size, device, dtype),
        ranking.moments_case(*size, device, dtype),
    ]


FAMILIES: dict[str, Build] = {"memory": _memory, "pairs": _pairs, "ranking": _ranking, "graph": _graph}


def cases(rows: Rows, device: str, dtypes: tuple[torch.dtype, ...]) -> Iterator[tuple[str, Case]]:
    """(family, case) of every main size. What cannot be built is a failed row."""
    for dtype in dtypes:
        for family, build in FAMILIES.items():
            label = f"inputs of {family} {str(dtype).removeprefix('torch.')}"
            built = rows.prepare(label, lambda build=build, dtype=dtype: build(device, dtype))
            yield from ((family, case) for case in built or ())
