# SPDX-License-Identifier: BSD-3-Clause
"""The feature basis of SLADE (Duan et al., CVPR 2021)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkernels.nn._precision import without_autocast
from ssmkernels.ops import _checks as check


class FeatureBasis(nn.Module):
    """k basis vectors a_c, the rows of W_a, on which features f are measured: r = W_a f, and s_ij = cos(W_a f_i, W_a
    f_j), (4) of SLADE.

    A basis vector belongs to a labelled class, so that softmax(W_a f) classifies labelled features (L_CE of L_Basis =
    L_CE + L_SD); pseudo-labelled features, of other classes, only meet in pairs (:class:`SimilarityDistributionLoss`).
    No bias. The parameter ``weight`` [k, in_features] starts as that of ``nn.Linear`` does.

    Args:
        in_features: d ≥ 1, size of the features.
        num_basis: k ≥ 1, the number of labelled classes.

    Raises:
        ValueError, TypeError: an argument is out of range; the message names it.
    """

    def __init__(self, in_features: int, num_basis: int) -> None:
        super().__init__()
        in_features, num_basis = (
            check.check_count("in_features", in_features),
            check.check_count("num_basis", num_basis),
        )
        self.weight = nn.Parameter(torch.empty(num_basis, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """U(−1/√d, 1/√d), the default of ``nn.Linear``."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, features: Tensor) -> Tensor:
        """r = W_a f, [n, k], of features [n, d] in the dtype of ``weight``; under autocast in autocast's."""
        return self._projected("features", features)

    def cross_entropy(self, features: Tensor, labels: Tensor) -> Tensor:
        """L_CE: −log softmax(W_a f)_label, mean over the batch, a scalar in float32 or better; 0 for an empty batch.

        Args:
            features: [n, d].
            labels: [n] int64 in [0, k).

        Raises:
            ValueError, TypeError: an argument is not as said above; the message names it.
        """
        logits = self._projected("features", features)
        check.check_tensor("labels", labels, "[n]", 1)
        check.check_int64("labels", labels)
        check.check_size("labels", labels, 0, features.shape[0], "n of features")
        check.check_same_device("labels", labels, "features", features)
        check_classes(labels, self.weight.shape[0], "num_basis")
        return mean_cross_entropy(logits.to(check.compute_dtype(logits.dtype)), labels)

    def similarities(self, features: Tensor, references: Tensor | None = None) -> Tensor:
        """s_ij, (4): the cosines of W_a f, [n, n], or [n, m] with references [m, d]; in float32 or better. A zero row
        has cosine 0.
        """
        rows = self._directions("features", features)
        columns = rows if references is None else self._directions("references", references)
        with without_autocast(rows):
            return rows @ columns.t()

    def _projected(self, name: str, features: Tensor) -> Tensor:
        check.check_tensor(name, features, "[n, d]", 2)
        check.check_floating(name, features)
        check.check_size(name, features, 1, self.weight.shape[1], "in_features")
        check.check_same_device(name, features, "weight", self.weight)
        if not check.autocast_is_enabled(features.device):
            check.check_same_dtype(name, features, "weight", self.weight)
        return F.linear(features, self.weight)

    def _directions(self, name: str, features: Tensor) -> Tensor:
        projected = self._projected(name, features)
        return F.normalize(projected.to(check.compute_dtype(projected.dtype)))

    def extra_repr(self) -> str:
        num_basis, in_features = self.weight.shape
        return f"in_features={in_features}, num_basis={num_basis}"


def check_classes(labels: Tensor, classes: int, meaning: str) -> None:
    """Labels in [0, classes), where values are checked."""
    if check.values_are_checked(labels):
        check.check_range("labels", labels, classes, meaning)


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Of logits [n, classes], not under autocast; 0 for n = 0."""
    return F.cross_entropy(logits, labels, reduction="sum") / max(logits.shape[0], 1)
