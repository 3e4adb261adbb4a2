# SPDX-License-Identifier: BSD-3-Clause
"""Pseudo-labels by k-means."""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import Tensor


def cluster(features: Tensor, k: int, *, seed: int) -> Tensor:
    """The cluster of every row, [n] int64 on the CPU, numbered from 0 without gaps: k-means, the best of five starts by
    inertia.

    With faiss where it is installed, otherwise with scikit-learn. They start differently, faiss from random rows and
    scikit-learn by k-means++, so the clusters are not the same; with one of them they are a function of the arguments.

    Args:
        features: [n, d], floating point, finite.
        k: from 1 to n. Fewer clusters come out where fewer rows differ.
        seed: of the starts.

    Raises:
        ValueError: ``k`` is out of range.
        ImportError: there is neither faiss nor scikit-learn.
    """
    if not 1 <= k <= len(features):
        raise ValueError(f"k is {k}; it should be from 1 to {len(features)}, the number of features")
    find = _faiss_clusters if importlib.util.find_spec("faiss") is not None else _sklearn_clusters
    clusters = find(features.detach().float().cpu().contiguous(), k, seed)
    return clusters.unique(return_inverse=True)[1]


def _faiss_clusters(features: Tensor, k: int, seed: int) -> Tensor:
    faiss = importlib.import_module("faiss")
    rows = features.numpy()
    # All rows are learnt from, however many or few there are for a cluster.
    means = faiss.Kmeans(
        rows.shape[1],
        k,
        niter=50,
        nredo=5,
        seed=seed % 2**31,
        min_points_per_centroid=1,
        max_points_per_centroid=len(rows),
    )
    means.train(rows)
    return torch.from_numpy(means.index.search(rows, 1)[1][:, 0])


def _sklearn_clusters(features: Tensor, k: int, seed: int) -> Tensor:
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        raise ImportError("k-means needs faiss or scikit-learn: pip install faiss-cpu, or scikit-learn") from None
    return torch.from_numpy(KMeans(k, n_init=5, random_state=seed % 2**32).fit_predict(features.numpy())).long()
