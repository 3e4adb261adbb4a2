# SPDX-License-Identifier: BSD-3-Clause
"""What is particular to the ops of the pairs family; what every op must show is in test_contract.py."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, judge

from ssmkernels import ops, reference

# n, m, d, h
SIZES = [(1, 1, 1, 1), (3, 5, 7, 2), (17, 130, 16, 33), (123, 64, 24, 17), (65, 200, 3, 40), (5, 1000, 40, 8)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INTERACTIONS = ["concat", "absdiff", "product"]
NETWORK = ("x", "y", "w1", "b1", "w2", "b2")


class Problem:
    """A random network with labelled rows; values are drawn in float64 and rounded."""

    def __init__(
        self, n, m, d, h, dtype=torch.float64, device="cpu", seed=0, interaction="concat", listed=None, scale=1.0
    ):
        draw = torch.Generator().manual_seed(seed)

        def normal(*size):
            return torch.randn(size, generator=draw, dtype=torch.float64)

        wide = 2 * d if interaction == "concat" else d
        values = (
            normal(n, d),
            normal(m, d),
            normal(h, wide) * scale / wide**0.5,
            normal(h) / 4,
            normal(h) / h**0.5,
            normal(),
        )
        self.network = [value.to(device, dtype) for value in values]
        self.x_labels, self.y_labels = (torch.randint(-1, 4, (size,), generator=draw).to(device) for size in (n, m))
        self.interaction, self.pairs = interaction, None
        if listed is not None:
            self.pairs = torch.stack([torch.randint(0, size, (listed,), generator=draw) for size in (n, m)], dim=1).to(
                device
            )
        self.grad = normal(*((n, m) if listed is None else (listed,))).to(device)

    def double(self):
        other = object.__new__(Problem)
        other.__dict__ = self.__dict__ | {"network": [value.double() for value in self.network]}
        return other

    def logits(self, package):
        """The logits, and the gradients of the network."""
        network = [value.detach().clone().requires_grad_() for value in self.network]
        out = package.pair_logits(*network, interaction=self.interaction, pairs=self.pairs)
        return out.detach(), *torch.autograd.grad(out, network, self.grad.to(out.dtype))

    def loss(self, package, **options):
        """The focal loss, and the gradients of the network."""
        network = [value.detach().clone().requires_grad_() for value in self.network]
        x, y, *weights = network
        settings = {"interaction": self.interaction, "pairs": self.pairs} | options
        out = package.pair_focal_loss(x, y, self.x_labels, self.y_labels, *weights, **settings)
        grad = self.grad if out.ndim else self.grad.new_ones(())
        return out.detach(), *torch.autograd.grad(out, network, grad.to(out.dtype))


@pytest.mark.parametrize("alpha", [None, 0.25])
@pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
def test_agrees_with_torchvision(alpha, gamma, device):
    sigmoid_focal_loss = pytest.importorskip("torchvision.ops").sigmoid_focal_loss
    problem = Problem(30, 40, 8, 16, device=device)
    problem.x_labels, problem.y_labels = problem.x_labels.abs(), problem.y_labels.abs()
    x, y, *weights = problem.network
    targets = (problem.x_labels[:, None] == problem.y_labels).double()
    logits = ops.pair_logits(x, y, *weights)
    for reduction in ("mean", "sum", "none"):
        ours = ops.pair_focal_loss(
            x, y, problem.x_labels, problem.y_labels, *weights, alpha=alpha, gamma=gamma, reduction=reduction
        )
        theirs = sigmoid_focal_loss(
            logits, targets, alpha=-1 if alpha is None else alpha, gamma=gamma, reduction=reduction
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_small_losses_keep_their_digits(device):
    """p_t close to 1: the loss is p² e^{−3s}-small, and still right to rounding."""
    x = torch.tensor([[5.0], [10.0], [20.0]], device=device)
    one, none = torch.ones(1, device=device), torch.zeros(1, device=device)
    labels = torch.zeros(3, dtype=torch.int64, device=device)
    arguments = (labels, labels[:1], torch.ones(1, 2, device=device), none, one, none[0])
    for gamma, power in ((2.0, 3), (1.5, 2.5), (0.0, 1)):
        ours = ops.pair_focal_loss(x, none[None], *arguments, alpha=None, gamma=gamma, reduction="none")[:, 0]
        q = torch.sigmoid(-x[:, 0].double())
        torch.testing.assert_close(ours.double(), q ** (power - 1) * -torch.log1p(-q), rtol=3e-6, atol=0)


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_ignored_labels_count_nowhere(interaction, device):
    problem = Problem(40, 50, 6, 12, device=device, interaction=interaction)
    rows, columns = (problem.x_labels >= 0).nonzero()[:, 0], (problem.y_labels >= 0).nonzero()[:, 0]
    inside = Problem(40, 50, 6, 12, device=device, interaction=interaction)
    inside.network[0], inside.network[1] = inside.network[0][rows], inside.network[1][columns]
    inside.x_labels, inside.y_labels = inside.x_labels[rows], inside.y_labels[columns]
    loss, x_grad, y_grad, *weights = problem.loss(ops)
    expected, x_expected, y_expected, *weights_expected = inside.loss(ops)
    ours, theirs = (
        (loss, x_grad[rows], y_grad[columns], *weights),
        (expected, x_expected, y_expected, *weights_expected),
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    problem.y_labels.fill_(-1)
    assert not any(value.any() for value in problem.loss(ops))  # none counts: 0, and no NaN
    problem.pairs = torch.tensor([[3, 4], [5, 6]], device=device)
    assert not any(value.any() for value in problem.loss(ops))


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_listing_all_pairs_is_the_same(interaction, device):
    problem = Problem(33, 70, 5, 20, device=device, interaction=interaction)
    listed = Problem(33, 70, 5, 20, device=device, interaction=interaction)
    listed.pairs = torch.cartesian_prod(torch.arange(33), torch.arange(70)).to(device)
    listed.grad = problem.grad.flatten()
    for a, b in zip((*problem.logits(ops), *problem.loss(ops)), (*listed.logits(ops), *listed.loss(ops)), strict=True):
        torch.testing.assert_close(a, b.reshape(a.shape), rtol=1e-11, atol=1e-13)


def test_duplicate_rows_agree(device):
    for interaction in INTERACTIONS:
        problem = Problem(40, 100, 6, 12, torch.float32, device, interaction=interaction)
        problem.network[0][1] = problem.network[0][39] = problem.network[0][0]
        problem.network[1][99] = problem.network[1][0]
        logits = ops.pair_logits(*problem.network, interaction=interaction)
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(logits[:, 99], logits[:, 0], rtol=1e-5, atol=1e-6)


def test_the_same_rows_on_both_sides(device):
    """x is y: both gradients are added."""
    for interaction in INTERACTIONS:
        problem = Problem(30, 30, 6, 12, device=device, interaction=interaction)
        grads = []
        for package in (ops, reference):
            x = problem.network[0].clone().requires_grad_()
            labels = problem.x_labels
            loss = package.pair_focal_loss(x, x, labels, labels, *problem.network[2:], interaction=interaction)
            grads += torch.autograd.grad(loss, x)
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-13)


def test_pairs_out_of_range_are_never_followed(device):
    """The operators below the checks skip them: logit and loss 0, no gradient."""
    library = torch.ops.ssmkernels
    for interaction in (0, 1, 2):
        problem = Problem(4, 5, 6, 6, torch.float32, device, interaction=INTERACTIONS[interaction])
        x, y, *weights = problem.network
        labels = (problem.x_labels.abs(), problem.y_labels.abs())
        good = torch.tensor([[1, 2], [3, 4]], device=device)
        mixed = torch.tensor([[1, 2], [4, 0], [-1, 3], [2, 5], [3, 4], [0, -(2**40)]], device=device)
        logits = library.pair_logits(x, y, *weights, mixed, interaction)
        assert (
            logits[[0, 4]].equal(library.pair_logits(x, y, *weights, good, interaction))
            and not logits[[1, 2, 3, 5]].any()
        )
        ours, expected = (
            library.pair_focal_loss_sum(x, y, *labels, *weights, pairs, interaction, 0.25, 2.0, -1, True, True)
            for pairs in (mixed, good)
        )
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.arithmetic
@pytest.mark.parametrize("listed", [None, 300], ids=["all", "listed"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.7])
@pytest.mark.parametrize("alpha", [None, 0.0, 0.25, 1.0])
def test_settings_of_the_loss(alpha, gamma, reduction, listed, device):
    case = CASES["pair_focal_loss"]
    options = {"alpha": alpha, "gamma": gamma, "reduction": reduction, "ignore_index": 2}
    for interaction in INTERACTIONS:
        judge(case, case.draw((17, 21, 5, 9), torch.float64, interaction=interaction, listed=listed, **options), device)


@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_saturated_logits(dtype, interaction, device):
    """Logits of ±1e4 and more: p_t rounds to 0 or 1, the loss does not."""
    case = CASES["pair_focal_loss"]
    for gamma in (0.0, 0.5, 2.0):
        inputs = case.draw((20, 30, 6, 12), dtype, interaction=interaction, scale=1e4, gamma=gamma)
        results = judge(case, inputs, device)
        assert all(value.isfinite().all() for value in results.values())
