# SPDX-License-Identifier: BSD-3-Clause
"""The confidence-weighted proxy loss of mixed label propagation (Zhuang and Moulin, CVPR 2023), equations (26)-(29)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkernels.nn._precision import LARGEST_FACTOR, LEAST_FACTOR, without_autocast
from ssmkernels.ops import _checks as check


class ProxyLoss(nn.Module):
    """A learnt proxy p_c for every class, and the loss that pulls embeddings to the proxy of their class and pushes
    them off the others.

    With unit embeddings z_i, classes y_i (given or pseudo) and confidences ω_i,

        L = (1/C) Σ_i ω_i [ softplus(−ε(z_i·p_{y_i} − b)) + Σ_{c ≠ y_i} softplus(ε(z_i·p_c + b)) ],

    a sum over the batch, not its mean. The parameter ``proxies`` [C, δ] is kept as the optimiser leaves it and scaled
    to unit rows inside. It starts Kaiming normal (fan-out), as Proxy-Anchor's does (Kim et al., CVPR 2020), of which
    this loss is the per-sample form; there proxies learn at 100 times the rate of the network.

    Args:
        num_classes: C ≥ 1.
        embedding_dim: δ ≥ 1.
        epsilon: ε in [1e-18, 1e18], scale of the cosines.
        margin: b, in cosine.

    Raises:
        ValueError, TypeError: an argument is out of range; the message names it.
    """

    def __init__(self, num_classes: int, embedding_dim: int, *, epsilon: float = 32.0, margin: float = 0.1) -> None:
        super().__init__()
        shape = check.check_count("num_classes", num_classes), check.check_count("embedding_dim", embedding_dim)
        self.epsilon = check.check_within("epsilon", epsilon, LEAST_FACTOR, LARGEST_FACTOR)
        self.margin = check.check_number("margin", margin)
        if not -1 <= self.margin <= 1:
            raise ValueError(f"margin must be in [-1, 1], as cosines are, got {margin}")
        self.proxies = nn.Parameter(torch.empty(shape))
        nn.init.kaiming_normal_(self.proxies, mode="fan_out")

    def forward(self, embeddings: Tensor, labels: Tensor, confidence: Tensor | None = None) -> Tensor:
        """L, a scalar in float32 (float64 for float64 embeddings), also under autocast.

        Args:
            embeddings: z [B, δ] of unit length, floating point; they are taken as given.
            labels: y [B] int64, in [0, C); rows with −1 contribute nothing, neither value nor gradient.
            confidence: ω [B], floating point, finite, ≥ 0; by default 1. No gradient flows to it.

        Raises:
            ValueError, TypeError: an argument is not as said above; the message names it.
        """
        classes, dim = self.proxies.shape
        check.check_tensor("embeddings", embeddings, "[B, δ]", 2)
        check.check_floating("embeddings", embeddings)
        check.check_size("embeddings", embeddings, 1, dim, "embedding_dim")
        check.check_same_device("embeddings", embeddings, "proxies", self.proxies)
        check.check_tensor("labels", labels, "[B]", 1)
        check.check_int64("labels", labels)
        check.check_size("labels", labels, 0, embeddings.shape[0], "B of embeddings")
        check.check_same_device("labels", labels, "embeddings", embeddings)
        if check.values_are_checked(labels) and not check.is_batched(labels) and labels.numel():
            low, high = (int(bound) for bound in torch.aminmax(labels))
            if low < -1 or high >= classes:
                raise ValueError(f"labels must be in [0, {classes}), or −1 for none; got values from {low} to {high}")
        if confidence is not None:
            check.check_tensor("confidence", confidence, "[B]", 1)
            check.check_floating("confidence", confidence)
            check.check_size("confidence", confidence, 0, embeddings.shape[0], "B of embeddings")
            check.check_same_device("confidence", confidence, "embeddings", embeddings)
            if check.values_are_checked(confidence):
                check.check_weights("confidence", confidence)

        dtype = check.compute_dtype(embeddings.dtype)
        with without_autocast(embeddings):
            cosines = embeddings.to(dtype) @ F.normalize(self.proxies.to(dtype)).t()
            own = labels[:, None] == torch.arange(classes, device=labels.device)
            margins = torch.where(own, cosines - self.margin, -cosines - self.margin)
            margins = torch.where(labels[:, None] >= 0, margins, 0)  # no gradient, whatever the confidence
            losses = -F.logsigmoid(self.epsilon * margins).sum(dim=1)  # (28), (29); softplus(x) = −log sigmoid(−x)
            if confidence is not None:
                losses = confidence.detach().to(dtype) * losses  # (27)
            return torch.where(labels >= 0, losses, 0).sum() / classes  # (26)

    def extra_repr(self) -> str:
        classes, dim = self.proxies.shape
        return f"num_classes={classes}, embedding_dim={dim}, epsilon={self.epsilon}, margin={self.margin}"
