# SPDX-License-Identifier: BSD-3-Clause
"""Modules whose pairs are those of the rows of all ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranking_checks import DTYPES, N, compare, problem
from shards import assert_close, shard
from torch import Tensor

from ssmkernels.distributed import Group, for_ddp
from ssmkernels.nn import ContrastiveLoss, MultiSimilarityLoss, SimilarityDistributionLoss


def losses(group: Group) -> list[torch.nn.Module]:
    return [
        *[ContrastiveLoss(0.1, 1.2, reduction=reduction, group=group) for reduction in ("mean_nonzero", "mean", "sum")],
        *[ContrastiveLoss(ignore_index=3, group=group), MultiSimilarityLoss(group=group)],
        *[MultiSimilarityLoss(3.0, 20.0, 0.1, ignore_index=3, group=group)],
        *[SimilarityDistributionLoss(0.9, gradient=gradient, group=group) for gradient in ("batch", "momentum")],
        *[SimilarityDistributionLoss(0.9, ignore_index=3, group=group)],
    ]


def check_losses(group: dist.ProcessGroup) -> None:
    labels = problem(torch.float64)[1]
    for dtype in DTYPES:
        rows = problem(dtype)[0]
        for place in range(len(losses("local"))):
            for even in (True, False):

                def loss(x: Tensor, part: slice, over_ranks: bool, place: int = place) -> Tensor:
                    made = losses(group if over_ranks else "local")[place]  # anew, because moments have a memory
                    return made(x, labels[part])

                compare(loss, rows, shard(N, group, even=even))


def check_moments_are_those_of_all_rows(group: dist.ProcessGroup) -> None:
    rows, labels, _ = problem(torch.float32)
    whole, split = SimilarityDistributionLoss(), SimilarityDistributionLoss(group=group)
    for batch in (slice(0, 3), slice(3, 20), slice(20, N)):  # in the first, ranks have no positive pair of their own
        part = shard(len(rows[batch]), group)
        whole(rows[batch], labels[batch])
        split(rows[batch][part], labels[batch][part])
    for name, expected in whole.named_buffers():
        assert_close(split.get_buffer(name).float(), expected.float())


def check_losses_of_rows_that_make_no_pair(group: dist.ProcessGroup) -> None:
    rows = torch.ones(1 if dist.get_rank(group) == 0 else 0, 4, requires_grad=True)
    for loss in losses(group):
        value = loss(rows, torch.zeros(len(rows), dtype=torch.int64))
        assert value.isfinite()
        (gradient,) = torch.autograd.grad(value, rows)
        assert gradient.isfinite().all()


def check_losses_refuse_what_a_group_cannot_have(group: dist.ProcessGroup) -> None:
    rows, labels = torch.zeros(2, 3), torch.tensor([0, 1])
    pairs = (torch.tensor([0]), torch.tensor([1]), torch.tensor([0]), torch.tensor([1]))
    for made in (ContrastiveLoss, MultiSimilarityLoss):
        with pytest.raises(ValueError, match="indices_tuple must be None with a group"):
            made(group=group)(rows, labels, pairs)
        with pytest.raises(ValueError, match="ref_emb must be None with a group"):
            made(group=group)(rows, labels, ref_emb=rows, ref_labels=labels)
        with pytest.raises(TypeError, match="group must be a process group, None or 'local', got 3"):
            made(group=3)
    with pytest.raises(TypeError, match="group must be"):
        SimilarityDistributionLoss(group=3)


def check_on_four_wrapper_of_pytorch_metric_learning(group: dist.ProcessGroup) -> None:
    """Its DistributedLossWrapper gathers all rows on every rank, and multiplies by the number of ranks as for_ddp does
    for the gradient. With efficient=True, pairs with a row of another rank have no gradient as the other end, so that
    it is another gradient.
    """
    from pytorch_metric_learning import losses as theirs
    from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

    rows, labels, _ = problem(torch.float64)
    part = shard(40, group, even=True)
    pairs_of_losses = [
        (theirs.ContrastiveLoss(0.1, 1.2), ContrastiveLoss(0.1, 1.2, group=None)),
        (theirs.MultiSimilarityLoss(), MultiSimilarityLoss(group=None)),
    ]
    for whole, ours in pairs_of_losses:
        values, gradients = [], []
        for loss in (
            DistributedLossWrapper(whole),
            DistributedLossWrapper(whole, efficient=True),
            lambda *rows, ours=ours: for_ddp(ours(*rows)),
        ):
            own = rows[part].clone().requires_grad_()
            values.append(loss(own, labels[part]))
            gradients += torch.autograd.grad(values[-1], own)
        assert_close(values[0].detach() / 4, values[2].detach())
        # Two rows are 1e-4 apart: from products, their distance has an error of some u/d² = 1e-8.
        largest = float(gradients[0].abs().max())
        torch.testing.assert_close(gradients[2], gradients[0], rtol=0, atol=1e-7 * largest)
        assert (gradients[1] - gradients[0]).abs().max() > 0.1 * largest
