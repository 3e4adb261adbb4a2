# SPDX-License-Identifier: BSD-3-Clause
"""Tensors with the negative bit, which numpy and torch's indexing ignore, and weights at the end of their range."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ssmkernels import graph, metrics
from ssmkernels.nn import LabeledMemory, ProxyLoss


def negated(value: Tensor) -> Tensor:
    """The same values, as minus what lies in memory."""
    return torch._neg_view(-value)


def rows(count: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", ["native", "faiss", "torch"])
def test_neighbours(backend: str) -> None:
    if backend == "faiss":
        pytest.importorskip("faiss")
    features = rows(30, 4)
    neighbours, expected = (graph.knn_graph(rows, 5, backend=backend) for rows in (negated(features), features))
    assert neighbours.col.equal(expected.col)
    assert neighbours.weight.equal(expected.weight)


def test_a_graph() -> None:
    plain = graph.knn_graph(rows(30, 4), 5)
    copied = graph.Graph(negated(plain.crow), negated(plain.col), negated(plain.weight))
    for part in ("crow", "col", "weight"):
        assert not getattr(copied, part).is_neg()
        assert getattr(copied, part).equal(getattr(plain, part))
    assert plain.with_weight(negated(plain.weight)).to_scipy().data.tolist() == plain.weight.tolist()


def test_metrics() -> None:
    labels, assigned = torch.arange(12) % 3, torch.arange(12) % 4
    assert metrics.nmi_of_clusters(negated(labels), negated(assigned)) == metrics.nmi_of_clusters(labels, assigned)
    with pytest.raises(TypeError, match="seed"):
        metrics.nmi(rows(12, 3), labels, seed=torch.tensor(True))


def test_slots_of_a_memory() -> None:
    slots, embeddings, labels = torch.tensor([4, 1]), rows(2, 3), torch.tensor([0, 1])
    memories = []
    for given in (slots, negated(slots)):
        torch.manual_seed(0)
        memory = LabeledMemory(6, 3, 2)
        memory.update(given, embeddings, labels)
        memories.append(memory)
    assert memories[0].bank.equal(memories[1].bank)
    assert memories[0].labels.equal(memories[1].labels)


def test_rows_without_a_label_have_no_gradient() -> None:
    embeddings = rows(4, 3)
    embeddings[1], embeddings[3] = torch.nan, 1e30
    embeddings.requires_grad_()
    loss = ProxyLoss(2, 3)
    confidence = torch.tensor([1.0, 3e38, 1.0, 3e38])
    loss(embeddings, torch.tensor([0, -1, 1, -1]), confidence).backward()
    assert embeddings.grad is not None
    assert embeddings.grad.isfinite().all()
    assert not embeddings.grad[[1, 3]].any()


def test_probabilities_of_subnormal_weights_sum_to_one() -> None:
    estimators = pytest.importorskip("ssmkernels.estimators")
    weight = np.ones((6, 6)) - np.eye(6)
    model = estimators.LabelPropagation(affinity="precomputed").fit(weight, [0, 1, -1, -1, -1, -1])
    np.testing.assert_allclose(model.predict_proba(weight[:3] * 1e-310).sum(axis=1), 1, rtol=1e-12)
