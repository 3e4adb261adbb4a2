# SPDX-License-Identifier: BSD-3-Clause
import math

import pytest
import torch
import torch.nn.functional as F
from pair_batches import LABELS, assert_same, make

from ssmkernels.nn import MultiSimilarityLoss

SETTINGS = [(2.0, 50.0, 0.5), (0.01, 50.6, 0.56), (17.97, 75.66, 0.77)]


def their_loss(*settings):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    return losses.MultiSimilarityLoss(*settings)


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_is_the_literal_loop(kind, settings):
    alpha, beta, base = settings
    embeddings, labels = make(9, 4, kind)
    units = F.normalize(embeddings.detach()).tolist()
    total = 0.0
    for i, x in enumerate(units):
        sums = {True: 1.0, False: 1.0}
        for j, y in enumerate(units):
            if i != j:
                cosine, same = sum(a * b for a, b in zip(x, y, strict=True)), bool(labels[i] == labels[j])
                sums[same] += math.exp(-alpha * (cosine - base) if same else beta * (cosine - base))
        total += math.log(sums[True]) / alpha + math.log(sums[False]) / beta
    assert MultiSimilarityLoss(*settings)(embeddings, labels).item() == pytest.approx(total / len(units), rel=1e-10)


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("size", [(1, 3), (2, 3), (17, 5), (123, 8)])
@pytest.mark.parametrize("settings", SETTINGS)
def test_agrees_with_pytorch_metric_learning(kind, size, settings):
    embeddings, labels = make(*size, kind)
    assert_same(
        MultiSimilarityLoss(*settings)(embeddings, labels),
        their_loss(*settings)(embeddings, labels),
        embeddings,
    )


def test_sharp_exponents_stay_finite():
    embeddings, labels = make(dtype=torch.float32)
    loss = MultiSimilarityLoss(1e4, 1e4, 0.0)(embeddings, labels)
    loss.backward()
    hardest = F.normalize(embeddings.detach()) @ F.normalize(embeddings.detach()).t()
    same = labels[:, None] == labels
    positive = (-hardest.masked_fill(~same, 1).min(dim=1).values).relu()
    negative = hardest.masked_fill(same, -1).max(dim=1).values.relu()
    torch.testing.assert_close(loss, (positive + negative).mean(), rtol=1e-3, atol=1e-3)  # log-sum-exp near its maximum
    assert embeddings.grad.isfinite().all()


def test_gradients():
    embeddings, labels = make(7, 3)
    assert torch.autograd.gradcheck(lambda x: MultiSimilarityLoss(2.0, 5.0)(x, labels), embeddings)


@pytest.mark.gpu
def test_agrees_with_the_cpu():
    embeddings, labels = make()
    here = embeddings.detach().cuda().requires_grad_()
    for listed in (
        None,
        tuple(torch.arange(6) + shift for shift in (0, 2, 9)),
    ):  # labels and indices may stay on the CPU
        expected, actual = (
            MultiSimilarityLoss()(embeddings, labels, listed),
            MultiSimilarityLoss()(here, labels, listed),
        )
        torch.testing.assert_close(actual.cpu(), expected)
        (expected,), (actual,) = torch.autograd.grad(expected, embeddings), torch.autograd.grad(actual, here)
        torch.testing.assert_close(actual.cpu(), expected)


def test_a_pair_listed_as_both_kinds_is_one_of_each():
    embeddings, labels = make()
    index = torch.arange(5)
    loss = MultiSimilarityLoss()
    both = loss(embeddings, labels, (index, index + 1, index, index + 1))
    none = index[:0]
    positive = loss(embeddings, labels, (index, index + 1, none, none))
    negative = loss(embeddings, labels, (none, none, index, index + 1))
    assert_same(both, positive + negative, embeddings)


def test_bad_input():
    embeddings, labels = make()
    with pytest.raises(ValueError, match="labels and indices_tuple are both None"):
        MultiSimilarityLoss()(embeddings)
    with pytest.raises(TypeError, match="labels must be integers"):
        MultiSimilarityLoss()(embeddings, labels.float())
