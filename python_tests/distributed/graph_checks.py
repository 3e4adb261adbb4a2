# SPDX-License-Identifier: BSD-3-Clause
"""A graph whose rows are split over ranks, against the one of one process."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.distributed as dist
from shards import assert_close, normal, shard
from torch import Tensor
from traffic import counted

from ssmkernels import graph
from ssmkernels.graph import Graph, SplitGraph, knn
from ssmkernels.graph.split import cells
from ssmkernels.graph.split.structure import starts_of

N, D, K = 90, 5, 7
DTYPES = (torch.float32, torch.float64)


def points(dtype: torch.dtype) -> Tensor:
    """Three clusters; 12 equal rows in two places, so that ties reach over ranks, and a row of zeros."""
    rows = normal(N, D, seed=0, dtype=dtype) + 2 * normal(3, D, seed=1, dtype=dtype)[torch.arange(N) // 30]
    rows[20:26] = rows[70:76] = rows[3]
    rows[50] = 0
    return rows


def assert_same_graph(actual: Graph, expected: Graph) -> None:
    for name in ("crow", "col", "weight", "reverse", "mutual"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name


def check_ring_graph_has_the_bits_of_one_process(group: dist.ProcessGroup) -> None:
    for dtype in DTYPES:
        rows = points(dtype)
        expected = graph.knn_graph(rows, K)
        for even in (True, False):
            own = shard(N, group, even=even)
            split = graph.knn_graph(rows[own], K, group=group, backend="ring")
            assert split.nodes == own
            assert split.dtype == dtype
            assert_same_graph(split.gather(), expected)


def check_ring_graph_where_ranks_have_fewer_rows_than_neighbours(group: dist.ProcessGroup) -> None:
    rows = points(torch.float32)[:9]
    rows[4:7] = rows[0]
    for count in (3, 9):
        expected = graph.knn_graph(rows[:count], count - 1)
        split = graph.knn_graph(rows[:count][shard(count, group)], count - 1, group=group)
        assert_same_graph(split.gather(), expected)


def check_bytes_of_the_ring_graph(group: dist.ProcessGroup) -> None:
    ranks, own = dist.get_world_size(group), shard(N, group)
    for dtype, size in ((torch.float32, 4), (torch.float64, 8)):
        rows = points(dtype)
        with counted() as (calls, received):
            graph.knn_graph(rows[own], K, group=group)
        nodes, similarities = graph.nearest_neighbours(rows, K)
        inside = (nodes >= own.start) & (nodes < own.stop) & (similarities > 0)
        inside[own] = False  # entries of other ranks' lists that are of rows here
        others = sum(1 for rank in range(ranks) if rank not in (dist.get_rank(group), 1))
        assert calls["receive"] == others
        assert received["receive"] == (N - (own.stop - own.start)) * D * size
        assert calls["all_to_all"] == 2
        assert received["all_to_all"] == 8 * (ranks - 1) + (8 + size) * int(inside.sum())
        assert received["all_gather"] == (ranks - 1) * 8 * (3 + 1 + 2)


def check_split_of_a_whole_graph(group: dist.ProcessGroup) -> None:
    whole = graph.knn_graph(points(torch.float64), K)
    with counted() as (calls, _):
        split = SplitGraph.from_graph(whole, group)
    assert not calls
    assert_same_graph(split.gather(), whole)
    own = split.nodes
    values = normal(N, 3, seed=2)
    with counted() as (calls, received):
        extended = split.extend(values[own])
    assert torch.equal(extended, torch.cat([values[own], values[split.ghosts]]))
    assert calls == {"all_to_all": 1}
    assert received["all_to_all"] == split.num_ghosts * 3 * 8
    assert torch.equal(split.degree, whole.degree[own])


def check_split_of_a_graph_by_cells(group: dist.ProcessGroup) -> None:
    """Clusters whose rows are shuffled come together again."""
    ranks = dist.get_world_size(group)
    shuffled = torch.randperm(400, generator=torch.Generator().manual_seed(3))
    rows = normal(400, D, seed=4, dtype=torch.float32) + 6 * normal(8, D, seed=5)[shuffled % 8].float()
    whole = graph.knn_graph(rows, K)
    split, runs = (SplitGraph.from_graph(whole, group, partition=kind) for kind in ("cells", "contiguous"))
    assert_same_graph(split.gather(), whole)
    assert split.num_rows == 400 // ranks
    assert split.num_ghosts < runs.num_ghosts / 4
    labels = torch.where(torch.arange(400) < 60, shuffled % 8, -1)
    expected = graph.mixed_label_propagation(whole, labels).pseudo_labels
    assert torch.equal(graph.mixed_label_propagation(split, labels[split.ids]).pseudo_labels, expected[split.ids])


def check_ring_graph_refuses(group: dist.ProcessGroup) -> None:
    rows = points(torch.float32)[shard(N, group)]
    with pytest.raises(ValueError, match=r"k must be in \[1, N\), N = 90"):
        graph.knn_graph(rows, N, group=group)
    with pytest.raises(ValueError, match="k must be the same on every rank"):
        graph.knn_graph(rows, 3 + dist.get_rank(group), group=group)
    with pytest.raises(ValueError, match="backend must be 'auto', 'ring', 'ivf' or 'cuvs'"):
        graph.knn_graph(rows, 3, group=group, backend="faiss")
    if importlib.util.find_spec("cuvs") is None:
        with pytest.raises(ImportError, match="backend is 'cuvs', which needs the package cuvs"):
            graph.knn_graph(rows, 3, group=group, backend="cuvs")
        with pytest.raises(ImportError, match="backend is 'cuvs', which needs the package cuvs"):
            graph.knn_graph(points(torch.float32), 3, backend="cuvs")
    with pytest.raises(ValueError, match="which is for the ranks of a group"):
        graph.knn_graph(points(torch.float32), 3, backend="ring")


def check_search_in_cells_over_ranks(group: dist.ProcessGroup) -> None:
    if importlib.util.find_spec("faiss") is None:
        return
    for dtype in DTYPES:
        rows, own = points(dtype), shard(N, group)
        expected, similarities = graph.nearest_neighbours(rows, K)
        unit = knn._normalized(rows)[own]
        search = cells.Search(unit, K, starts_of(len(unit), group, unit.device), group)
        assert search.cells == 9
        everything = torch.arange(len(unit))
        nodes, exact = search.exactly(everything)
        assert torch.equal(nodes, expected[own])
        assert torch.equal(exact, similarities[own])
        # Where all cells are searched nothing is missed, but for which of equal rows are taken.
        nodes, actual = search.approximately(everything, search.cells)
        assert_close(actual, exact)
        assert not (nodes == everything[:, None] + own.start).any()


def check_graph_of_a_search_in_cells(group: dist.ProcessGroup) -> None:
    if importlib.util.find_spec("faiss") is None:
        return
    rows, own = points(torch.float32), shard(N, group)
    exact, whole = graph.knn_graph(rows, K), graph.knn_graph(rows[own], K, group=group, backend="ivf").gather()
    same = (exact.to_scipy() - whole.to_scipy()).count_nonzero() / exact.num_edges
    assert same < 0.1  # 0.01 of the neighbours are missed, and others of equal rows taken
