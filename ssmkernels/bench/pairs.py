# SPDX-License-Identifier: BSD-3-Clause
"""Benchmark cases of the pairs family: our op, and the similarity network that users write, in eager mode and under
torch.compile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels import ops, reference
from ssmkernels.bench.case import Case
from ssmkernels.bench.measure import Function

DIM = 128
SIZES = [(64, 128), (128, 128), (64, 512), (128, 512), (1024, 128), (1024, 512), (4096, 128), (8192, 128)]  # n = m, h
LISTED = [(128, 512, 512), (1024, 512, 65_536), (4096, 128, 4_000_000)]  # n = m, h, p
INTERACTION_SIZES = [(128, 128), (1024, 128)]
QUICK_SIZES, QUICK_LISTED, QUICK_INTERACTION_SIZES = [(64, 128), (256, 128)], [(128, 128, 512)], [(64, 64)]
PEER_ELEMENTS = {"cpu": 2**28, "cuda": 2**32}  # of the hidden units that the peers store, of which they hold several


def split_focal_loss(
    x: Tensor,
    y: Tensor,
    x_labels: Tensor,
    y_labels: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    interaction: str = "concat",
    pairs: Tensor | None = None,
) -> Tensor:
    """The same loss for "concat" with w1·[x, y] split into two small products first, as a careful user writes it;
    [n, m, h] remains.
    """
    left, right = F.linear(x, w1[:, : x.shape[1]], b1), F.linear(y, w1[:, x.shape[1] :])
    if pairs is None:
        hidden, same = left[:, None] + right[None], x_labels[:, None] == y_labels
    else:
        hidden, same = left[pairs[:, 0]] + right[pairs[:, 1]], x_labels[pairs[:, 0]] == y_labels[pairs[:, 1]]
    logits = hidden.relu() @ w2 + b2
    signed = torch.where(same, logits, -logits)
    return (torch.where(same, 0.25, 0.75) * torch.sigmoid(-signed) ** 2 * F.softplus(-signed)).mean()


def cases(*, device: str = "cpu", dtype: torch.dtype = torch.float32, quick: bool = False) -> Iterator[Case]:
    """Forward and backward of the mean focal loss, ten classes."""
    for nodes, hidden in QUICK_SIZES if quick else SIZES:
        yield case_of_size("concat", nodes, hidden, None, device, dtype)
    for nodes, hidden, listed in QUICK_LISTED if quick else LISTED:
        yield case_of_size("concat", nodes, hidden, listed, device, dtype)
    for interaction in ("absdiff", "product"):
        for nodes, hidden in QUICK_INTERACTION_SIZES if quick else INTERACTION_SIZES:
            yield case_of_size(interaction, nodes, hidden, None, device, dtype)


def case_of_size(
    interaction: str, nodes: int, hidden: int, listed: int | None, device: str, dtype: torch.dtype
) -> Case:
    draw = torch.Generator().manual_seed(0)
    wide = 2 * DIM if interaction == "concat" else DIM

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=draw) * scale).to(device, dtype).requires_grad_()

    x, y = normal(nodes, DIM), normal(nodes, DIM)
    weights = [normal(hidden, wide, scale=wide**-0.5), normal(hidden, scale=0.1), normal(hidden, scale=hidden**-0.5)]
    weights.append(torch.tensor(-2.0, device=device, dtype=dtype, requires_grad=True))
    labels = [torch.randint(0, 10, (nodes,), generator=draw).to(device) for _ in range(2)]
    pairs = None if listed is None else torch.randint(0, nodes, (listed, 2), generator=draw).to(device)
    inputs = (x, y, *weights)

    def step(loss: Callable[..., Any]) -> Function:
        return lambda: torch.autograd.grad(loss(x, y, *labels, *weights, interaction=interaction, pairs=pairs), inputs)

    count = nodes * nodes if listed is None else listed
    size = {"n": nodes, "m": nodes, "d": DIM, "h": hidden} | ({} if listed is None else {"p": listed})
    peers: dict[str, Function] = {}
    if count * max(hidden, wide) <= PEER_ELEMENTS[x.device.type]:
        peers = {
            "eager": step(reference.pair_focal_loss),
            "torch.compile": step(torch.compile(reference.pair_focal_loss, dynamic=False)),
        }
        if interaction == "concat":
            peers["split, eager"] = step(split_focal_loss)
            peers["split, torch.compile"] = step(torch.compile(split_focal_loss, dynamic=False))
    rows = x.element_size() * 2 * nodes * (DIM + 2 * hidden)
    return Case(
        op="pair_focal_loss",
        phase=f"forward + backward, {interaction}",
        size=size,
        dtype=dtype,
        ours=step(functools.partial(ops.pair_focal_loss)),
        peers=peers,
        products={},
        product_counts={},
        # concat: max, multiply-add, compare and two additions per hidden unit, a vector operation being counted as the
        # two flops of a multiply-add; the others: three matrix products.
        flops=2 * 5 * count * hidden if interaction == "concat" else 6 * count * hidden * DIM,
        bytes=2 * rows + (0 if listed is None else 16 * listed),
    )
