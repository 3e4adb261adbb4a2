# SPDX-License-Identifier: BSD-3-Clause
"""Local-CE and Global-CE, the alternatives to the similarity-distribution loss in ablation 3 of SLADE (Duan et al.,
CVPR 2021).

The ablation prints the names and their figures (MAP@R on CUB-200: Local-CE 32.69, Global-CE 32.23, the
similarity-distribution loss 33.59). How the two are defined could not be found in public text; what each class says it
computes is our reading of its name.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkernels.nn._pair_arguments import without_diagonal
from ssmkernels.nn._precision import LARGEST_FACTOR, LEAST_FACTOR, without_autocast
from ssmkernels.nn.feature_basis import check_classes, mean_cross_entropy
from ssmkernels.nn.similarity_distribution import RunningSimilarityMoments, check_batch
from ssmkernels.ops import _checks as check


def _directions(basis_features: Tensor) -> Tensor:
    return F.normalize(basis_features.to(check.compute_dtype(basis_features.dtype)))


class LocalCrossEntropy(RunningSimilarityMoments):
    """Binary cross-entropy of the pairs within a batch: is the pseudo-label of i that of j?

        L = mean_P softplus(−σ s_ij) + mean_N softplus(σ s_ij),   s_ij = cos(W_a f_i, W_a f_j),

    over the ordered pairs i ≠ j of equal (P) and of different (N) pseudo-labels; a mean without a pair is 0. The name
    is the paper's; that it means this, the two means, and σ are ours. The four running moments are kept as
    :class:`RunningSimilarityMoments` says, without a gradient, for the thresholds of the mining. Plain PyTorch: memory
    O(n²).

    Args:
        scale: σ in [1e-18, 1e18], from cosine to logit.
        momentum: β in [0, 1) of the moments.

    Raises:
        ValueError, TypeError: an argument is out of range; the message names it.
    """

    def __init__(self, scale: float = 10.0, momentum: float = 0.99) -> None:
        super().__init__(momentum)
        self.scale = check.check_within("scale", scale, LEAST_FACTOR, LARGEST_FACTOR)

    def forward(self, basis_features: Tensor, labels: Tensor) -> Tensor:
        """L, a scalar in float32 (float64 for float64 features), also under autocast.

        Args:
            basis_features: W_a f [n, k], floating point, of any length.
            labels: pseudo-labels [n] int64.

        Raises:
            ValueError, TypeError: an argument is not as said above; the message names it.
        """
        check_batch(basis_features, labels, self.positive_mean)
        self._update(basis_features.detach(), labels, batch_gradient=False)
        with without_autocast(basis_features):
            directions = _directions(basis_features)
            logits = self.scale * (directions @ directions.t())
        same = labels[:, None] == labels
        total = logits.new_zeros(())
        # softplus(x) = −log sigmoid(−x); F.softplus is x itself from 20 on
        for pairs, logs in ((without_diagonal(same), F.logsigmoid(logits)), (~same, F.logsigmoid(-logits))):
            total = total - torch.where(pairs, logs, 0).sum() / pairs.sum().clamp_min(1)
        return total

    def extra_repr(self) -> str:
        return f"scale={self.scale}, momentum={self.momentum}"


class GlobalCrossEntropy(RunningSimilarityMoments):
    """Cross-entropy of each sample against all clusters of the pseudo-labels, not only those in the batch.

        L = −mean_i log softmax_c(σ cos(W_a f_i, p_c))_{label i}

    with a learnt prototype p_c for every cluster c; optimise :meth:`parameters` beside those of W_a. The name is the
    paper's; that it means this, the cosine with a prototype, and σ are ours. The four running moments are kept as
    :class:`RunningSimilarityMoments` says, without a gradient, for the thresholds of the mining. The parameter
    ``prototypes`` [num_clusters, k] starts normal and is scaled to unit rows inside. Prototypes belong to one
    clustering: a new one needs a new module.

    Args:
        num_basis: k ≥ 1, of the feature basis.
        num_clusters: clusters C ≥ 1 of the pseudo-labels.
        scale: σ in [1e-18, 1e18], from cosine to logit.
        momentum: β in [0, 1) of the moments.

    Raises:
        ValueError, TypeError: an argument is out of range; the message names it.
    """

    def __init__(self, num_basis: int, num_clusters: int, scale: float = 10.0, momentum: float = 0.99) -> None:
        super().__init__(momentum)
        self.scale = check.check_within("scale", scale, LEAST_FACTOR, LARGEST_FACTOR)
        shape = check.check_count("num_clusters", num_clusters), check.check_count("num_basis", num_basis)
        self.prototypes = nn.Parameter(torch.randn(shape))

    def forward(self, basis_features: Tensor, labels: Tensor) -> Tensor:
        """L, a scalar in float32 (float64 for float64 features), also under autocast; 0 for an empty batch.

        Args:
            basis_features: W_a f [n, k], floating point, of any length.
            labels: pseudo-labels [n] int64 in [0, C).

        Raises:
            ValueError, TypeError: an argument is not as said above; the message names it.
        """
        check_batch(basis_features, labels, self.prototypes)
        check.check_size("basis_features", basis_features, 1, self.prototypes.shape[1], "num_basis")
        check_classes(labels, self.prototypes.shape[0], "num_clusters")
        self._update(basis_features.detach(), labels, batch_gradient=False)
        with without_autocast(basis_features):
            directions = _directions(basis_features)
            logits = self.scale * (directions @ F.normalize(self.prototypes.to(directions.dtype)).t())
            return mean_cross_entropy(logits, labels)

    def extra_repr(self) -> str:
        clusters, num_basis = self.prototypes.shape
        return f"num_basis={num_basis}, num_clusters={clusters}, scale={self.scale}, momentum={self.momentum}"
