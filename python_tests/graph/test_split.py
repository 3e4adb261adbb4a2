# SPDX-License-Identifier: BSD-3-Clause
"""A split graph in a group of one; python_tests/distributed has those of several ranks."""

from __future__ import annotations

import pytest
import torch

from ssmkernels import graph
from ssmkernels.graph import SplitGraph
from ssmkernels.graph.split.cells import dealt


def features(dtype=torch.float32):
    return torch.randn(150, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_of_one_has_the_bits_of_no_group(dtype):
    whole, split = graph.knn_graph(features(dtype), 8), graph.knn_graph(features(dtype), 8, group=None)
    for name in ("crow", "col", "weight", "mutual"):
        assert torch.equal(getattr(split, name), getattr(whole, name))
        assert torch.equal(getattr(split.gather(), name), getattr(whole, name))
    assert split.num_ghosts == 0
    labels = torch.where(torch.arange(150) < 30, torch.arange(150) % 3, -1)
    expected, actual = graph.mixed_label_propagation(whole, labels), graph.mixed_label_propagation(split, labels)
    for mine, other in zip(actual, expected, strict=True):
        assert torch.equal(mine, other)


def test_a_split_graph_has_no_constructor():
    with pytest.raises(TypeError, match="made by knn_graph"):
        SplitGraph()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3), None), TypeError, "graph must be a ssmkernels.graph.Graph, got Tensor"),
        ((graph.Graph.from_edge_index(torch.tensor([[0, 1], [1, 0]])), 3), TypeError, "group must be a process group"),
    ],
)
def test_from_graph_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        SplitGraph.from_graph(*arguments)


def test_solve_and_leave_one_out_refuse():
    whole = graph.knn_graph(features(), 3)
    split = SplitGraph.from_graph(whole)
    with pytest.raises(TypeError, match="SplitGraph, got Graph"):
        graph.laplacian_solve(whole, None, torch.ones(150), torch.ones(150, 2))
    with pytest.raises(TypeError, match="SplitGraph, got Graph"):
        graph.leave_one_edge_out(whole, torch.ones(150, 2))
    for wrong, error in ((None, TypeError), (torch.ones(150), ValueError), (torch.ones(149, 2), ValueError)):
        with pytest.raises(error, match="propagated"):
            graph.leave_one_edge_out(split, wrong)
        with pytest.raises(error, match="rhs"):
            graph.laplacian_solve(split, None, torch.ones(150), wrong)
    with pytest.raises(ValueError, match="logit_scale"):
        graph.leave_one_edge_out(split, torch.ones(150, 2), logit_scale=0.0)


def test_sparse_features_and_a_group():
    from scipy.sparse import csr_array

    with pytest.raises(TypeError, match="features must be dense with a group"):
        graph.knn_graph(csr_array(features().numpy()), 3, group=None)


def test_cells_are_dealt_evenly():
    sizes = [7, 1, 5, 5, 0, 6]
    owner = dealt(sizes, 3)
    assert sorted(sum(sizes[cell] for cell in range(6) if owner[cell] == rank) for rank in range(3)) == [7, 7, 10]
