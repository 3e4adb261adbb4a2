# SPDX-License-Identifier: BSD-3-Clause
"""Approximate neighbours among the rows of all ranks, by an inverted file of faiss whose cells are dealt to the ranks.

As :mod:`ssmkernels.graph.ivf`: every rank runs the same k-means, on the same rows of all ranks, and sends its rows to
the ranks that own their cells. A row is searched by the owners of the cells nearest to it, in as many cells as a recall
of 0.99 takes on a sample of the rows, which is searched exactly.
"""

from __future__ import annotations

import heapq
import logging
import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ssmkernels.distributed import (
    Group,
    all_gather_rows,
    all_reduce_sum,
    exchange_rows,
    gather_sizes,
    pack_rows,
    rank_of,
    send_rows,
    unpack_rows,
    world_size,
)
from ssmkernels.graph.candidates import faiss
from ssmkernels.graph.candidates import rank as ranked
from ssmkernels.graph.ivf import FEWEST_CELLS, LEAST_RECALL, SAMPLE, SEED
from ssmkernels.ops import _neighbours as kernels

POINTS_OF_A_CELL = 64  # of those that k-means sees
ROWS_AT_ONCE = 2**16  # whose features are on their way

logger = logging.getLogger("ssmkernels.graph")


def nearest(unit: Tensor, k: int, starts: list[int], group: Group) -> tuple[Tensor, Tensor]:
    """About the k nearest others of every row of ``unit`` [n, d], of length 1 or 0, among those of all ranks: nodes
    [n, k] int64 and similarities [n, k], ranked by similarity and then by node.

    Raises:
        ImportError: faiss is not installed.
    """
    search = Search(unit, k, starts, group)
    sample = search.evenly_spaced(SAMPLE)
    exact = search.exactly(sample)[0]
    probes = min(FEWEST_CELLS, search.cells)
    while True:
        matches = (search.approximately(sample, probes)[0][:, :, None] == exact[:, None, :]).any(dim=1)
        share = all_reduce_sum(torch.tensor([int(matches.sum()), matches.numel()]), group=group)
        recall = float(share[0]) / float(share[1])
        if recall >= LEAST_RECALL or probes == search.cells:
            break
        probes = min(2 * probes, search.cells)
    if rank_of(group) == 0:
        logger.info(
            "ivf: %d of %d cells searched, recall %.4f on a sample of %d points",
            probes,
            search.cells,
            recall,
            int(share[1]) // k,
        )
    nodes, similarities = search.nothing(len(unit))
    longest = max(end - start for start, end in pairwise(starts))
    for begin in range(0, longest, ROWS_AT_ONCE):
        rows = torch.arange(min(begin, len(unit)), min(begin + ROWS_AT_ONCE, len(unit)))
        nodes[rows], similarities[rows] = search.approximately(rows, probes)
    short = (nodes < 0).any(dim=1).nonzero()[:, 0]
    nodes[short], similarities[short] = search.exactly(short)
    return nodes, similarities


class Search:
    """The cells, and this rank's part of them."""

    def __init__(self, unit: Tensor, k: int, starts: list[int], group: Group) -> None:
        library = faiss("ivf")
        self.unit, self.k, self.starts, self.group = unit, k, starts, group
        self.ranks, self.first = world_size(group), starts[rank_of(group)]
        total, dim = starts[-1], unit.shape[1]
        self.cells = max(1, round(math.sqrt(total)))
        seen = unit[self.evenly_spaced(POINTS_OF_A_CELL * self.cells)].float()
        self.index = library.IndexIVFFlat(library.IndexFlatIP(dim), dim, self.cells, library.METRIC_INNER_PRODUCT)
        self.index.cp.seed, self.index.cp.spherical, self.index.cp.min_points_per_centroid = SEED, True, 1
        self.index.train(all_gather_rows(seen, group=group).numpy())
        cell = self._nearest_cells(torch.arange(len(unit)), 1)[:, 0]
        sizes = all_reduce_sum(torch.bincount(cell, minlength=self.cells), group=group)
        self.owner = dealt(sizes.tolist(), self.ranks)
        order = self.owner[cell].argsort(stable=True)
        entries = [unit[order], order + self.first]
        counts = torch.bincount(self.owner[cell], minlength=self.ranks).tolist()
        self.held, self.held_nodes = unpack_rows(send_rows(pack_rows(entries), counts, group=group)[0], entries)
        if len(self.held):
            self.index.add(self.held.float().numpy())

    def evenly_spaced(self, count: int) -> Tensor:
        """This rank's share of ``count`` rows of all ranks."""
        own = min(len(self.unit), math.ceil(count * len(self.unit) / self.starts[-1]))
        return torch.linspace(0, max(len(self.unit) - 1, 0), own, dtype=torch.float64).long()

    def nothing(self, rows: int) -> tuple[Tensor, Tensor]:
        """Lists of no neighbours."""
        nodes = torch.full((rows, self.k), -1)
        return nodes, self.unit.new_full((rows, self.k), -torch.inf)

    def approximately(self, rows: Tensor, probes: int) -> tuple[Tensor, Tensor]:
        """nodes and similarities of some of this rank's rows, in so many cells; −1 where these have fewer."""
        asked = torch.zeros(self.ranks, len(rows), dtype=torch.bool)
        cells = self._nearest_cells(rows, probes)
        asked[self.owner[cells], torch.arange(len(rows))[:, None]] = True
        owner, row = asked.nonzero(as_tuple=True)
        entries = [self.unit[rows[row]], rows[row] + self.first]
        counts = torch.bincount(owner, minlength=self.ranks).tolist()
        packed, sizes = send_rows(pack_rows(entries), counts, group=self.group)
        queries, asking = unpack_rows(packed, entries)
        lists = self._in_own_cells(queries, asking, probes)
        answers = unpack_rows(send_rows(pack_rows(lists), sizes, group=self.group)[0], lists)
        nodes, similarities = self.nothing(len(rows))
        for place in range(self.ranks):
            here = row[owner == place]
            more, closeness = (answer[owner == place] for answer in answers)
            merged = torch.cat([nodes[here], more], dim=1), torch.cat([similarities[here], closeness], dim=1)
            nodes[here], similarities[here] = ranked(merged[0], merged[1], self.k)
        return nodes, similarities

    def exactly(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """nodes and similarities of some of this rank's rows, by a search of all rows on all ranks."""
        counts = [count for (count,) in gather_sizes([len(rows)], rows.device, group=self.group)]
        queries, asking = (all_gather_rows(x, group=self.group) for x in (self.unit[rows], rows + self.first))
        count = min(self.k + 1, len(self.unit))
        if count == 0 or len(queries) == 0:
            lists = self.nothing(len(queries))
        else:
            ids, similarities = kernels.nearest(queries, count, columns=self.unit)
            lists = self._listed(ids.long() + self.first, similarities, asking)
        parts = exchange_rows(pack_rows(lists), counts, group=self.group)
        answers = [unpack_rows(part, lists) for part in parts]
        nodes, similarities = (torch.cat([answer[which] for answer in answers], dim=1) for which in (0, 1))
        return ranked(nodes, similarities, self.k)

    def _in_own_cells(self, queries: Tensor, asking: Tensor, probes: int) -> tuple[Tensor, Tensor]:
        """For rows of any ranks, whose nodes are ``asking``: the best of what this rank holds."""
        if len(self.held) == 0 or len(queries) == 0:
            return self.nothing(len(queries))
        self.index.nprobe = probes
        places = torch.from_numpy(self.index.search(queries.float().numpy(), self.k + 1)[1])
        right = (places.clamp_min(0) + len(queries)).flatten()
        left = torch.arange(len(queries)).repeat_interleave(places.shape[1])
        similarities = kernels.pair_products(torch.cat([queries, self.held]), left, right).view(places.shape)
        nodes = torch.where(places >= 0, self.held_nodes[places.clamp_min(0)], -1)
        return self._listed(nodes, similarities, asking)

    def _listed(self, nodes: Tensor, similarities: Tensor, asking: Tensor) -> tuple[Tensor, Tensor]:
        """The k best, without the asking nodes themselves; −1 where there are fewer."""
        none = (nodes < 0) | (nodes == asking[:, None])
        padding = self.nothing(len(nodes))
        nodes = torch.cat([nodes.masked_fill(none, -1), padding[0]], dim=1)
        similarities = torch.cat([similarities.masked_fill(none, -torch.inf), padding[1]], dim=1)
        return ranked(nodes, similarities, self.k)

    def _nearest_cells(self, rows: Tensor, count: int) -> Tensor:
        """[rows, count]."""
        if len(rows) == 0:
            return torch.empty(0, count, dtype=torch.int64)
        quantizer: Any = self.index.quantizer
        return torch.from_numpy(quantizer.search(self.unit[rows].float().numpy(), count)[1])


def dealt(sizes: list[int], ranks: int) -> Tensor:
    """[cells] int64 the rank of every cell, the largest first to the rank that has least."""
    load = [(0, rank) for rank in range(ranks)]
    owner = torch.empty(len(sizes), dtype=torch.int64)
    for cell in sorted(range(len(sizes)), key=lambda cell: (-sizes[cell], cell)):
        held, rank = load[0]
        owner[cell] = rank
        heapq.heapreplace(load, (held + sizes[cell], rank))
    return owner
