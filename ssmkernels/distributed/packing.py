# SPDX-License-Identifier: BSD-3-Clause
"""Rows of several tensors in one message."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ssmkernels.distributed.collectives import Group, is_distributed, process_group, world_size


def _row_bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape[1:]) * tensor.element_size()


def pack_rows(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors [n, ...] of any dtypes side by side: [n, bytes of a row] uint8."""
    rows = tensors[0].shape[0]
    columns = [tensor.detach().reshape(rows, -1) if rows else tensor.new_empty(0, 1) for tensor in tensors]
    widths = [_row_bytes(tensor) for tensor in tensors]
    packed = torch.empty(rows, sum(widths), dtype=torch.uint8, device=tensors[0].device)
    if rows == 0:
        return packed
    for place, column in zip(packed.split(widths, dim=1), columns, strict=True):
        if column.numel() > 0:
            place.copy_(column.resolve_neg().contiguous().view(torch.uint8))
    return packed


def unpack_rows(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """What :func:`pack_rows` was given, of tensors with the dtypes and the shapes of ``like`` but for the rows."""
    widths = [_row_bytes(tensor) for tensor in like]
    unpacked = []
    for column, tensor in zip(packed.split(widths, dim=1), like, strict=True):
        if column.numel() == 0:
            unpacked.append(tensor.new_empty(packed.shape[0], *tensor.shape[1:]))
            continue
        # A copy, since a dtype is seen only in memory that is aligned for it.
        values = column.clone(memory_format=torch.contiguous_format).view(tensor.dtype)
        unpacked.append(values.view(packed.shape[0], *tensor.shape[1:]))
    return unpacked


class RowGather:
    """all_gathers of the rows of several tensors, by one collective a call.

    A rank does not know how many rows the others have. So each sends a row with its number of rows, and as many rows
    as any rank had in the calls before. Only where a rank has more than that, as in the first call, the rows are sent
    again, once the number is known.
    """

    def __init__(self) -> None:
        self.capacity = 0

    @torch.no_grad()
    def __call__(self, tensors: Sequence[Tensor], *, group: Group = None) -> list[Tensor]:
        """Tensors [n_r, ...] of rank r -> [Σ n_r, ...], in rank order; dtypes and the other sizes must agree."""
        if not is_distributed(group):
            return list(tensors)
        packed = pack_rows(tensors)
        counts, rows = self._gather(packed, group)
        if max(counts) > self.capacity:
            self.capacity = max(counts)
            counts, rows = self._gather(packed, group)
        kept = [part[:count] for part, count in zip(rows, counts, strict=True)]
        return unpack_rows(torch.cat(kept), tensors)

    def _gather(self, packed: Tensor, group: Group) -> tuple[list[int], Tensor]:
        count = torch.tensor([packed.shape[0]], dtype=torch.int64, device=packed.device).view(torch.uint8)
        width = max(packed.shape[1], len(count))
        own = packed.new_zeros(1 + self.capacity, width)
        own[0, : len(count)] = count
        if packed.shape[0] <= self.capacity:
            own[1 : 1 + packed.shape[0], : packed.shape[1]] = packed
        ranks = world_size(group)
        everyone = own.new_empty(ranks * own.shape[0], width)
        dist.all_gather_into_tensor(everyone, own, group=process_group(group))
        everyone = everyone.view(ranks, own.shape[0], width)
        counts = everyone[:, 0, : len(count)].contiguous().view(torch.int64)[:, 0].tolist()
        return counts, everyone[:, 1:, : packed.shape[1]]
