# SPDX-License-Identifier: BSD-3-Clause
"""The multi-similarity loss (Wang et al., CVPR 2019), as pytorch-metric-learning calls it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkernels.nn import _pair_arguments as pair
from ssmkernels.nn._precision import without_autocast
from ssmkernels.ops import _checks as check


class MultiSimilarityLoss(nn.Module):
    """(1/n) Σ_i { (1/α) log[1 + Σ_{j ∈ P_i} exp(−α(s_ij − λ))] + (1/β) log[1 + Σ_{j ∈ N_i} exp(β(s_ij − λ))] }.

    s_ij is the cosine of embeddings i and j, P_i are the positives of i and N_i its negatives; a row without any counts as 0 in the mean.
    Values, arguments and defaults are those of ``pytorch_metric_learning.losses.MultiSimilarityLoss``. SLADE (Duan et al., CVPR 2021)
    trains its teachers T3 and T4 with it. Plain PyTorch: memory O(n·m).

    Args:
        alpha: α > 0, sharpness on positives.
        beta: β > 0, sharpness on negatives.
        base: λ, in cosine.

    Raises:
        ValueError, TypeError: an argument is out of range; the message names it.
    """

    def __init__(self, alpha: float = 2.0, beta: float = 50.0, base: float = 0.5) -> None:
        super().__init__()
        self.alpha = check.check_positive("alpha", alpha)
        self.beta = check.check_positive("beta", beta)
        self.base = check.check_number("base", base)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Sequence[Tensor] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar in float32 (float64 for float64 embeddings), also under autocast; 0, with gradient 0, without any pair.

        Args:
            embeddings: [n, d], floating point, of any length.
            labels: [n], integers; may be None beside ``indices_tuple``.
            indices_tuple: the pairs to take, from a miner: 3 tensors (anchors, positives, negatives) or 4 (anchors, positives, anchors,
                negatives), each [p], integers. A pair listed twice is one pair. Where each list holds one pair at most, the loss is 0,
                as in pytorch-metric-learning.
            ref_emb: [m, d]; pairs are then (row of ``embeddings``, row of ``ref_emb``), and both have a gradient.
            ref_labels: [m], integers. As in pytorch-metric-learning, (i, i) is a pair unless this is the very tensor ``labels``.

        Raises:
            ValueError, TypeError: an argument is not as said above; the message names it.
        """
        references, pairs = pair.check_pair_arguments(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        if embeddings.shape[0] == 0 or pair.at_most_one_pair(pairs):
            return pair.zero_loss(embeddings)
        positives, negatives = pair.pair_masks(pairs, embeddings.shape[0], references.shape[0])
        if isinstance(pairs, pair.PairIndices) and check.values_are_checked(positives) and (positives & negatives).any():
            raise ValueError("indices_tuple lists a pair both as positive and as negative")
        dtype = check.compute_dtype(torch.promote_types(embeddings.dtype, references.dtype))
        with without_autocast(embeddings):
            x = F.normalize(embeddings.to(dtype))
            y = x if references is embeddings else F.normalize(references.to(dtype))
            shifted = x @ y.t() - self.base
            losses = _log_one_plus_sum_exp(-self.alpha * shifted, positives) / self.alpha
            losses = losses + _log_one_plus_sum_exp(self.beta * shifted, negatives) / self.beta
            return losses.mean()

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, base={self.base}"


def _log_one_plus_sum_exp(exponents: Tensor, counted: Tensor) -> Tensor:
    """log(1 + Σ_{j counted} exp(exponents_ij)), [n]; the 1 is the exponent 0 of one more column."""
    return F.pad(exponents.masked_fill(~counted, float("-inf")), (0, 1)).logsumexp(dim=1)
