# SPDX-License-Identifier: BSD-3-Clause
"""What is particular to the ops of the graph family; what every op must show is in test_contract.py."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import CASES, judge

from ssmkernels import ops, reference

SIZES = [(1, 1), (3, 2), (17, 3), (40, 10), (123, 13), (123, 17), (130, 33), (507, 100), (64, 300)]  # N, C
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
REAL = [torch.float64, torch.float32]


def sparse(matrix):
    """crow, col, reverse and the values of a dense symmetric matrix."""
    rows, col = matrix.nonzero(as_tuple=True)
    crow = torch.zeros(len(matrix) + 1, dtype=torch.int64, device=matrix.device)
    crow[1:] = torch.bincount(rows, minlength=len(matrix)).cumsum(0)
    position = torch.zeros(matrix.shape, dtype=torch.int64, device=matrix.device)
    position[rows, col] = torch.arange(len(col), device=matrix.device)
    return crow, col.int(), position[col, rows], matrix[rows, col]


class Problem:
    """A random graph with rows of very different lengths; values are drawn in float64 and rounded."""

    def __init__(self, N, C, dtype=torch.float64, device="cpu", seed=0, scale=1.0, isolated=False):
        draw = torch.Generator().manual_seed(seed)

        def normal(*size):
            return torch.randn(*size, generator=draw, dtype=torch.float64)

        popular = torch.rand(N, 1, generator=draw, dtype=torch.float64) ** 2
        linked = torch.rand(N, N, generator=draw, dtype=torch.float64) < (popular * popular.t() * 1.5 + 4 / N)
        weight = normal(N, N).abs().to(dtype).double() * (linked | linked.t())
        weight = weight.triu(1) + weight.triu(1).t()
        if isolated and N > 2:
            weight[1] = weight[:, 1] = 0
        crow, col, reverse, values = sparse(weight)
        upper = torch.rand(N, N, generator=draw, dtype=torch.float64).to(dtype).double()
        dissimilarity = (upper.triu() + upper.triu(1).t())[
            torch.repeat_interleave(torch.arange(N), crow.diff()), col.long()
        ]
        diagonal = torch.zeros(N, dtype=torch.float64)
        diagonal[:: max(1, N // 5)] = 0.5
        self.crow, self.col, self.reverse = crow.to(device), col.to(device), reverse.to(device)
        self.weight, self.dissimilarity, self.diagonal = (
            x.to(device, dtype) for x in (values, dissimilarity, diagonal)
        )
        self.rhs, self.propagated = normal(N, C).to(device, dtype), (scale * normal(N, C) / 5).to(device, dtype)
        self.grad_edges, self.grad_matrix = normal(len(values)).to(device), normal(N, C).to(device)

    def double(self):
        other = object.__new__(Problem)
        other.__dict__ = {
            k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in self.__dict__.items()
        }
        return other

    def leave_one_edge_out(self, package, **options):
        """The weights, and the gradients of weight and propagated."""
        weight, propagated = (x.detach().clone().requires_grad_() for x in (self.weight, self.propagated))
        out = package.leave_one_edge_out(self.crow, self.col, self.reverse, weight, propagated, **options)
        return out.detach(), *torch.autograd.grad(out, (weight, propagated), self.grad_edges.to(out.dtype))

    def laplacian_solve(self, package, **options):
        """The solution, and the gradients of weight, dissimilarity, diagonal and rhs."""
        given = [
            x.detach().clone().requires_grad_() for x in (self.weight, self.dissimilarity, self.diagonal, self.rhs)
        ]
        out = package.laplacian_solve(self.crow, self.col, *given, **options).solution
        return out.detach(), *torch.autograd.grad(out, given, self.grad_matrix.to(out.dtype))


@pytest.mark.arithmetic
@pytest.mark.parametrize("preconditioner", ["jacobi", "none"])
@pytest.mark.parametrize("with_dissimilarity", [False, True])
@pytest.mark.parametrize("rtol", [1e-3, 1e-6, 1e-10])
def test_every_column_reaches_its_tolerance(rtol, with_dissimilarity, preconditioner, device):
    problem = Problem(200, 37, device=device)
    dissimilarity = problem.dissimilarity if with_dissimilarity else None
    # Each column has its own size
    scaled = problem.rhs * torch.logspace(-200, 200, 37, dtype=torch.float64, device=device)
    graph = (problem.crow, problem.col, problem.weight, dissimilarity, problem.diagonal)
    out = ops.laplacian_solve(*graph, scaled, rtol=rtol, preconditioner=preconditioner)
    assert out.residual.max() <= rtol * 1.01 and out.iterations.min() > 0 and out.iterations.dtype == torch.int64
    rows = torch.repeat_interleave(torch.arange(200, device=device), problem.crow.diff())
    values = -problem.weight if dissimilarity is None else dissimilarity - problem.weight
    sums = problem.weight if dissimilarity is None else dissimilarity + problem.weight
    diagonal = problem.diagonal.index_add(0, rows, sums)
    unit = scaled / scaled.abs().amax(0)
    x = out.solution / scaled.abs().amax(0)
    product = diagonal[:, None] * x + torch.zeros_like(x).index_add(0, rows, values[:, None] * x[problem.col.long()])
    left, size = (((value / diagonal[:, None]).norm(dim=0)) for value in (unit - product, unit))
    torch.testing.assert_close(left / size, out.residual, rtol=1e-2, atol=1e-12)


def test_columns_do_not_see_each_other(device):
    """A column is frozen when it has converged: alone or among others, the same bits."""
    problem = Problem(300, 20, device=device)
    problem.rhs[:, 3] = 0
    problem.rhs[:, 4:8] = problem.diagonal[:, None] * torch.arange(4, 8, device=device)  # the solution is constant
    graph = (problem.crow, problem.col, problem.weight, None, problem.diagonal)
    together = ops.laplacian_solve(*graph, problem.rhs)
    assert together.iterations.unique().numel() > 2
    for c in (0, 3, 7):
        alone = ops.laplacian_solve(*graph, problem.rhs[:, c : c + 1])
        assert alone.iterations[0] == together.iterations[c]
        torch.testing.assert_close(alone.solution[:, 0], together.solution[:, c], rtol=1e-12, atol=1e-14)
    assert together.iterations[3] == 0 and not together.solution[:, 3].any() and together.residual[3] == 0


def test_initial(device):
    problem = Problem(120, 9, device=device)
    graph = (problem.crow, problem.col, problem.weight, problem.dissimilarity, problem.diagonal)
    cold = ops.laplacian_solve(*graph, problem.rhs, rtol=1e-12)
    exact = ops.laplacian_solve(*graph, problem.rhs, initial=cold.solution, rtol=1e-9)
    assert not exact.iterations.any() and exact.solution.isfinite().all()
    torch.testing.assert_close(exact.solution, cold.solution, rtol=1e-12, atol=1e-14)
    near = ops.laplacian_solve(*graph, problem.rhs, initial=cold.solution * (1 + 1e-4), rtol=1e-9)
    plain = ops.laplacian_solve(*graph, problem.rhs, rtol=1e-9)
    assert near.iterations.double().mean() < plain.iterations.double().mean()
    zero = ops.laplacian_solve(*graph, torch.zeros_like(problem.rhs), initial=problem.rhs)
    assert not zero.solution.any() and not zero.iterations.any()


def test_jacobi_saves_iterations(device):
    problem = Problem(500, 4, device=device)
    graph = (problem.crow, problem.col, problem.weight, None, problem.diagonal, problem.rhs)
    jacobi, plain = (ops.laplacian_solve(*graph, preconditioner=name).iterations.max() for name in ("jacobi", "none"))
    assert jacobi < plain


def test_max_iter_is_reported(device):
    problem = Problem(300, 5, device=device)
    graph = (problem.crow, problem.col, problem.weight, None, problem.diagonal, problem.rhs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = ops.laplacian_solve(*graph, rtol=1e-12, max_iter=3)
    assert out.iterations.tolist() == [3] * 5 and out.residual.min() > 1e-6
    if device == "cpu":
        with pytest.warns(
            RuntimeWarning, match=r"5 of 5 columns did not converge to rtol = 1e-12 .* raise max_iter \(3\) or rtol"
        ):
            ops.laplacian_solve(*graph, rtol=1e-12, max_iter=3)


def two_components(device):
    """0-1-2 and 3-4, and 5 alone; the diagonal is 0 but at node 0."""
    weight = torch.zeros(6, 6, dtype=torch.float64)
    weight[0, 1] = weight[1, 2] = weight[3, 4] = 1.0
    crow, col, _, values = sparse(weight + weight.t())
    diagonal = torch.zeros(6, dtype=torch.float64)
    diagonal[0] = 1
    return crow.to(device), col.to(device), values.to(device), None, diagonal.to(device)


def test_singular_component(device):
    """The indicator of a component without diagonal is the null space: from 0 it stays out, from elsewhere it is
    kept.
    """
    graph = two_components(device)
    rhs = torch.zeros(6, 2, dtype=torch.float64, device=device)
    rhs[0, 0] = rhs[3, 1] = 1
    rhs[4, 1] = -1
    out = ops.laplacian_solve(*graph, rhs)
    torch.testing.assert_close(out.solution[:3, 0], torch.ones(3, dtype=torch.float64, device=device))
    assert not out.solution[3:, 0].any() and not out.solution[:3, 1].any()
    torch.testing.assert_close(out.solution[3:, 1].cpu(), torch.tensor([0.5, -0.5, 0.0], dtype=torch.float64))
    shifted = torch.full_like(rhs, 7.0)
    out = ops.laplacian_solve(*graph, rhs, initial=shifted)
    torch.testing.assert_close(
        out.solution[3:].cpu(), torch.tensor([[7.0, 7.5], [7.0, 6.5], [7.0, 7.0]], dtype=torch.float64)
    )


def test_right_side_outside_the_range(device):
    graph = two_components(device)
    rhs = torch.zeros(6, 3, dtype=torch.float64, device=device)
    rhs[3, 0] = rhs[5, 1] = rhs[0, 2] = 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = ops.laplacian_solve(*graph, rhs)
    assert out.solution.isfinite().all() and (out.residual > 0.5).tolist() == [True, True, False]
    if device == "cpu":
        assert "2 of 3 columns did not converge" in str(caught[0].message)


@pytest.mark.parametrize("kind", ["off-diagonal", "diagonal", "zero diagonal"])
def test_indefinite_matrix_shows_its_curvature(kind, device):
    """Negative weights, as LPDR has them: the least curvature is at most 0, and nothing is silently wrong."""
    problem = Problem(60, 4, device=device)
    weight = problem.weight.clone()
    edge = 0 if kind == "off-diagonal" else slice(problem.crow[0], problem.crow[1])
    factor = {"off-diagonal": -0.9, "diagonal": -3.0, "zero diagonal": 0.0}[kind]
    if kind == "off-diagonal":
        weight *= -1
        weight[problem.weight < 0.7] *= -1
    else:
        weight[edge] *= factor
        weight[problem.reverse[edge]] = weight[edge].clone()
    diagonal = problem.diagonal if kind == "off-diagonal" else torch.zeros_like(problem.diagonal)
    rhs = problem.rhs
    solution, iterations, residual, curvature = ops.graph.solve_with_curvature(
        problem.crow, problem.col, weight, None, diagonal, rhs, rtol=1e-6, max_iter=1000
    )
    assert solution.isfinite().all()
    if kind == "zero diagonal":  # a node whose edges all weigh nothing is only isolated
        assert (curvature > 0).all() or (residual > 1e-3).any()
        return
    assert (curvature <= 0).all() and (residual > 1e-3).all()
    if kind == "diagonal":
        assert not iterations.any() and not solution.any()


def test_constants_per_node_change_nothing(device):
    problem = Problem(50, 7, device=device)
    arguments = (problem.crow, problem.col, problem.reverse, problem.weight)
    shift = torch.linspace(-100, 100, 50, dtype=torch.float64, device=device)[:, None]
    torch.testing.assert_close(
        ops.leave_one_edge_out(*arguments, problem.propagated + shift),
        ops.leave_one_edge_out(*arguments, problem.propagated),
    )


def test_flat_labels_are_never_dissimilar(device):
    problem = Problem(50, 7, torch.float32, device)
    out = ops.leave_one_edge_out(
        problem.crow, problem.col, problem.reverse, problem.weight, torch.ones(50, 7, device=device)
    )
    assert out.abs().max() < 1e-12


@pytest.mark.parametrize("nodes", [2, 4, 6, 41, 64])
def test_complete_graph_with_loops(nodes, device):
    """Every pair has one owner, also two nodes N/2 apart, and a node with itself."""
    draw = torch.Generator().manual_seed(0)
    matrix = torch.rand(nodes, nodes, generator=draw, dtype=torch.float64) + 0.1
    crow, col, reverse, weight = (x.to(device) for x in sparse(matrix + matrix.t()))
    propagated = torch.randn(nodes, 5, generator=draw, dtype=torch.float64).to(device) / nodes
    given = [x.requires_grad_() for x in (weight, propagated)]
    ours, expected = (package.leave_one_edge_out(crow, col, reverse, *given) for package in (ops, reference))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    grad = torch.randn(nodes * nodes, generator=draw, dtype=torch.float64).to(device)
    for a, b in zip(torch.autograd.grad(ours, given, grad), torch.autograd.grad(expected, given, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    diagonal = torch.ones(nodes, dtype=torch.float64, device=device)
    for dissimilarity in (None, ours.detach()):
        ours_x, expected_x = (
            package.laplacian_solve(crow, col, weight, dissimilarity, diagonal, propagated, **options)
            for package, options in ((ops, {"rtol": 1e-13}), (reference, {}))
        )
        torch.testing.assert_close(ours_x.solution, expected_x.solution, rtol=1e-9, atol=1e-11)


def test_large_graph_is_renumbered():
    """From some thousand nodes on, rows are computed in another order; the result is in the order given."""
    nodes, draw = 5001, torch.Generator().manual_seed(0)
    order = torch.randperm(nodes, generator=draw)
    a, b = order[:-1], order[1:]  # a path through all nodes, in no order
    rows, cols = torch.cat([a, b]), torch.cat([b, a])
    by_row = (rows * nodes + cols).argsort()
    crow = torch.zeros(nodes + 1, dtype=torch.int64)
    crow[1:] = torch.bincount(rows, minlength=nodes).cumsum(0)
    diagonal = torch.rand(nodes, generator=draw, dtype=torch.float64) + 0.1
    col, weight = cols[by_row], torch.ones(2 * nodes - 2, dtype=torch.float64)
    rhs = torch.randn(nodes, 3, generator=draw, dtype=torch.float64)
    initial = torch.randn(nodes, 3, generator=draw, dtype=torch.float64)
    x = ops.laplacian_solve(crow, col, weight, None, diagonal, rhs, rtol=1e-10, initial=initial).solution
    degree = crow.diff().double()
    product = (diagonal + degree)[:, None] * x - torch.zeros_like(x).index_add(0, rows, x[cols])
    torch.testing.assert_close(product, rhs, rtol=1e-8, atol=1e-8)


def test_empty(device):
    crow, nothing = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(0, device=device)
    ids = torch.zeros(0, dtype=torch.int64, device=device)
    assert ops.leave_one_edge_out(crow, ids, ids, nothing, torch.zeros(0, 3, device=device)).shape == (0,)
    out = ops.laplacian_solve(crow, ids, nothing, None, nothing, torch.zeros(0, 3, device=device))
    assert out.solution.shape == (0, 3) and out.iterations.tolist() == [0] * 3 and out.residual.tolist() == [0] * 3
    problem = Problem(5, 3, device=device)
    none = ops.laplacian_solve(problem.crow, problem.col, problem.weight, None, problem.diagonal, problem.rhs[:, :0])
    assert none.solution.shape == (5, 0) and none.iterations.shape == (0,)
    alone = torch.zeros(5, dtype=torch.int64, device=device)
    edgeless = ops.laplacian_solve(
        alone, ids, nothing, None, torch.full((4,), 4.0, device=device), torch.ones(4, 2, device=device)
    )
    assert edgeless.solution.tolist() == [[0.25, 0.25]] * 4


@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=str)
def test_non_contiguous_and_id_types(ids, device):
    problem = Problem(70, 12, device=device)
    expected = (*problem.leave_one_edge_out(ops), *problem.laplacian_solve(ops))
    for name in ("crow", "col", "reverse"):
        tensor = getattr(problem, name).to(ids)
        setattr(problem, name, torch.stack([tensor, tensor], dim=1)[:, 0])
    for name in ("weight", "dissimilarity", "diagonal"):
        tensor = getattr(problem, name)
        setattr(problem, name, torch.stack([tensor, torch.zeros_like(tensor)], dim=1)[:, 0])
    for name in ("rhs", "propagated"):
        setattr(problem, name, getattr(problem, name).t().contiguous().t())
    assert not problem.rhs.is_contiguous() and not problem.weight.is_contiguous()
    for ours, other in zip((*problem.leave_one_edge_out(ops), *problem.laplacian_solve(ops)), expected, strict=True):
        torch.testing.assert_close(ours, other)


def test_gradient_of_the_right_side_alone(device):
    problem = Problem(30, 4, device=device)
    rhs = problem.rhs.clone().requires_grad_()
    solution = ops.laplacian_solve(
        problem.crow, problem.col, problem.weight, None, problem.diagonal, rhs, rtol=1e-12
    ).solution
    (grad,) = torch.autograd.grad(solution, rhs, problem.grad_matrix)
    expected = reference.laplacian_solve(
        problem.crow, problem.col, problem.weight, None, problem.diagonal, problem.grad_matrix
    )
    torch.testing.assert_close(grad, expected.solution, rtol=1e-8, atol=1e-9)


def test_nan_stays_where_it_is(device):
    """The checks that read values aside: a NaN in F reaches the edges of its node, and no others."""
    problem = Problem(40, 5, torch.float32, device)
    problem.propagated[3] = torch.nan
    out = torch.ops.ssmkernels.leave_one_edge_out(
        problem.crow, problem.col, problem.reverse, problem.weight, problem.propagated, 4.0
    )
    rows = torch.repeat_interleave(torch.arange(40, device=device), problem.crow.diff())
    touched = (rows == 3) | (problem.col == 3)
    assert not out[~touched].isnan().any()


def test_kernels_survive_ids_out_of_range():
    """Below the checks of the wrappers: nothing is read or written outside, and the entry counts as absent."""
    problem = Problem(20, 4)
    bad = torch.where(torch.arange(len(problem.col)) % 7 == 0, torch.tensor(2**30), problem.col.long()).int()
    out = torch.ops.ssmkernels.laplacian_solve(
        problem.crow, bad, problem.weight, None, problem.diagonal + 1, problem.rhs, None, 1e-6, 50, True
    )
    assert out[0].isfinite().all()
    edges = torch.ops.ssmkernels.leave_one_edge_out(
        problem.crow, bad, problem.reverse - 10**9, problem.weight, problem.propagated, 4.0
    )
    assert edges.isfinite().all()
    with pytest.raises(RuntimeError, match="crow must ascend"):
        torch.ops.ssmkernels.leave_one_edge_out(
            problem.crow + 1, bad, problem.reverse, problem.weight, problem.propagated, 4.0
        )


@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_saturated_logits(dtype, device):
    """±1e4: nothing overflows, and weights are 0 or 1 nearly everywhere."""
    results = judge(CASES["leave_one_edge_out"], CASES["leave_one_edge_out"].draw((80, 12), dtype, scale=1e4), device)
    weights = results["dissimilarity"]
    assert ((weights < 1e-3) | (weights > 0.999)).double().mean() > 0.9
