# SPDX-License-Identifier: BSD-3-Clause
"""When conjugate gradients stop in each column; as csrc/kernels/graph/convergence.h, whose words these are, for the
form of the iteration that has its sums at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

BALANCED = 0.1  # a row's residual may be this share of its terms, …
RESOLVED = 1e-12  # … or this share of A_ii |x_i|, …
ROUNDING = 2e-15  # … and this share of A_ii ‖x‖_∞


def imbalance(residual: Tensor, terms: Tensor, diagonal: Tensor, x: Tensor, largest: Tensor) -> Tensor:
    """[n, C] which share of its terms the residual of a row is, beyond what rounding explains.

    Args:
        residual, terms, x: [n, C] float64.
        diagonal: [n].
        largest: [C] ‖x‖_∞.
    """
    explained = diagonal.double()[:, None] * (RESOLVED * x.abs() + ROUNDING * largest)
    excess = residual.abs() - explained
    return torch.where(excess <= 0, 0, excess / terms)


class Convergence:
    """The state of every column, tensors [C] on the CPU, the same on every rank.

    Args:
        finite: whether right side and start of the column are.
        has_right_side: whether b is not 0.
        norm: ‖D⁻¹ b‖.
        out_of_range: whether b is not 0 in a row of zeros.
    """

    def __init__(
        self, finite: Tensor, has_right_side: Tensor, norm: Tensor, out_of_range: Tensor, rtol: float, max_iter: int
    ) -> None:
        self.finite, self.has_right_side, self.norm, self.out_of_range = finite, has_right_side, norm, out_of_range
        self.rtol, self.max_iter = rtol, max_iter
        # The squares vanish beside a start that is larger by more than the square root of the range: what the residual
        # is relative to b remains unknown.
        self.lost = finite & has_right_side & ~out_of_range & (norm == 0)
        self.ended = ~finite | ~has_right_side | self.lost
        self.active = torch.zeros_like(self.ended)
        self.stepped, self.restarts = self.active, self.active
        self.iterations = torch.zeros_like(norm, dtype=torch.int64)
        self.curvature, self.last = (torch.full_like(norm, torch.inf) for _ in range(2))
        zeros = torch.zeros_like(norm)
        self.limit, self.along, self.squares, self.beta, self.alpha, self.length = (zeros for _ in range(6))
        self.relative, self.imbalance = zeros, zeros
        self.measured_along, self.measured_squares = zeros, zeros

    def measure(self, along: Tensor, squares: Tensor, imbalance: Tensor) -> None:
        """Of the residual of the solution: r·M⁻¹r, ‖D⁻¹r‖² and the largest imbalance of a row."""
        self.measured_along, self.measured_squares, self.imbalance = along, squares, imbalance
        self.relative = torch.where(self.norm > 0, squares.sqrt() / self.norm, 0)

    def judge(self) -> bool:
        """Whether a column goes on from what was measured."""
        solved = (self.relative <= self.rtol) & (self.imbalance <= BALANCED)
        stuck = self.restarts & ~(self.relative <= self.last / 2)
        self.ended = self.ended | solved | stuck | (self.iterations >= self.max_iter) | self.relative.isnan()
        self.active = ~self.ended
        first = torch.where(self.last.isinf(), self.rtol, self.rtol / 2)
        target = torch.where(self.relative <= self.rtol, self.relative / 10, first)
        self.limit = (target * self.norm).square()
        self.last = torch.where(self.active, self.relative, self.last)
        self.restarts = torch.where(self.active, ~(self.measured_squares <= 4 * self.squares), self.restarts)
        anew = self.active & self.restarts
        self.along = torch.where(anew, self.measured_along, self.along)
        self.squares = torch.where(anew, self.measured_squares, self.squares)
        self.beta = torch.where(anew, 0, self.beta)
        self.stepped = torch.zeros_like(self.active)
        return bool(self.active.any())

    def advance(self, along: Tensor, squares: Tensor) -> None:
        """After a step, of the residual r of the recurrence: r·M⁻¹r and ‖D⁻¹r‖²."""
        self.iterations = self.iterations + self.stepped
        self.beta = torch.where(self.stepped, along / self.along, self.beta)
        self.along = torch.where(self.stepped, along, self.along)
        self.squares = torch.where(self.stepped, squares, self.squares)
        goes_on = (self.squares > self.limit) & (self.along > 0) & (self.iterations < self.max_iter)
        self.active = self.active & torch.where(self.stepped, goes_on, True)

    def step(self, product: Tensor) -> bool:
        """The lengths of the steps, ``alpha``, from u·A u; whether one is taken.

        With p = u + β p₋, r ⟂ p₋ and u A-orthogonal to all but the last direction, p·A p = u·A u − (β/α₋) r·u and
        p·M p = r·u + β² p₋·M p₋.
        """
        curvature = product - torch.where(self.beta > 0, self.beta * self.along / self.alpha, 0)
        length = self.along + self.beta.square() * self.length
        relative = torch.where(length > 0, curvature / length, 0)
        self.curvature = torch.where(self.active, torch.minimum(self.curvature, relative), self.curvature)
        flat = self.active & ~(relative > 0)
        self.ended, self.active = self.ended | flat, self.active & ~flat
        self.alpha = torch.where(self.active, self.along / curvature, self.alpha)
        self.length = torch.where(self.active, length, self.length)
        self.stepped = self.active
        return bool(self.active.any())

    def residual(self) -> Tensor:
        """[C] as :attr:`ssmkernels.ops.LaplacianSolution.residual`."""
        unsolved = torch.where(self.out_of_range, self.imbalance.clamp_min(1), self.imbalance)
        residual = torch.where((unsolved > BALANCED) & (unsolved > self.relative), unsolved, self.relative)
        residual = residual.masked_fill(self.lost, torch.inf)
        return torch.where(self.finite, torch.where(self.has_right_side, residual, 0), torch.nan)
