# SPDX-License-Identifier: BSD-3-Clause
"""What is the same for a graph on one process and for a rank's part of a split one: of the first all rows are here."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ssmkernels.distributed import Group, all_gather_rows
from ssmkernels.graph.split import SplitGraph
from ssmkernels.graph.split.components import components
from ssmkernels.graph.structure import Graph

AnyGraph: TypeAlias = Graph | SplitGraph


def num_rows(graph: AnyGraph) -> int:
    """Rows that are here."""
    return len(graph.crow) - 1


def class_group(graph: AnyGraph) -> Group:
    """The ranks that share the classes out."""
    return graph.classes if isinstance(graph, SplitGraph) else "local"


def all_columns(graph: AnyGraph, values: Tensor) -> Tensor:
    """The columns of all classes, of ``values`` [n, c] for those of this rank."""
    return all_gather_rows(values.t(), group=class_group(graph)).t()


def extended(graph: AnyGraph, values: Tensor) -> Tensor:
    """``values`` [n, …] of the rows that are here, and behind them those of the ghosts: what columns index."""
    return graph.extend(values) if isinstance(graph, SplitGraph) else values


def total(graph: AnyGraph, values: Tensor) -> Tensor:
    """The sum over ranks."""
    return graph.total(values) if isinstance(graph, SplitGraph) else values


def largest(graph: AnyGraph, values: Tensor) -> Tensor:
    """The largest over ranks, element by element."""
    return graph.largest(values) if isinstance(graph, SplitGraph) else values


def is_any(graph: AnyGraph, holds: Tensor) -> bool:
    """Whether one of ``holds`` is true, on any rank."""
    return bool(largest(graph, holds.any().long()))


def linked_components(graph: AnyGraph, linked: Tensor) -> tuple[Tensor, int]:
    """[n] int64 the component of each of the rows that are here over the entries that are ``linked`` [E], and their
    number on all ranks.
    """
    if isinstance(graph, SplitGraph):
        return components(graph, linked)
    from scipy.sparse.csgraph import connected_components

    kept = graph.to_scipy()
    kept.data = linked.cpu().numpy().astype(np.float32)
    kept.eliminate_zeros()
    count, labels = connected_components(kept, directed=False)
    return torch.from_numpy(labels).long().to(graph.device), int(count)
