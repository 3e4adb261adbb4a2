# SPDX-License-Identifier: BSD-3-Clause
"""Pair ranking losses and similarity moments of SLADE (Duan et al., CVPR 2021), in plain PyTorch."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "SimilarityMoments",
    "mined_pair_ranking_loss",
    "pair_ranking_loss",
    "similarity_moments",
]


class SimilarityMoments(NamedTuple):
    """Means and population variances of the cosines of pairs with equal and with different labels, four scalars; 0
    without such a pair.
    """

    positive_mean: Tensor
    positive_var: Tensor
    negative_mean: Tensor
    negative_var: Tensor


def _computed(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _unit(rows: Tensor) -> Tensor:
    """Rows of unit length; a row of zeros, without direction, stays one, with no gradient."""
    rows = _in_range(rows)
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / torch.where(norms < 1e-12, torch.inf, norms)


def _in_range(rows: Tensor) -> Tensor:
    """Large rows times a power of two, which keeps their squares in range and their direction as it is."""
    if rows.shape[1] == 0:
        return rows
    exponents = torch.frexp(rows.detach().abs().amax(dim=1, keepdim=True)).exponent
    # Torch 2.11 differentiates ldexp wrongly
    scale = torch.ldexp(torch.ones_like(exponents, dtype=rows.dtype), -exponents)
    return torch.where(exponents > 0, rows * scale, rows)


def _cosines(rows: Tensor) -> Tensor:
    """As products of the rows over the root of their squares', which is exact where it is 0 or ±1 and the rows are
    whole numbers.
    """
    norms, rows = torch.linalg.vector_norm(rows, dim=1), _in_range(rows)
    squares = rows.square().sum(dim=1).masked_fill(norms < 1e-12, torch.inf)
    return rows @ rows.t() / (squares[:, None] * squares).sqrt()


def _off_diagonal(mask: Tensor) -> Tensor:
    return mask & ~torch.eye(len(mask), dtype=torch.bool, device=mask.device)


def _ranking_loss(
    distances: Tensor,
    positives: Tensor,
    negatives: Tensor,
    positive_margin: float,
    negative_margin: float,
    reduction: str,
) -> Tensor:
    """Equation (1): Σ [d − m_pos]_+ over positives and Σ [m_neg − d]_+ over negatives, each reduced by itself."""
    total = distances.new_zeros(())
    for pairs, excess in ((positives, distances - positive_margin), (negatives, negative_margin - distances)):
        losses = torch.where(pairs, excess.relu(), 0)
        counted = {"sum": None, "mean": pairs, "mean_nonzero": losses > 0}[reduction]
        total = total + (losses.sum() if counted is None else losses.sum() / counted.sum().clamp_min(1))
    return total


def pair_ranking_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    positive_margin: float = 0.0,
    negative_margin: float = 0.5,
    reduction: Literal["mean_nonzero", "mean", "sum"] = "mean_nonzero",
    references: Tensor | None = None,
    reference_labels: Tensor | None = None,
) -> Tensor:
    """Pairs with equal labels are positives, with different labels negatives."""
    embeddings = _computed(embeddings)
    others = embeddings if references is None else _computed(references)
    other_labels = labels if reference_labels is None else reference_labels
    # Differences, not products: exact for close pairs, and the gradient of a distance 0 is 0.
    distances = torch.cdist(embeddings, others, compute_mode="donot_use_mm_for_euclid_dist")
    same, different = labels[:, None] == other_labels, labels[:, None] != other_labels
    same = _off_diagonal(same) if references is None else same
    return _ranking_loss(distances, same, different, positive_margin, negative_margin, reduction)


def mined_pair_ranking_loss(
    embeddings: Tensor,
    basis_features: Tensor,
    *,
    positive_threshold: float | Tensor,
    negative_threshold: float | Tensor,
    positive_margin: float = 0.0,
    negative_margin: float = 0.5,
    reduction: Literal["mean_nonzero", "mean", "sum"] = "mean_nonzero",
) -> Tensor:
    """Equation (7): positives are the pairs whose basis features have a cosine ≥ T1, negatives those with one ≤ T2."""
    embeddings, similarities = _computed(embeddings), _cosines(_computed(basis_features.detach()))
    distances = torch.cdist(embeddings, embeddings, compute_mode="donot_use_mm_for_euclid_dist")
    positives, negatives = (
        _off_diagonal(similarities >= positive_threshold),
        _off_diagonal(similarities <= negative_threshold),
    )
    return _ranking_loss(distances, positives, negatives, positive_margin, negative_margin, reduction)


def similarity_moments(features: Tensor, labels: Tensor) -> SimilarityMoments:
    """Over all ordered pairs i ≠ j; the cosine with a row of zeros is 0."""
    features = _unit(_computed(features))
    similarities = features @ features.t()
    same = labels[:, None] == labels
    moments = []
    for pairs in (_off_diagonal(same), ~same):
        count = pairs.sum().clamp_min(1)
        mean = torch.where(pairs, similarities, 0).sum() / count
        moments += [mean, torch.where(pairs, (similarities - mean).square(), 0).sum() / count]
    return SimilarityMoments(*moments)
