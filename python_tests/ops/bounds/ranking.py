# SPDX-License-Identifier: BSD-3-Clause
"""Bounds of the ranking family: hinges of distances, pairs mined by cosines, and moments of cosines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bounds.rounding import BLOCK, Rounding, blocks

CLOSE = 32  # a squared distance below 1/32 of |x|² + |y|² is taken from differences
SMALLEST_NORM = 1e-12


def _off_diagonal(mask: Tensor) -> Tensor:
    return mask & ~torch.eye(len(mask), dtype=torch.bool, device=mask.device)


def _unit(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of unit length, or of zeros, and their lengths (∞ for those)."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    norms = torch.where(norms < SMALLEST_NORM, torch.inf, norms)
    return rows / norms, norms


class _Cosines:
    """Unit rows, which have a relative error of 3u (their lengths are summed in float64), and the cosines of all pairs
    with theirs.
    """

    def __init__(self, features: Tensor, rounding: Rounding) -> None:
        self.rows, self.norms = _unit(features)
        dim = features.shape[1]
        self.row_error = 3 * rounding.unit + rounding.exact_gamma(dim + 3)
        self.size = self.rows.abs() @ self.rows.abs().mT  # Σ_d |r_i||r_j|
        self.values = self.rows @ self.rows.mT
        self.error = (rounding.gamma(dim + 2) + 2 * self.row_error) * self.size + rounding.tiny


class _Distances:
    """Distances of all pairs (row, other) and their largest errors.

    By products, d² = |x|² + |y|² − 2 x·y of rows less their mean has an error of 2γ_{D+4}(|x|² + |y|²), by differences
    of γ_{D+3} d²; which of them a kernel takes changes at d² = (|x|² + |y|²)/32, so d has one of γ·min((|x|² + |y|²)/d,
    32 d) and γ d. Subtracting the mean rounds every coordinate by u of the result.
    """

    def __init__(self, rows: Tensor, others: Tensor, rounding: Rounding) -> None:
        self.rows, self.others = rows, others
        everything = rows if others is rows else torch.cat([rows, others])
        center = everything.mean(0) if len(everything) else rows.new_zeros(rows.shape[1])
        self.left, self.right = rows - center, others - center
        squares = self.left.square().sum(1)[:, None] + self.right.square().sum(1)
        self.values = torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist")
        dim = rows.shape[1]
        by_product = torch.minimum(squares / self.values.clamp_min(1e-300), CLOSE * self.values)
        terms = rounding.gamma(dim + 6)
        self.error = terms * (by_product + self.values) + 2 * rounding.unit * torch.where(
            by_product > 0, squares.sqrt(), 0.0
        )
        self.error = torch.where(
            self.values == 0, 0.0, self.error + dim**0.5 * rounding.tiny**0.5 * (self.values < 1e-15)
        )


class _Part:
    """One of the two hinges: the pairs, how far each is over its margin, and which may be in or out of the sum."""

    def __init__(
        self, pairs: Tensor, maybe: Tensor, excess: Tensor, error: Tensor, rounding: Rounding, reduction: str
    ) -> None:
        self.active = pairs & (excess > 0)
        self.doubtful = (pairs & (excess.abs() <= error)) | (maybe & (excess > -error))
        self.possible = self.active | self.doubtful
        losses = torch.where(self.active, excess, 0.0)
        moved = torch.where(self.possible, error, 0.0) + torch.where(maybe, excess.clamp_min(0), 0.0)
        self.total = losses.sum()
        # Half of the ordered pairs are summed, in tiles of BLOCK; the tiles in float64.
        self.total_error = (
            moved.sum()
            + (rounding.gamma(min(BLOCK, excess.numel())) + rounding.exact_gamma(blocks(excess.numel())))
            * (losses + moved).sum()
        )
        counted, unsure = {
            "sum": (excess.new_ones(()), excess.new_zeros(())),
            "mean": (pairs.sum().double(), maybe.sum().double()),
            "mean_nonzero": (self.active.sum().double(), self.doubtful.sum().double()),
        }[reduction]
        self.scale = 1 / counted.clamp_min(1)
        self.scale_error = 1 / (counted - unsure).clamp_min(1) - self.scale + 2 * rounding.unit * self.scale

    def loss_error(self) -> Tensor:
        return self.total_error * (self.scale + self.scale_error) + self.total * self.scale_error


def _ranking(
    inputs: dict[str, Any],
    grads: dict[str, Tensor],
    distances: _Distances,
    kinds: list[tuple[Tensor, Tensor]],
    rounding: Rounding,
):
    """The loss, and the gradients of rows and references.

    A pair's gradient is K (x_i − x_j), K = weight/d; all of it is in doubt where the pair may be in or out. In sums of
    products, (Σ K) x_i − Σ K x_j, of rows less their mean, the error is γ_n Σ |K|(|x_i| + |x_j|) per coordinate.
    """
    margins = inputs.get("positive_margin", 0.0), inputs.get("negative_margin", 0.5)
    d, error = distances.values, distances.error
    reduction = inputs.get("reduction", "mean_nonzero")
    size = rounding.unit * sum(abs(margin) for margin in margins)  # margins are rounded to the dtype
    excesses = (d - margins[0], margins[1] - d)
    parts = [
        _Part(pairs, maybe, excess, error + size, rounding, reduction)
        for (pairs, maybe), excess in zip(kinds, excesses, strict=True)
    ]
    loss = sum((part.total * part.scale for part in parts), start=d.new_zeros(()))
    bounds = {
        "loss": sum((part.loss_error() for part in parts), start=d.new_zeros(()))
        + 2 * rounding.unit * loss
        + rounding.tiny
    }
    if "loss" not in grads:
        return bounds, None
    grad = grads["loss"].double().abs()
    inverse = torch.where(d > 0, 1 / d, 0.0)
    k_size, k_error, k = (torch.zeros_like(d) for _ in range(3))
    for part, sign in zip(parts, (1, -1), strict=True):
        weight, unsure = grad * part.scale * inverse, grad * part.scale_error * inverse
        k = k + sign * torch.where(part.active, weight, 0.0)
        k_size = k_size + torch.where(part.possible, weight + unsure, 0.0)
        relative = (error * inverse + 3 * rounding.unit) * (weight + unsure)
        k_error = (
            k_error
            + torch.where(part.possible, unsure + relative, 0.0)
            + torch.where(part.doubtful, weight + unsure, 0.0)
        )
    return bounds, (k, k_size, k_error)


def _row_gradients(
    distances: _Distances, k: tuple[Tensor, Tensor, Tensor], rounding: Rounding, *, both: bool
) -> tuple[Tensor, Tensor]:
    """Gradient of the rows, from both sides of a pair where the set is paired with itself, and its error."""
    values, size, error = k
    if both:
        values, size, error = values + values.mT, size + size.mT, error + error.mT
    left, right = distances.left, distances.right
    dim, others = left.shape[1], len(right)
    exact = values.sum(1, keepdim=True) * left - values @ right
    moved = (
        torch.stack([(error * (left[:, c, None] - right[:, c]).abs()).sum(1) for c in range(dim)], dim=1)
        if dim
        else exact
    )
    sums = rounding.gamma(others + 8) * (size.sum(1, keepdim=True) * left.abs() + size @ right.abs())
    return exact, rounding.stored(exact, moved + sums)


def pair_ranking_loss(inputs: dict[str, Any], grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hinges of the distances of pairs with equal and with different labels."""
    references = inputs.get("references")
    rounding = Rounding.of(inputs["embeddings"].dtype)
    rows = inputs["embeddings"].double()
    others = rows if references is None else references.double()
    labels = inputs["labels"]
    other_labels = labels if references is None else inputs["reference_labels"]
    same, different = labels[:, None] == other_labels, labels[:, None] != other_labels
    same = _off_diagonal(same) if references is None else same
    nothing = torch.zeros_like(same)
    distances = _Distances(rows, others, rounding)
    bounds, k = _ranking(inputs, grads, distances, [(same, nothing), (different, nothing)], rounding)
    if k is None:
        return bounds
    bounds["grad embeddings"] = _row_gradients(distances, k, rounding, both=references is None)[1]
    if references is not None:
        mirrored = _Distances(others, rows, rounding)
        bounds["grad references"] = _row_gradients(mirrored, tuple(matrix.mT for matrix in k), rounding, both=False)[1]
    return bounds


def mined_pair_ranking_loss(inputs: dict[str, Any], grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same for pairs whose cosine is past a threshold; a cosine within its error of the threshold may be in or
    out.
    """
    dtype = torch.promote_types(inputs["embeddings"].dtype, inputs["basis_features"].dtype)
    rounding = Rounding.of(dtype)
    rows = inputs["embeddings"].double()
    cosines = _Cosines(inputs["basis_features"].double(), rounding)
    distances = _Distances(rows, rows, rounding)
    kinds = []
    for name, sign in (("positive_threshold", 1), ("negative_threshold", -1)):
        threshold = float(inputs[name])
        over = sign * (cosines.values - threshold)
        unsure = over.abs() <= cosines.error + rounding.unit * abs(threshold) + 1e-15
        kinds.append((_off_diagonal(over >= 0), _off_diagonal(unsure)))
    bounds, k = _ranking(inputs, grads, distances, kinds, rounding)
    if k is not None:
        bounds["grad embeddings"] = _row_gradients(distances, k, rounding, both=True)[1]
    return bounds


MOMENTS = ("positive_mean", "positive_var", "negative_mean", "negative_var")


def similarity_moments(inputs: dict[str, Any], grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """Means from the sums of unit rows, variances from deviations of cosines or, in float64, from ‖RᵀR‖²; negatives as
    all less positives.

    Unit rows have a relative error ρ, cosines one of (γ_{D+2} + 2ρ) Σ|r_i||r_j|. A mean moves by the mean of 2ρ
    Σ|r_i||r_j|, a variance by 2 mean(|s − mean| δ) + mean(δ²), and by what the positives' and the squares in float64
    bring to the negatives. The gradient is (I − r rᵀ) Σ_j c_ij r_j/‖x‖, c_ij = g_mean/count + 2 g_var (s_ij −
    mean)/count; where all pairs get the negatives' c, a positive pair's is a difference, so the magnitudes of both
    count.
    """
    rounding = Rounding.of(inputs["features"].dtype)
    labels, n = inputs["labels"], len(inputs["labels"])
    cosines = _Cosines(inputs["features"].double(), rounding)
    same = labels[:, None] == labels
    kinds = [_Moments(pairs, cosines, rounding, n) for pairs in (_off_diagonal(same), ~same)]
    positives, negatives = kinds
    negatives.var_error = negatives.var_error + positives.count / negatives.count.clamp_min(1) * positives.var_error * (
        negatives.count > 0
    )
    bounds = {}
    for name, kind in (("positive", positives), ("negative", negatives)):
        bounds |= {f"{name}_mean": kind.mean_error, f"{name}_var": kind.var_error + rounding.unit * kind.var}
    if all(name in grads for name in MOMENTS):
        bounds["grad features"] = _moment_gradients(
            cosines, kinds, [grads[name].double() for name in MOMENTS], rounding
        )
    return bounds


class _Moments:
    def __init__(self, pairs: Tensor, cosines: _Cosines, rounding: Rounding, n: int) -> None:
        self.pairs, self.count = pairs, pairs.sum().double()
        share = 1 / self.count.clamp_min(1)
        here = pairs.double() * share
        # Sums over all pairs, in float64, from which the others are taken off: of n rows and D·D products.
        sums = rounding.exact_gamma(2 * n + 2 * cosines.rows.shape[1] + 8) * share * (self.count > 0)
        self.mean = (here * cosines.values).sum()
        self.mean_error = (
            (here * 2 * cosines.row_error * cosines.size).sum()
            + sums * cosines.size.sum()
            + rounding.unit * self.mean.abs()
        )
        away = (cosines.values - self.mean).abs()
        moved = cosines.error + rounding.unit * (self.mean.abs() + away)
        self.var = (here * away.square()).sum()
        self.var_error = (here * (2 * away * moved + moved.square())).sum() + rounding.gamma(
            min(BLOCK, n * n)
        ) * self.var
        self.var_error = (
            self.var_error
            + self.mean_error.square()
            + 4 * sums * (cosines.size.square() + cosines.size).sum()
            + rounding.tiny
        )
        self.away = cosines.values - self.mean


def _moment_gradients(cosines: _Cosines, kinds: list[_Moments], grads: list[Tensor], rounding: Rounding) -> Tensor:
    rows = cosines.rows
    size, error, exact = (torch.zeros_like(cosines.values) for _ in range(3))
    everything = torch.ones_like(cosines.values)
    for kind, grad_mean, grad_var in zip(kinds, grads[::2], grads[1::2], strict=True):
        share = 2 / kind.count.clamp_min(1) * (kind.count > 0)
        alpha, beta = grad_mean * share, 2 * grad_var * share
        here = kind.pairs.double()
        reach = here if kind is kinds[0] else everything
        magnitude = alpha.abs() + beta.abs() * (cosines.values.abs() + kind.mean.abs())
        size = size + reach * magnitude
        error = error + reach * (beta.abs() * (cosines.error + kind.mean_error) + 4 * rounding.unit * magnitude)
        exact = exact + here * (alpha + beta * kind.away)
    v = exact @ rows
    v_error = error @ rows.abs() + (rounding.gamma(len(rows) + 6) + cosines.row_error) * (size @ rows.abs())
    along = (rows.abs() * v.abs()).sum(1, keepdim=True)
    along_error = (rows.abs() * v_error).sum(1, keepdim=True)
    total = (
        v_error
        + rows.abs() * along_error
        + (4 * cosines.row_error + 4 * rounding.unit) * (v.abs() + 2 * rows.abs() * along)
    )
    value = (v - rows * (rows * v).sum(1, keepdim=True)) / cosines.norms
    return rounding.stored(value, total / cosines.norms)
