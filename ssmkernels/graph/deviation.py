# SPDX-License-Identifier: BSD-3-Clause
"""Solutions of the graph systems as their deviation from constants that neither rounding nor a small residual
determines.

A X = B with A = diag(u) + D − W + D_dis + W_dis is nearly singular where u and W_dis are small beside D: A 1 = u + 2
d_dis. So it is for every group of nodes that only weak edges join to the rest, as the two halves of a barbell with a
thin bar. A small residual says nothing of the constants of such groups, and an iteration in floating point loses them.
They are solved for directly:

1. With c = Σ B/Σ A 1 for each component and column, the right side B − A 1 c of the deviation from c sums to 0.
2. With P the indicators of groups, (Pᵀ A P) Y = Pᵀ (B − A 1 c) gives their constants; conjugate gradients in float64
   give the deviation from those; what they leave of the constants is taken off by the same projection.
3. What is left of the component's own constant, (1ᵀ A X)/(1ᵀ A 1), is taken off.

No sum that has to cancel is taken over strong edges: A P Y has differences along weak ones only.

Of a graph that is split over ranks, N below is the number of this rank's rows; what is of components and groups is the
same on every rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssmkernels import ops
from ssmkernels.graph.parts import AnyGraph, extended, is_any, largest, linked_components, total
from ssmkernels.graph.split import SplitGraph
from ssmkernels.graph.split.solve import conjugate_gradients

WEAK = (1e-3, 1e-6, 1e-9, 1e-12)  # an edge is weak that is less than this share of the strongest edge of either end
MOST_GROUPS = 512  # beyond the components; their matrix is dense
ENTRIES_AT_ONCE = 2**22  # of a product along weak edges


class Deviation(NamedTuple):
    """The solution X = constant[component] + values."""

    constant: Tensor
    """[components, C] float64."""
    values: Tensor
    """[N, C] float64."""
    iterations: Tensor
    """[C] int64, of conjugate gradients."""
    residual: Tensor
    """[C] float64, at their end; see :func:`ssmkernels.ops.laplacian_solve`."""


class NearlySingular:
    """A = diag(u) + D − W + D_dis + W_dis, made ready for right sides with any columns.

    Args:
        diagonal: [N] float64 u.
        dissimilarity: [E] W_dis, or None for 0.
    """

    def __init__(self, graph: AnyGraph, diagonal: Tensor, dissimilarity: Tensor | None) -> None:
        self.graph, self.diagonal = graph, diagonal
        self.weight = graph.weight.double()
        self.dissimilarity = None if dissimilarity is None else dissimilarity.double()
        self.row_sums = diagonal  # A 1
        if self.dissimilarity is not None:
            self.row_sums = diagonal + 2 * graph.sum_rows(self.dissimilarity)
        whole = total(graph, sum_by(*graph.components, self.row_sums[:, None]))
        self.per_whole = torch.where(whole > 0, 1 / whole.clamp_min(torch.finfo(whole.dtype).tiny), 0)
        self.groups = Groups(graph, dissimilarity, self.row_sums)

    def solve(self, rhs: Tensor, totals: Tensor, *, rtol: float, max_iter: int) -> Deviation:
        """A X = B.

        Args:
            rhs: [N, C] float64 B, which is written.
            totals: [components, C] float64, the sums of B over each component, without rounding where they are to be
                equal.
        """
        component, count = self.graph.components
        groups = self.groups
        constant = self.per_whole * totals
        of_constant = self.row_sums[:, None] * constant[component]
        terms = rhs.abs() + of_constant.abs()
        rest = rhs.sub_(of_constant)
        del of_constant
        coarse = groups.solve(rest)
        if len(groups.joined):
            rest -= groups.product(coarse)
            terms += groups.row_terms[:, None] * groups.largest(coarse)
        # What rounding left of terms that cancel: nothing else may be there in a row, and no row would be solved for
        # it.
        rest[rest.abs() <= 4 * torch.finfo(rest.dtype).eps * terms] = 0
        del terms
        values: Tensor | None = None
        iterations = torch.zeros(rest.shape[1], dtype=torch.int64, device=rest.device)
        # In float64 throughout: started anew from float32's solution, the same iterations take as long again.
        # What the projection changed is checked by the second, which seldom takes an iteration.
        for _ in range(2 if len(groups.joined) else 1):
            values, steps, residual = self._conjugate_gradients(rest, values, rtol, max_iter)
            iterations += steps
            if len(groups.joined):
                values += groups.solve(rest - groups.product(values))
        assert values is not None
        del rest, rhs
        values += coarse
        left = self.per_whole * total(self.graph, sum_by(component, count, self.row_sums[:, None] * values))
        return Deviation(constant, values - left[component], iterations, residual)

    def _conjugate_gradients(
        self, rhs: Tensor, start: Tensor | None, rtol: float, max_iter: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Solution [N, C], iterations [C] and residual [C], in float64."""
        if isinstance(self.graph, SplitGraph):
            system = self.graph, self.weight, self.dissimilarity, self.diagonal, rhs
            return conjugate_gradients(*system, initial=start, rtol=rtol, max_iter=max_iter)[:3]
        start = torch.zeros_like(rhs) if start is None else start
        solution, iterations, residual, _ = ops.graph.solve_with_curvature(
            self.graph.crow,
            self.graph.col,
            self.weight,
            self.dissimilarity,
            self.diagonal,
            rhs,
            initial=start,
            rtol=rtol,
            max_iter=max_iter,
        )
        return solution, iterations, residual


class Groups:
    """Groups of nodes that strong edges join, and what A is between them."""

    def __init__(self, graph: AnyGraph, dissimilarity: Tensor | None, row_sums: Tensor) -> None:
        self.graph, self.row_sums = graph, row_sums
        self.group, self.count = strong_groups(graph)
        rows, col = graph.rows, graph.col.long()
        linked = graph.weight > 0  # a stored zero joins nothing
        if dissimilarity is not None:
            linked = linked | (dissimilarity > 0)
        group = extended(graph, self.group)
        weak = (linked & (group[rows] != group[col])).nonzero()[:, 0]
        self.rows, self.col, self.value = rows[weak], col[weak], -graph.weight[weak].double()
        if dissimilarity is not None:
            self.value += dissimilarity[weak].double()
        self.nodes, self.lengths = self.rows.unique_consecutive(return_counts=True)
        self.row_terms = row_sums.clone()  # a bound on the terms of a row of A P
        if len(weak):
            self.row_terms[self.nodes] += torch.segment_reduce(2 * self.value.abs(), "sum", lengths=self.lengths)
        is_joined = torch.zeros(self.count, dtype=torch.int64, device=graph.device)
        is_joined[self.group[self.nodes]] = 1
        self.joined = largest(graph, is_joined).nonzero()[:, 0]  # all groups of the components that have several
        if len(self.joined):
            self.scale, self.matrix = self._matrix(graph.components[0], group)
            most = int(largest(graph, torch.tensor(len(self.col))))
            self._columns_at_once = max(1, ENTRIES_AT_ONCE // most)

    def _matrix(self, component: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """S [K] and S (Pᵀ A P) S [K, K] of the joined groups, S = diag(Pᵀ A P)^−½, on the CPU.

        Pᵀ A P is all but singular on the constants of a component, which p = Pᵀ A 1 tells. With a multiple of p pᵀ
        added, a right side that sums to 0 there has the same solution, for which p·y = 0.
        """
        count = len(self.joined)
        place = torch.searchsorted(self.joined, group)
        pairs = place[self.rows] * count + place[self.col]
        matrix = torch.bincount(pairs.cpu(), self.value.cpu(), minlength=count * count).double().view(count, count)
        matrix = total(self.graph, matrix)
        sums = total(self.graph, sum_by(self.group, self.count, self.row_sums[:, None]))[self.joined, 0].cpu()
        matrix.diagonal().copy_(sums - matrix.sum(dim=1))
        scale = matrix.diagonal().rsqrt()
        matrix = scale[:, None] * matrix * scale
        owners = component.new_full((self.count,), -1).scatter_(0, self.group, component)
        owner = largest(self.graph, owners)[self.joined].cpu()
        for owning in owner.unique():
            inside = (owner == owning).nonzero()[:, 0]
            along = sums[inside] if bool(sums[inside].any()) else torch.ones_like(sums[inside])
            along = torch.nn.functional.normalize(scale[inside] * along, dim=0)
            matrix[inside[:, None], inside] += along[:, None] * along
        return scale, matrix

    def largest(self, constants: Tensor) -> Tensor:
        """[C] the largest magnitude of constants [N, C] of the groups; 0 without groups."""
        if len(self.joined) == 0:
            return constants.new_zeros(constants.shape[1])
        return largest(self.graph, torch.cat([constants.abs(), constants.new_zeros(1, constants.shape[1])]).amax(dim=0))

    def product(self, x: Tensor) -> Tensor:
        """A x [N, C] for an x that is constant on groups; for any other, what has the sums of A x over groups."""
        out = self.row_sums[:, None] * x
        if len(self.joined) == 0:
            return out
        for columns in torch.arange(x.shape[1], device=x.device).split(self._columns_at_once):
            some = extended(self.graph, x[:, columns])
            if len(self.col) == 0:
                continue
            flow = self.value[:, None] * (some[self.col] - some[self.rows])
            out[self.nodes[:, None], columns] += torch.segment_reduce(flow, "sum", lengths=self.lengths, axis=0)
        return out

    def solve(self, residual: Tensor) -> Tensor:
        """[N, C] constants of the groups, P (Pᵀ A P)⁻¹ Pᵀ applied to ``residual``; 0 where a component is one group."""
        if len(self.joined) == 0:
            return residual.new_zeros(()).expand_as(residual)
        sums = total(self.graph, sum_by(self.group, self.count, residual))[self.joined].cpu()
        shift = self.scale[:, None] * torch.linalg.solve(self.matrix, self.scale[:, None] * sums)
        constants = residual.new_zeros(self.count, residual.shape[1])
        constants[self.joined] = shift.to(residual.device)
        return constants[self.group]


def strong_groups(graph: AnyGraph) -> tuple[Tensor, int]:
    """[N] int64, the group of every node, and their number; at most MOST_GROUPS more than there are components."""
    most = extended(graph, torch.segment_reduce(graph.weight, "max", offsets=graph.crow, initial=0))
    strength = graph.weight / torch.minimum(most[graph.rows], most[graph.col.long()])
    component, count = graph.components
    for least in WEAK:
        strong = strength >= least
        if not is_any(graph, ~strong & (graph.weight > 0)):
            break
        group, groups = linked_components(graph, strong)
        if groups <= count + MOST_GROUPS:
            return group, groups
    return component, count


def sum_by(group: Tensor, count: int, values: Tensor) -> Tensor:
    """[count, C] sums of the rows [N, C] of every group, in order on any device."""
    order = group.argsort(stable=True)
    sizes = torch.bincount(group.cpu(), minlength=count).to(group.device)
    return torch.segment_reduce(values[order], "sum", lengths=sizes, axis=0, initial=0)
