# SPDX-License-Identifier: BSD-3-Clause
"""Leave-one-edge-out on a split graph whose classes are split too, over the ranks of ``graph.classes``.

A softmax over classes that are on several ranks needs of each only its largest logit, the sum of the exponentials and
their mean logit; the product of the two softmaxes of an edge needs one sum more. So the ranks reduce 7 numbers of every
edge, which each pair of nodes has once, however many classes there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssmkernels.distributed import all_reduce_max, all_reduce_sum
from ssmkernels.graph.split.structure import SplitGraph

NUMBERS_AT_ONCE = 2**20  # of the logits of one side
LEAST_LOGIT = -1000.0  # below the largest, whose exponential is 0


class Ends(NamedTuple):
    """Pairs of nodes with an edge, each of which one rank of ``graph.group`` computes: the one that has the first."""

    entry: Tensor
    """[P] the entry of the pair."""
    row: Tensor
    """[P] own row."""
    col: Tensor
    """[P] own row or ghost."""


def ends_of(graph: SplitGraph) -> Ends:
    places = torch.cat([torch.arange(graph.nodes.start, graph.nodes.stop), graph.ghosts])
    rows, col = graph.rows, graph.col.long()
    entry = (places[rows] <= places[col]).nonzero()[:, 0]
    return Ends(entry, rows[entry], col[entry])


class Pairs:
    """The logits (20) of both ends of some pairs, for the classes of this rank, a part of the pairs at a time.

    Args:
        propagated: [n + g, c] float64.
        degree: [n + g] float64.
        weight: [P] float64.
    """

    def __init__(self, ends: Ends, propagated: Tensor, degree: Tensor, weight: Tensor, logit_scale: float) -> None:
        self.ends, self.propagated, self.degree, self.weight = ends, propagated, degree, weight
        self.logit_scale = logit_scale

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Which pairs they are, and a_ij and a_ji [p, c] of them."""
        size = max(1, NUMBERS_AT_ONCE // max(1, self.propagated.shape[1]))
        for begin in range(0, len(self.weight), size):
            some = slice(begin, begin + size)
            row, col, weight = self.ends.row[some], self.ends.col[some], self.weight[some, None]
            own, other = self.propagated[row], self.propagated[col]
            first = self.degree[row, None] * own - weight * other
            second = self.degree[col, None] * other - weight * own
            yield some, self.logit_scale * first, self.logit_scale * second


class Sums(NamedTuple):
    """Over all classes, of both ends of each pair; e is the exponential of a logit a less the largest."""

    largest: Tensor
    """[P, 2]."""
    exponentials: Tensor
    """[P, 2] Σ e."""
    moments: Tensor
    """[P, 2] Σ e a, a less the largest."""
    cross: Tensor
    """[P] Σ e_ij e_ji."""


def sums_of(pairs: Pairs, graph: SplitGraph) -> Sums:
    """The sums of this rank's classes, reduced over the ranks: 2 numbers of a pair by their largest, 5 added up."""
    count = len(pairs.weight)
    largest = torch.full((count, 2), -torch.inf, dtype=torch.float64)
    sums = torch.zeros(count, 5, dtype=torch.float64)
    if pairs.propagated.shape[1] > 0:
        for some, *logits in pairs:
            tops = torch.stack([a.amax(dim=1) for a in logits], dim=1)
            lowered = [a - tops[:, side, None] for side, a in enumerate(logits)]
            powers = [a.exp() for a in lowered]
            parts = [e.sum(dim=1) for e in powers]
            parts += [(e * a).sum(dim=1) for e, a in zip(powers, lowered, strict=True)]
            parts.append((powers[0] * powers[1]).sum(dim=1))
            largest[some], sums[some] = tops, torch.stack(parts, dim=1)
    of_all = all_reduce_max(largest, group=graph.classes)
    lower = (largest - of_all).clamp_min(LEAST_LOGIT)
    factor = lower.exp()
    exponentials, moments, cross = sums[:, :2], sums[:, 2:4], sums[:, 4]
    sums = torch.cat(
        [factor * exponentials, factor * (moments + lower * exponentials), (factor.prod(dim=1) * cross)[:, None]], dim=1
    )
    sums = all_reduce_sum(sums, group=graph.classes)
    return Sums(of_all, sums[:, :2], sums[:, 2:4], sums[:, 4])


class Confidences(NamedTuple):
    """Of (21) and (22)."""

    omega: Tensor
    """[P, 2] ω_ij and ω_ji."""
    overlap: Tensor
    """[P] Z_ij·Z_ji."""

    def dissimilarity(self) -> Tensor:
        """[P]; rounding alone takes a factor out of [0, 1]."""
        return self.omega.clamp_min(0).prod(dim=1) * (1 - self.overlap).clamp_min(0)


def confidences_of(sums: Sums, classes: int) -> Confidences:
    entropy = sums.exponentials.log() - sums.moments / sums.exponentials
    return Confidences(1 - entropy / math.log(classes), sums.cross / sums.exponentials.prod(dim=1))


class LeaveOneEdgeOut(torch.autograd.Function):
    """(F [n + g, c] of this rank's classes, degrees [n + g], graph, λ, C) -> W_dis [P] of the pairs of ``ends``."""

    @staticmethod
    def forward(
        ctx: Any, propagated: Tensor, degree: Tensor, graph: SplitGraph, ends: Ends, logit_scale: float, classes: int
    ) -> Tensor:
        weight = graph.weight[ends.entry].double()
        pairs = Pairs(ends, propagated.double(), degree, weight, logit_scale)
        sums = sums_of(pairs, graph)
        ctx.save_for_backward(propagated, degree, weight, *ends, *sums)
        ctx.logit_scale, ctx.classes = logit_scale, classes
        return confidences_of(sums, classes).dissimilarity().to(propagated.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        propagated, degree, weight, *rest = ctx.saved_tensors
        ends, sums = Ends(*rest[:3]), Sums(*rest[3:])
        pairs = Pairs(ends, propagated.double(), degree, weight, ctx.logit_scale)
        of = confidences_of(sums, ctx.classes)
        entropy = (1 - of.omega) * math.log(ctx.classes)
        out = torch.zeros_like(pairs.propagated)
        for some, *logits in pairs:
            logs = [a - (sums.largest + sums.exponentials.log())[some, side, None] for side, a in enumerate(logits)]
            probs = [a.exp() for a in logs]
            slopes = []  # of W_dis by a_ij and by a_ji, csrc/kernels/graph/leave_one_edge_out.h
            for side in range(2):
                apart = of.omega[some, 1 - side] * (1 - of.overlap[some]) / math.log(ctx.classes)
                both = of.omega[some].prod(dim=1)
                surprise = logs[side].clamp_min(LEAST_LOGIT) + entropy[some, side, None]
                overlap = probs[1 - side] - of.overlap[some, None]
                slopes.append(probs[side] * (apart[:, None] * surprise - both[:, None] * overlap))
            scale = (ctx.logit_scale * grad[some].double())[:, None]
            row, col, own_weight = ends.row[some], ends.col[some], weight[some, None]
            out.index_add_(0, row, scale * (degree[row, None] * slopes[0] - own_weight * slopes[1]))
            out.index_add_(0, col, scale * (degree[col, None] * slopes[1] - own_weight * slopes[0]))
        return out.to(propagated.dtype), None, None, None, None, None
