# SPDX-License-Identifier: BSD-3-Clause
"""Random graphs, and calls of the graph family of ops."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from fuzz import values as v
from fuzz.oracle import Target, Undecided
from fuzz.values import Draw, Number
from hypothesis import strategies as st
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from ssmkernels import ops, reference

RTOL = Number((1e-6, 1e-4, 1e-3), least=0, above=True)
MAX_ITER = Number((1000, 2000), least=1, integer=True)
SCALE = Number((4.0, 1, 0.5), least=0, above=True)
EDGES = ("col", "reverse", "weight", "dissimilarity")
STRUCTURE = ("crow", "col", "reverse", "weight", "dissimilarity")


def symmetric(draw: Draw, linked: Tensor, dtype: torch.dtype, exponent: int | None = None) -> Tensor:
    """[N, N] weights >= 0 on the pairs that are linked."""
    values = v.values(draw, tuple(linked.shape), dtype, least=0, exponent=exponent)
    values = values.clone(memory_format=torch.contiguous_format)
    values = torch.where(linked, values, 0)
    return values.triu() + values.triu(1).t()


def draw_linked(draw: Draw, nodes: int) -> Tensor:
    """[N, N] which pairs are linked, a node with itself perhaps."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    density = draw(st.sampled_from([0.0, 0.1, 0.4, 1.0]))
    linked = torch.rand(nodes, nodes, generator=generator) < density
    if draw(st.booleans()):
        linked.fill_diagonal_(False)
    return linked | linked.t()


def csr(linked: Tensor) -> dict[str, Tensor]:
    """crow, col, reverse of the pairs that are linked."""
    nodes = len(linked)
    rows, col = linked.nonzero(as_tuple=True)
    crow = torch.zeros(nodes + 1, dtype=torch.int64)
    crow[1:] = torch.bincount(rows, minlength=nodes).cumsum(0) if nodes else 0
    position = torch.zeros(nodes, nodes, dtype=torch.int64)
    position[rows, col] = torch.arange(len(rows))
    return {"crow": crow, "col": col, "reverse": position[col, rows]}


def draw_arrays(draw: Draw, nodes: int, dtype: torch.dtype, *values: str) -> dict[str, Tensor]:
    """A graph in compressed rows, and values on its entries."""
    linked = draw_linked(draw, nodes)
    stored = csr(linked)
    arrays = {
        name: v.layout(draw, array.to(v.dtype(draw, v.INTEGERS)), without=("expanded",))
        for name, array in stored.items()
    }
    for name in values:
        arrays[name] = v.layout(draw, symmetric(draw, linked, dtype)[linked], without=("expanded",))
    return arrays


def draw_solve(draw: Draw, dtypes: tuple[torch.dtype, ...] = v.FLOATS) -> dict[str, Any]:
    dtype, (nodes, columns) = v.dtype(draw, dtypes), v.sizes(draw, 2)
    nodes = min(nodes, 65)
    arrays = draw_arrays(draw, nodes, dtype, "weight", "dissimilarity")
    plain = [arrays[name].resolve_neg().contiguous() for name in ("weight", "col", "crow")]
    weight = sparse.csr_array((plain[0].double().numpy(), plain[1].numpy(), plain[2].numpy()), shape=(nodes, nodes))
    del arrays["reverse"]
    if draw(st.booleans()):
        arrays["dissimilarity"] = None
    diagonal = v.values(draw, (nodes,), dtype, least=0).clone(memory_format=torch.contiguous_format)
    if nodes:  # something holds every component
        component = torch.from_numpy(connected_components(weight, directed=False)[1]).long()
        held = torch.bincount(component, diagonal.double())
        diagonal = torch.where(held[component] > 0, diagonal, 1)
    initial = v.values(draw, (nodes, columns), dtype) if draw(st.booleans()) else None
    return {
        **arrays,
        "diagonal": v.layout(draw, diagonal, without=("expanded",)),
        "rhs": v.values(draw, (nodes, columns), dtype),
        "initial": initial,
        "rtol": RTOL.draw(draw),
        "max_iter": MAX_ITER.draw(draw),
        "preconditioner": draw(st.sampled_from(["jacobi", "none"])),
    }


def solved(solve: Callable[..., Any], *system: Any, **arguments: Any) -> Tensor:
    """The solution, if it is within its tolerance."""
    result = solve(*system, **arguments)
    if bool((result.iterations > int(arguments["max_iter"])).any()):
        raise AssertionError("more iterations than max_iter")
    if not bool((result.residual <= float(arguments["rtol"])).all()):
        raise Undecided
    return result.solution


def exact_solve(**arguments: Any) -> Tensor:
    try:
        return reference.laplacian_solve(**arguments).solution
    except torch.linalg.LinAlgError as error:  # weights of very different size: singular in float64
        raise Undecided from error


def draw_leave_one_out(draw: Draw, dtypes: tuple[torch.dtype, ...] = v.FLOATS) -> dict[str, Any]:
    dtype, (nodes, columns) = v.dtype(draw, dtypes), v.sizes(draw, 2, least=2)
    return {
        **draw_arrays(draw, min(nodes, 65), dtype, "weight"),
        "propagated": v.values(draw, (min(nodes, 65), columns), dtype),
        "logit_scale": SCALE.draw(draw),
    }


TARGETS = {
    "ops.laplacian_solve": Target(
        draw_solve,
        partial(solved, ops.laplacian_solve),
        exact_solve,
        numbers={"rtol": RTOL, "max_iter": MAX_ITER},
        words={"preconditioner": ("jacobi", "none")},
        gradient=("rhs",),
        undefined=STRUCTURE,
        case="laplacian_solve",
        lists=EDGES,
    ),
    "ops.leave_one_edge_out": Target(
        draw_leave_one_out,
        ops.leave_one_edge_out,
        reference.leave_one_edge_out,
        numbers={"logit_scale": SCALE},
        gradient=("weight", "propagated"),
        undefined=STRUCTURE,
        case="leave_one_edge_out",
        lists=EDGES,
    ),
}
