# SPDX-License-Identifier: BSD-3-Clause
"""The kernels behind conjugate gradients on a graph whose rows are split over ranks, on the CPU.

No public ops: :mod:`ssmkernels.graph.split` has checked what it gives them. A matrix has n rows and m ≥ n columns:
(A x)_i = excess_i x_i + Σ_e value_e (x_i − x_col[e]).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssmkernels import _library
from ssmkernels.ops import _autograd as autograd


class Matrix(NamedTuple):
    """Rows of a matrix."""

    crow: Tensor
    """[n + 1] int64."""
    col: Tensor
    """[E] int32 in [0, m)."""
    value: Tensor
    """[E] −A_ij, float32 or float64."""
    excess: Tensor
    """[n] the sum of each row."""


def multiply_rows_(out: Tensor, matrix: Matrix, rows: Tensor, x: Tensor, residual: Tensor, inverse: Tensor) -> Tensor:
    """Writes some rows of A x to ``out`` and gives the sums over these rows that an iteration needs.

    Args:
        out: [n, C].
        rows: [k] int64, which.
        x: [m, C].
        residual: [n, C] r.
        inverse: [n] D⁻¹.

    Returns:
        [3, C] float64: Σ x·(A x), Σ r·x and Σ (D⁻¹ r)².
    """
    _library.require(x)
    return torch.ops.ssmkernels.laplacian_rows_(out, *matrix, rows, x, residual, inverse)


def step_(
    x: Tensor,
    r: Tensor,
    p: Tensor,
    s: Tensor,
    u: Tensor,
    *,
    w: Tensor,
    step: Tensor,
    fresh: Tensor,
    beta: Tensor,
    alpha: Tensor,
) -> None:
    """p ← fresh u + beta p, s ← fresh w + beta s, x += alpha p, r −= alpha s, u ← step r.

    Args:
        x: [n, C] float64.
        r, p, s, u, w: [n, C].
        step: [n].
        fresh, beta, alpha: [C].
    """
    _library.require(r)
    torch.ops.ssmkernels.laplacian_step_(x, r, p, s, u, w, step, fresh, beta, alpha)


def multiply_in_double(matrix: Matrix, x: Tensor) -> tuple[Tensor, Tensor]:
    """A x [n, C] for x [m, C], float64, and the sums of the magnitudes of the terms of each row."""
    _library.require(x)
    return torch.ops.ssmkernels.laplacian_residual(*matrix, x)


@autograd.fake("laplacian_rows_")
def _fake_rows(
    out: Tensor, crow: Tensor, col: Tensor, value: Tensor, excess: Tensor, rows: Tensor, x: Tensor, *rest: Tensor
) -> Tensor:
    return x.new_empty(3, x.shape[1], dtype=torch.float64)


@autograd.fake("laplacian_step_")
def _fake_step(*arguments: Tensor) -> None:
    pass


@autograd.fake("laplacian_residual")
def _fake_residual(crow: Tensor, col: Tensor, value: Tensor, excess: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    shape = crow.shape[0] - 1, x.shape[1]
    return x.new_empty(shape), x.new_empty(shape)
