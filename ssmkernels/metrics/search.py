# SPDX-License-Identifier: BSD-3-Clause
"""The references nearest to queries, exactly: in one process, or among those of all ranks."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ssmkernels.distributed import Group, rank_of, ring_blocks, world_size
from ssmkernels.ops import _neighbours as kernels

# Distances or candidates in memory at a time; 64 MiB of float64.
_CHUNK_ENTRIES = 2**23


class Search(Protocol):
    """Which of the nearest references are of a query's class."""

    def rows_at_once(self, longest: int) -> int:
        """Queries that can be asked for lists of this length at a time."""

    def same(self, queries: Tensor, labels: Tensor, k: int, itself: Tensor | None) -> Tensor:
        """[B, k] bool, for the k references nearest to each of ``queries`` [B, d], in float64, whether their class is
        that of ``labels`` [B]; without reference ``itself`` [B]. False where a distance overflows.
        """


class LocalSearch:
    """Among ``references`` [M, d], in float64, of the classes ``labels`` [M]."""

    def __init__(self, references: Tensor, labels: Tensor) -> None:
        self._search = FusedSearch(references) if references.device.type == "cpu" else Distances(references)
        self._labels = labels
        self.rows_at_once = self._search.rows_at_once

    def same(self, queries: Tensor, labels: Tensor, k: int, itself: Tensor | None) -> Tensor:
        nearest = self._search.nearest(queries, k, itself)
        return (self._labels[nearest] == labels[:, None]) & (nearest >= 0)


class RingSearch:
    """Among the references of all ranks, on the CPU, which go round in blocks: none has them all.

    The kernel gives a pair the same score in whatever block it is, so that the lists are those of one process, bit for
    bit. Every rank has to ask as often as the others, also for no queries; a rank receives the other ranks' references
    each time.

    Args:
        references: [m, d] of this rank, floating point, in float64 only while they are searched.
        labels: [m] int64.
        starts: the first reference of every rank, and the number of all.
    """

    def __init__(self, references: Tensor, labels: Tensor, starts: list[int], group: Group) -> None:
        self._references, self._labels, self._starts, self._group = references, labels, starts, group

    def rows_at_once(self, longest: int) -> int:
        """As of one process, or as many as give lists of as many numbers as this rank's references have."""
        return max(1, max(_CHUNK_ENTRIES, self._references.numel()) // (4 * (longest + 8)))

    def same(self, queries: Tensor, labels: Tensor, k: int, itself: Tensor | None) -> Tensor:
        scores, ids = queries.new_empty(len(queries), 0), labels.new_empty(len(queries), 0)
        same = torch.empty(len(queries), 0, dtype=torch.bool)
        own, ranks = rank_of(self._group), world_size(self._group)
        blocks = ring_blocks([self._references, self._labels], group=self._group)
        for step, (block, classes) in enumerate(blocks):
            count = min(k + (itself is not None and step == 0), len(block))
            if count == 0 or len(queries) == 0:
                continue
            references = block.double()
            offsets = references.square().sum(dim=1).div_(-2)
            places, closeness = kernels.nearest(queries, count, columns=references, offsets=offsets)
            nodes = places.long() + self._starts[(own - step) % ranks]
            none = places < 0
            if itself is not None:
                none |= nodes == itself[:, None]
            scores = torch.cat([scores, closeness.masked_fill(none, -torch.inf)], dim=1)
            ids = torch.cat([ids, nodes], dim=1)
            same = torch.cat([same, (classes[places.long()] == labels[:, None]) & ~none], dim=1)
            by_id = ids.argsort(dim=1)
            best = by_id.gather(1, scores.gather(1, by_id).argsort(dim=1, descending=True, stable=True)[:, :k])
            scores, ids, same = (listed.gather(1, best) for listed in (scores, ids, same))
        return same


class FusedSearch:
    """Searches ``references`` [M, d] on the CPU by the kernel of ``knn_graph``: the largest q·r − ‖r‖²/2."""

    def __init__(self, references: Tensor) -> None:
        self._references = references
        self._offsets = references.square().sum(dim=1).div_(-2)

    def rows_at_once(self, longest: int) -> int:
        return max(1, _CHUNK_ENTRIES // (4 * (longest + 8)))  # candidates, twice as many as are kept, of two numbers

    def nearest(self, queries: Tensor, k: int, itself: Tensor | None) -> Tensor:
        """[B, k] references nearest to each of ``queries`` [B, d], without reference ``itself`` [B]."""
        if itself is None:
            return kernels.nearest(queries, k, columns=self._references, offsets=self._offsets)[0].long()
        ids = kernels.nearest(queries, k + 1, columns=self._references, offsets=self._offsets)[0].long()
        itself_last = (ids == itself[:, None]).int().argsort(dim=1, stable=True)
        return ids.gather(1, itself_last[:, :k])


class Distances:
    """Searches ``references`` [M, d] by squared Euclidean distances, but for the squared norm of the query, which
    changes no order.
    """

    def __init__(self, references: Tensor) -> None:
        # A matrix product may round the same numbers differently from column to column; equal references are computed
        # once instead.
        distinct, self._position = torch.unique(references, dim=0, return_inverse=True)
        self._repeated = len(distinct) < len(references)
        rows = distinct if self._repeated else references
        self._rows = torch.cat([-2 * rows, rows.square().sum(dim=1, keepdim=True)], dim=1)  # [M, d + 1]

    def rows_at_once(self, longest: int) -> int:
        return max(1, _CHUNK_ENTRIES // len(self._position))

    def nearest(self, queries: Tensor, k: int, itself: Tensor | None) -> Tensor:
        """As :meth:`FusedSearch.nearest`: ‖r‖² − 2 q·r is the one product of (q, 1) and (−2 r, ‖r‖²)."""
        distances = torch.cat([queries, queries.new_ones(len(queries), 1)], dim=1) @ self._rows.t()
        if self._repeated:
            distances = distances[:, self._position]
        if itself is not None:
            distances.scatter_(1, itself[:, None], torch.inf)
        return smallest(distances, k)


def smallest(values: Tensor, k: int) -> Tensor:
    """[B, k] columns of the k least of each row of ``values`` [B, M], ascending, and by index where they are equal."""
    largest = values.topk(k, dim=1, largest=False, sorted=False).values.amax(dim=1, keepdim=True)
    kept = values <= largest
    candidates = kept.nonzero()
    if len(candidates) > k * len(values):  # more columns as far as the k-th: the first of them by index
        below, tied = values < largest, values == largest
        remaining = k - below.sum(dim=1, keepdim=True)
        candidates = (below | (tied & (tied.cumsum(dim=1) <= remaining))).nonzero()
    columns = candidates[:, 1].view(-1, k)
    order = values.gather(1, columns).sort(dim=1, stable=True).indices
    return columns.gather(1, order)
