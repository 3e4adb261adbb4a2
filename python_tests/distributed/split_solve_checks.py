# SPDX-License-Identifier: BSD-3-Clause
"""Systems on a split graph, and label propagation, against one process."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy.sparse import csr_array
from shards import assert_close, integers, normal, shard
from torch import Tensor
from traffic import counted

from ssmkernels import graph, ops
from ssmkernels.graph import Graph, SplitGraph
from ssmkernels.graph.split.solve import conjugate_gradients

N, D, K, C = 120, 5, 6, 4
DTYPES = (torch.float32, torch.float64)


def features(dtype: torch.dtype) -> Tensor:
    """Four clusters, one of them far from the others, and two equal rows."""
    rows = normal(N, D, seed=0) + 3 * normal(C, D, seed=1)[torch.arange(N) % C]
    rows[5] = rows[9]
    return rows.to(dtype)


def split(whole: Graph, group: dist.ProcessGroup, *, even: bool) -> tuple[SplitGraph, slice]:
    """Its rows as the ranks hold them, also none."""
    own = shard(whole.num_nodes, group, even=even)
    rows = features(whole.dtype)[own]
    return graph.knn_graph(rows, K, group=group), own


def system(whole: Graph) -> tuple[Tensor, Tensor, Tensor]:
    """A symmetric W_dis [E], a diagonal with zeros and a right side [N, C] with a column of zeros."""
    apart = normal(whole.num_edges, seed=2).abs().to(whole.dtype)
    diagonal = (normal(N, seed=3).abs() * (torch.arange(N) % 5 == 0)).to(whole.dtype) + 1e-3
    rhs = normal(N, C, seed=4, dtype=whole.dtype)
    rhs[:, 2] = 0
    return apart + apart[whole.reverse], diagonal, rhs


def entries(whole: Graph, own: slice) -> slice:
    return slice(int(whole.crow[own.start]), int(whole.crow[own.stop]))


def check_laplacian_solve_on_a_split_graph(group: dist.ProcessGroup) -> None:
    cases = ((torch.float32, 1e-5, False, "jacobi"), (torch.float64, 1e-10, True, "none"))
    for dtype, rtol, even, preconditioner in cases:
        whole = graph.knn_graph(features(dtype), K)
        apart, diagonal, rhs = system(whole)
        dissimilarity = apart if even else None
        settings = {"rtol": rtol, "preconditioner": preconditioner}
        expected = ops.laplacian_solve(whole.crow, whole.col, whole.weight, dissimilarity, diagonal, rhs, **settings)
        part, own = split(whole, group, even=even)
        own_apart = None if dissimilarity is None else dissimilarity[entries(whole, own)]
        actual = graph.laplacian_solve(part, own_apart, diagonal[own], rhs[own], **settings)
        size = float(expected.solution.abs().max())
        torch.testing.assert_close(actual.solution, expected.solution[own], rtol=0, atol=100 * rtol * size)
        assert int((actual.iterations - expected.iterations).abs().max()) <= 1
        assert bool((actual.residual <= rtol).all())
        assert actual.iterations[2] == 0
        assert not actual.solution[:, 2].any()


def check_gradient_of_a_solve_on_a_split_graph(group: dist.ProcessGroup) -> None:
    whole = graph.knn_graph(features(torch.float64), K)
    given = [x.requires_grad_() for x in (whole.weight.clone(), *system(whole))]
    weight, apart, diagonal, rhs = given
    settings = {"rtol": 1e-11}
    along = normal(N, C, seed=5)
    solved = ops.laplacian_solve(whole.crow, whole.col, weight, apart, diagonal, rhs, **settings)
    expected = torch.autograd.grad((along * solved.solution).sum(), given)
    part, own = split(whole, group, even=False)
    edges = entries(whole, own)
    mine = [x.detach()[at].requires_grad_() for x, at in zip(given, (edges, edges, own, own), strict=True)]
    solution = graph.laplacian_solve(part, *mine[1:], weight=mine[0], **settings).solution
    gradients = torch.autograd.grad((along[own] * solution).sum(), mine)
    for actual, whole_gradient, at in zip(gradients, expected, (edges, edges, own, own), strict=True):
        largest = float(whole_gradient.abs().max())
        torch.testing.assert_close(actual, whole_gradient[at], rtol=0, atol=1e-8 * largest)


def check_scale_of_a_solve_on_a_split_graph(group: dist.ProcessGroup) -> None:
    """A power of two changes nothing but the size of the solution."""
    whole = graph.knn_graph(features(torch.float64), K)
    apart, diagonal, rhs = system(whole)
    part, own = split(whole, group, even=True)
    edges = entries(whole, own)
    solved = graph.laplacian_solve(part, apart[edges], diagonal[own], rhs[own])
    for up, right in ((2.0**-500, 1.0), (2.0**600, 2.0**-400)):
        other = graph.laplacian_solve(
            part, up * apart[edges], up * diagonal[own], right * rhs[own], weight=up * part.weight
        )
        assert torch.equal(other.solution * up / right, solved.solution)
        assert torch.equal(other.iterations, solved.iterations)


def check_a_column_with_a_nan_spoils_no_other(group: dist.ProcessGroup) -> None:
    part, own = split(graph.knn_graph(features(torch.float64), K), group, even=True)
    _, diagonal, rhs = system(graph.knn_graph(features(torch.float64), K))
    expected = graph.laplacian_solve(part, None, diagonal[own], rhs[own])
    spoilt = rhs.clone()
    spoilt[7, 1] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = conjugate_gradients(part, part.weight, None, diagonal[own], spoilt[own], rtol=1e-6, max_iter=1000)
    assert results[0][:, 1].isnan().all()
    assert results[2][1].isnan()
    assert torch.equal(results[0][:, [0, 2, 3]], expected.solution[:, [0, 2, 3]])


def check_bytes_of_a_solve(group: dist.ProcessGroup) -> None:
    for dtype, size in ((torch.float32, 4), (torch.float64, 8)):
        whole = graph.knn_graph(features(dtype), K)
        part, own = split(whole, group, even=True)
        _, diagonal, rhs = system(whole)
        with counted() as (calls, received):
            solved = graph.laplacian_solve(part, None, diagonal[own], rhs[own], rtol=1e-4)
        steps = int(solved.iterations.max())  # of one sweep: nothing starts again at this tolerance
        assert calls["all_to_all"] == (steps + 1) + 2
        assert received["all_to_all"] == part.num_ghosts * C * ((steps + 1) * size + 2 * 8)
        assert calls["all_reduce"] == 4 + (steps + 1) + 2 * 3
        assert received["all_reduce"] == 8 + 8 * C * (2 + 1 + 2) + (steps + 1) * 24 * C + 2 * 8 * C * (1 + 2 + 1)


def check_leave_one_edge_out_with_ghost_rows(group: dist.ProcessGroup) -> None:
    for dtype in DTYPES:
        whole = graph.knn_graph(features(dtype), K)
        propagated, along = (normal(n, *m, seed=6, dtype=dtype) for n, m in ((N, (C,)), (whole.num_edges, ())))
        propagated.requires_grad_()
        expected = ops.leave_one_edge_out(whole.crow, whole.col, whole.reverse, whole.weight, propagated)
        (gradient,) = torch.autograd.grad((along * expected).sum(), propagated)
        part, own = split(whole, group, even=False)
        mine = propagated.detach()[own].requires_grad_()
        edges = entries(whole, own)
        with counted() as (calls, received):
            actual = graph.leave_one_edge_out(part, mine)
        assert calls == {"all_to_all": 2}
        assert received["all_to_all"] == part.num_ghosts * (C * dtype.itemsize + 8)
        assert_close(actual.detach(), expected.detach()[edges])
        (own_gradient,) = torch.autograd.grad((along[edges] * actual).sum(), mine)
        atol = (1e-5 if dtype == torch.float32 else 1e-12) * float(gradient.abs().max())
        torch.testing.assert_close(own_gradient, gradient[own], rtol=0, atol=atol)


def labelled(seed: int) -> Tensor:
    """Some labels of each class, of different numbers, all of one class on one rank."""
    labels = torch.arange(N) % C
    return torch.where(integers(9, N, seed=seed) == 0, labels, -1)


def check_label_propagation_on_a_split_graph(group: dist.ProcessGroup) -> None:
    for dtype, even, block in ((torch.float32, False, None), (torch.float64, True, 3)):
        whole = graph.knn_graph(features(dtype), K)
        labels = labelled(7)
        expected = graph.label_propagation(whole, labels, num_classes=C + 1)
        part, own = split(whole, group, even=even)
        actual = graph.label_propagation(part, labels[own], num_classes=C + 1, class_block=block)
        assert actual.dtype == dtype
        assert_close(actual, expected[own])
        assert torch.equal(actual.argmax(dim=1), expected[own].argmax(dim=1))


def check_mixed_label_propagation_on_a_split_graph(group: dist.ProcessGroup) -> None:
    labels = labelled(8)
    for dtype, balance in ((torch.float32, True), (torch.float64, False)):
        whole = graph.knn_graph(features(dtype), K)
        settings = {"normalize_confidence": True, "balance": balance}
        expected = graph.mixed_label_propagation(whole, labels, **settings)
        part, own = split(whole, group, even=balance)
        actual = graph.mixed_label_propagation(part, labels[own], **settings)
        assert torch.equal(actual.pseudo_labels, expected.pseudo_labels[own])
        for name in ("scores", "probs", "confidence", "propagated"):
            assert_close(getattr(actual, name), getattr(expected, name)[own])
        assert_close(actual.dissimilarity, expected.dissimilarity[entries(whole, own)])
        assert int((actual.iterations - expected.iterations).abs().max()) <= 1
    given = graph.mixed_label_propagation(part, labels[own], dissimilarity=actual.dissimilarity, **settings)
    assert torch.equal(given.pseudo_labels, actual.pseudo_labels)


def check_estimators_on_a_split_graph(group: dist.ProcessGroup) -> None:
    from ssmkernels.estimators import LabelPropagation, MixedLabelPropagation

    whole = graph.knn_graph(features(torch.float64), K)
    names = np.array(["d", "c", "b", "a", -1], dtype=object)[labelled(8).numpy()]
    part, own = split(whole, group, even=False)
    for estimator in (LabelPropagation, MixedLabelPropagation):
        expected = estimator(affinity="precomputed").fit(whole, names)
        actual = estimator(affinity="precomputed").fit(part, names[own])
        assert np.array_equal(actual.classes_, expected.classes_)
        assert np.array_equal(actual.transduction_, expected.transduction_[own])
        np.testing.assert_allclose(
            actual.label_distributions_, expected.label_distributions_[own], rtol=1e-6, atol=1e-9
        )
    with pytest.raises(ValueError, match="it judges no new points"):
        actual.predict(np.zeros((1, N)))
    with pytest.raises(ValueError, match="which needs affinity='precomputed'"):
        LabelPropagation().fit(part, names[own])


def check_weak_edges_and_parts_without_labels(group: dist.ProcessGroup) -> None:
    """Two cliques that a weak edge joins, one that nothing joins to them, and nodes without edges."""
    matrix = torch.zeros(26, 26, dtype=torch.float64)
    for nodes in (slice(0, 8), slice(8, 16), slice(16, 22)):
        matrix[nodes, nodes] = 1
    matrix.fill_diagonal_(0)
    matrix[7, 8] = matrix[8, 7] = 1e-10
    whole = Graph.from_scipy(csr_array(matrix.numpy()))
    labels = torch.full((26,), -1)
    labels[[0, 15]] = torch.tensor([0, 1])
    part = SplitGraph.from_graph(whole, group)
    own = part.nodes
    components, count = part.components
    assert count == whole.components[1] == 6
    together = (whole.components[0][own, None] == whole.components[0][own]).equal(components[:, None] == components)
    assert together
    expected = graph.label_propagation(whole, labels)
    assert_close(graph.label_propagation(part, labels[own]), expected[own])
    mixed, here = graph.mixed_label_propagation(whole, labels), graph.mixed_label_propagation(part, labels[own])
    assert torch.equal(here.pseudo_labels, mixed.pseudo_labels[own])
    assert_close(here.scores, mixed.scores[own])


def check_split_systems_refuse(group: dist.ProcessGroup) -> None:
    part, own = split(graph.knn_graph(features(torch.float64), K), group, even=True)
    with pytest.raises(ValueError, match="labels must have at least one label"):
        graph.label_propagation(part, torch.full((part.num_rows,), -1))
    with pytest.raises(ValueError, match=rf"labels must be \[N\] = \[{part.num_rows}\]"):
        graph.label_propagation(part, torch.zeros(N, dtype=torch.int64))
    one_way = torch.zeros_like(part.weight)
    one_way[part.col >= part.num_rows] = 1.0 + dist.get_rank(group)
    with pytest.raises(ValueError, match="dissimilarity must be symmetric"):
        graph.mixed_label_propagation(part, labelled(7)[own], dissimilarity=one_way)
