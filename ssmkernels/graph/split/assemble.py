# SPDX-License-Identifier: BSD-3-Clause
"""W = A + Aᵀ from the neighbours that every rank found for its rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkernels.distributed import Group, pack_rows, rank_of, send_rows, unpack_rows
from ssmkernels.graph.split.structure import SplitGraph


def symmetric(nodes: Tensor, weights: Tensor, starts: list[int], group: Group, classes: Group = "local") -> SplitGraph:
    """The split graph of lists ``nodes`` [n, k] int64 with ``weights`` [n, k], but for what is not above 0.

    An entry (i, j) of A is of row i and of row j. What is of another rank's row goes there by one all_to_all: its row
    there, i and the weight, 8 bytes and those of the weight.
    """
    first, last = starts[rank_of(group)], starts[rank_of(group) + 1]
    listing = torch.arange(first, last).repeat_interleave(nodes.shape[1])
    kept = (weights > 0).flatten()
    listing, listed, weight = listing[kept], nodes.flatten()[kept], weights.flatten()[kept]
    owner = torch.bucketize(listed, torch.tensor(starts[1:-1], dtype=torch.int64), right=True)
    order = owner.argsort(stable=True)
    entries = [
        (listed - torch.tensor(starts, dtype=torch.int64)[owner])[order].int(),
        listing[order].int(),
        weight[order],
    ]
    counts = torch.bincount(owner, minlength=len(starts) - 1).tolist()
    row, other, mirrored = unpack_rows(send_rows(pack_rows(entries), counts, group=group)[0], entries)
    # A pair that lists each other comes twice, with equal weights, of which either may be first.
    total = starts[-1]
    keys = torch.cat([(listing - first) * total + listed, row.long() * total + other])
    keys, order = keys.sort(stable=True)
    both = torch.cat([weight, mirrored])[order]
    keys, times = keys.unique_consecutive(return_counts=True)
    begins = times.cumsum(0) - times
    mutual = times == 2
    summed = both[begins]
    summed[mutual] += both[begins[mutual] + 1]
    crow = torch.searchsorted(keys, torch.arange(last - first + 1) * total)
    return SplitGraph._from_rows(group, starts, crow, keys % max(total, 1), summed, mutual, classes=classes)
