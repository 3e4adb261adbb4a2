# SPDX-License-Identifier: BSD-3-Clause
"""The multi-similarity loss (Wang et al., CVPR 2019), as pytorch-metric-learning calls it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkernels.distributed import Group
from ssmkernels.nn import _metric_learning as package
from ssmkernels.nn import _multi_similarity_over_ranks as over_ranks
from ssmkernels.nn import _pair_arguments as pair
from ssmkernels.nn._pair_loss import PairLoss
from ssmkernels.nn._precision import LARGEST_FACTOR, LEAST_FACTOR, without_autocast
from ssmkernels.ops import _checks as check


class MultiSimilarityLoss(PairLoss):
    """(1/n) Σ_i { (1/α) log[1 + Σ_{j ∈ P_i} exp(−α(s_ij − λ))] + (1/β) log[1 + Σ_{j ∈ N_i} exp(β(s_ij − λ))] }.

    s_ij is the cosine of embeddings i and j, P_i are the positives of i and N_i its negatives; a row without any counts
    as 0 in the mean. SLADE (Duan et al., CVPR 2021) trains its teachers T3 and T4 with it. Plain PyTorch: memory
    O(n·m).

    Values, the arguments of a call and default settings are those of
    ``pytorch_metric_learning.losses.MultiSimilarityLoss``, and it goes into that package's ``CrossBatchMemory``,
    ``SelfSupervisedLoss`` and, made after the package was imported, ``DistributedLossWrapper``. With a distance other
    than ``CosineSimilarity`` and ``DotProductSimilarity``, or a reducer other than ``MeanReducer``, the package's own
    class computes the loss. A pair listed twice in ``indices_tuple`` is one pair; one listed both as positive
    and as negative, as ``CrossBatchMemory`` of that package's 2.8 may list it, is one of each.

    Args:
        alpha: α in [1e-18, 1e18], sharpness on positives.
        beta: β in [1e-18, 1e18], sharpness on negatives.
        base: λ, in cosine, in [-1e18, 1e18].
        ignore_index: rows with this label are in no pair and not in the mean; by default every label is a class, −1
            too. Leaving rows out synchronises with the device, and one compiled graph cannot hold it. Not with a
            distance or a reducer that the package's own class computes.
        distance: of ``pytorch_metric_learning.distances``; None, the default, is ``CosineSimilarity()``.
        reducer: of ``pytorch_metric_learning.reducers``; None, the default, is ``MeanReducer()``.
        embedding_regularizer: of ``pytorch_metric_learning.regularizers``; its value is added.
        embedding_reg_weight: what that value is multiplied by.
        group: the ranks whose rows make pairs: a process group, None for the default group, or "local", the default,
            for this process alone. Each rank calls it with its own embeddings and labels; the loss is that of all rows
            together, and the gradient that of the own rows (:func:`ssmkernels.distributed.for_ddp`). Not with
            ``indices_tuple``, ``ref_emb``, or what the package computes.

    Raises:
        ValueError, TypeError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        alpha: float = 2.0,
        beta: float = 50.0,
        base: float = 0.5,
        *,
        ignore_index: int | None = None,
        distance: nn.Module | None = None,
        reducer: nn.Module | None = None,
        embedding_regularizer: nn.Module | None = None,
        embedding_reg_weight: float = 1.0,
        group: Group = "local",
    ) -> None:
        super().__init__(ignore_index, distance, reducer, embedding_regularizer, embedding_reg_weight, group)
        self.alpha = check.check_within("alpha", alpha, LEAST_FACTOR, LARGEST_FACTOR)
        self.beta = check.check_within("beta", beta, LEAST_FACTOR, LARGEST_FACTOR)
        self.base = check.check_within("base", base, -LARGEST_FACTOR, LARGEST_FACTOR)
        reduces = reducer is None or package.is_exactly(reducer, "reducers.MeanReducer")
        if not reduces or not package.is_power_one(distance, "CosineSimilarity", "DotProductSimilarity"):
            path = "losses.multi_similarity_loss.MultiSimilarityLoss"
            self._leave_to_package(path, alpha=self.alpha, beta=self.beta, base=self.base)

    def _loss(self, x: Tensor, y: Tensor, pairs: pair.PairIndices | pair.PairLabels) -> Tensor:
        positives, negatives = pair.pair_masks(pairs, x.shape[0], y.shape[0])
        dtype = check.compute_dtype(torch.promote_types(x.dtype, y.dtype))
        with without_autocast(x):
            rows = self._prepared(x.to(dtype))
            columns = rows if y is x else self._prepared(y.to(dtype))
            shifted = rows @ columns.t() - self.base
            losses = _log_one_plus_sum_exp(-self.alpha * shifted, positives) / self.alpha
            losses = losses + _log_one_plus_sum_exp(self.beta * shifted, negatives) / self.beta
            return losses.mean()

    def _loss_over_ranks(self, x: Tensor, labels: Tensor) -> Tensor:
        settings = over_ranks.Settings(self.alpha, self.beta, self.base)
        with without_autocast(x):
            rows = self._prepared(x.to(check.compute_dtype(x.dtype)))
            return over_ranks.multi_similarity_loss(rows, labels, settings, self.group)

    def _prepared(self, x: Tensor) -> Tensor:
        return F.normalize(x) if self.normalize else x

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, base={self.base}, ignore_index={self.ignore_index}"


def _log_one_plus_sum_exp(exponents: Tensor, counted: Tensor) -> Tensor:
    """log(1 + Σ_{j counted} exp(exponents_ij)), [n]; the 1 is the exponent 0 of one more column."""
    return F.pad(exponents.masked_fill(~counted, float("-inf")), (0, 1)).logsumexp(dim=1)
