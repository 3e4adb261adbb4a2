# SPDX-License-Identifier: BSD-3-Clause
"""Metrics of the rows of all ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from shards import integers, normal, shard

from ssmkernels import metrics

N = 60


def check_retrieval_and_nmi(group: dist.ProcessGroup) -> None:
    embeddings, labels = normal(N, 3, seed=0, dtype=torch.float32), integers(5, N, seed=1)
    labels[7] = 5  # the only one of its class
    expected = metrics.retrieval(embeddings, labels, recall_at=(1, 3))
    clusters = metrics.nmi(embeddings, labels, num_clusters=4, seed=3)
    for even in (True, False):
        own = shard(N, group, even=even)
        figures = metrics.retrieval(embeddings[own], labels[own], recall_at=(1, 3), group=group)
        assert figures.keys() == expected.keys()
        assert figures == pytest.approx(expected, rel=1e-12)
        assert metrics.nmi(embeddings[own], labels[own], num_clusters=4, seed=3, group=group) == clusters


def check_retrieval_without_two_of_a_class(group: dist.ProcessGroup) -> None:
    own = shard(4, group)
    figures = metrics.retrieval(normal(4, 3, seed=0)[own], torch.arange(4)[own], group=group)
    assert figures["R@1"] == 0
    assert figures["MAP@R"] != figures["MAP@R"]  # NaN


def check_retrieval_refuses_references_with_a_group(group: dist.ProcessGroup) -> None:
    rows, labels = torch.zeros(2, 3), torch.arange(2)
    with pytest.raises(ValueError, match="references should be None with a group"):
        metrics.retrieval(rows, labels, references=rows, reference_labels=labels, group=group)
