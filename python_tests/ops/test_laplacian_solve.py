# SPDX-License-Identifier: BSD-3-Clause
"""laplacian_solve at any scale: of weights, of right sides, of the ties between parts of a graph; NaN; nearly
separate clusters.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from fractions import Fraction

import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from ssmkernels import ops, reference
from ssmkernels.graph import Graph, SplitGraph, knn_graph, laplacian_solve

REAL = [torch.float64, torch.float32]
MU = 1 / 99


def sparse(edges, nodes, dtype):
    """crow, col and weight of a graph given by (i, j, weight), each pair once."""
    rows, col, weight = (torch.tensor(values) for values in zip(*edges, strict=True))
    rows, col, weight = torch.cat([rows, col]), torch.cat([col, rows]), weight.to(torch.float64).repeat(2)
    order = (rows * nodes + col).argsort()
    crow = torch.zeros(nodes + 1, dtype=torch.int64)
    crow[1:] = torch.bincount(rows, minlength=nodes).cumsum(0)
    return crow, col[order], weight[order].to(dtype)


def path(nodes):
    return [(i, i + 1, 1.0) for i in range(nodes - 1)], nodes, {0: 0, nodes - 1: 1}


def star(leaves):
    return [(0, i, 1.0 + i % 3) for i in range(1, leaves + 1)], leaves + 1, {1: 0, 2: 1}


def barbell(size, bridge=1.0, labels=None):
    """Two cliques, and an edge between the last node of the first and the first of the second."""
    clique = [(i, j, 1.0 + (i + j) % 2) for i, j in itertools.combinations(range(size), 2)]
    other = [(i + size, j + size, weight) for i, j, weight in clique]
    return [*clique, *other, (size - 1, size, bridge)], 2 * size, labels or {1: 0, size + 1: 1}


GRAPHS = {
    "path": path(40),
    "star": star(20),
    "barbell": barbell(10),
    "weak bridge": barbell(10, bridge=1e-9),
    "half without labels": barbell(10, bridge=1e-9, labels={0: 0, 9: 1}),
}


def system(name, scale, dtype):
    """crow, col, weight, diagonal and right side (of the deviation: its columns sum to 0) of label propagation with
    two labels.
    """
    edges, nodes, labels = GRAPHS[name]
    crow, col, weight = sparse([(i, j, scale * weight) for i, j, weight in edges], nodes, dtype)
    diagonal, rhs = torch.zeros(nodes, dtype=dtype), torch.zeros(nodes, 2, dtype=dtype)
    for node, label in labels.items():
        diagonal[node] = MU
        rhs[node] = -0.5
        rhs[node, label] = 0.5
    return crow, col, weight, diagonal, rhs


def exact_labels(crow, col, weight, diagonal, rhs):
    """The larger of the two columns of the solution in every row, in rational numbers."""
    nodes = len(diagonal)
    rows = [[Fraction(0)] * nodes + [Fraction(b)] for b in (rhs[:, 1] - rhs[:, 0]).tolist()]
    for i in range(nodes):
        rows[i][i] = Fraction(diagonal[i].item())
        for e in range(crow[i], crow[i + 1]):
            w = Fraction(weight[e].item())
            rows[i][i] += w
            rows[i][col[e]] -= w
    for k in range(nodes):
        for i in range(k + 1, nodes):
            if rows[i][k] == 0:
                continue
            factor = rows[i][k] / rows[k][k]
            for j in range(k, nodes + 1):
                if rows[k][j] != 0:
                    rows[i][j] -= factor * rows[k][j]
    x = [Fraction(0)] * nodes
    for i in reversed(range(nodes)):
        x[i] = (rows[i][nodes] - sum(rows[i][j] * x[j] for j in range(i + 1, nodes))) / rows[i][i]
    return torch.tensor([int(value > 0) for value in x])


@pytest.mark.arithmetic
@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e-3, 1.0, 1e3, 1e6, 1e12])
@pytest.mark.parametrize("name", GRAPHS)
def test_labels_at_any_scale_of_the_weights(name, scale, dtype):
    crow, col, weight, diagonal, rhs = system(name, scale, dtype)
    out = ops.laplacian_solve(crow, col, weight, None, diagonal, rhs, rtol=1e-4)
    assert out.residual.max() <= 1e-4
    deviation = out.solution.double()  # less the constant, which the columns of the right side sum to 0 against
    deviation -= (diagonal[:, None] * deviation).sum(dim=0) / diagonal.sum()
    assert deviation.argmax(dim=1).tolist() == exact_labels(crow, col, weight, diagonal, rhs).tolist()


@pytest.mark.arithmetic
@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e-3, 1.0])
def test_labels_of_real_points(scale, dtype):
    digits = load_digits()
    graph = knn_graph(torch.from_numpy(digits.data), 10).to(torch.float64)
    labeled = torch.arange(0, 1797, 60)
    diagonal, rhs = torch.zeros(1797, dtype=torch.float64), torch.zeros(1797, 10, dtype=torch.float64)
    diagonal[labeled] = MU
    rhs[labeled] = -0.1
    rhs[labeled, torch.from_numpy(digits.target)[labeled]] += 1
    rhs -= diagonal[:, None] * rhs.sum(dim=0) / diagonal.sum()
    given = (scale * graph.weight).to(dtype), None, diagonal.to(dtype), rhs.to(dtype)
    ours = ops.laplacian_solve(graph.crow, graph.col, *given, rtol=1e-6)
    exact = reference.laplacian_solve(graph.crow, graph.col, scale * graph.weight, None, diagonal, rhs)
    assert ours.residual.max() <= 1e-6
    assert (ours.solution.argmax(dim=1) == exact.solution.argmax(dim=1)).double().mean() >= 0.999


def small_problem(dtype, columns=3):
    draw = torch.Generator().manual_seed(0)
    crow, col, weight = sparse(barbell(6)[0], 12, dtype)
    diagonal = torch.rand(12, generator=draw, dtype=torch.float64).to(dtype) + 0.1
    return crow, col, weight, diagonal, torch.randn(12, columns, generator=draw, dtype=torch.float64).to(dtype)


@pytest.mark.arithmetic
@pytest.mark.parametrize(
    ("dtype", "matrix", "size"),
    [
        *[
            (torch.float64, *sizes)
            for sizes in itertools.product([1e-150, 1e-12, 1.0, 1e12, 1e150], [1e-150, 1.0, 1e150])
        ],
        *[
            (torch.float64, *sizes)
            for sizes in [(1.0, 1e-315), (1e10, 1e-300), (1.0, 1e300), (1e-300, 1e-300), (1e300, 1e300)]
        ],
        *[
            (torch.float32, *sizes)
            for sizes in [(1.0, 1e-41), (1e-6, 1e-41), (1.0, 1e37), (1e30, 1e37), (1e-30, 1e-30), (1e-12, 1.0)]
        ],
    ],
)
def test_values_and_gradients_of_any_size(dtype, matrix, size):
    """Numbers of any size: the solution is that of moderate ones times the ratio, and so are the gradients."""
    crow, col, weight, diagonal, rhs = small_problem(dtype)
    rhs = (rhs * size).double() / size  # subnormal numbers have few digits: both solve for the same ones
    grad = torch.linspace(-1, 1, 36, dtype=torch.float64).view(12, 3)

    def solve(dtype, matrix, size):
        given = [
            x.double().mul(factor).to(dtype).requires_grad_()
            for x, factor in ((weight, matrix), (diagonal, matrix), (rhs, size))
        ]
        out = ops.laplacian_solve(crow, col, given[0], None, *given[1:], rtol=1e-5)
        assert out.residual.max() <= 1e-5 and out.iterations.min() > 0
        return out.solution, *torch.autograd.grad(out.solution, given, grad.to(dtype))

    ratio = size / matrix
    factors = (ratio, ratio / matrix, ratio / matrix, 1 / matrix)
    tiny, largest = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    for ours, expected, factor in zip(solve(dtype, matrix, size), solve(torch.float64, 1.0, 1.0), factors, strict=True):
        if not 1e-300 < factor < 1e300 or not tiny < factor * expected.abs().max() < largest / 10:
            continue  # not representable
        torch.testing.assert_close(ours.double() / factor, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_gradients_of_a_tiny_incoming_gradient(dtype):
    """A saturated loss sends back gradients below the smallest normal number: what comes out is finite."""
    crow, col, weight, diagonal, rhs = small_problem(dtype)
    given = [x.requires_grad_() for x in (weight, diagonal, rhs)]
    solution = ops.laplacian_solve(crow, col, weight, None, diagonal, rhs).solution
    cross_entropy(solution * 60, solution.argmax(dim=1)).backward()
    assert all(x.grad.isfinite().all() for x in given)


def test_a_right_side_that_is_nothing_beside_the_start_is_never_converged():
    """Their ratio is such that squares of the right side vanish: the column keeps its start and says so."""
    diagonal = torch.tensor([0.66, 0.66], dtype=torch.float64)
    rhs = torch.tensor([[-1e-309, 1.0], [2e-309, -1.0]], dtype=torch.float64)
    start = torch.tensor([[0.66, 0.66], [0.62, 0.62]], dtype=torch.float64)
    empty = torch.zeros(3, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    split = SplitGraph.from_graph(Graph(*empty, torch.zeros(0, dtype=torch.float64)))
    for solve in (
        functools.partial(ops.laplacian_solve, *empty, torch.zeros(0, dtype=torch.float64)),
        functools.partial(laplacian_solve, split),
    ):
        with pytest.warns(RuntimeWarning, match="did not converge"):
            out = solve(None, diagonal, rhs, initial=start, rtol=1.0)
        assert out.residual[0] == float("inf") and out.residual[1] <= 1
        assert out.solution[:, 0].equal(start[:, 0])


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_is_never_converged(bad, dtype):
    """Below the checks of values, which a GPU and compiled code do not have."""
    crow, col, weight, diagonal, rhs = small_problem(dtype, columns=20)
    solve = torch.ops.ssmkernels.laplacian_solve
    clean, poisoned = rhs, rhs.clone()
    poisoned[5, 3] = bad
    expected = solve(crow, col.int(), weight, None, diagonal, clean, None, 1e-6, 100, True)
    ours = solve(crow, col.int(), weight, None, diagonal, poisoned, None, 1e-6, 100, True)
    others = [c for c in range(20) if c != 3]
    assert ours[0][:, 3].isnan().all() and ours[2][3].isnan()
    assert ours[0][:, others].equal(expected[0][:, others]) and ours[2][others].equal(expected[2][others])
    weight[4] = bad
    solution, _, residual, _ = solve(crow, col.int(), weight, None, diagonal, clean, None, 1e-6, 100, True)
    assert solution.isnan().all() and residual.isnan().all()


def test_nan_is_named(monkeypatch):
    crow, col, weight, diagonal, rhs = small_problem(torch.float64)
    monkeypatch.setattr(ops.graph.check, "check_finite", lambda *_: None)
    rhs[2, 1] = float("nan")
    with pytest.warns(RuntimeWarning, match=r"1 of 3 columns .* NaN"):
        out = ops.laplacian_solve(crow, col, weight, None, diagonal, rhs)
    assert out.residual.isnan().tolist() == [False, True, False]


def nearly_separate_clusters(nodes, classes, neighbours):
    """Random edges within clusters, and one of 1e-3 per 50 nodes to another cluster; four labels a cluster; the
    deviation's right side.
    """
    draw = torch.Generator().manual_seed(0)
    cluster = torch.arange(nodes) % classes
    other = torch.randint(nodes // classes, (nodes, neighbours // 2), generator=draw) * classes + cluster[:, None]
    rows, col = torch.arange(nodes).repeat_interleave(neighbours // 2), other.flatten()
    weight = torch.rand(len(rows), generator=draw, dtype=torch.float64) + 0.1
    bridges = torch.arange(0, nodes, 50)
    rows, col = torch.cat([rows, bridges]), torch.cat([col, (bridges + 1) % nodes])
    weight = torch.cat([weight, torch.full((len(bridges),), 1e-3, dtype=torch.float64)])
    keep = rows != col
    matrix = torch.sparse_coo_tensor(
        torch.stack([rows, col])[:, keep], weight[keep], (nodes, nodes), check_invariants=False
    )
    matrix = (matrix + matrix.t()).coalesce()
    rows, col = matrix.indices()
    crow = torch.zeros(nodes + 1, dtype=torch.int64)
    crow[1:] = torch.bincount(rows, minlength=nodes).cumsum(0)
    labeled = torch.arange(4 * classes)
    diagonal, rhs = torch.zeros(nodes, dtype=torch.float64), torch.zeros(nodes, classes, dtype=torch.float64)
    diagonal[labeled] = MU
    rhs[labeled] = -1 / classes
    rhs[labeled, cluster[labeled]] += 1
    return crow, col, matrix.values(), diagonal, rhs


@pytest.mark.arithmetic
def test_float32_reaches_its_tolerance_on_nearly_separate_clusters():
    crow, col, *given = nearly_separate_clusters(10_000, 100, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        double, single = (
            ops.laplacian_solve(crow, col, weight, None, diagonal, rhs, rtol=1e-4)
            for weight, diagonal, rhs in (given, [x.float() for x in given])
        )
    assert single.residual.max() <= 1e-4
    assert (single.solution.argmax(dim=1) == double.solution.argmax(dim=1)).double().mean() >= 0.9998
    assert single.iterations.sum() <= 1.5 * double.iterations.sum()
