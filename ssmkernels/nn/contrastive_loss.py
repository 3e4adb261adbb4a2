# SPDX-License-Identifier: BSD-3-Clause
"""The contrastive loss, as pytorch-metric-learning calls it, without its n×n matrix; L_rank of SLADE (Duan et al., CVPR
2021).
"""

from __future__ import annotations

from functools import partial
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssmkernels import ops
from ssmkernels.distributed import Group
from ssmkernels.nn import _metric_learning as package
from ssmkernels.nn import _pair_arguments as pair
from ssmkernels.nn._pair_loss import PairLoss
from ssmkernels.nn._precision import without_autocast
from ssmkernels.ops import _checks as check
from ssmkernels.ops.ranking import Reduction

CHUNK_ELEMENTS = 1 << 22  # of the differences that exist at a time
REDUCERS: dict[str, Reduction] = {
    "AvgNonZeroReducer": "mean_nonzero",
    "MeanReducer": "mean",
    "SumReducer": "sum",
}
DENSE_LIST = 4  # a list of p pairs is dense where the matrix of distances has at most this times p elements


class ContrastiveLoss(PairLoss):
    """Σ_P [d_ij − m_pos]_+ + Σ_N [m_neg − d_ij]_+ over positive pairs P and negative pairs N, each sum reduced by
    itself: SLADE, (1).

    d_ij is the Euclidean distance of embeddings scaled to unit length; at d_ij = 0 its gradient is 0. Without
    ``indices_tuple`` every pair counts and memory is O((n + m)·d), see :func:`ssmkernels.ops.pair_ranking_loss`, but
    O(n²) for two views of one batch, that is with the tensor ``labels`` as ``ref_labels``; with ``indices_tuple`` it is
    O((n + m)·d + pairs), and a pair counts as often as listed.

    Values, the arguments of a call and default settings are those of
    ``pytorch_metric_learning.losses.ContrastiveLoss``, and it goes into that package's ``CrossBatchMemory``,
    ``SelfSupervisedLoss`` and, made after the package was imported, ``DistributedLossWrapper``. What is said of memory
    holds for ``LpDistance`` with p = 2 and power = 1, of any ``normalize_embeddings``, and for the reducers of
    ``reduction``; with other distances or reducers the package's own class computes the loss, from a matrix [n, m].

    Args:
        pos_margin: m_pos; positives closer than this cost nothing.
        neg_margin: m_neg; negatives farther than this cost nothing. Unit vectors are 2 apart at most.
        reduction: "mean_nonzero", the mean over the pairs that cost something (``AvgNonZeroReducer``, the default
            there); "mean", over all pairs (``MeanReducer``); "sum" (``SumReducer``).
        ignore_index: rows with this label are in no pair; by default every label is a class, −1 too. Leaving rows out
            synchronises with the device, and one compiled graph cannot hold it. Not with a distance or a reducer that
            the package's own class computes.
        distance: of ``pytorch_metric_learning.distances``; None, the default, is ``LpDistance()``.
        reducer: of ``pytorch_metric_learning.reducers``, in place of ``reduction``.
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
        pos_margin: float = 0.0,
        neg_margin: float = 1.0,
        *,
        reduction: Reduction = "mean_nonzero",
        ignore_index: int | None = None,
        distance: nn.Module | None = None,
        reducer: nn.Module | None = None,
        embedding_regularizer: nn.Module | None = None,
        embedding_reg_weight: float = 1.0,
        group: Group = "local",
    ) -> None:
        super().__init__(ignore_index, distance, reducer, embedding_regularizer, embedding_reg_weight, group)
        self.pos_margin = check.check_number("pos_margin", pos_margin)
        self.neg_margin = check.check_nonnegative("neg_margin", neg_margin)
        check.check_choice("reduction", reduction, get_args(Reduction))
        if reducer is not None and reduction != "mean_nonzero":
            raise ValueError(f"reducer and reduction={reduction!r} were both given; give one")
        reduction_there = reduction if reducer is None else _reduction_of(reducer)
        self.reduction: Reduction = reduction_there or reduction
        if reduction_there is None or not package.is_power_one(distance, "LpDistance"):
            path = "losses.contrastive_loss.ContrastiveLoss"
            self._leave_to_package(path, pos_margin=self.pos_margin, neg_margin=self.neg_margin)

    def _loss(self, x: Tensor, y: Tensor, pairs: pair.PairIndices | pair.PairLabels) -> Tensor:
        dtype = check.compute_dtype(torch.promote_types(x.dtype, y.dtype))
        with without_autocast(x):
            rows = self._prepared(x.to(dtype))
            columns = rows if y is x else self._prepared(y.to(dtype))
            if isinstance(pairs, pair.PairIndices):
                return self._loss_of_listed(rows, columns, pairs)
            if pairs.skip_diagonal and columns is not rows:
                return self._loss_of_two_views(rows, columns, pairs)
            return ops.pair_ranking_loss(
                rows,
                pairs.labels,
                positive_margin=self.pos_margin,
                negative_margin=self.neg_margin,
                reduction=self.reduction,
                references=None if columns is rows else columns,
                reference_labels=None if columns is rows else pairs.reference_labels,
            )

    def _loss_over_ranks(self, x: Tensor, labels: Tensor) -> Tensor:
        with without_autocast(x):
            return ops.pair_ranking_loss(
                self._prepared(x.to(check.compute_dtype(x.dtype))),
                labels,
                positive_margin=self.pos_margin,
                negative_margin=self.neg_margin,
                reduction=self.reduction,
                group=self.group,
            )

    def _prepared(self, x: Tensor) -> Tensor:
        return F.normalize(x) if self.normalize else x

    def _loss_of_listed(self, x: Tensor, y: Tensor, pairs: pair.PairIndices) -> Tensor:
        rows = torch.cat([pairs.positive_rows, pairs.negative_rows])
        columns = torch.cat([pairs.positive_columns, pairs.negative_columns])
        positive, negative = _distances(x, y, rows, columns).split([len(pairs.positive_rows), len(pairs.negative_rows)])
        positive_losses, negative_losses = F.relu(positive - self.pos_margin), F.relu(self.neg_margin - negative)
        return self._reduced(positive_losses, len(positive)) + self._reduced(negative_losses, len(negative))

    def _loss_of_two_views(self, x: Tensor, y: Tensor, pairs: pair.PairLabels) -> Tensor:
        """Without the pairs (i, i), which the op cannot leave out of two sets of rows: from the matrix of all
        distances.
        """
        positives, negatives = pair.pair_masks(pairs, x.shape[0], y.shape[0])
        distances = _all_distances(x, y)
        positive_losses = torch.where(positives, F.relu(distances - self.pos_margin), 0)
        negative_losses = torch.where(negatives, F.relu(self.neg_margin - distances), 0)
        return self._reduced(positive_losses, positives.sum()) + self._reduced(negative_losses, negatives.sum())

    def _reduced(self, losses: Tensor, count: int | Tensor) -> Tensor:
        if self.reduction == "sum":
            return losses.sum()
        divisor = torch.as_tensor(count, device=losses.device) if self.reduction == "mean" else (losses > 0).sum()
        return losses.sum() / divisor.clamp_min(1)

    def extra_repr(self) -> str:
        margins = f"pos_margin={self.pos_margin}, neg_margin={self.neg_margin}"
        return f"{margins}, reduction={self.reduction!r}, ignore_index={self.ignore_index}"


def _reduction_of(reducer: nn.Module) -> Reduction | None:
    """What a reducer of pytorch-metric-learning is called here; None where it has no name here."""
    return next((REDUCERS[name] for name in REDUCERS if package.is_exactly(reducer, f"reducers.{name}")), None)


def _distances(x: Tensor, y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """‖x_row − y_column‖ of p pairs, [p], from differences, not products: exact for close pairs, and the gradient of a
    distance 0 is 0.

    Memory is O(p) beside x and y: differences exist a chunk at a time and are made again in the backward pass. A list
    that is long for the sizes of x and y, as one of triplets is, is read from the matrix of all distances, which is
    then cheaper.
    """
    if 0 < x.shape[0] * y.shape[0] <= DENSE_LIST * len(rows):
        return _all_distances(x, y)[rows, columns]
    chunk = max(CHUNK_ELEMENTS // max(x.shape[1], 1), 1)
    parts = zip(rows.split(chunk), columns.split(chunk), strict=True)
    # checkpoint makes the differences of a chunk again where its gradient is wanted.
    distances = partial(checkpoint, _listed_distances, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([distances(x, y, *part) for part in parts])


def _all_distances(x: Tensor, y: Tensor) -> Tensor:
    # On CUDA the backward of cdist makes the differences of a block.
    block = max(CHUNK_ELEMENTS // max(y.numel(), 1), 1)
    return torch.cat([torch.cdist(part, y, compute_mode="donot_use_mm_for_euclid_dist") for part in x.split(block)])


def _listed_distances(x: Tensor, y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    # Rows are taken by F.embedding because its backward, unlike that of indexing, adds in a fixed order.
    return torch.linalg.vector_norm(F.embedding(rows, x) - F.embedding(columns, y), dim=1)
