# SPDX-License-Identifier: BSD-3-Clause
"""Prototypes and the codes of SwAV (Caron et al., NeurIPS 2020), section 3.1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkernels.distributed import all_gather_rows
from ssmkernels.nn._precision import LARGEST_FACTOR, LEAST_FACTOR, without_autocast
from ssmkernels.ops import _checks as check


class PrototypeHead(nn.Module):
    """SwAV's head: Linear, batch norm, ReLU, Linear and L2 normalisation give z, and unit prototypes c_k the scores
    z·c_k.

    ``prototypes.weight`` [K, D] is scored as it is; :meth:`normalize_prototypes_` makes its rows unit vectors before
    every step.

    Args:
        in_features: size d of the features.
        hidden_features: width of the hidden layer.
        embedding_dim: D, size of the embeddings z.
        num_prototypes: K.

    Shape: features [N, d] -> z [N, D] of norm 1, scores [N, K], cosines; both at least float32, also under autocast.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int = 2048,
        embedding_dim: int = 128,
        num_prototypes: int = 3000,
    ) -> None:
        super().__init__()
        self.in_features = in_features = check.check_count("in_features", in_features)
        hidden_features = check.check_count("hidden_features", hidden_features)
        embedding_dim = check.check_count("embedding_dim", embedding_dim)
        num_prototypes = check.check_count("num_prototypes", num_prototypes)
        self.projection = nn.Sequential(
            nn.Linear(in_features, hidden_features),
            nn.BatchNorm1d(hidden_features),
            nn.ReLU(),
            nn.Linear(hidden_features, embedding_dim),
        )
        self.prototypes = nn.Linear(embedding_dim, num_prototypes, bias=False)
        self.normalize_prototypes_()

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """z and the scores, as said above."""
        check.check_tensor("features", features, "[N, d]", 2)
        check.check_floating("features", features)
        check.check_size("features", features, 1, self.in_features, "in_features")
        check.check_same_device("features", features, "the weights", self.prototypes.weight)
        if not check.autocast_is_enabled(features.device):
            check.check_same_dtype("features", features, "the weights", self.prototypes.weight)
        z = self.projection(features)
        with without_autocast(z):
            z = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)
            return z, F.linear(z, self.prototypes.weight.to(z.dtype))

    @torch.no_grad()
    def normalize_prototypes_(self) -> None:
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))


@torch.no_grad()
def sinkhorn_codes(scores: Tensor, *, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """The codes q [N, K]: the matrix Q ∝ exp(scores / ε), scaled in turns so that every prototype has as much mass as
    any other and every row a sum of 1, equations (3)-(5). The last scaling is that of the rows; the prototypes are even
    but for what it changes.

    Under ``torch.distributed`` the prototypes are balanced over the rows of all ranks together, of which each gets the
    codes of its own. In log space, so nothing overflows while scores/ε does not; a sum over ranks is then a log-sum-exp
    of the ranks' [K] logarithms, which are gathered.

    Args:
        scores: [N, K] floating point, on every rank at least one row.
        epsilon: ε in [1e-18, 1e18]; the smaller, the sharper.
        iterations: turns, at least 1.

    Returns:
        q [N, K], float32 (float64 for float64 scores), without gradient.
    """
    check.check_tensor("scores", scores, "[N, K]", 2)
    check.check_floating("scores", scores)
    if 0 in scores.shape:
        raise ValueError(f"scores must be [N, K] with N, K > 0, got shape {list(scores.shape)}")
    epsilon = check.check_within("epsilon", epsilon, LEAST_FACTOR, LARGEST_FACTOR)
    iterations = check.check_count("iterations", iterations)
    log_q = scores.to(torch.promote_types(scores.dtype, torch.float32)) / epsilon
    for _ in range(iterations):
        # Constant factors, 1/K and the number of rows among them, cancel in the scaling that follows.
        log_q = log_q - all_gather_rows(log_q.logsumexp(dim=0, keepdim=True)).logsumexp(dim=0)
        log_q = log_q.log_softmax(dim=1)
    return log_q.exp()
