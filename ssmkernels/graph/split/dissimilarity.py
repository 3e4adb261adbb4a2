# SPDX-License-Identifier: BSD-3-Clause
"""Leave-one-edge-out on a split graph, and values of the other direction of its edges.

The kernel of one process runs on this rank's rows and its ghosts. The row of a ghost has the entries that lead here,
and a loop with the rest of its degree: what is left out of it is one edge, and the edge leads here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssmkernels import ops
from ssmkernels.distributed import all_reduce_sum, is_distributed, send_rows
from ssmkernels.graph.split import class_blocks
from ssmkernels.graph.split.halo import extend
from ssmkernels.graph.split.structure import SplitGraph, check_split_graph
from ssmkernels.ops import _checks as check


def leave_one_edge_out(graph: SplitGraph, propagated: Tensor, *, logit_scale: float = 4.0) -> Tensor:
    """[E_r] :func:`ssmkernels.ops.leave_one_edge_out` of the entries of this rank's rows.

    A rank receives its ghosts' rows of ``propagated`` and their degrees: g (C b + 8) bytes in two messages a rank. The
    gradient of ``propagated`` goes back the same way. Where the classes are split too, a rank has c of C columns, and
    7 numbers of every edge are reduced over the ranks of ``graph.classes``: see
    :mod:`ssmkernels.graph.split.class_blocks`.

    Args:
        propagated: [n, C] of this rank's rows, in the dtype of the graph; differentiable. [n, c] where the classes are
            split.
        logit_scale: λ > 0.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_split_graph(graph)
    check.check_tensor("propagated", propagated, "[n, C]", 2)
    check.check_size("propagated", propagated, 0, graph.num_rows, "n of the graph")
    check.check_same_dtype("propagated", propagated, "graph.weight", graph.weight)
    logit_scale = check.check_positive("logit_scale", logit_scale)
    if is_distributed(graph.classes):
        return _of_class_blocks(graph, propagated, logit_scale)
    rows, size = graph.num_rows, graph.num_rows + graph.num_ghosts
    own_row, own_col, weight = graph.rows, graph.col.long(), graph.weight
    cut = own_col >= rows
    inward = torch.zeros(graph.num_ghosts, dtype=torch.float64).index_add_(0, own_col[cut] - rows, weight[cut].double())
    degree = graph.extend(graph.sum_rows(weight.double()))[rows:]
    loops = torch.arange(rows, size)
    row = torch.cat([own_row, own_col[cut], loops])
    col = torch.cat([own_col, own_row[cut], loops])
    values = torch.cat([weight, weight[cut], (degree - inward).clamp_min(0).to(weight.dtype)])
    keys, order = (row * size + col).sort()
    crow = torch.searchsorted(keys, torch.arange(size + 1) * size)
    reverse = torch.searchsorted(keys, (col * size + row)[order])
    dissimilarity = ops.leave_one_edge_out(
        crow, col[order], reverse, values[order], extend(graph.halo, propagated), logit_scale=logit_scale
    )
    return dissimilarity[order.argsort()[: len(own_row)]]


def _of_class_blocks(graph: SplitGraph, propagated: Tensor, logit_scale: float) -> Tensor:
    """:func:`leave_one_edge_out` of the columns of this rank: each pair of nodes is computed once, at the end with the
    smaller place.
    """
    classes = int(all_reduce_sum(torch.tensor(propagated.shape[1]), group=graph.classes))
    degree = graph.extend(graph.sum_rows(graph.weight.double()))
    ends = class_blocks.ends_of(graph)
    of_pairs = class_blocks.LeaveOneEdgeOut.apply(
        extend(graph.halo, propagated), degree, graph, ends, logit_scale, classes
    )
    return _BothDirections.apply(of_pairs, graph, ends.entry)


class _BothDirections(torch.autograd.Function):
    """Values [P] of some entries, one of each pair of nodes -> [E_r] of all entries of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, of_pairs: Tensor, graph: SplitGraph, entry: Tensor) -> Tensor:
        ctx.graph, ctx.entry = graph, entry
        values = of_pairs.new_zeros(graph.num_edges).index_copy_(0, entry, of_pairs)
        is_known = torch.zeros(graph.num_edges, dtype=torch.bool).index_fill_(0, entry, True)
        return torch.where(is_known, values, mirrored(graph, values))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        graph: SplitGraph = ctx.graph
        is_loop = graph.col == graph.rows
        both = gradient + torch.where(is_loop, 0, mirrored(graph, gradient.contiguous()))
        return both[ctx.entry], None, None


def mirrored(graph: SplitGraph, values: Tensor) -> Tensor:
    """``values`` [E_r] of the entries (j, i) at the entries (i, j): what other ranks have of them comes by one
    all_to_all.
    """
    rows, row, col = graph.num_rows, graph.rows, graph.col.long()
    inner, cut = (col < rows).nonzero()[:, 0], (col >= rows).nonzero()[:, 0]
    out = torch.empty_like(values)
    # The inner entries (i, j) in the order of j, then i, are their mirrors in the order of i, then j.
    out[inner[(row * rows + col)[inner].argsort()]] = values[inner[(col * rows + row)[inner].argsort()]]
    # Ghosts ascend: in their order, entries go to one rank after the other, as the rows there want them.
    starts = torch.tensor(graph.starts[1:-1], dtype=torch.int64)
    owner = torch.bucketize(graph.ghosts[col[cut] - rows], starts, right=True)
    counts = torch.bincount(owner, minlength=len(graph.starts) - 1).tolist()
    sent = values[cut[(col * rows + row)[cut].argsort()]]
    nodes = torch.cat([torch.arange(rows), graph.ghosts])
    place = (row * graph.num_nodes + nodes[col])[cut].argsort()
    place = place[owner[place].argsort(stable=True)]
    out[cut[place]] = send_rows(sent, counts, group=graph.group)[0]
    return out
