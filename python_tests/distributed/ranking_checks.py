# SPDX-License-Identifier: BSD-3-Clause
"""The losses over pairs of the rows of all ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from shards import TOLERANCES, assert_close, integers, normal, shard
from torch import Tensor
from traffic import counted

from ssmkernels import ops
from ssmkernels.distributed import for_ddp, ring_blocks

N, D, K = 41, 6, 5
DTYPES = (torch.float32, torch.float64)


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, labels and a basis; two rows are equal, two close, and one basis vector is 0."""
    rows, basis = normal(N, D, seed=0, dtype=dtype), normal(N, K, seed=1, dtype=dtype)
    rows[40] = rows[0]
    rows[39] = rows[1] + 1e-4
    basis[2] = 0
    basis[38] = basis[3]
    return rows, integers(5, N, seed=2), basis


Loss = Callable[..., Tensor]


def compare(loss: Loss, rows: Tensor, own: slice) -> None:
    """loss(rows, slice of all rows, over ranks?) for all rows here, and over the ranks: values and gradients."""
    whole, mine = rows.clone().requires_grad_(), rows[own].clone().requires_grad_()
    expected, actual = loss(whole, slice(None), False), loss(mine, own, True)
    assert_close(actual.detach(), expected.detach())
    (expected_gradient,) = torch.autograd.grad(expected, whole)
    (gradient,) = torch.autograd.grad(actual, mine)
    assert gradient.dtype == rows.dtype
    largest = float(expected_gradient.abs().max())
    assert largest > 0
    torch.testing.assert_close(gradient, expected_gradient[own], rtol=0, atol=TOLERANCES[rows.dtype]["rtol"] * largest)
    with torch.no_grad():
        assert_close(loss(mine, own, True), expected.detach())


def check_pair_ranking_loss(group: dist.ProcessGroup) -> None:
    labels = problem(torch.float64)[1]
    for dtype in DTYPES:
        rows = problem(dtype)[0]
        for even in (True, False):
            for reduction in ("mean_nonzero", "mean", "sum"):

                def loss(x: Tensor, part: slice, split: bool, reduction: str = reduction) -> Tensor:
                    settings = {"positive_margin": 0.3, "negative_margin": 3.0, "reduction": reduction}
                    return ops.pair_ranking_loss(x, labels[part], **settings, group=group if split else "local")

                compare(loss, rows, shard(N, group, even=even))


def check_mined_pair_ranking_loss(group: dist.ProcessGroup) -> None:
    basis_features = problem(torch.float64)[2]
    basis_features[20:].round_()  # whole numbers, whose cosines may be thresholds
    for dtype in DTYPES:
        rows = problem(dtype)[0]
        for even in (True, False):
            for reduction, thresholds in (("mean_nonzero", (0.3, -0.1)), ("mean", (1.0, 0.0)), ("sum", (0.1, 0.2))):

                def loss(
                    x: Tensor,
                    part: slice,
                    split: bool,
                    reduction: str = reduction,
                    thresholds: tuple[float, float] = thresholds,
                ) -> Tensor:
                    return ops.mined_pair_ranking_loss(
                        x,
                        basis_features[part].to(x.dtype),
                        positive_threshold=thresholds[0],
                        negative_threshold=thresholds[1],
                        positive_margin=0.2,
                        negative_margin=3.0,
                        reduction=reduction,
                        group=group if split else "local",
                    )

                compare(loss, rows, shard(N, group, even=even))


def check_similarity_moments(group: dist.ProcessGroup) -> None:
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5])
    labels = problem(torch.float64)[1]
    for dtype in DTYPES:
        basis = problem(dtype)[2]
        for even in (True, False):

            def loss(x: Tensor, part: slice, split: bool) -> Tensor:
                moments = ops.similarity_moments(x, labels[part], group=group if split else "local")
                return (torch.stack(moments) * weights.to(x.dtype)).sum()

            compare(loss, basis, shard(N, group, even=even))


def check_pairs_of_one_kind_and_no_rows(group: dist.ProcessGroup) -> None:
    rows = normal(6, D, seed=0)[shard(6, group)].requires_grad_()
    for labels, mean in ((torch.zeros(6, dtype=torch.int64), 1), (torch.arange(6), 0)):
        moments = ops.similarity_moments(rows, labels[shard(6, group)], group=group)
        assert moments[2 * mean].item() == moments[2 * mean + 1].item() == 0
        loss = ops.pair_ranking_loss(rows, labels[shard(6, group)], negative_margin=2.0, group=group)
        assert torch.autograd.grad(loss, rows)[0].isfinite().all()
    nothing = torch.zeros(0, D, requires_grad=True)
    loss = ops.pair_ranking_loss(nothing, torch.zeros(0, dtype=torch.int64), group=group)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, nothing)[0].shape == (0, D)


def check_nan_in_nan_out(group: dist.ProcessGroup) -> None:
    """A row of NaN on the first rank makes the losses of all ranks NaN."""
    for dtype in DTYPES:
        rows, labels, basis = problem(dtype)
        own = shard(N, group)
        rows[0], basis[0] = torch.nan, torch.nan
        thresholds = {"positive_threshold": 0.5, "negative_threshold": 0.1}
        losses = (
            ops.pair_ranking_loss(rows[own], labels[own], group=group),
            ops.mined_pair_ranking_loss(rows[own], torch.ones_like(basis)[own], **thresholds, group=group),
            *ops.similarity_moments(basis[own], labels[own], group=group),
        )
        assert all(loss.isnan() for loss in losses), losses


def check_second_derivatives_raise(group: dist.ProcessGroup) -> None:
    rows, labels, basis = problem(torch.float64)
    own = shard(N, group)
    for loss in (
        lambda x: ops.pair_ranking_loss(x, labels[own], group=group),
        lambda x: ops.mined_pair_ranking_loss(
            x, basis[own], positive_threshold=0.2, negative_threshold=0.1, group=group
        ),
        lambda x: ops.similarity_moments(x, labels[own], group=group)[1],
    ):
        x = rows[own].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="with a group` is not differentiable"):
            torch.autograd.grad(gradient.sum(), x)


def check_traffic_of_rings(group: dist.ProcessGroup) -> None:
    """Every rank receives the rows of the others once: R − 1 messages, none in the backward."""
    rows, labels, basis = problem(torch.float32)
    ranks, own = dist.get_world_size(group), shard(N, group, even=False)
    others = N - (own.stop - own.start)
    empty = 1 if own.stop > own.start else 0  # the rank without rows sends none
    x = rows[own].clone().requires_grad_()
    for loss, row_bytes, reduced in (
        (lambda: ops.pair_ranking_loss(x, labels[own], group=group), 4 * D + 8, 4 * 8),
        (
            lambda: ops.mined_pair_ranking_loss(
                x, basis[own], positive_threshold=0.2, negative_threshold=0.1, group=group
            ),
            4 * D + 4 * K,
            4 * 8,
        ),
        (lambda: ops.similarity_moments(x, labels[own], group=group)[0], 4 * D + 8, 6 * 8),
    ):
        with counted() as (calls, received):
            loss().backward()
        assert calls == Counter(all_gather=1, receive=ranks - 1 - empty, all_reduce=1)
        assert received["receive"] == others * row_bytes
        assert received["all_gather"] == (ranks - 1) * 16
        assert received["all_reduce"] == reduced


def check_blocks_come_from_every_rank(group: dist.ProcessGroup) -> None:
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    mine = torch.full((rank,), rank)
    blocks = [values.tolist() for (values,) in ring_blocks([mine], group=group)]
    assert blocks == [[(rank - step) % ranks] * ((rank - step) % ranks) for step in range(ranks)]
    with pytest.raises(ValueError, match="the bytes of a row must be the same on every rank"):
        list(ring_blocks([torch.zeros(2, 1 + rank)], group=group))
    rows = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="references must be None with a group"):
        ops.pair_ranking_loss(
            rows, mine[:0].new_zeros(1), references=rows, reference_labels=mine.new_zeros(1), group=group
        )


def check_for_ddp(group: dist.ProcessGroup) -> None:
    x = torch.tensor(3.0, requires_grad=True)
    loss = for_ddp(x.square(), group=group)
    loss.backward()
    assert loss.item() == 9
    assert x.grad is not None
    assert x.grad.item() == 6 * dist.get_world_size(group)
    assert for_ddp(x / 0, group=group).isinf()
