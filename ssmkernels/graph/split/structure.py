# SPDX-License-Identifier: BSD-3-Clause
"""A symmetric, weighted graph whose rows are split over ranks."""

from __future__ import annotations

from itertools import accumulate
from typing import Literal, get_args

import torch
from torch import Tensor

from ssmkernels.distributed import (
    Group,
    all_gather_rows,
    all_reduce_max,
    all_reduce_sum,
    broadcast,
    gather_sizes,
    rank_of,
    split_rows,
    world_size,
)
from ssmkernels.graph.split.components import components
from ssmkernels.graph.split.halo import Halo, plan
from ssmkernels.graph.split.mesh import Ranks, groups_of
from ssmkernels.graph.split.partition import by_cells
from ssmkernels.graph.structure import Graph
from ssmkernels.ops import _checks as check

Partition = Literal["contiguous", "cells"]


class SplitGraph:
    """This rank's part of a :class:`Graph` whose rows are split over the ranks of a group. It does not change.

    Rank r has the places ``starts[r] … starts[r + 1] − 1``: the rows of the ranks follow each other in rank order. A
    column is a local id: 0 … n − 1 are this rank's rows, what follows are its ghosts, nodes of other ranks that its
    rows have entries for. Entries of a row ascend by their place. :func:`ssmkernels.graph.knn_graph` makes one from the
    features of every rank, :meth:`from_graph` from a graph that every rank has.

    Every rank of the group calls what communicates, also without rows: the methods :meth:`extend`, :meth:`gather`,
    :meth:`total`, :meth:`largest` and :meth:`normalized`, and the property ``components``.
    """

    group: Group
    """The ranks that share the rows out."""
    classes: Group
    """The ranks that have the same rows, and share the classes of a label propagation out: each has the columns
    :meth:`columns` of what has a column for every class. "local" where a rank has them all.
    """
    starts: list[int]
    """R + 1 numbers: the first place of every rank, and N."""
    crow: Tensor
    """[n + 1] int64, where the entries of each of this rank's rows begin."""
    col: Tensor
    """[E_r] int32, local ids."""
    weight: Tensor
    """[E_r] float32 or float64."""
    mutual: Tensor | None
    """[E_r] bool, or None."""
    ghosts: Tensor
    """[g] int64, the places of the nodes that the local ids from n on stand for; they ascend."""
    ids: Tensor
    """[n] int64, which nodes of the whole graph this rank's rows are: their places, but for ``partition="cells"``."""
    _components: tuple[Tensor, int] | None
    halo: Halo
    """Which rows are exchanged with which ranks."""

    def __init__(self) -> None:
        raise TypeError("a SplitGraph is made by knn_graph(..., group=...) or SplitGraph.from_graph")

    @classmethod
    def _trusted(
        cls,
        group: Group,
        starts: list[int],
        crow: Tensor,
        col: Tensor,
        weight: Tensor,
        mutual: Tensor | None,
        ghosts: Tensor,
        halo: Halo,
        ids: Tensor,
        classes: Group,
    ) -> SplitGraph:
        graph = cls.__new__(cls)
        graph.group, graph.classes, graph.starts, graph.crow, graph.col = group, classes, starts, crow, col
        graph.weight, graph.mutual, graph.ghosts, graph.halo, graph.ids = weight, mutual, ghosts, halo, ids
        graph._components = None
        return graph

    @classmethod
    def _from_rows(
        cls,
        group: Group,
        starts: list[int],
        crow: Tensor,
        nodes: Tensor,
        weight: Tensor,
        mutual: Tensor | None,
        ids: Tensor | None = None,
        classes: Group = "local",
    ) -> SplitGraph:
        """From this rank's rows with the place of every entry's node, ``nodes`` [E_r] int64."""
        first, last = starts[rank_of(group)], starts[rank_of(group) + 1]
        own = (nodes >= first) & (nodes < last)
        ghosts = torch.unique(nodes[~own])
        col = torch.where(own, nodes - first, last - first + torch.searchsorted(ghosts, nodes)).int()
        inner = torch.tensor(starts[1:-1], dtype=torch.int64, device=nodes.device)
        rows = torch.repeat_interleave(torch.arange(len(crow) - 1, device=crow.device), crow.diff())[~own]
        owners, ghost_owners = (torch.bucketize(of, inner, right=True) for of in (nodes[~own], ghosts))
        halo = plan(group, rows, owners, ghost_owners, len(starts) - 1)
        ids = torch.arange(first, last, device=nodes.device) if ids is None else ids
        return cls._trusted(group, starts, crow, col, weight, mutual, ghosts, halo, ids, classes)

    @classmethod
    def from_graph(cls, graph: Graph, group: Ranks = None, *, partition: Partition = "contiguous") -> SplitGraph:
        """This rank's part of a graph that every rank has.

        Args:
            graph: the same on every rank, on the CPU.
            group: the ranks; by default the default group, and this process alone without one. Or a
                torch.distributed.device_mesh.DeviceMesh with the dimensions "rows" and "classes", see :attr:`classes`.
            partition: ``"contiguous"``: runs of nodes as equal as can be, without sending anything; or ``"cells"``: as
                many nodes, in parts that fewer edges join, found by rank 0 and sent to the others (8·N bytes). ``ids``
                tells which nodes a rank has: ``labels[split.ids]`` are its labels.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        if not isinstance(graph, Graph):
            raise TypeError(f"graph must be a ssmkernels.graph.Graph, got {type(graph).__name__}")
        if graph.device.type != "cpu":
            raise ValueError(f"graph is on {graph.device}; a split graph is for the CPU, take graph.to('cpu')")
        group, classes = groups_of(group)
        check.check_choice("partition", partition, get_args(Partition))
        ranks = world_size(group)
        own = split_rows(graph.num_nodes, rank_of(group), ranks)
        starts = [split_rows(graph.num_nodes, rank, ranks).start for rank in range(ranks)] + [graph.num_nodes]
        if partition == "cells":
            order = by_cells(graph, ranks) if rank_of(group) == 0 else torch.empty(graph.num_nodes, dtype=torch.int64)
            return cls._of_nodes(graph, group, starts, broadcast(order, group=group), classes)
        entries = slice(int(graph.crow[own.start]), int(graph.crow[own.stop]))
        mutual = None if graph.mutual is None else graph.mutual[entries]
        crow = graph.crow[own.start : own.stop + 1] - graph.crow[own.start]
        nodes, weight = graph.col[entries].long(), graph.weight[entries]
        return cls._from_rows(group, starts, crow, nodes, weight, mutual, classes=classes)

    @classmethod
    def _of_nodes(cls, graph: Graph, group: Group, starts: list[int], order: Tensor, classes: Group) -> SplitGraph:
        """The part of a graph whose nodes have their places in ``order`` [N]."""
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        ids = order[starts[rank_of(group)] : starts[rank_of(group) + 1]]
        counts = graph.crow.diff()[ids]
        crow = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        rows = torch.repeat_interleave(torch.arange(len(ids)), counts)
        entries = torch.arange(int(crow[-1])) - crow[rows] + graph.crow[ids][rows]
        places = place[graph.col[entries].long()]
        by_place = (rows * len(order) + places).argsort()
        entries, places = entries[by_place], places[by_place]
        mutual = None if graph.mutual is None else graph.mutual[entries]
        return cls._from_rows(group, starts, crow, places, graph.weight[entries], mutual, ids, classes)

    @property
    def num_nodes(self) -> int:
        """N, of all ranks."""
        return self.starts[-1]

    @property
    def num_rows(self) -> int:
        """n, of this rank."""
        return len(self.crow) - 1

    @property
    def num_ghosts(self) -> int:
        """g, of this rank."""
        return len(self.ghosts)

    @property
    def num_edges(self) -> int:
        """E_r, the entries of this rank's rows."""
        return len(self.col)

    @property
    def nodes(self) -> slice:
        """This rank's places."""
        rank = rank_of(self.group)
        return slice(self.starts[rank], self.starts[rank + 1])

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.weight.dtype

    @property
    def rows(self) -> Tensor:
        """[E_r] int64, the own row of every entry."""
        return torch.repeat_interleave(torch.arange(self.num_rows, device=self.device), self.crow.diff())

    @property
    def degree(self) -> Tensor:
        """[n] the sum of the weights of each of this rank's rows."""
        return self.sum_rows(self.weight)

    def columns(self, num_classes: int) -> slice:
        """The classes whose columns this rank has, of so many."""
        return split_rows(num_classes, rank_of(self.classes), world_size(self.classes))

    def sum_rows(self, values: Tensor) -> Tensor:
        """[n] the sums of ``values`` [E_r] over the entries of each row, in their order."""
        return torch.segment_reduce(values, "sum", offsets=self.crow, initial=0)

    def extend(self, values: Tensor) -> Tensor:
        """``values`` [n, …] of own rows and behind them those of the ghosts, [n + g, …]: by one all_to_all."""
        return self.halo.extend(values)

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks, by one all_reduce."""
        return all_reduce_sum(values, group=self.group)

    def largest(self, values: Tensor) -> Tensor:
        """The largest over ranks, by one all_reduce."""
        return all_reduce_max(values, group=self.group)

    @property
    def components(self) -> tuple[Tensor, int]:
        """[n] int64, the connected component of each of this rank's rows over edges of positive weight, and the number
        of components on all ranks. Found once, by four collectives.
        """
        if self._components is None:
            self._components = components(self, self.weight > 0)
        return self._components

    def with_weight(self, weight: Tensor) -> SplitGraph:
        """The same edges with other weights [E_r], finite, ≥ 0 and, over ranks too, symmetric."""
        check.check_tensor("weight", weight, "[E_r]", 1)
        check.check_size("weight", weight, 0, self.num_edges, "E_r of the graph")
        check.check_weights("weight", weight)
        return SplitGraph._trusted(
            self.group,
            self.starts,
            self.crow,
            self.col,
            weight.detach(),
            self.mutual,
            self.ghosts,
            self.halo,
            self.ids,
            self.classes,
        )

    def normalized(self) -> SplitGraph:
        """The same edges with the weights W/w̄, w̄ being the mean of the positive ones of all ranks; the same graph
        where there are none.
        """
        weight = self.weight.double()
        most = float(self.largest(weight.max() if self.num_edges else weight.new_zeros(())))
        if most == 0:
            return self
        weight = weight / most  # so that the sum is finite
        positive = weight[weight > 0]
        whole, count = self.total(torch.stack([positive.sum(), positive.new_tensor(len(positive))]))
        return self.with_weight((weight / (whole / count)).to(self.dtype))

    def gather(self) -> Graph:
        """The whole graph, on every rank."""
        keys = self.ids[self.rows] * self.num_nodes + self.extend(self.ids)[self.col.long()]
        keys, order = all_gather_rows(keys, group=self.group).sort()
        weight, mutual = all_gather_rows(self.weight, group=self.group)[order], self.mutual
        if mutual is not None:
            mutual = all_gather_rows(mutual.to(torch.uint8), group=self.group)[order].bool()
        crow = torch.searchsorted(keys, torch.arange(self.num_nodes + 1, device=self.device) * self.num_nodes)
        return Graph(crow, keys % max(self.num_nodes, 1), weight, mutual=mutual)

    @property
    def _repr_of_classes(self) -> str:
        ranks = world_size(self.classes)
        return f", classes {rank_of(self.classes)} of {ranks}" if ranks > 1 else ""

    def __repr__(self) -> str:
        return (
            f"SplitGraph(rank {rank_of(self.group)} of {world_size(self.group)}{self._repr_of_classes},"
            f" num_rows={self.num_rows}, num_ghosts={self.num_ghosts}, num_edges={self.num_edges},"
            f" dtype={self.dtype}, device='{self.device}')"
        )


def check_split_graph(graph: SplitGraph) -> None:
    if not isinstance(graph, SplitGraph):
        raise TypeError(f"graph must be a ssmkernels.graph.SplitGraph, got {type(graph).__name__}")


def starts_of(count: int, group: Group, device: torch.device) -> list[int]:
    """The first row of every rank and the number of all, where this rank has ``count``."""
    counts = [of_rank for (of_rank,) in gather_sizes([count], device, group=group)]
    return list(accumulate(counts, initial=0))
