# SPDX-License-Identifier: BSD-3-Clause
"""Calls that make graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from fuzz import values as v
from fuzz.contents import Tensors
from fuzz.graphs import draw_arrays, draw_linked, symmetric
from fuzz.oracle import Finding, Target
from fuzz.values import Draw, Number
from hypothesis import strategies as st
from scipy import sparse
from torch import Tensor

from ssmkernels import graph
from ssmkernels.graph import Graph

NODES = Number((6, 7), least=0, integer=True, optional=True, shapes=True)
NEIGHBOURS = Number((1, 2), least=1, integer=True)
GAMMA = Number((3.0, 1.0, 0.5, 2), least=0, above=True)


def _parts(made: Graph) -> dict[str, Tensor]:
    return {"crow": made.crow, "col": made.col, "weight": made.weight, "reverse": made.reverse}


def _as_dense(made: Graph) -> dict[str, Tensor]:
    return {"dense": torch.from_numpy(made.to_scipy().toarray())}


def _draw_graph(draw: Draw) -> dict[str, Any]:
    arguments = draw_arrays(draw, draw(st.integers(0, 20)), v.dtype(draw, v.WIDE_FLOATS), "weight")
    if draw(st.booleans()):
        del arguments["reverse"]
    return arguments


def _exact_graph(crow: Tensor, col: Tensor, weight: Tensor, reverse: Tensor | None = None) -> dict[str, Tensor]:
    """Each entry by looking for its mirror."""
    rows = torch.repeat_interleave(torch.arange(len(crow) - 1), crow.long().diff())
    entries = list(zip(rows.tolist(), col.tolist(), strict=True))
    if len(set(entries)) < len(entries) or entries != sorted(entries):
        raise Finding("entries in disorder were accepted")
    mirror = [entries.index((j, i)) for i, j in entries]
    return {"crow": crow, "col": col, "weight": weight, "reverse": torch.tensor(mirror, dtype=torch.int64)}


def _check_symmetric(arguments: dict[str, Any], results: Tensors) -> None:
    weight = results["weight"]
    if not torch.allclose(weight, weight[results["reverse"]], rtol=1e-5, atol=0):
        raise Finding("weights that are not symmetric were accepted")


def _draw_dense(draw: Draw) -> Tensor:
    nodes = draw(st.integers(0, 20))
    return symmetric(draw, draw_linked(draw, nodes), v.dtype(draw, v.WIDE_FLOATS))


def _draw_scipy(draw: Draw) -> dict[str, Any]:
    dense = _draw_dense(draw).numpy()
    form = draw(st.sampled_from([sparse.csr_array, sparse.coo_array, sparse.csc_matrix, sparse.lil_array]))
    return {"matrix": form(dense)}


def _exact_scipy(matrix: Any) -> dict[str, Tensor]:
    return {"dense": torch.from_numpy(matrix.toarray())}


def _draw_dense_matrix(draw: Draw) -> dict[str, Any]:
    return {"dense": _draw_dense(draw)}


def _through_torch_sparse(dense: Tensor) -> dict[str, Tensor]:
    """There and back; torch lets no test tamper with a sparse tensor."""
    made = Graph.from_torch_sparse(dense.to_sparse_csr())
    return {"dense": made.to_torch_sparse().to_dense()}


def _draw_edge_index(draw: Draw) -> dict[str, Any]:
    dense = _draw_dense(draw)
    rows, col = dense.nonzero(as_tuple=True)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    edge_index = torch.stack([rows, col])[:, order].to(v.dtype(draw, v.INTEGERS))
    weight = dense[rows, col][order] if draw(st.booleans()) else None
    return {
        "edge_index": v.layout(draw, edge_index, without=("expanded",)),
        "weight": None if weight is None else v.layout(draw, weight, without=("expanded",)),
        "num_nodes": len(dense) if draw(st.booleans()) else None,
    }


def _exact_edge_index(edge_index: Tensor, weight: Tensor | None, num_nodes: int | None) -> dict[str, Tensor]:
    top = int(edge_index.max()) if edge_index.numel() else -1
    nodes = top + 1 if num_nodes is None else num_nodes
    values = torch.ones(edge_index.shape[1], dtype=torch.float64) if weight is None else weight
    dense = values.new_zeros(nodes, nodes).index_put(tuple(edge_index.long()), values, accumulate=True)
    return {"dense": dense}


def _draw_features(draw: Draw) -> dict[str, Any]:
    nodes, dim = draw(st.integers(2, 20)), draw(st.integers(0, 6))
    return {
        "features": v.values(draw, (nodes, dim), v.dtype(draw)),
        "k": draw(st.integers(1, nodes - 1)),
        "backend": draw(st.sampled_from(["auto", "native", "faiss", "torch"])),
    }


def _draw_knn(draw: Draw) -> dict[str, Any]:
    return {**_draw_features(draw), "gamma": GAMMA.draw(draw)}


def _cosines(features: Any) -> np.ndarray:
    rows = np.asarray(torch.as_tensor(features).double().resolve_neg())
    largest = np.abs(rows).max(axis=1, initial=0, keepdims=True)
    rows = rows / np.where(largest > 0, largest, 1)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / np.where(length > 0, length, 1)
    return rows @ rows.T


def _unit(features: Any) -> float:
    """What a cosine may be off by: a sum of products of numbers of at most 1."""
    wide = torch.float64 if torch.as_tensor(features).dtype == torch.float64 else torch.float32
    return (4 * torch.as_tensor(features).shape[1] + 16) * torch.finfo(wide).eps


def _check_neighbours(arguments: dict[str, Any], results: Tensors) -> None:
    cosines, allowed = _cosines(arguments["features"]), _unit(arguments["features"])
    ids, similarities = results["value 0"].numpy(), results["value 1"].double().numpy()
    nodes, k = len(cosines), int(arguments["k"])
    if ids.shape != (nodes, k) or similarities.shape != (nodes, k):
        raise Finding(f"shapes {ids.shape} and {similarities.shape}")
    for i in range(nodes):
        if i in ids[i] or len(set(ids[i])) < k:
            raise Finding(f"the neighbours of {i} are {ids[i]}")
        best = np.sort(np.delete(cosines[i], i))[::-1][:k]
        for what, truth in (("given", cosines[i, ids[i]]), ("k largest", best)):
            if not (np.abs(similarities[i] - truth) <= allowed).all():
                raise Finding(f"similarities of {i} are {similarities[i]}, {what}: {truth}")


def _check_knn(arguments: dict[str, Any], results: Tensors) -> None:
    ids, similarities = graph.nearest_neighbours(*(arguments[name] for name in ("features", "k")))
    nodes, gamma = len(ids), float(arguments["gamma"])
    affinity = np.zeros((nodes, nodes))
    affinity[np.arange(nodes)[:, None], ids.numpy()] = similarities.clamp_min(0).double().numpy() ** gamma
    truth, dense = affinity + affinity.T, results["dense"].double().numpy()
    # A float32 exponentiation; two backends may choose differently among cosines that differ by their rounding alone.
    allowed = 8 * torch.finfo(results["dense"].dtype).eps * truth + torch.finfo(results["dense"].dtype).tiny
    if dense.shape != truth.shape or not (np.abs(dense - truth) <= allowed).all():
        raise Finding(f"the graph is {dense}, from its neighbours {truth}")


def _draw_confidence(draw: Draw) -> dict[str, Any]:
    rows, classes = draw(st.integers(0, 20)), draw(st.integers(1, 8))
    probs = torch.rand(rows, classes, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
    probs = probs * (probs > draw(st.sampled_from([0.0, 0.5, 0.9])))
    probs = probs / probs.sum(dim=1, keepdim=True).clamp_min(1e-30)
    return {"probs": v.layout(draw, probs.to(v.dtype(draw, v.WIDE_FLOATS)))}


def _exact_confidence(probs: Tensor) -> Tensor:
    if probs.shape[1] == 1:
        return probs[:, 0]
    entropy = torch.special.entr(probs).sum(dim=1)
    return torch.where(probs.any(dim=1), (1 - entropy / np.log(probs.shape[1])).clamp_min(0), 0)


TARGETS = {
    "graph.Graph": Target(
        _draw_graph,
        lambda **arguments: _parts(Graph(**arguments)),
        _exact_graph,
        holds=_check_symmetric,
        shapes=("crow",),
    ),
    "graph.Graph.from_scipy": Target(
        _draw_scipy, lambda **arguments: _as_dense(Graph.from_scipy(**arguments)), _exact_scipy
    ),
    "graph.Graph.from_torch_sparse": Target(
        _draw_dense_matrix, _through_torch_sparse, lambda dense: {"dense": dense}, fixed=("dense",)
    ),
    "graph.Graph.from_edge_index": Target(
        _draw_edge_index,
        lambda **arguments: _as_dense(Graph.from_edge_index(**arguments)),
        _exact_edge_index,
        numbers={"num_nodes": NODES},
        shapes=("edge_index",),
    ),
    "graph.nearest_neighbours": Target(
        _draw_features,
        graph.nearest_neighbours,
        holds=_check_neighbours,
        numbers={"k": NEIGHBOURS},
        words={"backend": ("auto", "native", "faiss", "torch", "ivf")},
    ),
    "graph.knn_graph": Target(
        _draw_knn,
        lambda **arguments: _as_dense(graph.knn_graph(**arguments)),
        holds=_check_knn,
        numbers={"k": NEIGHBOURS, "gamma": GAMMA},
        words={"backend": ("auto", "native", "faiss", "torch", "ivf")},
    ),
    "graph.confidence_of": Target(_draw_confidence, graph.confidence_of, _exact_confidence),
}
