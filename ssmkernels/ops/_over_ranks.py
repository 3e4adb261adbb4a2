# SPDX-License-Identifier: BSD-3-Clause
"""The pair losses of :mod:`ssmkernels.ops.ranking` over the rows of all ranks of a group.

The rows go round in blocks (:func:`ssmkernels.distributed.ring_blocks`), and each rank takes its own rows against every
block: O(n_r·N) work on a rank, O(n_r·d) memory. A loss is w₊ S₊ + w₋ S₋ where only the weights depend on all ranks, so
that the sums, four numbers, are reduced once, and the gradient of S₊ and of S₋ is kept from the same pass: nothing is
sent in the backward. Each ordered pair is met by the rank of its first row; the gradient of a row counts it twice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmkernels import distributed
from ssmkernels.distributed import Group
from ssmkernels.ops import _autograd as autograd
from ssmkernels.ops import _checks as check
from ssmkernels.ops._second_order import tiles


class Share(NamedTuple):
    """What a rank knows of a loss: its share of the sums over positive and over negative pairs, and their gradients."""

    sums: Tensor
    """[2] float64, of the losses."""
    counts: Tensor
    """[2] float64, pairs to divide by."""
    gradients: list[Tensor]
    """[n, d] each, of the sums over all ranks; empty where no gradient is wanted."""


class _Known(torch.autograd.Function):
    """(name, values [k], x, *gradients of the values) -> values, as a function of x."""

    @staticmethod
    def forward(ctx: Any, name: str, values: Tensor, x: Tensor, *gradients: Tensor) -> Tensor:
        ctx.name = name
        ctx.save_for_backward(x, *gradients)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *gradients = ctx.saved_tensors
        total = torch.zeros_like(gradients[0])
        for value_grad, gradient in zip(grad.unbind(), gradients, strict=True):
            total = total + value_grad * gradient
        total = autograd.gradient_of(ctx.name, total.detach(), x)
        return None, None, check.cast(total, x.dtype), *[None] * len(gradients)


def known(name: str, values: Tensor, x: Tensor, gradients: list[Tensor]) -> Tensor:
    """``values`` [k] with the gradients [n, d] of each by ``x``, which are there already; without, the values."""
    return _Known.apply(f"{name} with a group", values, x, *gradients) if gradients else values


def weighted(name: str, share: Share, x: Tensor, reduction: str, group: Group) -> Tensor:
    """w₊ S₊ + w₋ S₋ over all ranks, with the gradient by the rows x [n, d] of this one."""
    totals = distributed.all_reduce_sum(torch.cat([share.sums, share.counts]), group=group)
    sums, counts = totals.chunk(2)
    weights = torch.ones_like(sums) if reduction == "sum" else torch.where(counts > 0, 1 / counts.clamp_min(1), 0)
    dtype = check.compute_dtype(x.dtype)
    gradients = []
    if share.gradients:
        positive, negative = weights.to(dtype)
        gradients = [positive * share.gradients[0] + negative * share.gradients[1]]
    return known(name, (weights * sums).sum().to(dtype)[None], x, gradients)[0]


def pair_ranking_loss(
    x: Tensor, labels: Tensor, margins: tuple[float, float], reduction: int, with_gradient: bool, group: Group
) -> Share:
    """The share of :func:`ssmkernels.ops.pair_ranking_loss`, by its kernels; ``reduction`` says what is counted."""
    dtype = check.compute_dtype(x.dtype)
    rows = x.detach()
    labels, order = labels.sort(stable=True)
    sums, counts = (torch.zeros(2, dtype=torch.float64, device=x.device) for _ in range(2))
    gradients = [torch.zeros(x.shape, dtype=dtype, device=x.device) for _ in range(2 if with_gradient else 0)]
    # Alone, as the op gives their sum: no negative is within a margin of 0, no positive beyond one of infinity.
    alone = ((margins[0], 0.0), (float("inf"), margins[1]))
    one = torch.ones((), dtype=dtype, device=x.device)
    in_order = torch.empty_like(labels).scatter_(0, order, labels)
    for place, (others, other_labels) in enumerate(distributed.ring_blocks([rows, in_order], group=group)):
        references: tuple[Tensor | None, ...] = (None, None, None)  # the first block are the rows themselves
        if place > 0:
            sorted_labels, other_order = other_labels.sort(stable=True)
            references = (others, other_order, sorted_labels)
        for kind in range(2):
            inputs = (rows, order, labels, *references, *alone[kind])
            loss, weights, active = autograd.kernel("pair_ranking_loss")(*inputs, reduction)
            weight = weights[kind].double()
            count = torch.where(weight > 0, 1 / weight, 0).round()
            counts[kind] += count
            sums[kind] += torch.where(weight > 0, loss.double() * count, 0)
            if with_gradient:
                only = torch.tensor([1.0 - kind, float(kind)], dtype=dtype, device=x.device)
                gradient, _ = autograd.kernel("pair_ranking_loss_backward")(one, *inputs, only, active)
                gradients[kind] += gradient if place == 0 else 2 * gradient
    return Share(sums, counts, gradients)


def mined_pair_ranking_loss(
    x: Tensor,
    basis: Tensor,
    thresholds: Tensor,
    margins: tuple[float, float],
    reduction: str,
    with_gradient: bool,
    group: Group,
) -> Share:
    """The share of :func:`ssmkernels.ops.mined_pair_ranking_loss`, tile by tile in plain PyTorch."""
    dtype = check.compute_dtype(x.dtype)
    rows, basis = x.detach(), basis.detach()
    sums, counts = (torch.zeros(2, dtype=torch.float64, device=x.device) for _ in range(2))
    gradients = [torch.zeros(x.shape, dtype=dtype, device=x.device) for _ in range(2 if with_gradient else 0)]
    own = _Directions(basis.to(dtype))
    computed = rows.to(dtype)
    for place, (others, other_basis) in enumerate(distributed.ring_blocks([rows, basis], group=group)):
        others, directions = others.to(dtype), _Directions(other_basis.to(dtype))
        for tile in tiles(len(rows) if len(others) else 0, len(others)):
            distances = torch.cdist(computed[tile], others, compute_mode="donot_use_mm_for_euclid_dist")
            kinds = own.compare(tile, directions, thresholds)
            excesses = (distances - margins[0], margins[1] - distances)
            for kind, (pairs, excess) in enumerate(zip(kinds, excesses, strict=True)):
                pairs = without_diagonal(pairs, tile) if place == 0 else pairs
                active = pairs & ~(excess <= 0)
                sums[kind] += torch.where(active, excess, 0).sum(dtype=torch.float64)
                counts[kind] += (active if reduction == "mean_nonzero" else pairs).sum()
                if with_gradient and x.shape[1] > 0:
                    slopes = active.to(dtype) * (2 - 4 * kind)  # of d_ij and of d_ji
                    gradients[kind][tile] += torch.ops.aten._cdist_backward(
                        slopes, computed[tile], others, 2.0, distances
                    )
    return Share(sums, counts, gradients)


def without_diagonal(pairs: Tensor, tile: slice) -> Tensor:
    """Of the pairs of a tile of rows with all rows, those of two different rows."""
    places = torch.arange(pairs.shape[1], device=pairs.device)
    return pairs & (places[tile, None] != places)


class _Directions:
    """Rows of a feature basis, whose cosines are compared with thresholds as the kernel does: those too near to one to
    tell are taken again in double.
    """

    def __init__(self, rows: Tensor) -> None:
        largest = rows.abs().amax(dim=1, keepdim=True) if rows.numel() > 0 else rows.new_zeros(len(rows), 1)
        exponents = torch.frexp(largest).exponent
        present = torch.linalg.vector_norm(rows, dim=1, keepdim=True) >= 1e-12
        present |= rows.isnan().any(dim=1, keepdim=True)
        self.rows = torch.ldexp(rows.double(), -exponents) * present
        squares = self.rows.square().sum(dim=1, keepdim=True)
        self.inverse = torch.where(present, torch.where(squares == 0, 1, squares).rsqrt(), 0)
        self.squares = squares.masked_fill(~present, torch.inf)[:, 0]
        self.unit = (self.rows * self.inverse).to(rows.dtype)

    def compare(self, tile: slice, others: _Directions, thresholds: Tensor) -> tuple[Tensor, Tensor]:
        """s ≥ T1 and s ≤ T2 for a tile of these rows and all others."""
        cosines = self.unit[tile] @ others.unit.t()
        error = (self.unit.shape[1] + 8) * (6e-8 if cosines.dtype == torch.float32 else 1.2e-16)
        near = ((cosines - thresholds[0]).abs() <= error) | ((cosines - thresholds[1]).abs() <= error)
        first, second = near.nonzero(as_tuple=True)
        for part in tiles(len(first), self.unit.shape[1]):
            i, j = first[part], second[part]
            products = (self.rows[tile][i] * others.rows[j]).sum(dim=1)
            exact = products / (self.squares[tile][i] * others.squares[j]).sqrt()
            cosines[i, j] = exact.to(cosines.dtype)
        return cosines >= thresholds[0], cosines <= thresholds[1]


def similarity_moments(x: Tensor, labels: Tensor, with_gradient: bool, group: Group) -> tuple[Tensor, Tensor]:
    """The moments [4] of :func:`ssmkernels.ops.similarity_moments` over all ranks, and the numbers of positive and of
    negative pairs [2].

    With q₊ = Σ_j r_j and u₊ = Σ_j s_ij r_j over the positives j of a row i, the gradient of μ₊ by r_i is 2 q₊/P and
    that of σ₊² is 4 (u₊ − μ₊ q₊)/P, so that these sums are all that has to be kept.
    """
    dtype = check.compute_dtype(x.dtype)
    unit, inverse = unit_rows(x.detach().to(dtype))
    totals = torch.zeros(3, 2, dtype=torch.float64, device=x.device)  # pairs, Σ s, Σ s²
    sums = [torch.zeros_like(unit) for _ in range(4 if with_gradient else 0)]  # q₊, u₊, q₋, u₋
    for place, (others, other_labels) in enumerate(distributed.ring_blocks([unit, labels], group=group)):
        for tile in tiles(len(unit) if len(others) else 0, len(others)):
            same = labels[tile, None] == other_labels
            cosines = unit[tile] @ others.t()
            kinds = (without_diagonal(same, tile) if place == 0 else same, ~same)
            for kind, pairs in enumerate(kinds):
                values = torch.where(pairs, cosines, 0)
                wide = values.double()
                totals[:, kind] += torch.stack([pairs.sum().double(), wide.sum(), wide.square().sum()])
                if with_gradient:
                    sums[2 * kind][tile] += pairs.to(dtype) @ others
                    sums[2 * kind + 1][tile] += values @ others
    pairs, first, second = distributed.all_reduce_sum(totals, group=group)
    divisor = pairs.clamp_min(1)
    mean = first / divisor
    moments = torch.stack([mean, (second / divisor - mean.square()).clamp_min(0)], dim=1).flatten().to(dtype)
    gradients = []
    for kind, (q, u) in enumerate(zip(sums[0::2], sums[1::2], strict=True)):
        weight, center = (1 / divisor[kind]).to(dtype), mean[kind].to(dtype)
        for pull in (2 * weight * q, 4 * weight * (u - center * q)):
            gradients.append((pull - unit * (unit * pull).sum(dim=1, keepdim=True)) * inverse)
    return known("similarity_moments", moments, x, gradients), pairs


def unit_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of unit length and one over their lengths, [n, d] and [n, 1]; both 0 for a row shorter than 1e-12."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    inverse = torch.where(norms < 1e-12, 0, 1 / norms)
    return torch.where(norms < 1e-12, 0, rows / norms), inverse
