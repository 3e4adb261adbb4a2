# SPDX-License-Identifier: BSD-3-Clause
"""The linear systems of a split graph, with gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssmkernels.graph.split.solve import conjugate_gradients
from ssmkernels.graph.split.structure import SplitGraph, check_split_graph
from ssmkernels.ops import LaplacianSolution
from ssmkernels.ops import _autograd as autograd
from ssmkernels.ops import _checks as check
from ssmkernels.ops.graph import PRECONDITIONERS, Preconditioner, warn_of_failures


def laplacian_solve(
    graph: SplitGraph,
    dissimilarity: Tensor | None,
    diagonal: Tensor,
    rhs: Tensor,
    *,
    weight: Tensor | None = None,
    initial: Tensor | None = None,
    rtol: float = 1e-6,
    max_iter: int = 1000,
    preconditioner: Preconditioner = "jacobi",
) -> LaplacianSolution:
    """:func:`ssmkernels.ops.laplacian_solve` on a split graph: every rank has its rows of all arguments and of the
    solution. The same iterations but for rounding, and the same gradients, by one more solve.

    An iteration sends the ghosts' rows of one vector, g·C·b bytes to this rank, while the rows that need none are
    computed, and reduces 24·C bytes over the ranks.

    Args:
        graph: on the CPU.
        dissimilarity: [E_r] on this rank's entries, finite, ≥ 0 and symmetric over ranks; or None. As what follows, in
            the dtype of the graph.
        diagonal: [n], finite and ≥ 0.
        rhs: [n, C].
        weight: [E_r], finite, ≥ 0 and symmetric; that of the graph if not given.
        initial: [n, C] where the iteration starts, or None for 0; no gradient.
        rtol, max_iter, preconditioner: as there.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_split_graph(graph)
    weight = graph.weight if weight is None else weight
    of_entries = {"weight": weight} | ({} if dissimilarity is None else {"dissimilarity": dissimilarity})
    of_rows = {"rhs": rhs} | ({} if initial is None else {"initial": initial})
    for name, value in (of_entries | {"diagonal": diagonal}).items():
        shape, size = ("[n]", graph.num_rows) if name == "diagonal" else ("[E_r]", graph.num_edges)
        check.check_tensor(name, value, shape, 1)
        check.check_size(name, value, 0, size, "this rank's part of the graph")
        check.check_same_dtype(name, value, "graph.weight", graph.weight)
        check.check_weights(name, value)
    for name, value in of_rows.items():
        check.check_tensor(name, value, "[n, C]", 2)
        check.check_size(name, value, 0, graph.num_rows, "n of the graph")
        check.check_size(name, value, 1, rhs.shape[1], "C of rhs")
        check.check_same_dtype(name, value, "graph.weight", graph.weight)
        check.check_finite(name, value)
    rtol, max_iter = check.check_positive("rtol", rtol), check.check_count("max_iter", max_iter)
    check.check_choice("preconditioner", preconditioner, PRECONDITIONERS)
    settings = rtol, max_iter, preconditioner == "jacobi"
    initial = None if initial is None else initial.detach()
    solution, iterations, residual, curvature = _Solve.apply(
        graph, settings, initial, weight, dissimilarity, diagonal, rhs
    )
    warn_of_failures(residual, curvature, rtol, max_iter)
    return LaplacianSolution(solution, iterations, residual)


Settings = tuple[float, int, bool]


def _solve(
    graph: SplitGraph,
    settings: Settings,
    initial: Tensor | None,
    weight: Tensor,
    dissimilarity: Tensor | None,
    diagonal: Tensor,
    rhs: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rtol, max_iter, jacobi = settings
    system = graph, weight, dissimilarity, diagonal, rhs.contiguous()
    return conjugate_gradients(*system, initial=initial, rtol=rtol, max_iter=max_iter, jacobi=jacobi)


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: SplitGraph, settings: Settings, initial: Tensor | None, *system: Any) -> Any:
        results = _solve(graph, settings, initial, *system)
        ctx.graph, ctx.settings = graph, settings
        ctx.save_for_backward(*system[:3], results[0])
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_solution: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
        graph: SplitGraph = ctx.graph
        rtol, max_iter, _ = ctx.settings
        weight, dissimilarity, diagonal, solution = ctx.saved_tensors
        grad_rhs, _, residual, curvature = _solve(
            graph, ctx.settings, None, weight, dissimilarity, diagonal, grad_solution
        )
        warn_of_failures(residual, curvature, rtol, max_iter, "laplacian_solve, gradient of rhs")
        # The kernel of one process, for which ghosts are rows without entries.
        crow = torch.nn.functional.pad(graph.crow[None], (0, graph.num_ghosts), mode="constant", value=graph.num_edges)
        padded = torch.nn.functional.pad(grad_rhs, (0, 0, 0, graph.num_ghosts))
        grads = autograd.call("laplacian_solve_backward", crow[0], graph.col, padded, graph.extend(solution))
        grad_weight, grad_dissimilarity, grad_diagonal = grads
        return (
            None,
            None,
            None,
            grad_weight,
            None if dissimilarity is None else grad_dissimilarity,
            grad_diagonal[: graph.num_rows],
            grad_rhs,
        )
