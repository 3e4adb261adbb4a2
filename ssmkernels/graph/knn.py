# SPDX-License-Identifier: BSD-3-Clause
"""Exact k-nearest-neighbour graphs."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from ssmkernels.graph.structure import Graph
from ssmkernels.metrics import smallest
from ssmkernels.ops import _checks as check

Backend = Literal["auto", "faiss", "torch"]
CHUNK_BYTES = 2**27
CHUNK_PRODUCTS = 2**32  # multiplications between two chances for Ctrl-C: some tenths of a second
SPARE = 8  # candidates beyond k, so that ties at the boundary are mostly seen


def knn_graph(
    features: Tensor | np.ndarray | Any, k: int = 50, *, gamma: float = 3.0, backend: Backend = "auto"
) -> Graph:
    """The affinity graph of mixed label propagation (Zhuang and Moulin, CVPR 2023), equation (15), exact: W = A + Aᵀ.

    A_ij = max(v_i·v_j, 0)^gamma where v_i is among the k nearest neighbours of v_j; features are L2-normalised first.
    Mutual neighbours keep their double weight, and :attr:`Graph.mutual` tells them. Edges of weight 0 (similarities up
    to 0, and all of a zero vector) are left out. Neighbours are ranked by similarity, then by index, whatever the
    backend; no point is its own neighbour.

    Nothing of size N×N is stored: the memory is O(N·k), beside the features. Ctrl-C is taken between chunks, within a
    second.

    Args:
        features: [N, d] float32, float64 (weights then are float64) or half (computed in float32); a tensor, an array,
            or a scipy.sparse matrix or array, which stays sparse.
        k: neighbours of a point, in [1, N − 1].
        gamma: γ > 0.
        backend: ``"faiss"`` (CPU), ``"torch"`` (products in chunks, and top-k), or ``"auto"``: faiss on the CPU where
            it is installed. Sparse features are searched by scipy's products.

    Returns:
        :class:`Graph` of N nodes on the device of the features.

    Raises:
        TypeError, ValueError: naming the argument. ImportError: backend "faiss" without faiss.
    """
    gamma = check.check_positive("gamma", gamma)
    neighbours, similarities = nearest_neighbours(features, k, backend=backend)
    # 0 ** gamma is 1 where gamma vanishes in the dtype of the similarities.
    graph = _assemble(neighbours, torch.where(similarities > 0, similarities**gamma, 0))
    return graph.to(features.device) if isinstance(features, Tensor) else graph


def nearest_neighbours(
    features: Tensor | np.ndarray | Any, k: int, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """The k nearest others of every row of ``features`` [N, d], normalised: ids [N, k] int64 and similarities [N, k],
    on the CPU.

    Arguments, order and errors as :func:`knn_graph`.
    """
    features = _checked(features, backend)
    k = check.check_integer("k", k)
    if not 1 <= k < features.shape[0]:
        raise ValueError(f"k must be in [1, N), N = {features.shape[0]} being the number of features; got {k}")
    if not isinstance(features, Tensor):
        return _sparse_neighbours(features, k)
    unit = _normalized(features)
    searched = unit.float().contiguous()
    nodes, rounding = len(unit), _rounding(unit.shape[1])
    ids, similarities = torch.empty(nodes, k, dtype=torch.int32), torch.empty(nodes, k, dtype=unit.dtype)
    for begin, candidates, scores in _search(searched, min(k + 1 + SPARE, nodes), backend):
        rows = torch.arange(begin, begin + len(candidates), device=unit.device)
        exact = _pairwise(unit, rows, candidates)
        exact[candidates == rows[:, None]] = -torch.inf  # itself
        chosen, best = _rank(candidates, exact, k)
        if candidates.shape[1] < nodes:  # what was not fetched may tie with the k-th
            unsure = (best[:, -1] > 0) & (scores.min(dim=1).values + rounding >= best[:, -1])
            if bool(unsure.any()):
                chosen[unsure], best[unsure] = _search_above(
                    unit, searched, rows[unsure], best[unsure, -1].float() - rounding, k
                )
        ids[begin : begin + len(candidates)] = chosen.int().cpu()
        similarities[begin : begin + len(candidates)] = best.cpu()
    return ids.long(), similarities


def _rounding(dim: int) -> float:
    """By how much the similarity of a search, a float32 product in any order, may differ from the one of the pair.

    Each of the two sums of ``dim`` products errs by at most dim u Σ|a_i b_i| ≤ dim u, u = 2⁻²⁴, and rounding the
    features to float32 adds 2u. Beyond some hundred terms that is never met: errors of that many roundings add up as
    √dim (Higham and Mary, 2019), here with a factor of 16 for each sum, which independent roundings exceed with
    probability 2 exp(−16²/2) < 1e-55.
    """
    return 2.0**-24 * (2 + 2 * min(dim, 16 * math.sqrt(dim)))


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
    if backend == "faiss" and features.device.type != "cpu":
        raise ValueError(
            f"backend is 'faiss', which is for the CPU here, but features are on {features.device}; take 'torch'"
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
    parts, size = [], max(1, min(4096, CHUNK_BYTES // (8 * nodes)))
    for begin in range(0, nodes, size):
        distances = torch.from_numpy(-(features[begin : begin + size] @ columns).toarray())
        rows = torch.arange(len(distances))
        distances[rows, begin + rows] = torch.inf  # itself
        ids = smallest(distances, k)
        parts.append((ids, -distances.gather(1, ids)))
    return torch.cat([ids for ids, _ in parts]), torch.cat([similarities for _, similarities in parts])


def _normalized(features: Tensor) -> Tensor:
    """Rows of length 1, or 0. Divided by their largest element first, so that no square overflows or vanishes."""
    if features.shape[1] == 0:
        return features
    largest = torch.linalg.vector_norm(features, torch.inf, dim=1, keepdim=True)
    unit = features / largest.masked_fill(largest == 0, 1)
    return unit.div_(torch.linalg.vector_norm(unit, dim=1, keepdim=True).clamp_min(1))


def _search(unit: Tensor, count: int, backend: str) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Chunk by chunk of rows: where it begins, the ``count`` most similar points of each row, and how similar the
    search found them.
    """
    nodes = len(unit)
    if backend == "faiss" or (
        backend == "auto" and unit.device.type == "cpu" and importlib.util.find_spec("faiss") is not None
    ):
        search = _faiss_search(unit, count)
    else:
        search = _torch_search(unit, count)
    size = _rows_at_once(unit)
    for begin in range(0, nodes, size):
        scores, candidates = search(unit[begin : begin + size])
        yield begin, candidates, scores


def _faiss_search(unit: Tensor, count: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "backend is 'faiss', which is not installed; pip install faiss-cpu, or take backend='torch'"
        ) from error
    index = faiss.IndexFlatIP(unit.shape[1])
    index.add(unit.numpy())

    def search(rows: Tensor) -> tuple[Tensor, Tensor]:
        scores, candidates = index.search(rows.numpy(), count)
        return torch.from_numpy(scores), torch.from_numpy(candidates)

    return search


def _rows_at_once(unit: Tensor) -> int:
    """Rows whose products with all others take some tenths of a second."""
    return max(1, min(4096, max(32, CHUNK_PRODUCTS // (len(unit) * max(unit.shape[1], 1)))))


def _torch_search(unit: Tensor, count: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def search(rows: Tensor) -> tuple[Tensor, Tensor]:
        best = rows.new_empty(len(rows), 0)
        ids = torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
        for begin, products in _products(rows, unit):
            values, places = products.topk(min(count, products.shape[1]), dim=1)
            best, ids = torch.cat([best, values], dim=1), torch.cat([ids, places + begin], dim=1)
            best, places = best.topk(min(count, best.shape[1]), dim=1)
            ids = ids.gather(1, places)
        return best, ids

    return search


def _products(rows: Tensor, unit: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Tiles of ``rows`` [B, d] times ``unit`` [N, d]: the first column, and [B, n] products, of CHUNK_BYTES at most."""
    size = max(1, CHUNK_BYTES // (4 * len(rows)))
    for begin in range(0, len(unit), size):
        with _full_precision(unit.device):
            yield begin, rows @ unit[begin : begin + size].t()


def _search_above(unit: Tensor, searched: Tensor, rows: Tensor, least: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of ``rows`` [M] among all others whose score is ``least`` [M] or more, which at least k have.

    For rows of which more others than a search fetches are about as similar as the k-th best: points of a tight
    cluster, or duplicates.
    """
    chosen = torch.empty(len(rows), k, dtype=torch.int64, device=unit.device)
    best = torch.empty(len(rows), k, dtype=unit.dtype, device=unit.device)
    size = max(1, min(256, _rows_at_once(searched)))
    for begin in range(0, len(rows), size):
        part = slice(begin, begin + size)
        row = torch.empty(0, dtype=torch.int64, device=unit.device)
        ids, similarities = row, best.new_empty(0)
        for first, products in _products(searched[rows[part]], searched):
            near, column = (products >= least[part, None]).nonzero(as_tuple=True)
            column = column + first
            other = rows[part][near] != column
            near, column = near[other], column[other]
            exact = _pairwise(unit, rows[part][near], column[:, None])[:, 0]
            row, ids, similarities = _best_of_each(
                torch.cat([row, near]), torch.cat([ids, column]), torch.cat([similarities, exact]), k
            )
        chosen[part], best[part] = ids.view(-1, k), similarities.view(-1, k)
    return chosen, best


def _best_of_each(row: Tensor, ids: Tensor, similarities: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of candidates [P], given by their row, the k best of each row, by similarity and then by index; all where a row
    has fewer. Rows ascend in the result.
    """
    order = ids.argsort()
    order = order[similarities[order].argsort(descending=True, stable=True)]
    order = order[row[order].argsort(stable=True)]
    row = row[order]
    place = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
    kept = order[place < k]
    return row[place < k], ids[kept], similarities[kept]


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Products of float32 without autocast, TF32 or bfloat16, whose errors are beyond :func:`_rounding`."""
    backends = cast(Any, torch.backends)  # mkldnn.matmul is set at run time
    products = backends.cuda.matmul, backends.mkldnn.matmul
    kept = [product.fp32_precision for product in products]
    try:
        for product in products:
            product.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for product, precision in zip(products, kept, strict=True):
            product.fp32_precision = precision


def _pairwise(unit: Tensor, rows: Tensor, others: Tensor) -> Tensor:
    """[B, M] similarities of row b and its M others, each summed in the same order: the same for (i, j) and (j, i),
    and for duplicates.
    """
    out = torch.empty(others.shape, dtype=unit.dtype, device=unit.device)
    size = max(1, CHUNK_BYTES // (others.shape[1] * unit.shape[1] * unit.element_size() + 1))
    for begin in range(0, len(rows), size):
        end = begin + size
        out[begin:end] = (unit[rows[begin:end], None] * unit[others[begin:end]]).sum(dim=2)
    return out


def _rank(ids: Tensor, similarities: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row, by similarity and then by index."""
    by_index = ids.argsort(dim=1)
    ids, similarities = ids.gather(1, by_index), similarities.gather(1, by_index)
    best = similarities.argsort(dim=1, descending=True, stable=True)[:, :k]
    return ids.gather(1, best), similarities.gather(1, best)


def _assemble(neighbours: Tensor, weights: Tensor) -> Graph:
    """W = A + Aᵀ; row j of A holds the neighbours of v_j."""
    from scipy import sparse

    nodes, k = neighbours.shape
    order = neighbours.argsort(dim=1)
    cols, values = neighbours.gather(1, order).flatten(), weights.gather(1, order).flatten()
    kept = values > 0
    counts = kept.view(nodes, k).sum(dim=1)
    indptr = torch.zeros(nodes + 1, dtype=torch.int64)
    indptr[1:] = counts.cumsum(0)
    arrays = (cols[kept].int().numpy(), indptr.numpy() if len(cols) >= 2**31 else indptr.int().numpy())
    affinity = sparse.csr_array((values[kept].numpy(), *arrays), shape=(nodes, nodes))
    times = sparse.csr_array((np.ones(affinity.nnz, dtype=np.int8), *arrays), shape=(nodes, nodes))
    symmetric = affinity + affinity.T.tocsr()
    del affinity
    both = times + times.T.tocsr()
    for matrix in (symmetric, both):
        matrix.sort_indices()
    mutual = torch.from_numpy(both.data == 2)
    crow, col = torch.from_numpy(symmetric.indptr), torch.from_numpy(symmetric.indices)
    return Graph(crow, col, torch.from_numpy(symmetric.data), mutual=mutual)
