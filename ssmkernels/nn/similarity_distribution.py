# SPDX-License-Identifier: BSD-3-Clause
"""The similarity-distribution loss of SLADE (Duan et al., CVPR 2021) and the running moments that its mining reads."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels import ops
from ssmkernels.distributed import Group, all_gather_rows, check_group, is_split
from ssmkernels.nn._precision import LARGEST_FACTOR, RunningStatistics
from ssmkernels.ops import _checks as check

MOMENTS = ops.SimilarityMoments._fields
MomentGradient = Literal["batch", "momentum"]


class RunningSimilarityMoments(RunningStatistics):
    """Running means and variances of the similarities of positive and of negative pairs, (6): μ ← (1 − β) μ_batch + β
    μ.

    Buffers ``positive_mean``, ``positive_var``, ``negative_mean``, ``negative_var``, 0-d and at least float32 whatever
    the module is converted to; 0 until there has been such a pair. The first batch with one sets them, and a batch
    without leaves them as they were. Which of the two a batch is is found out on the device, without a synchronisation.
    In eval mode nothing is updated.

    Args:
        momentum: β in [0, 1).
    """

    statistics = MOMENTS
    positive_mean: Tensor
    positive_var: Tensor
    negative_mean: Tensor
    negative_var: Tensor
    positive_seen: Tensor
    negative_seen: Tensor

    def __init__(self, momentum: float) -> None:
        super().__init__()
        self.momentum = check.check_fraction("momentum", momentum)
        if momentum == 1:
            raise ValueError("momentum must be below 1, or the moments would stay those of the first batch")
        for name in MOMENTS:
            self.register_buffer(name, torch.zeros(()))
        for name in ("positive_seen", "negative_seen"):
            self.register_buffer(name, torch.zeros((), dtype=torch.bool))

    def _update(
        self, basis_features: Tensor, labels: Tensor, *, batch_gradient: bool, group: Group = "local"
    ) -> ops.SimilarityMoments:
        """The moments after this batch, kept in train mode; differentiable as (6) says, or with the gradient of the
        batch's own moments.

        The arguments are those that :func:`check_batch` has seen.
        """
        batch = ops.similarity_moments(basis_features, labels, group=group)
        if is_split(group):
            labels = all_gather_rows(labels, group=group)
        # Neighbours in order tell whether any two labels are equal, and whether any two differ. The first comes after
        # the last, which says nothing that others do not say, unless they are one row. Slices of n − 1 would bind a
        # compiled graph to n > 2.
        in_order = labels.sort().values
        equal = in_order == in_order.roll(1)
        is_another = torch.arange(labels.shape[0], device=labels.device) > 0
        present = {"positive": (equal & is_another).any(), "negative": (~equal).any()}
        # The gradient needs what the buffers hold now, and they are written below. By stack, because a compiler makes a
        # clone only in the backward pass, when they have been written.
        were_seen = torch.stack([getattr(self, f"{side}_seen") for side in present]).unbind()
        seen = dict(zip(present, were_seen, strict=True))
        before = torch.stack([getattr(self, name) for name in MOMENTS]).to(batch[0].dtype).unbind()
        moments = {}
        for name, value, kept in zip(MOMENTS, batch, before, strict=True):
            side = name.partition("_")[0]
            running = torch.where(seen[side], (1 - self.momentum) * value + self.momentum * kept, value)
            if batch_gradient:
                running = running.detach() + (value - value.detach())
            moments[name] = torch.where(present[side], running, kept)
        if self.training:
            with torch.no_grad():
                for name, value in moments.items():
                    getattr(self, name).copy_(value)
                for side, here in present.items():
                    getattr(self, f"{side}_seen").logical_or_(here)
        return ops.SimilarityMoments(**moments)


def check_batch(basis_features: Tensor, labels: Tensor, like: Tensor) -> None:
    """What :meth:`RunningSimilarityMoments._update` takes, on the device of ``like``, a tensor of the module."""
    check.check_tensor("basis_features", basis_features, "[n, k]", 2)
    check.check_floating("basis_features", basis_features)
    check.check_same_device("basis_features", basis_features, "the module", like)
    check.check_tensor("labels", labels, "[n]", 1)
    check.check_int64("labels", labels)
    check.check_size("labels", labels, 0, basis_features.shape[0], "n of basis_features")
    check.check_same_device("labels", labels, "basis_features", basis_features)


class SimilarityDistributionLoss(RunningSimilarityMoments):
    """L_SD = max(μ⁻ − μ⁺ + m, 0) + λ_v (v⁺ + v⁻), (5) of SLADE, with the running moments of (6).

    μ and v are mean and population variance of s_ij = cos(W_a f_i, W_a f_j) over the pairs i ≠ j of equal (+) and of
    different (−) pseudo-labels. T1 = ``positive_mean`` and T2 = ``negative_mean`` are the thresholds of the mining,
    (7), 0-d tensors that :func:`ssmkernels.ops.mined_pair_ranking_loss` takes as they are. See
    :class:`RunningSimilarityMoments` for the four buffers. Memory is that of :func:`ssmkernels.ops.similarity_moments`.

    The gradient of (6) as it is printed has a trap: only the batch's share of a running moment depends on the network,
    so that the gradient is 1 − β (1 %) of what the loss looks like, and L_Basis is L_CE in effect. The paper does not
    say which of the two it takes. ``gradient="batch"`` keeps the value and gives the batch moments their whole
    gradient; ``gradient="momentum"`` is the literal (6). Whether the hinge is open is for the running means to say in
    both.

    With a group the moments are those of the rows of all its ranks, and the buffers are the same on all.

    Args:
        margin: m, in cosine. Not published; .5 is our choice.
        variance_weight: λ_v in [0, 1e18]. Not published; 1 is our choice.
        momentum: β in [0, 1); the paper's .99.
        gradient: "batch" or "momentum", as above.
        ignore_index: rows with this label are in no pair; by default every label is a class, −1 too. Leaving rows out
            synchronises with the device, and one compiled graph cannot hold it.
        group: the ranks whose rows make pairs, as in :class:`ContrastiveLoss`; also that a rank has no row.

    Raises:
        ValueError, TypeError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        margin: float = 0.5,
        variance_weight: float = 1.0,
        momentum: float = 0.99,
        gradient: MomentGradient = "batch",
        *,
        ignore_index: int | None = None,
        group: Group = "local",
    ) -> None:
        super().__init__(momentum)
        check_group(group)
        self.group = group
        self.margin = check.check_number("margin", margin)
        self.variance_weight = check.check_within("variance_weight", variance_weight, 0, LARGEST_FACTOR)
        check.check_choice("gradient", gradient, get_args(MomentGradient))
        self.gradient = gradient
        self.ignore_index = None if ignore_index is None else check.check_integer("ignore_index", ignore_index)

    def forward(self, basis_features: Tensor, labels: Tensor) -> Tensor:
        """L_SD, a scalar in float32 (float64 for float64 features), also under autocast; the moments are updated first.

        Args:
            basis_features: W_a f [n, k], floating point, of any length.
            labels: pseudo-labels [n] int64.

        Raises:
            ValueError, TypeError: an argument is not as said above; the message names it.
        """
        check_batch(basis_features, labels, self.positive_mean)
        if self.ignore_index is not None:
            kept = labels != self.ignore_index
            basis_features, labels = basis_features[kept], labels[kept]
        moments = self._update(basis_features, labels, batch_gradient=self.gradient == "batch", group=self.group)
        gap = F.relu(moments.negative_mean - moments.positive_mean + self.margin)
        return gap + self.variance_weight * (moments.positive_var + moments.negative_var)

    def extra_repr(self) -> str:
        weights = f"margin={self.margin}, variance_weight={self.variance_weight}, momentum={self.momentum}"
        return f"{weights}, gradient={self.gradient!r}, ignore_index={self.ignore_index}"
