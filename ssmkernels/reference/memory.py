# SPDX-License-Identifier: BSD-3-Clause
"""SimMatch (Zheng et al., CVPR 2022), equations (3)-(10), in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "InstanceMatching",
    "InstanceMatchingPartial",
    "aggregate",
    "instance_matching",
    "instance_matching_partial",
    "memory_update_",
    "unfold",
]


class InstanceMatching(NamedTuple):
    """Pseudo-labels [B, L] and the instance-matching loss [B] of each row."""

    pseudo_probs: Tensor
    loss: Tensor


class InstanceMatchingPartial(NamedTuple):
    """What is known after a part of the bank; parts merge by their log-normalisers."""

    log_weak: Tensor  # [B]     log Σ_j e^{w_j}
    log_target: (
        Tensor  # [B]   log Σ_j e^{w_j} p[y_j]; −inf where p is zero on every class of the part, q̂ then being q^w
    )
    log_strong: Tensor  # [B]   log Σ_j e^{s_j}
    aggregated: Tensor  # [B, L]    class sums of q^w
    target_logit: Tensor  # [B]     Σ_j q̂_j s_j
    target_mean: Tensor  # [B, D]   Σ_j q̂_j bank_j
    strong_mean: Tensor  # [B, D]   Σ_j q^s_j bank_j


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half types are computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _logits(query: Tensor, bank: Tensor, temperature: float) -> Tensor:
    dtype = _compute_dtype(query.dtype)
    return query.to(dtype) @ bank.to(dtype).t() / temperature


def _class_sums(values: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    return values.new_zeros(values.shape[0], num_classes).index_add(1, labels, values)


def _target_logits(logits: Tensor, labels: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """w + log p[y], or w in rows where p is zero on every class of the bank; and whether any p is not zero [B, 1]."""
    weights = probs.to(logits.dtype)[:, labels]
    known = (weights > 0).any(dim=1, keepdim=True)
    return torch.where(known, logits + weights.log(), logits), known


def instance_matching(
    query_weak: Tensor,
    query_strong: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    probs_weak: Tensor,
    *,
    temperature_weak: float = 0.1,
    temperature_strong: float = 0.1,
    alpha: float = 0.9,
) -> InstanceMatching:
    with torch.no_grad():
        weak = _logits(query_weak, bank, temperature_weak)
        aggregated = _class_sums(weak.softmax(dim=1), bank_labels, probs_weak.shape[1])
        pseudo_probs = alpha * probs_weak.to(weak.dtype) + (1 - alpha) * aggregated
        target = _target_logits(weak, bank_labels, probs_weak)[0].softmax(dim=1)
    log_strong = _logits(query_strong, bank.detach(), temperature_strong).log_softmax(dim=1)
    return InstanceMatching(pseudo_probs, -(target * log_strong).sum(dim=1))


def aggregate(
    query: Tensor, bank: Tensor, bank_labels: Tensor, num_classes: int, *, temperature: float = 0.1
) -> Tensor:
    return _class_sums(_logits(query, bank.detach(), temperature).softmax(dim=1), bank_labels, num_classes)


@torch.no_grad()
def unfold(query: Tensor, bank: Tensor, bank_labels: Tensor, probs: Tensor, *, temperature: float = 0.1) -> Tensor:
    return _target_logits(_logits(query, bank, temperature), bank_labels, probs)[0].softmax(dim=1)


@torch.no_grad()
def memory_update_(
    bank: Tensor, bank_labels: Tensor, index: Tensor, features: Tensor, labels: Tensor, *, momentum: float = 0.7
) -> None:
    dtype = _compute_dtype(bank.dtype)
    for row, slot in enumerate(index.tolist()):
        mixed = momentum * bank[slot].to(dtype) + (1 - momentum) * features[row].to(dtype)
        bank[slot] = F.normalize(mixed, dim=0, eps=1e-12).to(bank.dtype)
        bank_labels[slot] = labels[row]


@torch.no_grad()
def instance_matching_partial(
    query_weak: Tensor,
    query_strong: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    probs_weak: Tensor,
    *,
    temperature_weak: float = 0.1,
    temperature_strong: float = 0.1,
) -> InstanceMatchingPartial:
    weak = _logits(query_weak, bank, temperature_weak)
    strong = _logits(query_strong, bank, temperature_strong)
    target, known = _target_logits(weak, bank_labels, probs_weak)
    features = bank.to(weak.dtype)
    log_weak, log_target, log_strong = (logits.logsumexp(dim=1) for logits in (weak, target, strong))
    q_weak, q_target, q_strong = (logits.softmax(dim=1) for logits in (weak, target, strong))
    return InstanceMatchingPartial(
        log_weak=log_weak,
        log_target=torch.where(known[:, 0], log_target, -torch.inf),
        log_strong=log_strong,
        aggregated=_class_sums(q_weak, bank_labels, probs_weak.shape[1]),
        target_logit=(q_target * strong).sum(dim=1),
        target_mean=q_target @ features,
        strong_mean=q_strong @ features,
    )
