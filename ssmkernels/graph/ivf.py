# SPDX-License-Identifier: BSD-3-Clause
"""Approximate search by an inverted file of faiss (Johnson, Douze and Jégou, 2019).

k-means cuts the points into about √N cells, and a point is searched in the cells nearest to it: from 4 on, and twice as
many until the recall on a sample of the points, against an exact search of these, is 0.99. The sample, the cells and
the recall that was measured are logged by the logger ``ssmkernels.graph``, at level INFO. What is found is ranked by
its exact similarity, ties by index; a point in whose cells there are not k others is searched exactly. k-means begins
from the same seed, so that a call gives the same graph again.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor

from ssmkernels.graph.candidates import faiss, pairwise, rank, rows_at_once
from ssmkernels.ops import _neighbours as kernels

LEAST_RECALL = 0.99
SAMPLE = 1000  # the standard error of a recall of 0.99 of 1,000 · k pairs is far below 0.01
FEWEST_CELLS = 4
SEED = 1234

logger = logging.getLogger("ssmkernels.graph")


def nearest(unit: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """About the k nearest others of every row of ``unit`` [N, d], of length 1 or 0: ids [N, k] int32 and similarities
    [N, k].

    Raises:
        ImportError: faiss is not installed.
    """
    library, nodes = faiss("ivf"), len(unit)
    searched = unit.float().contiguous()
    index = _index(library, searched)
    sample = torch.linspace(0, nodes - 1, min(SAMPLE, nodes), dtype=torch.float64).long()
    exact = _exact(unit, sample, k)[0]
    index.nprobe = min(FEWEST_CELLS, index.nlist)
    while True:
        recall = _recall(_ranked(index, unit, searched, sample, k)[0], exact)
        if recall >= LEAST_RECALL or index.nprobe == index.nlist:
            break
        index.nprobe = min(2 * index.nprobe, index.nlist)
    logger.info(
        "ivf: %d of %d cells searched, recall %.4f on a sample of %d points",
        index.nprobe,
        index.nlist,
        recall,
        len(sample),
    )
    ids, similarities = torch.empty(nodes, k, dtype=torch.int32), torch.empty(nodes, k, dtype=unit.dtype)
    for rows in torch.arange(nodes).split(rows_at_once(searched)):
        ids[rows], similarities[rows] = _ranked(index, unit, searched, rows, k)
    short = (ids < 0).any(dim=1).nonzero()[:, 0]
    if len(short):
        ids[short], similarities[short] = _exact(unit, short, k)
    return ids, similarities


def _index(library: Any, searched: Tensor) -> Any:
    nodes, dim = searched.shape
    cells = max(1, round(math.sqrt(nodes)))
    index = library.IndexIVFFlat(library.IndexFlatIP(dim), dim, cells, library.METRIC_INNER_PRODUCT)
    index.cp.seed, index.cp.spherical, index.cp.min_points_per_centroid = SEED, True, 1
    index.train(searched.numpy())
    index.add(searched.numpy())
    return index


def _ranked(index: Any, unit: Tensor, searched: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """ids [B, k] int32 and similarities of ``rows`` [B]; −1 where there are fewer in the cells."""
    candidates = torch.from_numpy(index.search(searched[rows].numpy(), min(k + 1, len(unit)))[1])
    similarities = pairwise(unit, rows, candidates.clamp_min(0))
    similarities[(candidates < 0) | (candidates == rows[:, None])] = -torch.inf
    ids, similarities = rank(candidates, similarities, k)
    return ids.masked_fill(similarities == -torch.inf, -1).int(), similarities


def _exact(unit: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """ids [B, k] int32 and similarities of ``rows`` [B], among all others."""
    ids, similarities = kernels.nearest(unit[rows], k + 1, columns=unit)
    similarities = similarities.masked_fill(ids == rows[:, None], -torch.inf)
    return rank(ids, similarities, k)


def _recall(ids: Tensor, exact: Tensor) -> float:
    """The share of the exact neighbours [B, k] that are among ``ids`` [B, k]."""
    both = torch.cat([ids, exact], dim=1).sort(dim=1).values
    matches = (both[:, 1:] == both[:, :-1]) & (both[:, 1:] >= 0)
    return float(matches.sum()) / exact.numel()
