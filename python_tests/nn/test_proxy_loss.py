# SPDX-License-Identifier: BSD-3-Clause
import math

import pytest
import torch
import torch.nn.functional as F

from ssmkernels.nn import ProxyLoss

B, DIM, CLASSES = 7, 5, 4


def make(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    loss = ProxyLoss(CLASSES, DIM, **settings).to(dtype)
    embeddings = F.normalize(torch.randn(B, DIM, dtype=dtype)).requires_grad_()
    labels = torch.tensor([0, 3, 1, -1, 2, 2, -1])
    confidence = torch.tensor([1.0, 0.2, 0.0, 0.9, 0.5, 0.01, 0.3], dtype=dtype)
    return loss, embeddings, labels, confidence


def literal(embeddings, proxies, labels, confidence, epsilon, margin):
    """Equations (26)-(29), term by term."""
    total = 0.0
    for z, y, omega in zip(embeddings.tolist(), labels.tolist(), confidence.tolist(), strict=True):
        if y == -1:
            continue
        cosines = []
        for proxy in proxies.tolist():
            norm = math.sqrt(sum(component**2 for component in proxy))
            cosines.append(sum(a * b for a, b in zip(z, proxy, strict=True)) / norm)
        positive = math.log(1 + math.exp(-epsilon * (cosines[y] - margin)))
        negative = sum(math.log(1 + math.exp(epsilon * (cosines[c] + margin))) for c in range(CLASSES) if c != y)
        total += omega * (positive + negative)
    return total / CLASSES


@pytest.mark.parametrize(("epsilon", "margin"), [(32.0, 0.1), (3.0, 0.0), (16.0, -0.25)])
def test_is_the_literal_loop(epsilon, margin):
    loss, embeddings, labels, confidence = make(epsilon=epsilon, margin=margin)
    expected = literal(embeddings, loss.proxies, labels, confidence, epsilon, margin)
    assert loss(embeddings, labels, confidence).item() == pytest.approx(expected, rel=1e-12)
    expected = literal(embeddings, loss.proxies, labels, torch.ones(B), epsilon, margin)
    assert loss(embeddings, labels).item() == pytest.approx(expected, rel=1e-12)


def test_gradients():
    loss, embeddings, labels, confidence = make(epsilon=4.0)

    def of(z, proxies):
        return torch.func.functional_call(loss, {"proxies": proxies}, (z, labels, confidence))

    assert torch.autograd.gradcheck(of, (embeddings, loss.proxies.detach().clone().requires_grad_()))


def test_rows_without_a_label_have_no_gradient_and_confidence_none():
    loss, embeddings, labels, confidence = make()
    confidence.requires_grad_()
    loss(embeddings, labels, confidence).backward()
    assert confidence.grad is None
    silent = (labels == -1) | (confidence == 0)
    assert (embeddings.grad[silent] == 0).all()
    assert (embeddings.grad[~silent].abs().sum(dim=1) > 0).all()
    alone = loss(embeddings[labels >= 0], labels[labels >= 0], confidence[labels >= 0])
    torch.testing.assert_close(loss(embeddings, labels, confidence), alone, rtol=0, atol=0)


def test_the_length_of_a_proxy_does_not_matter_and_is_kept():
    loss, embeddings, labels, confidence = make()
    before = loss(embeddings, labels, confidence)
    with torch.no_grad():
        loss.proxies.mul_(torch.tensor([[0.1], [3.0], [1.0], [50.0]], dtype=torch.float64))
    kept = loss.proxies.detach().clone()
    torch.testing.assert_close(loss(embeddings, labels, confidence), before)
    assert torch.equal(loss.proxies, kept)


def test_initial_proxies_are_kaiming_normal():
    torch.manual_seed(0)
    proxies = ProxyLoss(400, 64).proxies
    assert proxies.std().item() == pytest.approx(math.sqrt(2 / 400), rel=0.02)  # fan-out of a [C, δ] weight is C


def test_extreme_embeddings_stay_finite():
    loss, embeddings, labels, confidence = make(torch.float32, epsilon=1e4)
    value = loss(embeddings, labels, confidence)
    value.backward()
    assert value.isfinite()
    assert embeddings.grad.isfinite().all()
    assert loss.proxies.grad.isfinite().all()


def test_an_empty_batch_and_one_without_labels_are_zero():
    loss, embeddings, labels, _ = make()
    value = loss(embeddings, torch.full_like(labels, -1))
    value.backward()
    assert value == 0
    assert (loss.proxies.grad == 0).all()
    assert loss(embeddings[:0], labels[:0]) == 0


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"embeddings": torch.zeros(B, DIM + 1)}, ValueError, r"embeddings must have embedding_dim = 5 in dimension 1"),
        ({"embeddings": torch.zeros(B, DIM, dtype=torch.int64)}, TypeError, "embeddings must be float32"),
        ({"labels": torch.zeros(B)}, TypeError, "labels must be int64"),
        ({"labels": torch.zeros(B - 1, dtype=torch.int64)}, ValueError, "labels must have B of embeddings = 7"),
        (
            {"labels": torch.full((B,), CLASSES)},
            ValueError,
            r"labels must be in \[0, 4\), or −1 for none; got values from 4 to 4",
        ),
        ({"labels": torch.full((B,), -2)}, ValueError, "labels must be in"),
        ({"confidence": torch.ones(B, 1)}, ValueError, r"confidence must be \[B\]"),
        ({"confidence": torch.full((B,), -0.5)}, ValueError, "confidence must be finite and >= 0"),
        ({"confidence": torch.full((B,), float("nan"))}, ValueError, "confidence must be finite and >= 0"),
    ],
)
def test_bad_input(changed, error, message):
    loss, embeddings, labels, confidence = make()
    with pytest.raises(error, match=message):
        loss(**{"embeddings": embeddings, "labels": labels, "confidence": confidence, **changed})
