# SPDX-License-Identifier: BSD-3-Clause
"""Every op of the graph family against its reference, and everything else an op must show."""

from __future__ import annotations

import gc
import threading
import warnings

import pytest
import torch
from torch.autograd import gradcheck
from torch.library import opcheck

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
        dissimilarity = (upper.triu() + upper.triu(1).t())[torch.repeat_interleave(torch.arange(N), crow.diff()), col.long()]
        diagonal = torch.zeros(N, dtype=torch.float64)
        diagonal[:: max(1, N // 5)] = 0.5
        self.crow, self.col, self.reverse = crow.to(device), col.to(device), reverse.to(device)
        self.weight, self.dissimilarity, self.diagonal = (x.to(device, dtype) for x in (values, dissimilarity, diagonal))
        self.rhs, self.propagated = normal(N, C).to(device, dtype), (scale * normal(N, C) / 5).to(device, dtype)
        self.grad_edges, self.grad_matrix = normal(len(values)).to(device), normal(N, C).to(device)

    def double(self):
        other = object.__new__(Problem)
        other.__dict__ = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in self.__dict__.items()}
        return other

    def leave_one_edge_out(self, room, **options):
        """The weights, and the gradients of weight and propagated."""
        weight, propagated = (x.detach().clone().requires_grad_() for x in (self.weight, self.propagated))
        out = room.leave_one_edge_out(self.crow, self.col, self.reverse, weight, propagated, **options)
        return out.detach(), *torch.autograd.grad(out, (weight, propagated), self.grad_edges.to(out.dtype))

    def laplacian_solve(self, room, **options):
        """The solution, and the gradients of weight, dissimilarity, diagonal and rhs."""
        given = [x.detach().clone().requires_grad_() for x in (self.weight, self.dissimilarity, self.diagonal, self.rhs)]
        out = room.laplacian_solve(self.crow, self.col, *given, **options).solution
        return out.detach(), *torch.autograd.grad(out, given, self.grad_matrix.to(out.dtype))


def assert_no_worse(ours, same_dtype, exact, dtype):
    """The error against float64 is at most twice that of the reference in the same dtype, plus rounding."""
    eps = 1e-10 if dtype == torch.float64 else torch.finfo(dtype).eps
    for a, b, x in zip(ours, same_dtype, exact, strict=True):
        assert a.dtype == b.dtype
        scale = max(1.0, x.abs().max().item()) if x.numel() else 1.0
        error, allowed = ((y.double() - x).abs().max().item() if x.numel() else 0.0 for y in (a, b))
        assert error <= 2 * allowed + 4 * eps * scale, f"error {error:.2e}, the reference's {allowed:.2e}"


@pytest.mark.parametrize("scale", [0.05, 1.0, 30.0])  # λ w F small, moderate and large
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES[1:], ids=str)
def test_leave_one_edge_out(size, dtype, scale, device):
    problem = Problem(*size, dtype, device, scale=scale, isolated=True)
    ours, same, exact = (p.leave_one_edge_out(room) for p, room in ((problem, ops), (problem, reference), (problem.double(), reference)))
    assert_no_worse(ours, same, exact, dtype)
    assert ours[0].equal(ours[0][problem.reverse]) and ours[0].min() >= 0 and ours[0].max() <= 1


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_laplacian_solve(size, dtype, device):
    problem = Problem(*size, dtype, device)
    exact = problem.double().laplacian_solve(reference)
    if dtype == torch.float64:
        for ours, expected in zip(problem.laplacian_solve(ops, rtol=1e-13), exact, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)
    else:
        for ours, expected in zip(problem.laplacian_solve(ops, rtol=1e-6), exact, strict=True):
            assert ((ours.double() - expected).abs() <= 3e-5 * max([1.0, *expected.abs().flatten()])).all()


@pytest.mark.parametrize("preconditioner", ["jacobi", "none"])
@pytest.mark.parametrize("with_dissimilarity", [False, True])
@pytest.mark.parametrize("rtol", [1e-3, 1e-6, 1e-10])
def test_every_column_reaches_its_tolerance(rtol, with_dissimilarity, preconditioner, device):
    problem = Problem(200, 37, device=device)
    dissimilarity = problem.dissimilarity if with_dissimilarity else None
    scaled = problem.rhs * torch.logspace(-200, 200, 37, dtype=torch.float64, device=device)  # each column has its own size
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
        with pytest.warns(RuntimeWarning, match=r"5 of 5 columns did not converge to rtol = 1e-12 .* raise max_iter \(3\) or rtol"):
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
    """The indicator of a component without diagonal is the null space: from 0 it stays out, from elsewhere it is kept."""
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
    torch.testing.assert_close(out.solution[3:].cpu(), torch.tensor([[7.0, 7.5], [7.0, 6.5], [7.0, 7.0]], dtype=torch.float64))


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


@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_saturated_logits(dtype, device):
    """±1e4: nothing overflows, and weights are 0 or 1 nearly everywhere."""
    problem = Problem(80, 12, dtype, device, scale=1e4)
    ours, same, exact = (p.leave_one_edge_out(room) for p, room in ((problem, ops), (problem, reference), (problem.double(), reference)))
    assert all(x.isfinite().all() for x in ours)
    assert_no_worse(ours[:1], same[:1], exact[:1], dtype)
    assert ((ours[0] < 1e-3) | (ours[0] > 0.999)).double().mean() > 0.9


def test_constants_per_node_change_nothing(device):
    problem = Problem(50, 7, device=device)
    arguments = (problem.crow, problem.col, problem.reverse, problem.weight)
    shift = torch.linspace(-100, 100, 50, dtype=torch.float64, device=device)[:, None]
    torch.testing.assert_close(
        ops.leave_one_edge_out(*arguments, problem.propagated + shift), ops.leave_one_edge_out(*arguments, problem.propagated)
    )


def test_flat_labels_are_never_dissimilar(device):
    problem = Problem(50, 7, torch.float32, device)
    out = ops.leave_one_edge_out(problem.crow, problem.col, problem.reverse, problem.weight, torch.ones(50, 7, device=device))
    assert out.abs().max() < 1e-12


@pytest.mark.parametrize("nodes", [2, 4, 6, 41, 64])
def test_complete_graph_with_loops(nodes, device):
    """Every pair has one owner, also two nodes N/2 apart, and a node with itself."""
    draw = torch.Generator().manual_seed(0)
    matrix = torch.rand(nodes, nodes, generator=draw, dtype=torch.float64) + 0.1
    crow, col, reverse, weight = (x.to(device) for x in sparse(matrix + matrix.t()))
    propagated = torch.randn(nodes, 5, generator=draw, dtype=torch.float64).to(device) / nodes
    given = [x.requires_grad_() for x in (weight, propagated)]
    ours, expected = (room.leave_one_edge_out(crow, col, reverse, *given) for room in (ops, reference))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    grad = torch.randn(nodes * nodes, generator=draw, dtype=torch.float64).to(device)
    for a, b in zip(torch.autograd.grad(ours, given, grad), torch.autograd.grad(expected, given, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    diagonal = torch.ones(nodes, dtype=torch.float64, device=device)
    for dissimilarity in (None, ours.detach()):
        ours_x, expected_x = (
            room.laplacian_solve(crow, col, weight, dissimilarity, diagonal, propagated, **options)
            for room, options in ((ops, {"rtol": 1e-13}), (reference, {}))
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
    edgeless = ops.laplacian_solve(alone, ids, nothing, None, torch.full((4,), 4.0, device=device), torch.ones(4, 2, device=device))
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


def test_gradcheck(device):
    problem = Problem(9, 3, device=device)
    weight, propagated = problem.weight.requires_grad_(), problem.propagated.requires_grad_()
    assert gradcheck(lambda w, f: ops.leave_one_edge_out(problem.crow, problem.col, problem.reverse, w, f), (weight, propagated))
    mirrored = torch.arange(len(weight), device=device) > problem.reverse  # the weights of both directions move together

    def solve(w, s, d, b):
        w, s = torch.where(mirrored, w[problem.reverse], w), torch.where(mirrored, s[problem.reverse], s)
        return ops.laplacian_solve(problem.crow, problem.col, w, s, d, b, rtol=1e-14).solution

    given = [x.detach().requires_grad_() for x in (problem.weight, problem.dissimilarity, problem.diagonal, problem.rhs)]
    assert gradcheck(solve, given)


def test_gradient_of_the_right_side_alone(device):
    problem = Problem(30, 4, device=device)
    rhs = problem.rhs.clone().requires_grad_()
    solution = ops.laplacian_solve(problem.crow, problem.col, problem.weight, None, problem.diagonal, rhs, rtol=1e-12).solution
    (grad,) = torch.autograd.grad(solution, rhs, problem.grad_matrix)
    expected = reference.laplacian_solve(problem.crow, problem.col, problem.weight, None, problem.diagonal, problem.grad_matrix)
    torch.testing.assert_close(grad, expected.solution, rtol=1e-8, atol=1e-9)


def test_differentiable_once_says_so(device):
    problem = Problem(20, 3, device=device)
    propagated = problem.propagated.requires_grad_()
    out = ops.leave_one_edge_out(problem.crow, problem.col, problem.reverse, problem.weight, propagated).sum()
    (grad,) = torch.autograd.grad(out, propagated, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_opcheck(dtype, device):
    problem = Problem(12, 4, dtype, device)
    library = torch.ops.ssmkernels
    ids = (problem.crow, problem.col)
    weight, dissimilarity, diagonal, rhs = (
        x.clone().requires_grad_() for x in (problem.weight, problem.dissimilarity, problem.diagonal, problem.rhs)
    )
    opcheck(library.laplacian_solve.default, (*ids, weight, dissimilarity, diagonal, rhs, None, 1e-6, 100, True))
    opcheck(library.laplacian_solve.default, (*ids, problem.weight, None, problem.diagonal, problem.rhs, problem.rhs, 1e-6, 100, False))
    opcheck(library.laplacian_solve_backward.default, (*ids, problem.rhs, problem.propagated))
    edges = (*ids, problem.reverse, weight, problem.propagated.clone().requires_grad_(), 4.0)
    opcheck(library.leave_one_edge_out.default, edges)
    grad = problem.grad_edges.to(dtype)
    opcheck(library.leave_one_edge_out_backward.default, (grad, *ids, problem.reverse, problem.weight, problem.propagated, 4.0))


def _step(crow, col, reverse, weight, diagonal, rhs):
    propagated = ops.laplacian_solve(crow, col, weight, None, diagonal, rhs).solution
    dissimilarity = ops.leave_one_edge_out(crow, col, reverse, weight, propagated)
    out = ops.laplacian_solve(crow, col, weight, dissimilarity, diagonal, rhs)
    return out.solution, out.iterations, dissimilarity


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_torch_compile(dynamic, device):
    compiled = torch.compile(_step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in [(20, 5), (33, 7)]:
        results = []
        for function in (compiled, _step):
            problem = Problem(*size, device=device)
            weight, rhs = problem.weight.requires_grad_(), problem.rhs.requires_grad_()
            out = function(problem.crow, problem.col, problem.reverse, weight, problem.diagonal, rhs)
            (out[0].square().sum() + out[2].sum()).backward()
            results.append((*out, weight.grad, rhs.grad))
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected)


def test_torch_compile_inductor(device):
    problem = Problem(20, 5, torch.float32, device)
    graph = (problem.crow, problem.col, problem.reverse, problem.weight, problem.diagonal)
    compiled = torch.compile(lambda rhs: _step(*graph, rhs)[0].sum(), fullgraph=True)
    torch.testing.assert_close(compiled(problem.rhs), _step(*graph, problem.rhs)[0].sum())


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_statistics_alone(low, device):
    problem = Problem(30, 6, torch.float32, device)
    expected = (*problem.leave_one_edge_out(ops), *problem.laplacian_solve(ops))
    with torch.autocast(device, low):
        ours = (*problem.leave_one_edge_out(ops), *problem.laplacian_solve(ops))
    assert all(a.dtype == torch.float32 and a.equal(b) for a, b in zip(ours, expected, strict=True))


def _everything(problem):
    solved = problem.laplacian_solve(ops) if problem.rhs.dtype in REAL else ()
    return [*problem.leave_one_edge_out(ops), *solved]


@pytest.mark.parametrize("size", [(1, 3), (700, 10), (400, 50)], ids=str)
def test_bits_do_not_depend_on_threads_or_run(size):
    problem = Problem(*size, torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(_everything(problem))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.gpu
def test_bits_do_not_depend_on_the_run_on_a_gpu():
    problem = Problem(700, 10, torch.float32, "cuda")
    assert all(a.equal(b) for a, b in zip(_everything(problem), _everything(problem), strict=True))


def test_calls_from_several_threads():
    problem = Problem(200, 10, torch.float32)
    expected, seen = _everything(problem), []
    workers = [threading.Thread(target=lambda: seen.append(_everything(problem))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(seen) == 4 and all(a.equal(b) for out in seen for a, b in zip(out, expected, strict=True))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    from ssmkernels import _C

    if isa not in _C.available_isas():
        pytest.skip(f"this processor has no {isa}")
    chosen = _C.current_isa()
    problems = [Problem(130, C, torch.float64, scale=scale) for C in (2, 5, 10, 33) for scale in (0.05, 1.0, 30.0)]
    try:
        _C.set_isa(isa)
        ours = [(*problem.leave_one_edge_out(ops), *problem.laplacian_solve(ops, rtol=1e-13)) for problem in problems]
        single = [Problem(130, C, torch.float32).leave_one_edge_out(ops) for C in (2, 5, 10, 33)]
    finally:
        _C.set_isa(chosen)
    for problem, out in zip(problems, ours, strict=True):
        for a, b in zip(out, (*problem.leave_one_edge_out(reference), *problem.laplacian_solve(reference)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    for C, out in zip((2, 5, 10, 33), single, strict=True):
        for a, b in zip(out, Problem(130, C, torch.float32).double().leave_one_edge_out(reference), strict=True):
            assert (a.double() - b).abs().max() <= 1e-5 * max(1, b.abs().max())


def test_inputs_are_not_written(device):
    problem = Problem(40, 6, torch.float32, device)
    before = {name: value.clone() for name, value in problem.__dict__.items() if torch.is_tensor(value)}
    _everything(problem)
    assert all(getattr(problem, name).equal(value) for name, value in before.items())


def _ring(nodes, degree, columns, dtype=torch.float32, device="cpu"):
    """A ring in which every node is linked to ``degree`` others around it."""
    offsets = torch.cat([torch.arange(-degree // 2, 0), torch.arange(1, degree // 2 + 1)])
    col = ((torch.arange(nodes)[:, None] + offsets) % nodes).sort(dim=1).values
    crow = torch.arange(nodes + 1) * degree
    keys = torch.arange(nodes).repeat_interleave(degree) * nodes + col.flatten()
    reverse = torch.searchsorted(keys, col.flatten() * nodes + torch.arange(nodes).repeat_interleave(degree))
    problem = object.__new__(Problem)
    problem.crow, problem.col, problem.reverse = crow.to(device), col.flatten().int().to(device), reverse.to(device)
    draw = torch.Generator().manual_seed(0)
    problem.weight = torch.ones(nodes * degree, dtype=dtype, device=device)
    problem.propagated = torch.randn(nodes, columns, generator=draw).to(device, dtype) / degree
    problem.grad_edges = torch.ones(nodes * degree, dtype=torch.float64, device=device)
    return problem


def test_peak_memory():
    """Forward and backward stay far below one [E, C] tensor."""
    resource = pytest.importorskip("resource", reason="POSIX only")
    nodes, degree, classes = 20_000, 60, 64  # [E, C] in float32 is 293 MiB; N·C is 5 MiB, E 5 MiB
    problem, small = _ring(nodes, degree, classes), _ring(100, 10, classes)
    small.leave_one_edge_out(ops)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    problem.leave_one_edge_out(ops)
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert extra < 64 * 2**20, f"{extra / 2**20:.1f} MiB more"


@pytest.mark.gpu
def test_peak_memory_on_a_gpu():
    problem = _ring(20_000, 60, 64, device="cuda")
    problem.leave_one_edge_out(ops)
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    problem.leave_one_edge_out(ops)
    assert torch.cuda.max_memory_allocated() - base < 64 * 2**20


@pytest.mark.gpu
def test_cuda_graph():
    problem, other = Problem(150, 12, torch.float32, "cuda"), Problem(150, 12, torch.float32, "cuda")
    other.rhs = other.rhs.flip(0).contiguous()
    arguments = (problem.crow, problem.col, problem.reverse, problem.weight, problem.diagonal, problem.rhs)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        _step(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = _step(*arguments)
    problem.rhs.copy_(other.rhs)
    graph.replay()
    expected = _step(other.crow, other.col, other.reverse, other.weight, other.diagonal, other.rhs)
    for ours, theirs in zip(out, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.gpu
def test_beyond_2_31_elements():
    """N·C of 2³¹ and more: offsets are 64 bits wide."""
    problem = _ring(2**21 + 5, 4, 1025, device="cuda")
    out = ops.leave_one_edge_out(problem.crow, problem.col, problem.reverse, problem.weight, problem.propagated)
    last = torch.arange(len(out) - 40, len(out), device="cuda")
    rows = last // 4
    keep = torch.unique(torch.cat([problem.col[problem.crow[r] : problem.crow[r + 1]].long() for r in rows.unique()] + [rows]))
    propagated = torch.zeros(len(problem.crow) - 1, 2, device="cuda")
    propagated[keep] = problem.propagated[keep, :2]  # the same nodes alone, with the classes that are compared
    assert out.isfinite().all() and out.min() >= 0 and out.max() <= 1
    logits = 4.0 * (4 * problem.propagated[rows] - problem.propagated[problem.col[last].long()]).double()
    back = 4.0 * (4 * problem.propagated[problem.col[last].long()] - problem.propagated[rows]).double()
    z, y = logits.softmax(1), back.softmax(1)
    omega = [1 + (p * p.log()).sum(1) / torch.log(torch.tensor(1025.0, dtype=torch.float64)) for p in (z, y)]
    torch.testing.assert_close(out[last].double(), omega[0] * omega[1] * (1 - (z * y).sum(1)), rtol=1e-3, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("size", [(17, 3), (60, 33)], ids=str)
def test_small_set(size, dtype):
    """Every kernel once, at sizes that a sanitizer gets through."""
    cpu, gpu = Problem(*size, dtype), Problem(*size, dtype, "cuda")
    tolerance = 1e-5 if dtype == torch.float64 else 1e-3
    for a, b in zip(_everything(cpu), _everything(gpu), strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES[1:], ids=str)
def test_device_parity(size):
    cpu, gpu = Problem(*size), Problem(*size, device="cuda")
    for op, options in (("leave_one_edge_out", {}), ("laplacian_solve", {"rtol": 1e-13})):
        for a, b in zip(getattr(cpu, op)(ops, **options), getattr(gpu, op)(ops, **options), strict=True):
            torch.testing.assert_close(b.cpu(), a, rtol=1e-9, atol=1e-10)


def test_nan_stays_where_it_is(device):
    """The checks that read values aside: a NaN in F reaches the edges of its node, and no others."""
    problem = Problem(40, 5, torch.float32, device)
    problem.propagated[3] = torch.nan
    out = torch.ops.ssmkernels.leave_one_edge_out(problem.crow, problem.col, problem.reverse, problem.weight, problem.propagated, 4.0)
    rows = torch.repeat_interleave(torch.arange(40, device=device), problem.crow.diff())
    touched = (rows == 3) | (problem.col == 3)
    assert not out[~touched].isnan().any()


def _bad_solve(p, **changes):
    arguments = {"crow": p.crow, "col": p.col, "weight": p.weight, "dissimilarity": None, "diagonal": p.diagonal, "rhs": p.rhs} | changes
    return ops.laplacian_solve(**arguments)


def _bad_edges(p, **changes):
    arguments = {"crow": p.crow, "col": p.col, "reverse": p.reverse, "weight": p.weight, "propagated": p.propagated} | changes
    return ops.leave_one_edge_out(**arguments)


BAD = [
    (_bad_solve, lambda p: {"rtol": 0.0}, ValueError, r"rtol must be finite and > 0, got 0.0"),
    (_bad_solve, lambda p: {"rtol": -1e-6}, ValueError, r"rtol must be finite and > 0"),
    (_bad_solve, lambda p: {"max_iter": 0}, ValueError, r"max_iter must be at least 1, got 0"),
    (_bad_solve, lambda p: {"max_iter": 2.5}, TypeError, r"max_iter must be an int, got float"),
    (_bad_solve, lambda p: {"preconditioner": "ilu"}, ValueError, r"preconditioner must be 'jacobi' or 'none', got 'ilu'"),
    (_bad_solve, lambda p: {"weight": -p.weight}, ValueError, r"weight must be finite and >= 0, got values from -"),
    (_bad_solve, lambda p: {"weight": p.weight * torch.nan}, ValueError, r"weight must be finite and >= 0"),
    (_bad_solve, lambda p: {"weight": p.weight[:-1]}, ValueError, r"weight must have E of col"),
    (_bad_solve, lambda p: {"dissimilarity": -p.weight}, ValueError, r"dissimilarity must be finite and >= 0"),
    (_bad_solve, lambda p: {"dissimilarity": p.weight[:3]}, ValueError, r"dissimilarity must have E of col"),
    (_bad_solve, lambda p: {"diagonal": p.diagonal - 1}, ValueError, r"diagonal must be finite and >= 0"),
    (_bad_solve, lambda p: {"diagonal": p.diagonal[:-1]}, ValueError, r"diagonal must have N of crow = 20"),
    (_bad_solve, lambda p: {"rhs": p.rhs[:-1]}, ValueError, r"rhs must have N of crow = 20"),
    (_bad_solve, lambda p: {"rhs": p.rhs[:, 0]}, ValueError, r"rhs must be \[N, C\], got shape \[20\]"),
    (_bad_solve, lambda p: {"rhs": p.rhs / 0}, ValueError, r"rhs must be finite"),
    (_bad_solve, lambda p: {"rhs": p.rhs.double()}, TypeError, r"rhs is torch.float64 but weight is torch.float32"),
    (_bad_solve, lambda p: {"rhs": p.rhs.long()}, TypeError, r"rhs must be float32, float64, bfloat16 or float16, got torch.int64"),
    (_bad_solve, lambda p: {"initial": p.rhs[:, :2]}, ValueError, r"initial must have C of rhs = 4"),
    (_bad_solve, lambda p: {"crow": p.crow[:-1]}, ValueError, r"diagonal must have N of crow = 19"),
    (_bad_solve, lambda p: {"crow": p.crow.flip(0)}, ValueError, r"crow must ascend from 0 to E"),
    (_bad_solve, lambda p: {"crow": p.crow.float()}, TypeError, r"crow must be int32 or int64, got torch.float32"),
    (_bad_solve, lambda p: {"col": p.col + 1}, ValueError, r"col must be in \[0, 20\), the nodes of crow; got values from 1 to 20"),
    (_bad_solve, lambda p: {"col": p.col.to("meta")}, ValueError, r"col is on meta but crow is on cpu"),
    (_bad_edges, lambda p: {"logit_scale": 0}, ValueError, r"logit_scale must be finite and > 0, got 0"),
    (_bad_edges, lambda p: {"reverse": p.reverse + 1}, ValueError, r"reverse must be in \[0, "),
    (_bad_edges, lambda p: {"reverse": p.reverse[1:]}, ValueError, r"reverse must have E of col"),
    (_bad_edges, lambda p: {"propagated": p.propagated[:, :1]}, ValueError, r"propagated must have at least 2 classes"),
    (_bad_edges, lambda p: {"propagated": p.propagated[:5]}, ValueError, r"propagated must have N of crow = 20"),
    (_bad_edges, lambda p: {"propagated": p.propagated * torch.inf}, ValueError, r"propagated must be finite"),
    (_bad_edges, lambda p: {"weight": -p.weight}, ValueError, r"weight must be finite and >= 0"),
    (_bad_edges, lambda p: {"propagated": [[1.0]]}, TypeError, r"propagated must be a tensor \[N, C\], got list"),
    (_bad_edges, lambda p: {"propagated": p.propagated.to("meta")}, ValueError, r"propagated is on meta but weight is on cpu"),
]


@pytest.mark.parametrize(("call", "change", "error", "message"), BAD, ids=[b[3][:48] for b in BAD])
def test_bad_input(call, change, error, message):
    problem = Problem(20, 4, torch.float32)
    with pytest.raises(error, match=message):
        call(problem, **change(problem))


def test_kernels_survive_ids_out_of_range():
    """Below the checks of the wrappers: nothing is read or written outside, and the entry counts as absent."""
    problem = Problem(20, 4)
    bad = torch.where(torch.arange(len(problem.col)) % 7 == 0, torch.tensor(2**30), problem.col.long()).int()
    out = torch.ops.ssmkernels.laplacian_solve(
        problem.crow, bad, problem.weight, None, problem.diagonal + 1, problem.rhs, None, 1e-6, 50, True
    )
    assert out[0].isfinite().all()
    edges = torch.ops.ssmkernels.leave_one_edge_out(problem.crow, bad, problem.reverse - 10**9, problem.weight, problem.propagated, 4.0)
    assert edges.isfinite().all()
    with pytest.raises(RuntimeError, match="crow must ascend"):
        torch.ops.ssmkernels.leave_one_edge_out(problem.crow + 1, bad, problem.reverse, problem.weight, problem.propagated, 4.0)
