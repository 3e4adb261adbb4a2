# SPDX-License-Identifier: BSD-3-Clause
"""How well clusters of embeddings agree with classes: normalised mutual information, equations (30)-(33) of Zhuang and
Moulin (CVPR 2023).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ssmkernels.distributed import Group, all_gather_rows, gather_sizes, is_split
from ssmkernels.metrics import clusters_over_ranks
from ssmkernels.metrics._arguments import embeddings_and_labels, integer, labels_of


def nmi(
    embeddings: Tensor | np.ndarray,
    labels: Tensor | np.ndarray,
    *,
    num_clusters: int | None = None,
    seed: int = 0,
    group: Group = "local",
) -> float:
    """Normalised mutual information 2 I/(H + H) between the classes and a k-means clustering of the embeddings:
    equations (30)-(33).

    Clusters with scikit-learn's k-means, on the CPU: k-means++ seeding, one run. The same seed gives the same clusters;
    another may give others. :func:`nmi_of_clusters` rates clusters from elsewhere. With a group the same algorithm runs
    over the ranks, on the device of ``embeddings``: no rank has the rows of another, and the clusters are those of one
    process unless distances are equal but for rounding.

    Args:
        embeddings: [N, d], floating point, finite.
        labels: [N] integers.
        num_clusters: from 1 to N; by default the number of classes.
        seed: of k-means, from 0 to 2³² − 1.
        group: the ranks whose rows are the embeddings, as in :func:`retrieval`.

    Returns:
        A number in [0, 1].

    Raises:
        ImportError: scikit-learn, which one process needs, is not installed.
        TypeError, ValueError: an argument is not as said above; the message names it.
    """
    split = is_split(group)
    points, labels = embeddings_and_labels("embeddings", embeddings, "labels", labels, least=0 if split else 1)
    count = sum(rows for (rows,) in gather_sizes([len(points)], points.device, group=group))
    if num_clusters is None:
        num_clusters = len(all_gather_rows(labels.unique(), group=group).unique())
    num_clusters, seed = integer("num_clusters", num_clusters), integer("seed", seed)
    if not 1 <= num_clusters <= count:
        raise ValueError(f"num_clusters should be from 1 to {count}, the number of embeddings; got {num_clusters}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed should be from 0 to 2³² − 1, got {seed}")
    if split:
        clusters = clusters_over_ranks.cluster(points, num_clusters, seed=seed, group=group)
        return _information(*_pairs(labels, clusters, group))
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        raise ImportError("this needs scikit-learn: pip install scikit-learn, or 'ssmkernels[train]'") from None
    clusters = KMeans(num_clusters, n_init=1, random_state=seed).fit_predict(points.cpu().numpy())
    return nmi_of_clusters(labels.cpu(), clusters)


def nmi_of_clusters(labels: Tensor | np.ndarray, clusters: Tensor | np.ndarray) -> float:
    """Normalised mutual information 2 I/(H + H) between classes and clusters, each [N] integers: equations (30)-(33).

    1 where the two agree but for the names, also where both are a single group; 0 where they tell nothing of each
    other.

    Raises:
        TypeError, ValueError: an argument is not as said above, or N is 0; the message names it.
    """
    classes, groups = labels_of("labels", labels), labels_of("clusters", clusters)
    if len(groups) != len(classes):
        raise ValueError(f"clusters should have {len(classes)} entries, as many as labels; got {len(groups)}")
    if groups.device != classes.device:
        raise ValueError(f"clusters should be on {classes.device}, the device of labels; got {groups.device}")
    if len(classes) == 0:
        raise ValueError("labels should have at least 1 entry, got none")
    return _information(*_pairs(classes, groups, "local"))


def _pairs(classes: Tensor, groups: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """The pairs [m, 2] of a class and a cluster that there are on any rank, sorted, and how often [m] each is."""
    pairs, counts = torch.stack([classes, groups], dim=1).unique(dim=0, return_counts=True)
    of_ranks = all_gather_rows(torch.cat([pairs, counts[:, None]], dim=1), group=group)
    pairs, place = of_ranks[:, :2].unique(dim=0, return_inverse=True)
    return pairs, torch.zeros_like(pairs[:, 0]).index_add_(0, place, of_ranks[:, 2])


def _information(pairs: Tensor, counts: Tensor) -> float:
    """2 I/(H + H)."""
    sums = []
    for column in (pairs[:, 0], pairs[:, 1]):
        names, place = column.unique(return_inverse=True)
        sums.append(torch.zeros_like(names).index_add_(0, place, counts))
    entropies = _entropy(sums[0]) + _entropy(sums[1])
    if entropies == 0:
        return 1.0
    # I = H(Ω) + H(C) − H(Ω, C)
    information = entropies - _entropy(counts)
    return min(max(2 * information / entropies, 0.0), 1.0)


def _entropy(counts: Tensor) -> float:
    """In nats, of groups of these sizes: equations (32), (33)."""
    share = counts.double() / counts.sum()
    return float(-(share * share.log()).sum()) + 0.0  # no -0.0
