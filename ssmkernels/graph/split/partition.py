# SPDX-License-Identifier: BSD-3-Clause
"""Parts of a graph that few edges join."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ssmkernels.graph.structure import Graph

CELLS_OF_A_RANK = 8
VECTORS = 16  # of each node, which tell the cells apart
SMOOTHINGS = 20
ROUNDS = 10  # of k-means
ROWS_AT_ONCE = 2**18


def by_cells(graph: Graph, ranks: int) -> Tensor:
    """[N] int64 the nodes in an order of which equal runs are parts that few edges join: cell by cell of a k-means, the
    cells in an order in which neighbours are near.

    k-means takes random vectors of the nodes that were averaged over neighbours, again and again: what is left differs
    slowly along the edges (subspace iteration).
    """
    if graph.num_nodes <= ranks * CELLS_OF_A_RANK:
        return torch.arange(graph.num_nodes)
    from scipy import sparse
    from scipy.sparse.csgraph import reverse_cuthill_mckee

    matrix = graph.to_scipy().astype(np.float64)
    inverse = 1 / np.maximum(matrix.sum(axis=1), np.finfo(np.float64).tiny)
    vectors = np.random.default_rng(0).standard_normal((graph.num_nodes, min(VECTORS, graph.num_nodes)))
    for _ in range(SMOOTHINGS):
        vectors = np.linalg.qr((vectors + inverse[:, None] * (matrix @ vectors)) / 2)[0]
    cell = _cells(torch.nn.functional.normalize(torch.from_numpy(vectors), dim=1), ranks * CELLS_OF_A_RANK)
    ends = cell[graph.rows.cpu()].numpy(), cell[graph.col.long().cpu()].numpy()
    count = int(cell.max()) + 1
    between = sparse.coo_array((matrix.data, ends), shape=(count, count)).tocsr()
    order = reverse_cuthill_mckee(between, symmetric_mode=True)
    return torch.from_numpy(order.argsort()).long()[cell].argsort(stable=True)


def _cells(vectors: Tensor, count: int) -> Tensor:
    """[N] int64 which of ``count`` means each of the vectors [N, d] is nearest to; k-means from evenly spaced ones."""
    centres = vectors[torch.linspace(0, len(vectors) - 1, count, dtype=torch.float64).long()]
    for _ in range(ROUNDS):
        shift = centres.square().sum(dim=1) / 2
        cell = torch.cat([(rows @ centres.T - shift).argmax(dim=1) for rows in vectors.split(ROWS_AT_ONCE)])
        sizes = torch.bincount(cell, minlength=count)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, cell, vectors)
        centres = torch.where(sizes > 0, sums / sizes.clamp_min(1), centres)
    return cell
