# SPDX-License-Identifier: BSD-3-Clause
"""scikit-learn's k-means on the rows of all ranks, none of which has them all.

KMeans(k, n_init=1, random_state=seed) step by step, with the same draws: the greedy k-means++ of Arthur and
Vassilvitskii (2007), then Lloyd's iterations. Sums over rows are sums over ranks, which round differently, so that the
clusters are scikit-learn's unless two distances are equal but for rounding.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ssmkernels.distributed import Group, all_gather_rows, all_reduce_sum, gather_sizes, rank_of

TOLERANCE = 1e-4  # scikit-learn's, of the mean variance
MOST_ITERATIONS = 300  # scikit-learn's
NUMBERS_AT_ONCE = 2**22  # distances in memory


def cluster(points: Tensor, k: int, *, seed: int, group: Group) -> Tensor:
    """The cluster of each of this rank's rows, [n] int64 from 0 to k − 1.

    Args:
        points: [n, d] float64, finite; also none.
        k: from 1 to the number of rows of all ranks.
        seed: from 0 to 2³² − 1.
    """
    counts = [count for (count,) in gather_sizes([len(points)], points.device, group=group)]
    total = sum(counts)
    points = points - all_reduce_sum(points.sum(dim=0), group=group) / total
    tolerance = TOLERANCE * float(all_reduce_sum(points.square().sum(dim=0), group=group).mean()) / total
    centers = _seeds(points, k, np.random.RandomState(seed), counts, group)
    clusters = torch.full((len(points),), -1, device=points.device)
    for _ in range(MOST_ITERATIONS):
        before, clusters = clusters, _nearest(points, centers)
        moved = _means(points, clusters, centers, group)
        shift = float((moved - centers).square().sum())
        centers = moved
        if not all_reduce_sum((clusters != before).sum(), group=group):
            return clusters
        if shift <= tolerance:
            break
    return _nearest(points, centers)


def _seeds(points: Tensor, k: int, draws: np.random.RandomState, counts: list[int], group: Group) -> Tensor:
    """[k, d]: rows drawn in proportion to the squared distance from those before; of 2 + ⌊ln k⌋ draws the one that
    leaves the least sum of these distances.
    """
    rank, trials = rank_of(group), 2 + int(math.log(k))
    first = int(draws.random_sample() * sum(counts))
    rows = _rows_of_all(points, torch.tensor([first - sum(counts[:rank])], device=points.device), group)
    centers = [rows[0]]
    closest = _distances(points, rows)[:, 0]
    potentials = _of_ranks(closest.sum()[None], group)[:, 0]
    nonempty = min(place for place, count in enumerate(counts) if count)
    for _ in range(1, k):
        ends = potentials.cumsum(0)
        wanted = torch.from_numpy(draws.uniform(size=trials)).to(points) * ends[-1]
        owner = torch.searchsorted(ends, wanted).clamp_min(nonempty)
        place = torch.searchsorted(closest.cumsum(0), wanted - (ends[owner] - potentials[owner]))
        place = place.clamp_max(len(points) - 1)
        rows = _rows_of_all(points, torch.where(owner == rank, place, -1), group)
        remaining = torch.minimum(closest[:, None], _distances(points, rows))
        of_ranks = _of_ranks(remaining.sum(dim=0), group)
        best = int(of_ranks.sum(dim=0).argmin())
        closest, potentials = remaining[:, best], of_ranks[:, best]
        centers.append(rows[best])
    return torch.stack(centers)


def _of_ranks(values: Tensor, group: Group) -> Tensor:
    """[R, m] the values [m] of every rank."""
    return all_gather_rows(values[None], group=group)


def _rows_of_all(points: Tensor, places: Tensor, group: Group) -> Tensor:
    """[m, d] rows at ``places`` [m], which are in range on the one rank that has the row."""
    own = (places >= 0) & (places < len(points))
    rows = points.new_zeros(len(places), points.shape[1])
    rows[own] = points[places[own]]
    return all_reduce_sum(rows, group=group)


def _distances(points: Tensor, centers: Tensor) -> Tensor:
    """[n, m] squared."""
    lengths = points.square().sum(dim=1, keepdim=True) + centers.square().sum(dim=1)
    return torch.addmm(lengths, points, centers.t(), alpha=-2).clamp_min_(0)


def _nearest(points: Tensor, centers: Tensor) -> Tensor:
    """[n] the nearest center of each row, the first of several."""
    size = max(1, NUMBERS_AT_ONCE // len(centers))
    parts = [_distances(some, centers).argmin(dim=1) for some in points.split(size)]
    return torch.cat(parts)


def _means(points: Tensor, clusters: Tensor, centers: Tensor, group: Group) -> Tensor:
    """[k, d] of the clusters; an empty one becomes the row that is farthest from its center, which leaves its own."""
    packed = points.new_zeros(len(centers), centers.shape[1] + 1)
    packed[:, :-1].index_add_(0, clusters, points)
    packed[:, -1] = torch.bincount(clusters, minlength=len(centers)).to(packed)
    packed = all_reduce_sum(packed, group=group)
    sums, sizes = packed[:, :-1], packed[:, -1]
    empty = (sizes == 0).nonzero()[:, 0]
    if len(empty):
        distances = (points - centers[clusters]).square().sum(dim=1)
        far = distances.topk(min(len(empty), len(points))).indices
        candidates = torch.cat([distances[far, None], clusters[far, None].to(points), points[far]], dim=1)
        candidates = all_gather_rows(candidates, group=group)
        candidates = candidates[candidates[:, 0].argsort(descending=True, stable=True)[: len(empty)]]
        if float(candidates[0, 0]) > 0:
            left, rows = candidates[:, 1].long(), candidates[:, 2:]
            sums.index_add_(0, left, rows, alpha=-1)
            sizes.index_add_(0, left, torch.ones_like(rows[:, 0]), alpha=-1)
            sums[empty], sizes[empty] = rows, 1.0
    means = sums / sizes[:, None].clamp_min(1)
    means[sizes == 0] = means[sizes.argmax()].clone()
    return means
