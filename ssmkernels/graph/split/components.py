# SPDX-License-Identifier: BSD-3-Clause
"""Connected components of a split graph."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ssmkernels.distributed import all_gather_rows, gather_sizes, rank_of

if TYPE_CHECKING:
    from ssmkernels.graph.split.structure import SplitGraph


def components(graph: SplitGraph, linked: Tensor) -> tuple[Tensor, int]:
    """[n] int64 the component of each of this rank's rows over the entries that are ``linked`` [E_r], and how many
    components there are on all ranks.

    Each rank finds the pieces of its own rows. Which of them are one over an edge between ranks is sent to every rank:
    16 bytes for a pair of pieces, of which there are few where ranks hold whole clusters.
    """
    pieces, count = _pieces(graph, linked)
    counts = [of_rank for (of_rank,) in gather_sizes([count], graph.device, group=graph.group)]
    starts = list(accumulate(counts, initial=0))
    first, rows = starts[rank_of(graph.group)], graph.num_rows
    own = torch.where(pieces >= 0, pieces + first, -1)
    others = graph.extend(own[:rows])[rows:]
    pairs = torch.stack([own[rows:], others], dim=1)[own[rows:] >= 0]
    whole = _joined(all_gather_rows(pairs.unique(dim=0), group=graph.group), starts[-1])
    return whole[own[:rows]], int(whole.max()) + 1 if len(whole) else 0


def _pieces(graph: SplitGraph, linked: Tensor) -> tuple[Tensor, int]:
    """[n + g] which piece of this rank's rows a row or ghost is in, −1 for a ghost that is in none, and how many there
    are.
    """
    from scipy import sparse
    from scipy.sparse.csgraph import connected_components

    rows, size = graph.num_rows, graph.num_rows + graph.num_ghosts
    ends = torch.stack([graph.rows, graph.col.long()])[:, linked].cpu().numpy()
    matrix = sparse.coo_array((np.ones(ends.shape[1], np.float32), tuple(ends)), shape=(size, size))
    labels = torch.from_numpy(connected_components(matrix, directed=False)[1]).long() if size else torch.empty(0).long()
    pieces, own = labels[:rows].unique(return_inverse=True)
    place = torch.searchsorted(pieces, labels[rows:])
    known = (
        (place < len(pieces)) & (pieces[place.clamp_max(len(pieces) - 1)] == labels[rows:]) if len(pieces) else False
    )
    return torch.cat([own, torch.where(torch.as_tensor(known), place, -1)]), len(pieces)


def _joined(pairs: Tensor, count: int) -> Tensor:
    """[count] the component of every piece, numbered by their first piece."""
    from scipy import sparse
    from scipy.sparse.csgraph import connected_components

    if count == 0:
        return torch.empty(0, dtype=torch.int64)
    ends = tuple(pairs.cpu().numpy().T)
    matrix = sparse.coo_array((np.ones(len(pairs), np.float32), ends), shape=(count, count))
    labels = connected_components(matrix, directed=False)[1]
    _, firsts, place = np.unique(labels, return_index=True, return_inverse=True)
    return torch.from_numpy(firsts.argsort().argsort()[place]).long()
