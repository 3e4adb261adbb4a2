# SPDX-License-Identifier: BSD-3-Clause
"""Mixed label propagation on a graph (Zhuang and Moulin, CVPR 2023): the linear systems, and the weights of dissimilar
edges.

A graph is symmetric, in compressed sparse rows with both directions of an edge stored: crow [N + 1], col [E] with
columns ascending in a row, weight [E]; ``reverse`` [E] holds the position of (j, i) for the entry (i, j).
:class:`ssmkernels.graph.Graph` makes and checks all four. The kernels read crow and reverse as int64 and col as int32;
either is taken for each. Dtypes: float32 and float64; half types are taken as float32, and results come so. The same
input gives the same bits, for any number of threads. :func:`laplacian_solve` has derivatives of any order,
:func:`leave_one_edge_out` a first one; a second raises.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ssmkernels import _library
from ssmkernels.ops import _autograd as autograd
from ssmkernels.ops import _checks as check
from ssmkernels.ops import _second_order as second_order

__all__ = [
    "LaplacianSolution",
    "laplacian_solve",
    "leave_one_edge_out",
]

Preconditioner = Literal["jacobi", "none"]

PRECONDITIONERS = get_args(Preconditioner)


class LaplacianSolution(NamedTuple):
    """What :func:`laplacian_solve` returns."""

    solution: Tensor
    """[N, C]."""
    iterations: Tensor
    """[C] int64, iterations of conjugate gradients until the column was converged, or given up."""
    residual: Tensor
    """[C] ‖D⁻¹(b − A x)‖/‖D⁻¹b‖ of the solution, D = diag(A), computed in float64 before it is rounded to its dtype.

    Where a row is not balanced it is the share of its terms that ``|b_i − (A x)_i|`` is, which is above 0.1. 0 where
    b = 0, NaN where the column or the matrix has a NaN or an infinity."""


def laplacian_solve(
    crow: Tensor,
    col: Tensor,
    weight: Tensor,
    dissimilarity: Tensor | None,
    diagonal: Tensor,
    rhs: Tensor,
    *,
    initial: Tensor | None = None,
    rtol: float = 1e-6,
    max_iter: int = 1000,
    preconditioner: Preconditioner = "jacobi",
) -> LaplacianSolution:
    """Solves (diag(diagonal) + D − W + D_dis + W_dis) X = rhs by conjugate gradients, all columns at once: equations
    (12), (16) and (24).

    D and D_dis are the row sums of W and W_dis. A column is converged when its ``residual`` is at most ``rtol``, and
    does not change any more: every row counts alike, however small its weights, and what is left of a row is at most a
    tenth of its terms (the componentwise backward error of Oettli and Prager), so that the solution has passed the
    weakest edge that joins two parts of the graph. Scaling the matrix or the right side, by any factor whose result is
    representable, changes nothing but the solution's size. The matrix is positive semidefinite; where it is singular (a
    connected component whose diagonal is 0) the right side of that component should sum to 0, and the solution keeps
    the mean of ``initial`` there, each node weighted by its diagonal entry of the matrix (evenly under "none"). A node
    without edges and diagonal keeps its initial value. A column that did not converge, or met a direction that the
    matrix does not stretch, is named in a warning (on CUDA with ``SSMKERNELS_CHECK=1``: it takes a synchronisation),
    and ``residual`` tells in any case.

    Differentiable in rhs, weight, dissimilarity and diagonal by the implicit function, at the price of one more solve,
    ∂rhs = A⁻¹ ∂X, of which a warning tells likewise. The gradients of weight and dissimilarity are per stored entry,
    each taken for itself.

    Args:
        crow: [N + 1] int32 or int64.
        col: [E] int32 or int64 in [0, N).
        weight: [E], finite and ≥ 0, symmetric.
        dissimilarity: [E] on the same entries, finite and ≥ 0, symmetric; or None.
        diagonal: [N], finite and ≥ 0.
        rhs: [N, C].
        initial: [N, C] where the iteration starts, or None for 0; no gradient.
        rtol: > 0, relative tolerance of every column.
        max_iter: ≥ 1.
        preconditioner: ``"jacobi"``, or ``"none"`` for about twice as many iterations on a kNN graph.

    Returns:
        :class:`LaplacianSolution`: solution [N, C], iterations [C], residual [C].

    Raises:
        TypeError: a dtype is wrong, or differs between the arguments.
        ValueError: a shape, device or value is wrong; the message names it.
    """
    _library.require(rhs)
    nodes = _check_graph(crow, col, weight)
    check.check_tensor("diagonal", diagonal, "[N]", 1)
    check.check_tensor("rhs", rhs, "[N, C]", 2)
    values = {"weight": weight, "dissimilarity": dissimilarity, "diagonal": diagonal, "rhs": rhs, "initial": initial}
    if dissimilarity is not None:
        check.check_tensor("dissimilarity", dissimilarity, "[E]", 1)
        check.check_size("dissimilarity", dissimilarity, 0, col.shape[0], "E of col")
    if initial is not None:
        check.check_tensor("initial", initial, "[N, C]", 2)
        check.check_size("initial", initial, 1, rhs.shape[1], "C of rhs")
    for name in ("diagonal", "rhs", "initial"):
        if (value := values[name]) is not None:
            check.check_size(name, value, 0, nodes, "N of crow")
    given = _same_dtype(values)
    if "initial" in given:
        given["initial"] = check.fixed(given["initial"])
    rtol = check.check_positive("rtol", rtol)
    max_iter = check.check_count("max_iter", max_iter)
    check.check_choice("preconditioner", preconditioner, PRECONDITIONERS)
    if check.values_are_checked(rhs):
        _check_entries(crow, col)
        for name in ("weight", "dissimilarity", "diagonal"):
            if name in given:
                check.check_weights(name, given[name])
        for name in ("rhs", "initial"):
            if name in given:
                check.check_finite(name, given[name])
    solution, iterations, residual, curvature = solve_with_curvature(
        crow,
        col,
        given["weight"],
        given.get("dissimilarity"),
        given["diagonal"],
        given["rhs"],
        initial=given.get("initial"),
        rtol=rtol,
        max_iter=max_iter,
        preconditioner=preconditioner,
    )
    if check.values_are_checked(residual) and not check.is_batched(residual):
        warn_of_failures(residual, curvature, rtol, max_iter)
    return LaplacianSolution(solution, iterations, residual)


@autograd.fake("laplacian_solve")
def _fake_laplacian_solve(
    crow: Tensor, col: Tensor, weight: Tensor, dissimilarity: Tensor | None, diagonal: Tensor, rhs: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    columns = rhs.shape[1]
    per_column = (rhs.new_empty((columns,), dtype=dtype) for dtype in (torch.int64, rhs.dtype, rhs.dtype))
    return rhs.new_empty(rhs.shape), *per_column


@autograd.fake("laplacian_solve_backward")
def _fake_laplacian_solve_backward(
    crow: Tensor, col: Tensor, grad_rhs: Tensor, solution: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    entries, nodes = col.shape[0], crow.shape[0] - 1
    return grad_rhs.new_empty((entries,)), grad_rhs.new_empty((entries,)), grad_rhs.new_empty((nodes,))


def _save_laplacian_solve(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    crow, col, weight, dissimilarity, diagonal, _, _, ctx.rtol, ctx.max_iter, ctx.jacobi = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(crow, col, weight, dissimilarity, diagonal, output[0])


def _laplacian_solve_backward(ctx: Any, grad_solution: Tensor, *rest: Tensor) -> tuple[Tensor | None, ...]:
    crow, col, weight, dissimilarity, diagonal, solution = ctx.saved_tensors
    grad_rhs, _, residual, curvature = autograd.call(
        "laplacian_solve",
        crow,
        col,
        weight,
        dissimilarity,
        diagonal,
        grad_solution,
        None,
        ctx.rtol,
        ctx.max_iter,
        ctx.jacobi,
    )
    if check.values_are_checked(residual) and not check.is_batched(residual):
        warn_of_failures(residual, curvature, ctx.rtol, ctx.max_iter, "laplacian_solve, gradient of rhs")
    grads: tuple[Tensor | None, ...] = (None, None, None)
    if any(ctx.needs_input_grad[2:5]):
        grads = autograd.call("laplacian_solve_backward", crow, col, grad_rhs, solution)
    grad_weight, grad_dissimilarity, grad_diagonal = grads
    return (
        None,
        None,
        grad_weight,
        None if dissimilarity is None else grad_dissimilarity,
        grad_diagonal,
        grad_rhs,
        *[None] * 4,
    )


def _save_laplacian_solve_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _laplacian_solve_backward_backward(ctx: Any, *v: Tensor | None) -> tuple[Tensor | None, ...]:
    crow, col, grad_rhs, solution = ctx.saved_tensors
    sizes = (len(col), len(col), len(grad_rhs))
    given = zip(v, sizes, strict=True)
    weight, dissimilarity, diagonal = (grad_rhs.new_zeros(size) if one is None else one for one, size in given)
    grads = second_order.laplacian_solve(weight, dissimilarity, diagonal, crow, col, grad_rhs, solution)
    return None, None, *grads


autograd.register("laplacian_solve", _laplacian_solve_backward, _save_laplacian_solve)
autograd.register("laplacian_solve_backward", _laplacian_solve_backward_backward, _save_laplacian_solve_backward)


def solve_with_curvature(
    crow: Tensor,
    col: Tensor,
    weight: Tensor,
    dissimilarity: Tensor | None,
    diagonal: Tensor,
    rhs: Tensor,
    *,
    initial: Tensor | None = None,
    rtol: float,
    max_iter: int,
    preconditioner: Preconditioner = "jacobi",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`laplacian_solve` without its checks of values and without its warning, for matrices that may not be
    definite.

    Returns:
        solution [N, C], iterations [C], residual [C], and curvature [C], the least p·A p/p·D p that conjugate gradients
        met in the column (D = diag(A), or 1 under "none"): at most 0 shows that the matrix is not positive definite,
        and ends the column. A diagonal entry of A that is not positive (a node without entries aside) ends them all:
        then it is the least of those.
    """
    return autograd.call(
        "laplacian_solve",
        check.cast(crow, torch.int64),
        check.cast(col, torch.int32),
        weight,
        dissimilarity,
        diagonal,
        rhs,
        initial,
        rtol,
        max_iter,
        preconditioner == "jacobi",
    )


def leave_one_edge_out(
    crow: Tensor, col: Tensor, reverse: Tensor, weight: Tensor, propagated: Tensor, *, logit_scale: float = 4.0
) -> Tensor:
    r"""How dissimilar the two ends of every edge are when each is labelled by its other neighbours only: equations
    (20)-(22).

    With Z_ij = softmax(logit_scale·(D_ii F_i − w_ij F_j)) and ω = 1 − H/log C: out[e] = ω(Z_ij) ω(Z_ji) (1 − Z_ij·Z_ji)
    for e = (i, j), the same for both directions. D_ii is the sum of row i. Constants added to a row of F change
    nothing.

    Memory is O(E + N·C), forward and backward: the [E, C] tensor of Z never exists. Differentiable in ``weight`` (per
    stored entry) and ``propagated``.

    Args:
        crow: [N + 1] int32 or int64.
        col: [E] int32 or int64 in [0, N).
        reverse: [E] int32 or int64, the position of (j, i) for the entry (i, j).
        weight: [E], finite and ≥ 0, symmetric.
        propagated: [N, C] propagated labels F, or their deviation from a constant per node; C ≥ 2.
        logit_scale: λ > 0, at most the largest number of the dtype that is computed in.

    Returns:
        [E] in [0, 1].

    Raises:
        TypeError, ValueError: as :func:`laplacian_solve`.
    """
    _library.require(propagated)
    nodes = _check_graph(crow, col, weight)
    _check_ids("reverse", reverse)
    check.check_size("reverse", reverse, 0, col.shape[0], "E of col")
    check.check_same_device("reverse", reverse, "crow", crow)
    check.check_tensor("propagated", propagated, "[N, C]", 2)
    check.check_size("propagated", propagated, 0, nodes, "N of crow")
    if propagated.shape[1] < 2:
        raise ValueError(f"propagated must have at least 2 classes in dimension 1, got shape {list(propagated.shape)}")
    given = _same_dtype({"weight": weight, "propagated": propagated})
    logit_scale = check.check_positive_in("logit_scale", logit_scale, given["propagated"].dtype)
    if check.values_are_checked(propagated):
        _check_entries(crow, col)
        check.check_range("reverse", reverse, col.shape[0], "the entries of col")
        check.check_weights("weight", given["weight"])
        check.check_finite("propagated", given["propagated"])
    return autograd.call(
        "leave_one_edge_out",
        check.cast(crow, torch.int64),
        check.cast(col, torch.int32),
        check.cast(reverse, torch.int64),
        given["weight"],
        given["propagated"],
        logit_scale,
    )


@autograd.fake("leave_one_edge_out")
def _fake_leave_one_edge_out(
    crow: Tensor, col: Tensor, reverse: Tensor, weight: Tensor, propagated: Tensor, logit_scale: float
) -> Tensor:
    return weight.new_empty(weight.shape)


@autograd.fake("leave_one_edge_out_backward")
def _fake_leave_one_edge_out_backward(
    grad_dissimilarity: Tensor,
    crow: Tensor,
    col: Tensor,
    reverse: Tensor,
    weight: Tensor,
    propagated: Tensor,
    logit_scale: float,
) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape), propagated.new_empty(propagated.shape)


def _save_leave_one_edge_out(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.logit_scale = inputs
    ctx.save_for_backward(*tensors)


def _leave_one_edge_out_backward(ctx: Any, grad_dissimilarity: Tensor) -> tuple[Tensor | None, ...]:
    grads = autograd.call("leave_one_edge_out_backward", grad_dissimilarity, *ctx.saved_tensors, ctx.logit_scale)
    return None, None, None, *grads, None


autograd.register_gradient("leave_one_edge_out_backward")
autograd.register("leave_one_edge_out", _leave_one_edge_out_backward, _save_leave_one_edge_out)


def _check_ids(name: str, value: Tensor) -> None:
    check.check_tensor(name, value, "[N + 1]" if name == "crow" else "[E]", 1)
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {value.dtype}")


def _check_graph(crow: Tensor, col: Tensor, weight: Tensor) -> int:
    """The shapes of a graph; its number of nodes."""
    _check_ids("crow", crow)
    _check_ids("col", col)
    if crow.shape[0] == 0:
        raise ValueError("crow must be [N + 1], got an empty tensor")
    check.check_same_device("col", col, "crow", crow)
    check.check_tensor("weight", weight, "[E]", 1)
    check.check_size("weight", weight, 0, col.shape[0], "E of col")
    return crow.shape[0] - 1


def _check_entries(crow: Tensor, col: Tensor) -> None:
    if not check.ascends_from_zero(crow, col.shape[0]):
        first, last = crow[0].item(), crow[-1].item()
        raise ValueError(
            f"crow must ascend from 0 to E = {col.shape[0]}, the size of col; it goes from {first} to {last}"
        )
    check.check_range("col", col, crow.shape[0] - 1, "the nodes of crow")


def _same_dtype(values: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """The tensors there are, half types as float32 (under autocast too: these are statistics); all of one dtype and
    on one device.
    """
    given = {name: value for name, value in values.items() if value is not None}
    first = next(iter(given))
    for name, value in given.items():
        check.check_floating(name, value)
        check.check_same_device(name, value, first, given[first])
    given = {name: check.cast(value, check.compute_dtype(value.dtype)) for name, value in given.items()}
    for name, value in given.items():
        check.check_same_dtype(name, value, first, given[first])
    return given


def warn_of_failures(
    residual: Tensor, curvature: Tensor, rtol: float, max_iter: int, solve: str = "laplacian_solve"
) -> None:
    failed = ~(residual <= rtol * (1 + torch.finfo(residual.dtype).eps))  # it was rounded to its dtype
    if not bool(failed.any()):
        return
    count, worst = int(failed.sum()), float(residual.max())
    if bool((curvature[failed] <= 0).any()):
        reason = "the matrix is not positive definite, or singular with a right side outside its range"
    elif bool(residual.isnan().any()):
        reason = "there is a NaN or an infinity in the matrix or in the right side"
    else:
        reason = f"raise max_iter ({max_iter}) or rtol"
    warnings.warn(
        f"{solve}: {count} of {len(residual)} columns did not converge to rtol = {rtol:g} (largest relative"
        f" residual {worst:.2g}): {reason}",
        RuntimeWarning,
        stacklevel=3,
    )
