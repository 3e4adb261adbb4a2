# SPDX-License-Identifier: BSD-3-Clause
"""Label propagation on a mesh of rows and classes, 2 × 2 ranks, against one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from shards import assert_close, integers, normal
from split_solve_checks import DTYPES, K, N, entries, features, labelled
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from traffic import counted

from ssmkernels import graph, ops
from ssmkernels.distributed import split_rows
from ssmkernels.estimators import LabelPropagation, MixedLabelPropagation
from ssmkernels.graph import Graph, SplitGraph

CLASSES = 5  # 2 on one rank, 3 on the other


def assert_solved(actual: Tensor, expected: Tensor) -> None:
    """Two solutions to a relative residual of 1e-8, the tolerance of label propagation."""
    size = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=(1e-5 if actual.dtype == torch.float32 else 1e-7) * size)


def mesh_of_four() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("classes", "rows"))


def own_rows(mesh: DeviceMesh) -> slice:
    return split_rows(N, mesh.get_local_rank("rows"), 2)


def check_on_four_mesh_has_the_labels_of_one_process(group: dist.ProcessGroup) -> None:
    mesh = mesh_of_four()
    labels = torch.where(labelled(8) >= 0, torch.arange(N) % CLASSES, -1)
    for dtype, classes, block in ((torch.float32, CLASSES, None), (torch.float64, CLASSES, 2), (torch.float64, 7, 2)):
        whole = graph.knn_graph(features(dtype), K)
        settings = {"normalize_confidence": True, "num_classes": classes, "class_block": block}
        expected = graph.mixed_label_propagation(whole, labels, **settings)
        own = own_rows(mesh)
        split = graph.knn_graph(features(dtype)[own], K, group=mesh)
        assert split.columns(classes) == split_rows(classes, mesh.get_local_rank("classes"), 2)
        columns = split.columns(classes)
        actual = graph.mixed_label_propagation(split, labels[own], **settings)
        assert torch.equal(actual.pseudo_labels, expected.pseudo_labels[own])
        assert_solved(actual.confidence, expected.confidence[own])
        for name in ("scores", "probs", "propagated"):
            assert_solved(getattr(actual, name), getattr(expected, name)[own, columns])
        assert_solved(actual.dissimilarity, expected.dissimilarity[entries(whole, own)])
        assert int((actual.iterations - expected.iterations[columns]).abs().max()) <= 1
        plain = graph.label_propagation(split, labels[own], num_classes=classes)
        assert_solved(plain, graph.label_propagation(whole, labels, num_classes=classes)[own, columns])


def check_on_four_mesh_of_a_whole_graph_and_fewer_classes_than_ranks(group: dist.ProcessGroup) -> None:
    """One class: the first of the ranks that share classes out has none."""
    mesh = mesh_of_four()
    whole = graph.knn_graph(features(torch.float64), K)
    split = SplitGraph.from_graph(whole, mesh, partition="cells")
    assert f"classes {mesh.get_local_rank('classes')} of 2" in repr(split)
    for classes in (1, 2):
        labels = torch.where(integers(5, N, seed=3) == 0, torch.arange(N) % classes, -1)
        expected = graph.mixed_label_propagation(whole, labels)
        actual = graph.mixed_label_propagation(split, labels[split.ids])
        assert actual.scores.shape == (split.num_rows, len(range(classes)[split.columns(classes)]))
        assert torch.equal(actual.pseudo_labels, expected.pseudo_labels[split.ids])
        assert_solved(actual.confidence, expected.confidence[split.ids])


def check_on_four_mesh_leaves_one_edge_out_by_7_numbers_an_edge(group: dist.ProcessGroup) -> None:
    mesh = mesh_of_four()
    for dtype in DTYPES:
        looped = graph.knn_graph(features(dtype), K).to_scipy().tolil()
        looped[3, 3] = looped[70, 70] = 0.5
        whole = Graph.from_scipy(looped.tocsr())
        propagated, along = (normal(n, *m, seed=6, dtype=dtype) for n, m in ((N, (CLASSES,)), (whole.num_edges, ())))
        propagated[:40] *= 50  # softmaxes of one class, where another rank's sums vanish
        propagated.requires_grad_()
        expected = ops.leave_one_edge_out(whole.crow, whole.col, whole.reverse, whole.weight, propagated)
        (gradient,) = torch.autograd.grad((along * expected).sum(), propagated)
        split = SplitGraph.from_graph(whole, mesh)
        own, columns, edges = split.nodes, split.columns(CLASSES), entries(whole, split.nodes)
        mine = propagated.detach()[own, columns].clone().requires_grad_()
        with counted() as (calls, received):
            actual = graph.leave_one_edge_out(split, mine)
        places = torch.cat([torch.arange(own.start, own.stop), split.ghosts])
        pairs = int((places[split.rows] <= places[split.col.long()]).sum())
        assert calls["all_reduce"] == 3
        assert received["all_reduce"] == 8 + 7 * 8 * pairs
        assert_close(actual.detach(), expected.detach()[edges])
        (own_gradient,) = torch.autograd.grad((along[edges] * actual).sum(), mine)
        atol = (1e-5 if dtype == torch.float32 else 1e-12) * float(gradient.abs().max())
        torch.testing.assert_close(own_gradient, gradient[own, columns], rtol=0, atol=atol)


def check_on_four_mesh_estimators(group: dist.ProcessGroup) -> None:
    mesh = mesh_of_four()
    whole = graph.knn_graph(features(torch.float64), K)
    names = np.array(["d", "c", "b", "a", -1], dtype=object)[labelled(8).numpy()]
    split = SplitGraph.from_graph(whole, mesh)
    own = split.nodes
    for estimator in (LabelPropagation, MixedLabelPropagation):
        expected = estimator(affinity="precomputed").fit(whole, names)
        actual = estimator(affinity="precomputed").fit(split, names[own])
        assert np.array_equal(actual.transduction_, expected.transduction_[own])
        np.testing.assert_allclose(
            actual.label_distributions_, expected.label_distributions_[own], rtol=1e-6, atol=1e-9
        )
        assert abs(actual.n_iter_ - expected.n_iter_) <= 1


def check_on_four_mesh_refuses(group: dist.ProcessGroup) -> None:
    other = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "rows"))
    with pytest.raises(ValueError, match="group must be a mesh with the dimensions 'rows' and 'classes'"):
        graph.knn_graph(features(torch.float32), K, group=other)
