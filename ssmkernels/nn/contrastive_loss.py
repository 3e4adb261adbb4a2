# SPDX-License-Identifier: BSD-3-Clause
"""The contrastive loss, as pytorch-metric-learning calls it, without its n×n matrix; L_rank of SLADE (Duan et al., CVPR 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssmkernels import ops
from ssmkernels.nn import _pair_arguments as pair
from ssmkernels.nn._precision import without_autocast
from ssmkernels.ops import _checks as check

Reduction = Literal["mean_nonzero", "mean", "sum"]

CHUNK_ELEMENTS = 1 << 22  # of the differences that exist at a time
DENSE_LIST = 4  # a list of p pairs is dense where the matrix of distances has at most this times p elements


class ContrastiveLoss(nn.Module):
    """Σ_P [d_ij − m_pos]_+ + Σ_N [m_neg − d_ij]_+ over positive pairs P and negative pairs N, each sum reduced by itself: SLADE, (1).

    d_ij is the Euclidean distance of embeddings scaled to unit length; at d_ij = 0 its gradient is 0. Values, arguments and defaults are
    those of ``pytorch_metric_learning.losses.ContrastiveLoss``, so that it goes where that one goes, also into its ``CrossBatchMemory``.
    Without ``indices_tuple`` every pair counts and memory is O((n + m)·d), see :func:`ssmkernels.ops.pair_ranking_loss`; with it,
    O((n + m)·d + pairs).

    Args:
        pos_margin: m_pos; positives closer than this cost nothing.
        neg_margin: m_neg; negatives farther than this cost nothing. Unit vectors are 2 apart at most.
        reduction: "mean_nonzero", the mean over the pairs that cost something (``AvgNonZeroReducer``, the default there); "mean", over
            all pairs (``MeanReducer``); "sum".

    Raises:
        ValueError, TypeError: an argument is out of range; the message names it.
    """

    def __init__(self, pos_margin: float = 0.0, neg_margin: float = 1.0, *, reduction: Reduction = "mean_nonzero") -> None:
        super().__init__()
        self.pos_margin = check.check_number("pos_margin", pos_margin)
        self.neg_margin = check.check_number("neg_margin", neg_margin)
        if reduction not in get_args(Reduction):
            raise ValueError(f"reduction must be 'mean_nonzero', 'mean' or 'sum', got {reduction!r}")
        self.reduction = reduction

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Sequence[Tensor] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar in float32 (float64 for float64 embeddings), also under autocast; 0, with gradient 0, where no pair costs.

        Args:
            embeddings: [n, d], floating point, of any length.
            labels: [n], integers; may be None beside ``indices_tuple``.
            indices_tuple: the pairs to take, from a miner: 3 tensors (anchors, positives, negatives) or 4 (anchors, positives, anchors,
                negatives), each [p], integers. A pair counts as often as it is listed. Where each list holds one pair at most, the
                loss is 0, as in pytorch-metric-learning.
            ref_emb: [m, d]; pairs are then (row of ``embeddings``, row of ``ref_emb``), and both have a gradient.
            ref_labels: [m], integers. As in pytorch-metric-learning, (i, i) is a pair unless this is the very tensor ``labels``.

        Raises:
            ValueError, TypeError: an argument is not as said above; the message names it.
        """
        references, pairs = pair.check_pair_arguments(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        if pair.at_most_one_pair(pairs):
            return pair.zero_loss(embeddings)
        dtype = check.compute_dtype(torch.promote_types(embeddings.dtype, references.dtype))
        with without_autocast(embeddings):
            x = F.normalize(embeddings.to(dtype))
            y = x if references is embeddings else F.normalize(references.to(dtype))
            if isinstance(pairs, pair.PairLabels):
                if not pairs.skip_diagonal or y is x:
                    return ops.pair_ranking_loss(
                        x,
                        pairs.labels,
                        positive_margin=self.pos_margin,
                        negative_margin=self.neg_margin,
                        reduction=self.reduction,
                        references=None if pairs.skip_diagonal else y,
                        reference_labels=None if pairs.skip_diagonal else pairs.reference_labels,
                    )
                # Two views of one batch without their diagonal: not a set of pairs that labels can say, so the pairs are listed.
                positives, negatives = pair.pair_masks(pairs, x.shape[0], y.shape[0])
                pairs = pair.PairIndices(*positives.nonzero(as_tuple=True), *negatives.nonzero(as_tuple=True))
            rows = torch.cat([pairs.positive_rows, pairs.negative_rows])
            columns = torch.cat([pairs.positive_columns, pairs.negative_columns])
            positive, negative = _distances(x, y, rows, columns).split([len(pairs.positive_rows), len(pairs.negative_rows)])
            return self._reduced(F.relu(positive - self.pos_margin)) + self._reduced(F.relu(self.neg_margin - negative))

    def _reduced(self, losses: Tensor) -> Tensor:
        if self.reduction == "sum":
            return losses.sum()
        if self.reduction == "mean":
            return losses.sum() / max(losses.shape[0], 1)
        return losses.sum() / (losses > 0).sum().clamp_min(1)

    def extra_repr(self) -> str:
        return f"pos_margin={self.pos_margin}, neg_margin={self.neg_margin}, reduction={self.reduction!r}"


def _distances(x: Tensor, y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """‖x_row − y_column‖ of p pairs, [p], from differences, not products: exact for close pairs, and the gradient of a distance 0 is 0.

    Memory is O(p) beside x and y: differences exist a chunk at a time and are made again in the backward pass. A list that is long for
    the sizes of x and y, as one of triplets is, is read from the matrix of all distances, which is then cheaper.
    """
    if 0 < x.shape[0] * y.shape[0] <= DENSE_LIST * len(rows):
        block = max(CHUNK_ELEMENTS // max(y.numel(), 1), 1)  # the backward of cdist makes the differences of a block on CUDA
        return torch.cat([torch.cdist(part, y, compute_mode="donot_use_mm_for_euclid_dist") for part in x.split(block)])[rows, columns]
    chunk = max(CHUNK_ELEMENTS // max(x.shape[1], 1), 1)
    parts = zip(rows.split(chunk), columns.split(chunk), strict=True)
    # checkpoint makes the differences of a chunk again where its gradient is wanted.
    return torch.cat([checkpoint(_listed_distances, x, y, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])


def _listed_distances(x: Tensor, y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    # Rows are taken by F.embedding because its backward, unlike that of indexing, adds in a fixed order.
    return torch.linalg.vector_norm(F.embedding(rows, x) - F.embedding(columns, y), dim=1)
