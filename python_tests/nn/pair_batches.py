# SPDX-License-Identifier: BSD-3-Clause
"""Batches for the losses over pairs, and what agreeing with pytorch-metric-learning means."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

LABELS = ["several", "one class", "all distinct", "one pair"]


def make(
    n: int = 17,
    dim: int = 5,
    kind: str = "several",
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Embeddings [n, dim] with a gradient and labels [n]."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(n, dim, generator=generator, dtype=torch.float64) * 3
    labels = {
        "several": torch.randint(0, 4, (n,), generator=generator),
        "one class": torch.full((n,), 7),
        "all distinct": torch.arange(n),
        "one pair": torch.arange(n).clamp_max(max(n - 2, 0)),
    }[kind]
    return embeddings.to(dtype).requires_grad_(), labels


def assert_same(ours: Tensor, theirs: Tensor, *leaves: Tensor) -> None:
    """Values and gradients."""
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-10, atol=1e-12)
    expected = torch.autograd.grad(theirs, leaves, allow_unused=True, materialize_grads=True)
    actual = torch.autograd.grad(ours, leaves, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def results_of_this_rank(ours):
    """Value and gradient by (rank, loss, efficient, ours or theirs), inside pytorch-metric-learning's wrapper."""
    from pytorch_metric_learning import losses
    from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

    rank, results = torch.distributed.get_rank(), {}
    embeddings, labels = make(7, seed=rank)
    for kind, efficient in itertools.product(ours, (False, True)):
        for loss in (kind(), getattr(losses, kind.__name__)()):
            value = DistributedLossWrapper(loss, efficient=efficient)(embeddings, labels)
            (gradient,) = torch.autograd.grad(value, embeddings)
            results[rank, kind.__name__, efficient, isinstance(loss, kind)] = (value.item(), gradient)
    return results
