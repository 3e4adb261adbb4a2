# SPDX-License-Identifier: BSD-3-Clause
"""Conjugate gradients on a split graph: every rank has its rows of the vectors.

The iteration is that of Chronopoulos and Gear (1989): its sums are taken at once, so that ranks reduce 3·C numbers once
an iteration. What a rank needs of others is sent while it computes the rows that do without. Preconditioner, scaling
and stopping rule are those of :func:`ssmkernels.ops.laplacian_solve`, and so is the number of iterations, but for
rounding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ssmkernels.distributed import is_distributed
from ssmkernels.graph.split.convergence import Convergence, imbalance
from ssmkernels.graph.split.structure import SplitGraph
from ssmkernels.ops import _laplacian_rows as kernels
from ssmkernels.ops.graph import solve_with_curvature


def conjugate_gradients(
    graph: SplitGraph,
    weight: Tensor,
    dissimilarity: Tensor | None,
    diagonal: Tensor,
    rhs: Tensor,
    *,
    initial: Tensor | None = None,
    rtol: float,
    max_iter: int,
    jacobi: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(diag(diagonal) + D − W + D_dis + W_dis) X = rhs, for weights that are finite and ≥ 0.

    Args:
        weight, dissimilarity: [E_r] of this rank's entries.
        diagonal: [n] of this rank's rows.
        rhs, initial: [n, C].

    Returns:
        solution [n, C] of this rank's rows, iterations [C], residual [C] and curvature [C], the same on every rank; see
        :func:`ssmkernels.ops.graph.solve_with_curvature`, which a group of one rank takes.
    """
    if not is_distributed(graph.group):
        return solve_with_curvature(
            graph.crow,
            graph.col,
            weight,
            dissimilarity,
            diagonal,
            rhs,
            initial=initial,
            rtol=rtol,
            max_iter=max_iter,
            preconditioner="jacobi" if jacobi else "none",
        )
    matrix = SplitMatrix(graph, weight, dissimilarity, diagonal, jacobi)
    return Iteration(matrix, rhs, initial, rtol, max_iter).run()


COLUMNS_AT_ONCE = 8  # of the residual that is measured, whose terms take memory


def exponent_of(x: float) -> int:
    """n with 2^(n − 1) ≤ x < 2^n; 0 where x is not above 0, or not finite."""
    return math.frexp(x)[1] if 0 < x < math.inf else 0


class PowersOf2:
    """2^n for each of some n, in two factors: the ratio of two numbers may leave the range that their product with a
    third is in.
    """

    def __init__(self, exponents: list[int]) -> None:
        halves = [(n // 2, n - n // 2) for n in exponents]
        self.first = torch.tensor([math.ldexp(1, first) for first, _ in halves], dtype=torch.float64)
        self.second = torch.tensor([math.ldexp(1, second) for _, second in halves], dtype=torch.float64)

    def times(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """``x`` [..., C], or [...] for a single n, as float64; in ``out``, where it is given."""
        return torch.mul(x, self.first, out=out).mul_(self.second)

    def divide(self, x: Tensor) -> Tensor:
        return x.double() / self.first / self.second


class SplitMatrix:
    """This rank's rows of A, divided by a power of two that leaves its largest diagonal entry about 1."""

    def __init__(
        self, graph: SplitGraph, weight: Tensor, dissimilarity: Tensor | None, diagonal: Tensor, jacobi: bool
    ) -> None:
        self.graph = graph
        rows = graph.rows
        is_loop = graph.col == rows
        value, sums, excess = weight.double(), weight.double(), diagonal.double()
        if dissimilarity is not None:
            apart = dissimilarity.double()
            excess = excess + 2 * graph.sum_rows(apart)
            value, sums = value - apart, value + torch.where(is_loop, 0, apart)
            loops = graph.sum_rows(torch.where(is_loop, 2 * apart, 0))
        else:
            loops = torch.zeros_like(excess)
        # A loop's weight counts for nothing, unless it is NaN.
        whole = diagonal.double() + graph.sum_rows(torch.where(is_loop, 0 * sums, sums)) + loops
        largest = float(graph.largest(_largest(whole[:, None]))[0])
        self.is_finite, self.exponent = math.isfinite(largest), exponent_of(largest)
        shrink = PowersOf2([-self.exponent])
        dtype = weight.dtype
        whole = shrink.times(whole)
        inverse = (1 / whole).clamp_max(2.0**126 if dtype == torch.float32 else 2.0**1022)
        self.diagonal = whole.to(dtype)
        self.inverse = torch.where(whole > 0, inverse, 0).to(dtype)
        self.step = self.inverse if jacobi else (whole > 0).to(dtype)
        value = torch.where(is_loop, 0, shrink.times(value)).to(dtype)
        self.rows = kernels.Matrix(graph.crow, graph.col, value, shrink.times(excess).to(dtype))
        at_boundary = torch.zeros(graph.num_rows, dtype=torch.bool)
        at_boundary[graph.halo.sent] = True
        self.interior, self.boundary = (~at_boundary).nonzero()[:, 0], at_boundary.nonzero()[:, 0]

    def multiply_(self, out: Tensor, x: Tensor, residual: Tensor) -> Tensor:
        """Writes A x to ``out``, after the ghosts of x [n + g, C] to x, and gives the sums of an iteration [3, C]."""
        halo, rows = self.graph.halo, len(out)
        request = halo.start(x[:rows], x[rows:])
        sums = kernels.multiply_rows_(out, self.rows, self.interior, x, residual, self.inverse)
        if request is not None:
            request.wait()
            sums += kernels.multiply_rows_(out, self.rows, self.boundary, x, residual, self.inverse)
        return self.graph.total(sums)


def vectors(graph: SplitGraph, spare: list[int], columns: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Zeros [n + spare, columns] for each of some numbers of spare rows, in one piece of memory: an allocator that
    keeps what is freed, as that of the C library does below 32 MiB, would find no use for the many of different sizes.
    """
    sizes = [graph.num_rows + rows for rows in spare]
    return torch.zeros(sum(sizes), columns, dtype=dtype).split(sizes)


class Iteration:
    """The vectors of conjugate gradients, which are those of the problem times powers of two."""

    def __init__(self, matrix: SplitMatrix, rhs: Tensor, initial: Tensor | None, rtol: float, max_iter: int) -> None:
        graph = self.graph = matrix.graph
        self.matrix, self.initial, self.dtype = matrix, initial, rhs.dtype
        columns = rhs.shape[1]
        tops = [_largest(rhs), torch.zeros(columns, dtype=torch.float64) if initial is None else _largest(initial)]
        top, top_start = graph.largest(torch.stack(tops))
        finite = top.isfinite() & top_start.isfinite() & matrix.is_finite
        inverse = matrix.inverse.double()[:, None]
        unit = PowersOf2([-exponent_of(value) for value in top.tolist()])
        jacobi = graph.largest(_largest(unit.times(rhs) * inverse))
        exponents = []
        for b, z, start in zip(top.tolist(), jacobi.tolist(), top_start.tolist(), strict=True):
            exponent = exponent_of(b) + exponent_of(z)
            exponents.append(max(exponent, exponent_of(start) + matrix.exponent) if start > 0 else exponent)
        self.grow = PowersOf2([exponent - matrix.exponent for exponent in exponents])
        self.b, self.extended = vectors(graph, [0, graph.num_ghosts], columns, torch.float64)
        PowersOf2([-exponent for exponent in exponents]).times(rhs, out=self.b).masked_fill_(~finite, 0)
        sums = torch.stack(
            [(self.b * inverse).square().sum(dim=0), ((self.b != 0) & (inverse == 0)).double().sum(dim=0)]
        )
        squares, outside = graph.total(sums)
        self.state = Convergence(finite, top > 0, squares.sqrt(), outside > 0, rtol, max_iter)
        self.x = self.extended[: graph.num_rows]
        if initial is not None:
            self.x.copy_(self.grow.divide(initial).masked_fill(~finite, 0))

    def run(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What :func:`conjugate_gradients` returns."""
        self._iterate()  # whose vectors are gone then
        state = self.state
        return self._solution(), state.iterations, state.residual().to(self.dtype), self._curvature()

    def _iterate(self) -> None:
        state, graph = self.state, self.graph
        r, p, s, w, extended = vectors(graph, [0, 0, 0, 0, graph.num_ghosts], self.x.shape[1], self.dtype)
        u = extended[: graph.num_rows]
        residual = self._measure(w)
        while state.judge():
            for column in (state.restarts & state.active).nonzero()[:, 0].tolist():
                r[:, column] = residual[:, column]
                p[:, column] = s[:, column] = 0
            torch.mul(self.matrix.step[:, None], r, out=u)
            while True:
                product, along, squares = self.matrix.multiply_(w, extended, r)
                state.advance(along, squares)
                if not state.step(product):
                    break
                self._step(r, p, s, u, w)
            residual = self._measure(w)

    def _step(self, r: Tensor, p: Tensor, s: Tensor, u: Tensor, w: Tensor) -> None:
        state, dtype = self.state, r.dtype
        kernels.step_(
            self.x,
            r,
            p,
            s,
            u,
            w=w,
            step=self.matrix.step,
            fresh=state.active.to(dtype),
            beta=torch.where(state.active, state.beta, 1).to(dtype),
            alpha=torch.where(state.active, state.alpha, 0).to(dtype),
        )

    def _measure(self, out: Tensor) -> Tensor:
        """b − A x [n, C] in float64, and what it says of the columns, some of them at a time; in ``out`` where that is
        of float64.
        """
        graph, matrix = self.graph, self.matrix
        request = graph.halo.start(self.x, self.extended[graph.num_rows :])
        largest = graph.largest(_largest(self.x))
        if request is not None:
            request.wait()
        whole = out if out.dtype == torch.float64 else torch.empty_like(self.x)
        inverse, step = matrix.inverse.double()[:, None], matrix.step.double()[:, None]
        sums, shares = self.x.new_empty(2, self.x.shape[1]), torch.empty_like(largest)
        for begin in range(0, self.x.shape[1], COLUMNS_AT_ONCE):
            some = slice(begin, begin + COLUMNS_AT_ONCE)
            product, terms = kernels.multiply_in_double(matrix.rows, self.extended[:, some].contiguous())
            b, x = self.b[:, some], self.x[:, some]
            residual, terms = b - product, terms + b.abs()
            sums[0, some] = (residual * step * residual).sum(dim=0)
            sums[1, some] = (inverse * residual).square().sum(dim=0)
            share = imbalance(residual, terms, matrix.diagonal, x, largest[some])
            shares[some] = _largest(torch.where(inverse > 0, share, 0))
            whole[:, some] = residual
        along, squares = graph.total(sums)
        self.state.measure(along, squares, graph.largest(shares))
        return whole

    def _solution(self) -> Tensor:
        solution = self.grow.times(self.x).to(self.dtype)
        solution = torch.where(self.matrix.inverse[:, None] > 0, solution, 0 if self.initial is None else self.initial)
        solution[:, ~self.state.has_right_side] = 0
        solution[:, ~self.state.finite] = torch.nan
        return solution

    def _curvature(self) -> Tensor:
        curvature = self.state.curvature
        if self.matrix.step is not self.matrix.inverse:  # p·A p/p·p of the matrix as it is given
            curvature = PowersOf2([self.matrix.exponent]).times(curvature)
        return torch.where(self.state.finite, curvature, torch.nan).to(self.dtype)


def _largest(x: Tensor) -> Tensor:
    """[C] float64 max |x_i| over the rows of x [n, C], 0 without rows and infinity where there is a NaN, which a
    reduction over ranks may lose.
    """
    if len(x) == 0:
        return x.new_zeros(x.shape[1], dtype=torch.float64)
    return x.abs().amax(dim=0).double().nan_to_num(nan=torch.inf, posinf=torch.inf)
