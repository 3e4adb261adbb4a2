# SPDX-License-Identifier: BSD-3-Clause
"""More than 2³¹ elements: offsets are 64 bits wide."""

from __future__ import annotations

import math

import pytest
import torch

from ssmkernels import ops


@pytest.mark.gpu
def test_bank():
    """K·D features."""
    D, K = 128, 2**24 + 77
    bank = torch.zeros(K, D, dtype=torch.bfloat16, device="cuda")
    bank[-1, 0] = 1
    labels = torch.zeros(K, dtype=torch.int64, device="cuda")
    labels[-1] = 1
    query = torch.zeros(2, D, dtype=torch.bfloat16, device="cuda")
    query[:, 0] = 1
    aggregated = ops.aggregate(query, bank, labels, 2, temperature=0.02)
    expected = torch.sigmoid(50.0 - torch.tensor(float(K - 1)).log())
    torch.testing.assert_close(aggregated[:, 1].cpu(), expected.expand(2), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_propagated():
    """N·C values."""
    nodes, degree, classes = 2**21 + 5, 4, 1025
    offsets = torch.tensor([-2, -1, 1, 2])
    col = ((torch.arange(nodes)[:, None] + offsets) % nodes).sort(dim=1).values.flatten()
    rows = torch.arange(nodes).repeat_interleave(degree)
    reverse = torch.searchsorted(rows * nodes + col, col * nodes + rows)
    crow, col, reverse, rows = (
        (torch.arange(nodes + 1) * degree).cuda(),
        col.int().cuda(),
        reverse.cuda(),
        rows.cuda(),
    )
    propagated = torch.randn(nodes, classes, generator=torch.Generator().manual_seed(0)).cuda() / degree
    out = ops.leave_one_edge_out(crow, col, reverse, torch.ones(nodes * degree, device="cuda"), propagated)
    assert out.isfinite().all() and out.min() >= 0 and out.max() <= 1
    own, other = propagated[rows[-40:]].double(), propagated[col[-40:].long()].double()
    logits, back = 4 * (degree * own - other), 4 * (degree * other - own)
    z, y = logits.softmax(1), back.softmax(1)
    omega = [1 + (p * p.log()).sum(1) / math.log(classes) for p in (z, y)]
    torch.testing.assert_close(out[-40:].double(), omega[0] * omega[1] * (1 - (z * y).sum(1)), rtol=1e-3, atol=1e-6)


@pytest.mark.gpu
def test_logits():
    """n·m logits."""
    n, m = 65536, 32771
    x = torch.zeros(n, 1, device="cuda")
    x[-1] = 3
    ones, none = torch.ones(1, 2, device="cuda"), torch.zeros(1, device="cuda")
    logits = ops.pair_logits(x, torch.ones(m, 1, device="cuda"), ones, none, ones[0, :1], none[0])
    assert (logits[-1] == 4).all() and (logits[-2] == 1).all() and (logits[0] == 1).all()


@pytest.mark.gpu
def test_pairs_and_rows():
    """More than 2³¹ pairs, and as many elements of a float16 matrix."""
    rows = torch.zeros(65536, 3, device="cuda")
    rows[-1] = 1
    rows.requires_grad_()
    loss = ops.pair_ranking_loss(rows, torch.zeros(65536, dtype=torch.int64, device="cuda"), reduction="sum")
    loss.backward()
    torch.testing.assert_close(loss, 2 * 65535 * torch.tensor(3.0, device="cuda").sqrt(), rtol=1e-5, atol=0)
    assert rows.grad[-1].all() and rows.grad[0].all()
    long = torch.zeros(70_000, 32768, device="cuda", dtype=torch.float16)
    long[-1, -1] = long[0, -1] = 2
    labels = torch.arange(70_000, device="cuda")
    labels[-1] = 0
    assert ops.pair_ranking_loss(long, labels, negative_margin=0.0) == 0
