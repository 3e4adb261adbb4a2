# SPDX-License-Identifier: BSD-3-Clause
"""Mixed label propagation (Zhuang and Moulin, CVPR 2023), equations (12) and (19)-(24), in plain PyTorch."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "LaplacianSolution",
    "laplacian_solve",
    "leave_one_edge_out",
]


class LaplacianSolution(NamedTuple):
    """The solution [N, C], CG iterations [C] and relative residual [C] of each column."""

    solution: Tensor
    iterations: Tensor
    residual: Tensor


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half types are computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows(crow: Tensor) -> Tensor:
    """[E] the row of every stored entry."""
    return torch.repeat_interleave(torch.arange(len(crow) - 1, device=crow.device), crow.diff().long())


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
    preconditioner: Literal["jacobi", "none"] = "jacobi",
) -> LaplacianSolution:
    """(diag(diagonal) + D − W + D_dis + W_dis) X = rhs through the dense matrix, which must not be singular.

    What steers the iteration of :func:`ssmkernels.ops.laplacian_solve` (``initial`` and what follows) means nothing
    here.
    """
    dtype = _compute_dtype(rhs.dtype)
    rows, col, nodes = _rows(crow), col.long(), len(crow) - 1
    weight, diagonal, rhs = weight.to(dtype), diagonal.to(dtype), rhs.to(dtype)
    similar = weight.new_zeros(nodes, nodes).index_put((rows, col), weight, accumulate=True)
    matrix = torch.diag(diagonal + similar.sum(dim=1)) - similar
    if dissimilarity is not None:
        dissimilar = weight.new_zeros(nodes, nodes).index_put((rows, col), dissimilarity.to(dtype), accumulate=True)
        matrix = matrix + torch.diag(dissimilar.sum(dim=1)) + dissimilar
    solution = torch.linalg.solve(matrix, rhs)
    with torch.no_grad():
        values = weight if dissimilarity is None else weight - dissimilarity.to(dtype)
        residual = _residual(matrix, rows, col, values, rhs, solution)
    return LaplacianSolution(solution, torch.zeros(rhs.shape[1], dtype=torch.int64, device=rhs.device), residual)


def _residual(matrix: Tensor, rows: Tensor, col: Tensor, values: Tensor, rhs: Tensor, solution: Tensor) -> Tensor:
    """[C] ‖D⁻¹(b − A x)‖/‖D⁻¹b‖, D = diag(A), or, where above a tenth, the largest share that what is left of a row
    has of its terms.
    """
    left, inverse = rhs - matrix @ solution, 1 / matrix.diagonal()[:, None]
    norms = torch.linalg.vector_norm(inverse * rhs, dim=0)
    residual = torch.linalg.vector_norm(inverse * left, dim=0) / torch.where(norms > 0, norms, 1)
    flows = values[:, None] * (solution[rows] - solution[col])
    terms = (matrix.sum(dim=1, keepdim=True) * solution).abs() + rhs.abs()
    terms = terms.index_add(0, rows, flows.abs())
    resolved = 1e-12 if rhs.dtype == torch.float64 else 1e-6  # of the largest term; dense solvers round in their dtype
    share = (left.abs() - resolved * (matrix.diagonal()[:, None] * solution).abs()).clamp_min(0) / torch.where(
        terms > 0, terms, 1
    )
    imbalance = share.amax(dim=0) if len(share) else torch.zeros_like(residual)
    return torch.where(imbalance > 0.1, torch.maximum(residual, imbalance), residual)


def leave_one_edge_out(
    crow: Tensor, col: Tensor, reverse: Tensor, weight: Tensor, propagated: Tensor, *, logit_scale: float = 4.0
) -> Tensor:
    """Dissimilarity [E] of the two ends of every edge, each labelled by its other neighbours only: equations
    (20)-(22).
    """
    dtype = _compute_dtype(propagated.dtype)
    rows, col, reverse, classes = _rows(crow), col.long(), reverse.long(), propagated.shape[1]
    weight, propagated = weight.to(dtype), propagated.to(dtype)
    degree = weight.new_zeros(len(crow) - 1).index_add(0, rows, weight)
    logits = logit_scale * ((degree[:, None] * propagated)[rows] - weight[:, None] * propagated[col])  # (20)
    log_z = logits.log_softmax(dim=1)
    z = log_z.exp()
    entropy = -torch.where(z > 0, z * log_z, 0.0).sum(dim=1)
    confidence = (1 - entropy / math.log(classes)).clamp_min(0)  # (21); rounding alone takes it, or the next, below 0
    dissimilar = (1 - (z * z[reverse]).sum(dim=1)).clamp_min(0)
    return confidence * confidence[reverse] * dissimilar  # (22)
