# SPDX-License-Identifier: BSD-3-Clause
"""The multi-similarity loss over the rows of all ranks of a group, which go round in blocks.

The first round gives each rank the two logarithms of its own rows. The second takes them along with the rows, and gives
the gradient of the whole loss by the own rows: as anchors, and as the other end of every anchor's pairs. Memory is that
of the own rows against a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ssmkernels import distributed
from ssmkernels.distributed import Group
from ssmkernels.ops import _autograd as autograd
from ssmkernels.ops import _over_ranks as over_ranks


class Settings(NamedTuple):
    alpha: float
    beta: float
    base: float

    def exponents(self, similarities: Tensor) -> tuple[Tensor, Tensor]:
        """−α(s − λ) of positives and β(s − λ) of negatives."""
        shifted = similarities - self.base
        return -self.alpha * shifted, self.beta * shifted


def multi_similarity_loss(x: Tensor, labels: Tensor, settings: Settings, group: Group) -> Tensor:
    """The mean over the rows of all ranks, a scalar that is the same on all, with the gradient by x [n, d].

    Args:
        x: this rank's rows, float32 or float64, as similarities take them.
        labels: [n] int64.
    """
    rows = x.detach()
    logarithms = _logarithms(rows, labels, settings, group)
    own = logarithms[0].double().sum() / settings.alpha + logarithms[1].double().sum() / settings.beta
    total, count = distributed.all_reduce_sum(torch.stack([own, own.new_tensor(len(x))]), group=group)
    count = count.clamp_min(1)
    gradients = []
    if autograd.is_wanted(x):
        gradients = [(_gradient(rows, labels, logarithms, settings, group) / count).to(x.dtype)]
    return over_ranks.known("MultiSimilarityLoss", (total / count).to(x.dtype)[None], x, gradients)[0]


def _logarithms(rows: Tensor, labels: Tensor, settings: Settings, group: Group) -> list[Tensor]:
    """log(1 + Σ exp(exponents)) over the positives and over the negatives of each row, [n] each."""
    logarithms = [rows.new_zeros(len(rows)) for _ in range(2)]  # of the 1
    for others, _, masks in _blocks([rows, labels], group):
        for kind, exponents in enumerate(settings.exponents(rows @ others.t())):
            of_block = exponents.masked_fill(~masks[kind], -torch.inf).logsumexp(dim=1)
            logarithms[kind] = torch.logaddexp(logarithms[kind], of_block)
    return logarithms


def _gradient(rows: Tensor, labels: Tensor, logarithms: list[Tensor], settings: Settings, group: Group) -> Tensor:
    """Σ_i of the loss of anchor i over all ranks, by this rank's rows [n, d]."""
    gradient = torch.zeros_like(rows)
    for others, other_logarithms, masks in _blocks([rows, labels, *logarithms], group):
        exponents = settings.exponents(rows @ others.t())
        slopes = torch.zeros_like(exponents[0])
        for kind, sign in ((0, -1), (1, 1)):
            as_anchor = (exponents[kind] - logarithms[kind][:, None]).exp()
            as_other_end = (exponents[kind] - other_logarithms[kind]).exp()
            slopes += sign * torch.where(masks[kind], as_anchor + as_other_end, 0)
        gradient += slopes @ others
    return gradient


def _blocks(tensors: list[Tensor], group: Group) -> Iterator[tuple[Tensor, list[Tensor], tuple[Tensor, Tensor]]]:
    """Rows of a block, what goes with them behind the labels, and which pairs of an own row and one of those are
    positive and which negative. The first block are the own rows.
    """
    labels = tensors[1]
    for place, (others, other_labels, *more) in enumerate(distributed.ring_blocks(tensors, group=group)):
        same = labels[:, None] == other_labels
        positive = same.clone().fill_diagonal_(False) if place == 0 else same
        yield others, more, (positive, ~same)
