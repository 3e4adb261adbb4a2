# SPDX-License-Identifier: BSD-3-Clause
"""The kernels behind :func:`ssmkernels.graph.knn_graph` and :func:`ssmkernels.metrics.retrieval`, on the CPU.

No public ops: what calls them has checked its input and found it finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkernels import _library
from ssmkernels.ops import _autograd as autograd


def nearest(
    rows: Tensor, k: int, *, columns: Tensor | None = None, offsets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k columns of every row with the largest rows_i · columns_j + offsets_j: ids [N, k] int32 and these scores
    [N, k], ranked by score and then by index.

    Args:
        rows: [N, D] float32 or float64.
        k: from 1 to M, or below N without ``columns``.
        columns: [M, D]; without them the rows are searched among themselves, each without itself, at half the price.
        offsets: [M], 0 if not given.
    """
    _library.require(rows)
    return torch.ops.ssmkernels.nearest_neighbours(rows, columns, offsets, k)


def pair_products(rows: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """[P] rows_left · rows_right, with the bits of :func:`nearest`; left and right [P] int64."""
    _library.require(rows)
    return torch.ops.ssmkernels.pair_products(rows, left, right)


def symmetric_graph(ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """W = A + Aᵀ, where row i of A has weights [N, k] in the columns ids [N, k] int32, but for what is not above 0:
    crow [N + 1], col [E], weight [E], reverse [E] and mutual [E] of a :class:`ssmkernels.graph.Graph`.
    """
    _library.require(weights)
    return torch.ops.ssmkernels.symmetric_graph(ids, weights)


@autograd.fake("nearest_neighbours")
def _fake_nearest(rows: Tensor, columns: Tensor | None, offsets: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    shape = rows.shape[0], k
    return rows.new_empty(shape, dtype=torch.int32), rows.new_empty(shape)


@autograd.fake("pair_products")
def _fake_pair_products(rows: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return rows.new_empty(left.shape[0])


@autograd.fake("symmetric_graph")
def _fake_symmetric_graph(ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    edges = torch.library.get_ctx().new_dynamic_size()
    return (
        ids.new_empty(ids.shape[0] + 1, dtype=torch.int64),
        ids.new_empty(edges),
        weights.new_empty(edges),
        ids.new_empty(edges, dtype=torch.int64),
        ids.new_empty(edges, dtype=torch.bool),
    )
