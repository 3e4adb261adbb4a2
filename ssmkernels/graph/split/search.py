# SPDX-License-Identifier: BSD-3-Clause
"""Exact neighbours among the rows of all ranks: blocks of rows go round the ranks, each keeps the best for its own."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkernels.distributed import Group, rank_of, ring_blocks, world_size
from ssmkernels.graph.candidates import rank as ranked
from ssmkernels.ops import _neighbours as kernels


def nearest(unit: Tensor, k: int, starts: list[int], group: Group) -> tuple[Tensor, Tensor]:
    """The k nearest others of every row of ``unit`` [n, d], of length 1 or 0, among those of all ranks.

    The kernel gives a pair the same product in whatever block it is, so the lists are those of one process, bit for
    bit. A rank receives (N − n)·d numbers in R − 1 messages.

    Args:
        k: below N.
        starts: the first row of every rank, and N.

    Returns:
        nodes [n, k] int64 and similarities [n, k], ranked by similarity and then by node.
    """
    nodes = torch.empty(len(unit), 0, dtype=torch.int64)
    similarities = unit.new_empty(len(unit), 0)
    ranks, own = world_size(group), rank_of(group)
    for step, (block,) in enumerate(ring_blocks([unit], group=group)):
        ids, scores = _within(unit, k) if step == 0 else _among(unit, block, k)
        nodes = torch.cat([nodes, ids.long() + starts[(own - step) % ranks]], dim=1)
        similarities = torch.cat([similarities, scores], dim=1)
        nodes, similarities = ranked(nodes, similarities, k)
    return nodes, similarities


def _within(unit: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Up to k of the others of every row."""
    count = min(k, len(unit) - 1)
    if count < 1:
        return torch.empty(len(unit), 0, dtype=torch.int32), unit.new_empty(len(unit), 0)
    return kernels.nearest(unit, count)


def _among(unit: Tensor, block: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Up to k rows of the block for every row."""
    count = min(k, len(block))
    if count == 0 or len(unit) == 0:
        return torch.empty(len(unit), count, dtype=torch.int32), unit.new_empty(len(unit), count)
    return kernels.nearest(unit, count, columns=block)
