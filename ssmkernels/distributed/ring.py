# SPDX-License-Identifier: BSD-3-Clause
"""Rows that go round the ranks in blocks, so that each rank meets those of every other and never holds them all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ssmkernels.distributed.collectives import Group, agree_on, gather_sizes, process_group, rank_of, world_size
from ssmkernels.distributed.packing import pack_rows, unpack_rows


@torch.no_grad()
def ring_blocks(tensors: Sequence[Tensor], *, group: Group = None) -> Iterator[list[Tensor]]:
    """The rows of every rank of a group, block by block: this rank's own first, then those of the ranks before it.

    While the caller works on a block the next one is on its way. A rank receives the rows of the others once, in
    world_size − 1 messages, and has two blocks besides its own in memory. Every rank has to take all blocks.

    Args:
        tensors: [n_r, ...] each, with as many rows as this rank has, also none; dtypes and the other sizes must agree
            between ranks.
        group: the ranks.
    """
    yield list(tensors)
    ranks, rank = world_size(group), rank_of(group)
    block = pack_rows(tensors)
    sizes = gather_sizes([block.shape[1], block.shape[0]], block.device, group=group)
    agree_on(["the bytes of a row"], [block.shape[1]], sizes)
    before, after = (_global_rank(group, (rank + step) % ranks) for step in (-1, 1))
    for step in range(1, ranks):
        # The operations of a step are posted together, so that no two ranks wait for each other.
        following = block.new_empty(sizes[(rank - step) % ranks][1], block.shape[1])
        operations = []
        if block.numel() > 0:
            operations.append(dist.P2POp(dist.isend, block, after, process_group(group)))
        if following.numel() > 0:
            operations.append(dist.P2POp(dist.irecv, following, before, process_group(group)))
        requests = dist.batch_isend_irecv(operations) if operations else []
        if step > 1:
            yield unpack_rows(block, tensors)
        for request in requests:
            request.wait()
        block = following
    if ranks > 1:
        yield unpack_rows(block, tensors)


def _global_rank(group: Group, rank: int) -> int:
    of = process_group(group)
    return rank if of is None else dist.get_global_rank(of, rank)
