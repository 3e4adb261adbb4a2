# SPDX-License-Identifier: BSD-3-Clause
"""k-nearest-neighbour graphs."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal, get_args, overload

import numpy as np
import torch
from torch import Tensor

from ssmkernels.distributed import Group, agree_on, gather_sizes
from ssmkernels.graph import candidates, ivf
from ssmkernels.graph.split import SplitGraph, assemble, cells, search
from ssmkernels.graph.split.mesh import Ranks, groups_of
from ssmkernels.graph.split.structure import starts_of
from ssmkernels.graph.structure import Graph
from ssmkernels.metrics.search import smallest
from ssmkernels.ops import _checks as check
from ssmkernels.ops import _neighbours as kernels

Backend = Literal["auto", "native", "faiss", "torch", "ivf", "ring", "cuvs"]
OF_THE_CPU = ("native", "faiss", "ivf", "ring")
OF_A_GROUP = ("auto", "ring", "ivf", "cuvs")


@overload
def knn_graph(
    features: Tensor | np.ndarray | Any,
    k: int = ...,
    *,
    gamma: float = ...,
    backend: Backend = ...,
    group: Literal["local"] = ...,
) -> Graph: ...


@overload
def knn_graph(
    features: Tensor | np.ndarray | Any,
    k: int = ...,
    *,
    gamma: float = ...,
    backend: Backend = ...,
    group: torch.distributed.ProcessGroup | torch.distributed.device_mesh.DeviceMesh | None,
) -> SplitGraph: ...


def knn_graph(
    features: Tensor | np.ndarray | Any,
    k: int = 50,
    *,
    gamma: float = 3.0,
    backend: Backend = "auto",
    group: Ranks = "local",
) -> Graph | SplitGraph:
    """The affinity graph of mixed label propagation (Zhuang and Moulin, CVPR 2023), equation (15), exact: W = A + Aᵀ.

    A_ij = max(v_i·v_j, 0)^gamma where v_i is among the k nearest neighbours of v_j; features are L2-normalised first.
    Mutual neighbours keep their double weight, and :attr:`Graph.mutual` tells them. Edges of weight 0 (similarities up
    to 0, and all of a zero vector) are left out. Neighbours are ranked by similarity, then by index, whatever the
    backend; no point is its own neighbour.

    Nothing of size N×N is stored: the memory is O(N·k), beside the features. Ctrl-C is taken within a second.

    Args:
        features: [N, d] float32, float64 (weights then are float64) or half (computed in float32); a tensor, an array,
            or a scipy.sparse matrix or array, which stays sparse.
        k: neighbours of a point, in [1, N − 1].
        gamma: γ > 0.
        backend: ``"native"``, a kernel of this library for the CPU, which computes each product once for both of its
            points; ``"faiss"``, a flat index on the CPU; ``"torch"``, products in chunks and top-k; or ``"auto"``:
            native on the CPU, torch elsewhere. These find the same neighbours. ``"ivf"`` is approximate: an inverted
            file of faiss, see :mod:`ssmkernels.graph.ivf`. Sparse features are searched by scipy's products. With a
            group ``"ring"``, which ``"auto"`` stands for: the native search, of the rows of a rank against those of one
            rank after the other, as they come round; or ``"ivf"``, whose cells are dealt to the ranks, see
            :mod:`ssmkernels.graph.split.cells`. ``"cuvs"`` has not been built: it raises an error.
        group: whose features they are: of this process alone ("local"), or this rank's rows, also none, of those of a
            process group (None: the default group), in rank order. Dense features on the CPU, the same d and dtype on
            every rank. Or a torch.distributed.device_mesh.DeviceMesh with the dimensions "rows" and "classes": the
            ranks along the first share the rows out; those along the second have the same rows, and share the classes
            of a label propagation out (:attr:`SplitGraph.classes`).

    Returns:
        :class:`Graph` of N nodes on the device of the features. With a group this rank's part of it as a
        :class:`SplitGraph`: with "ring" of the same graph as without, bit for bit.

    Raises:
        TypeError, ValueError: naming the argument. ImportError: backend "faiss" or "ivf" without faiss, "cuvs" without
            cuvs.
    """
    gamma = check.check_positive("gamma", gamma)
    rows, classes = groups_of(group)
    if rows != "local":
        return _split_graph(features, k, gamma, backend, rows, classes)
    ids, similarities = _nearest(features, k, backend)
    graph = Graph._trusted(*kernels.symmetric_graph(ids, _affinity(similarities, gamma)))
    return graph.to(features.device) if isinstance(features, Tensor) else graph


def _affinity(similarities: Tensor, gamma: float) -> Tensor:
    # 0 ** gamma is 1 where gamma vanishes in the dtype of the similarities.
    return torch.where(similarities > 0, similarities**gamma, 0)


def _split_graph(
    features: Tensor | np.ndarray | Any, k: int, gamma: float, backend: Backend, group: Group, classes: Group
) -> SplitGraph:
    if _is_sparse(features):
        raise TypeError("features must be dense with a group, got a sparse array; take its .toarray()")
    check.check_choice("backend", backend, OF_A_GROUP)
    _refuse_cuvs(backend)
    features = _checked(features, "ring")
    k = check.check_integer("k", k)
    shared = {"d of features": features.shape[1], "the bytes of a number": features.element_size(), "k": k}
    sizes = list(shared.values())
    agree_on(list(shared), sizes, gather_sizes(sizes, features.device, group=group))
    starts = starts_of(len(features), group, features.device)
    _check_neighbours(k, starts[-1])
    nearest = cells.nearest if backend == "ivf" else search.nearest
    nodes, similarities = nearest(_normalized(features), k, starts, group)
    return assemble.symmetric(nodes, _affinity(similarities, gamma), starts, group, classes)


def nearest_neighbours(
    features: Tensor | np.ndarray | Any, k: int, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """The k nearest others of every row of ``features`` [N, d], normalised: ids [N, k] int64 and similarities [N, k],
    on the CPU.

    Arguments, order and errors as :func:`knn_graph`.
    """
    ids, similarities = _nearest(features, k, backend)
    return ids.long(), similarities


def _nearest(features: Tensor | np.ndarray | Any, k: int, backend: Backend) -> tuple[Tensor, Tensor]:
    """:func:`nearest_neighbours`, with ids in int32."""
    features = _checked(features, backend)
    _refuse_cuvs(backend)
    k = check.check_integer("k", k)
    _check_neighbours(k, features.shape[0])
    if backend == "ring":
        raise ValueError("backend is 'ring', which is for the ranks of a group; knn_graph takes one")
    if not isinstance(features, Tensor):
        return _sparse_neighbours(features, k)
    unit = _normalized(features)
    if backend == "ivf":
        return ivf.nearest(unit, k)
    if backend == "native" or (backend == "auto" and unit.device.type == "cpu"):
        return kernels.nearest(unit, k)
    return candidates.nearest(unit, k, backend)


def _refuse_cuvs(backend: str) -> None:
    if backend != "cuvs":
        return
    if importlib.util.find_spec("cuvs") is None:
        raise ImportError("backend is 'cuvs', which needs the package cuvs, which is not installed: take 'auto'")
    raise NotImplementedError("backend is 'cuvs', whose search has not been built: take 'auto'")


def _check_neighbours(k: int, nodes: int) -> None:
    if not 1 <= k < nodes:
        raise ValueError(f"k must be in [1, N), N = {nodes} being the number of features; got {k}")


def _checked(features: Tensor | np.ndarray | Any, backend: str) -> Tensor | Any:
    """A tensor of float32 or float64, or a sparse array of them."""
    check.check_choice("backend", backend, get_args(Backend))
    if _is_sparse(features):
        return _checked_sparse(features, backend)
    if isinstance(features, np.ndarray):
        features = torch.from_numpy(np.require(features, requirements=["C", "W"]))
    if not isinstance(features, Tensor):
        raise TypeError(f"features must be a tensor or an array [N, d], got {type(features).__name__}")
    if features.ndim != 2:
        raise ValueError(f"features must be [N, d], got shape {list(features.shape)}")
    if not features.is_floating_point():
        raise TypeError(f"features must be floating point, got {features.dtype}")
    if backend in OF_THE_CPU and features.device.type != "cpu":
        raise ValueError(
            f"backend is {backend!r}, which is for the CPU here, but features are on {features.device}; take 'torch'"
        )
    features = features.detach().resolve_neg()  # numpy, which faiss takes, does not know the negative bit
    if not bool(torch.isfinite(features).all()):
        raise ValueError("features must be finite; they have NaN or infinite values")
    return features if features.dtype == torch.float64 else features.float()


def _is_sparse(features: object) -> bool:
    from scipy import sparse

    return bool(sparse.issparse(features))


def _checked_sparse(features: Any, backend: str) -> Any:
    from scipy import sparse

    if backend != "auto":
        raise ValueError(f"backend must be 'auto' for sparse features, got {backend!r}")
    if features.ndim != 2:
        raise ValueError(f"features must be [N, d], got shape {list(features.shape)}")
    if features.dtype.kind != "f":
        raise TypeError(f"features must be floating point, got {features.dtype}")
    rows = sparse.csr_array(features, dtype=np.float64 if features.dtype == np.float64 else np.float32, copy=True)
    rows.sum_duplicates()
    if not np.isfinite(rows.data).all():
        raise ValueError("features must be finite; they have NaN or infinite values")
    return rows


def _sparse_neighbours(features: Any, k: int) -> tuple[Tensor, Tensor]:
    """:func:`nearest_neighbours` of a sparse array of its own, which is normalised in place."""
    entries, nodes = np.diff(features.indptr), features.shape[0]
    for norm in (lambda rows: abs(rows).max(axis=1).toarray().ravel(), lambda rows: np.sqrt(rows.power(2).sum(axis=1))):
        length = norm(features)
        features.data /= np.repeat(np.where(length > 0, length, 1), entries)
    # A product adds the terms of a pair in the order of the columns, whichever of the two comes first.
    columns = features.T.tocsr()
    parts, size = [], max(1, min(4096, candidates.CHUNK_BYTES // (8 * nodes)))
    for begin in range(0, nodes, size):
        distances = torch.from_numpy(-(features[begin : begin + size] @ columns).toarray())
        rows = torch.arange(len(distances))
        distances[rows, begin + rows] = torch.inf  # itself
        ids = smallest(distances, k)
        parts.append((ids, -distances.gather(1, ids)))
    return torch.cat([ids for ids, _ in parts]).int(), torch.cat([similarities for _, similarities in parts])


def _normalized(features: Tensor) -> Tensor:
    """Rows of length 1, or 0. Divided by their largest element first, so that no square overflows or vanishes."""
    if features.shape[1] == 0:
        return features
    largest = torch.linalg.vector_norm(features, torch.inf, dim=1, keepdim=True)
    unit = features / largest.masked_fill(largest == 0, 1)
    return unit.div_(torch.linalg.vector_norm(unit, dim=1, keepdim=True).clamp_min(1))
