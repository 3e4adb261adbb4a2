# SPDX-License-Identifier: BSD-3-Clause
"""Pairwise similarity network with focal loss (Wu, Feng and Zhou, MLSN, 2020), section 2.1 to 2.3, in plain PyTorch."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "pair_focal_loss",
    "pair_logits",
]


def _interact(left: Tensor, right: Tensor, interaction: str) -> Tensor:
    """φ [..., d], or [..., 2d] for "concat", of rows [..., d]."""
    if interaction == "concat":
        return torch.cat(torch.broadcast_tensors(left, right), dim=-1)
    return (left - right).abs() if interaction == "absdiff" else left * right


def pair_logits(
    x: Tensor,
    y: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    interaction: Literal["concat", "absdiff", "product"] = "concat",
    pairs: Tensor | None = None,
) -> Tensor:
    """w2·relu(w1·φ(x_i, y_j) + b1) + b2 of all pairs [n, m] or of those listed [p]."""
    left, right = (x[:, None], y[None]) if pairs is None else (x[pairs[:, 0]], y[pairs[:, 1]])
    phi = _interact(left, right, interaction)
    logits = F.linear(F.linear(phi, w1, b1).relu(), w2[None], b2[None])[..., 0]
    return logits if logits.dtype == torch.float64 else logits.float()


def pair_focal_loss(
    x: Tensor,
    y: Tensor,
    x_labels: Tensor,
    y_labels: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    interaction: Literal["concat", "absdiff", "product"] = "concat",
    pairs: Tensor | None = None,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
    ignore_index: int = -1,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """FL = −α_t (1 − p_t)^γ log p_t of the logits, the target being whether the labels match; 0 for pairs with an
    ignored label.
    """
    logits = pair_logits(x, y, w1, b1, w2, b2, interaction=interaction, pairs=pairs)
    if pairs is None:
        left, right = x_labels[:, None], y_labels[None]
    else:
        left, right = x_labels[pairs[:, 0]], y_labels[pairs[:, 1]]
    target, counted = left == right, (left != ignore_index) & (right != ignore_index)
    signed = torch.where(target, logits, -logits)
    loss = -(gamma * F.logsigmoid(-signed)).exp() * F.logsigmoid(signed)  # 1 − p_t = sigmoid(−signed)
    if alpha is not None:
        loss = torch.where(target, alpha, 1 - alpha) * loss
    loss = torch.where(counted, loss, 0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counted.sum().clamp_min(1)
