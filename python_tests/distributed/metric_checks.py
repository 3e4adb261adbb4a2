# SPDX-License-Identifier: BSD-3-Clause
"""Metrics of the rows of all ranks."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from shards import integers, normal, shard
from traffic import counted

from ssmkernels import metrics
from ssmkernels.metrics import clusters_over_ranks, search

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


def check_retrieval_in_shares(group: dist.ProcessGroup) -> None:
    """Several rounds of the blocks, where lists are long; equal rows and equal distances on different ranks."""
    embeddings, labels = integers(3, 3 * N, seed=2).view(N, 3).float(), integers(4, N, seed=3)
    expected = metrics.retrieval(embeddings, labels, recall_at=(1, 9))
    at_once = search._CHUNK_ENTRIES
    try:
        for entries in (1, 4 * 7 * (20 + 8), at_once):
            search._CHUNK_ENTRIES = entries
            for even in (True, False):
                own = shard(N, group, even=even)
                figures = metrics.retrieval(embeddings[own], labels[own], recall_at=(1, 9), group=group)
                assert figures == pytest.approx(expected, rel=1e-12)
    finally:
        search._CHUNK_ENTRIES = at_once


def check_retrieval_among_references(group: dist.ProcessGroup) -> None:
    queries, labels = normal(N, 3, seed=4), integers(6, N, seed=5)
    references, reference_labels = normal(2 * N, 3, seed=6), integers(5, 2 * N, seed=7)  # queries of class 5 have none
    expected = metrics.retrieval(queries, labels, references=references, reference_labels=reference_labels)
    own, other = shard(N, group), shard(2 * N, group, even=True)
    for asked, kept in ((own, other), (shard(N, group, even=True), shard(2 * N, group))):
        figures = metrics.retrieval(
            queries[asked],
            labels[asked],
            references=references[kept],
            reference_labels=reference_labels[kept],
            group=group,
        )
        assert figures == pytest.approx(expected, rel=1e-12)
    own_queries, rest = queries[own], references[own]
    together = torch.cat([own_queries, rest]), torch.cat([labels[own], reference_labels[own]])
    figures = metrics.retrieval(
        own_queries,
        labels[own],
        references=together[0],
        reference_labels=together[1],
        ref_includes_query=True,
        group=group,
    )
    whole = torch.cat([queries, references[:N]]), torch.cat([labels, reference_labels[:N]])
    expected = metrics.retrieval(
        queries, labels, references=whole[0], reference_labels=whole[1], ref_includes_query=True
    )
    assert figures == pytest.approx(expected, rel=1e-12)


def check_traffic_of_retrieval(group: dist.ProcessGroup) -> None:
    """References go round; of classes and counts each rank has those of all."""
    embeddings, labels = normal(N, 3, seed=0, dtype=torch.float32), integers(5, N, seed=1)
    own = shard(N, group, even=True)
    with counted() as (_, received):
        metrics.retrieval(embeddings[own], labels[own], group=group)
    assert received["receive"] == (N - (own.stop - own.start)) * (3 * 4 + 8)


def check_clusters(group: dist.ProcessGroup) -> None:
    """Those of scikit-learn, whose draws are the same."""
    sklearn = pytest.importorskip("sklearn.cluster")
    blobs = normal(3, 2, seed=8)[integers(3, 200, seed=9)] + 1e-3 * normal(200, 2, seed=10)
    for points, k in ((normal(200, 3, seed=11), 7), (normal(200, 3, seed=11), 1), (blobs, 40)):
        for seed in range(3):
            expected = sklearn.KMeans(k, n_init=1, random_state=seed).fit_predict(points.numpy())
            for even in (True, False):
                own = shard(200, group, even=even)
                clusters = clusters_over_ranks.cluster(points[own], k, seed=seed, group=group)
                assert clusters.tolist() == expected[own].tolist()


def check_clusters_that_become_empty(group: dist.ProcessGroup) -> None:
    """From centers far away, which get no rows at first: the rows farthest from their centers take their places."""
    sklearn = pytest.importorskip("sklearn.cluster")
    points, first = normal(200, 3, seed=13), torch.cat([normal(3, 3, seed=14), 50 + normal(4, 3, seed=15)])
    expected = sklearn.KMeans(7, init=first.numpy(), n_init=1).fit_predict(points.numpy())
    assert len(set(expected)) == 7
    centered = first - points.mean(dim=0)
    own = shard(200, group)
    with mock.patch.object(clusters_over_ranks, "_seeds", return_value=centered):
        clusters = clusters_over_ranks.cluster(points[own], 7, seed=0, group=group)
    if len(clusters):
        assert metrics.nmi_of_clusters(clusters, torch.from_numpy(expected[own]).long()) == 1


def check_clusters_of_equal_rows(group: dist.ProcessGroup) -> None:
    points = integers(3, 60, seed=16).double()[:, None].repeat(1, 2)
    own = shard(60, group)
    assert metrics.nmi(points[own], points[own, 0].long(), num_clusters=5, group=group) > 0.8
    assert metrics.nmi(points[own], points[own, 0].long(), group=group) == 1


def check_nmi_without_rows_of_others(group: dist.ProcessGroup) -> None:
    """To a rank come sums of draws, of pairs of a class and a cluster, and of clusters, by all_reduce."""
    embeddings, labels = normal(400, 64, seed=0), integers(3, 400, seed=1)
    own = shard(400, group, even=True)
    with counted() as (_, received):
        metrics.nmi(embeddings[own], labels[own], group=group)
    assert received["receive"] == 0
    assert received["all_gather"] < (400 - (own.stop - own.start)) * 8


def check_retrieval_refuses(group: dist.ProcessGroup) -> None:
    rows, labels = torch.zeros(2, 3), torch.arange(2)
    with pytest.raises(ValueError, match="references should have at least 1 rows; got 0"):
        metrics.retrieval(rows, labels, references=rows[:0], reference_labels=labels[:0], group=group)
    with pytest.raises(ValueError, match="num_clusters should be from 1 to"):
        metrics.nmi(rows, labels, num_clusters=100, group=group)
