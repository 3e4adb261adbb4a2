# SPDX-License-Identifier: BSD-3-Clause
"""Calls of split graphs in a group of one process, whose part is the whole graph: what ranks do with one another is
checked in python_tests/distributed.
"""

from __future__ import annotations

from typing import Any

import torch
from fuzz import values as v
from fuzz.graphs import (
    EDGES,
    MAX_ITER,
    RTOL,
    SCALE,
    STRUCTURE,
    draw_leave_one_out,
    draw_solve,
    exact_solve,
    solved,
)
from fuzz.oracle import Target
from fuzz.propagation import draw_graph
from fuzz.values import Draw
from hypothesis import strategies as st
from torch import Tensor

from ssmkernels import graph, reference
from ssmkernels.graph import Graph, SplitGraph

PARTITIONS = ("contiguous", "cells")
OF_THE_GRAPH = ("crow", "col", "reverse")  # one of another size is right, and the wrong one for the other arguments


def _draw_whole(draw: Draw) -> dict[str, Any]:
    whole = draw_graph(draw, draw(st.integers(0, 20)), mutual=True)
    return {"graph": whole, "partition": draw(st.sampled_from(PARTITIONS))}


def _split_and_gathered(**arguments: Any) -> dict[str, Tensor]:
    return _dense(SplitGraph.from_graph(**arguments).gather())


def _dense(whole: Graph) -> dict[str, Tensor]:
    return {"dense": torch.from_numpy(whole.to_scipy().toarray())}


def _split(crow: Tensor, col: Tensor, weight: Tensor, reverse: Tensor | None = None) -> SplitGraph:
    return SplitGraph.from_graph(Graph(crow, col, weight, reverse))


def _solve(crow: Tensor, col: Tensor, weight: Tensor, **rest: Any) -> Tensor:
    return solved(graph.laplacian_solve, _split(crow, col, weight), **rest)


def _leave_one_out(crow: Tensor, col: Tensor, reverse: Tensor, weight: Tensor, **rest: Any) -> Tensor:
    return graph.leave_one_edge_out(_split(crow, col, weight, reverse), **rest)


TARGETS = {
    "graph.SplitGraph": Target(
        _draw_whole,
        _split_and_gathered,
        lambda graph, partition: _dense(graph),
        words={"partition": PARTITIONS},
    ),
    "graph.laplacian_solve": Target(
        lambda draw: draw_solve(draw, v.WIDE_FLOATS),
        _solve,
        exact_solve,
        numbers={"rtol": RTOL, "max_iter": MAX_ITER},
        words={"preconditioner": ("jacobi", "none")},
        gradient=("rhs",),
        fixed=OF_THE_GRAPH,
        undefined=STRUCTURE,
        case="laplacian_solve",
        lists=EDGES,
    ),
    "graph.leave_one_edge_out": Target(
        lambda draw: draw_leave_one_out(draw, v.WIDE_FLOATS),
        _leave_one_out,
        reference.leave_one_edge_out,
        numbers={"logit_scale": SCALE},
        gradient=("propagated",),
        fixed=OF_THE_GRAPH,
        undefined=STRUCTURE,
        case="leave_one_edge_out",
        lists=EDGES,
    ),
}
