# SPDX-License-Identifier: BSD-3-Clause
"""Exact search among the candidates that another library finds: faiss on the CPU, torch's products on any device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from ssmkernels.ops import _neighbours as kernels

CHUNK_BYTES = 2**27
CHUNK_PRODUCTS = 2**32  # multiplications between two chances for Ctrl-C: some tenths of a second
SPARE = 8  # candidates beyond k, so that ties at the boundary are mostly seen


def nearest(unit: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    """The k nearest others of every row of ``unit`` [N, d], of length 1 or 0: ids [N, k] int32 and similarities
    [N, k], on the CPU, ranked by similarity and then by index.
    """
    searched = unit.float().contiguous()
    nodes, rounding = len(unit), _rounding(unit.shape[1])
    ids, similarities = torch.empty(nodes, k, dtype=torch.int32), torch.empty(nodes, k, dtype=unit.dtype)
    for begin, candidates, scores in _search(searched, min(k + 1 + SPARE, nodes), backend):
        rows = torch.arange(begin, begin + len(candidates), device=unit.device)
        exact = pairwise(unit, rows, candidates)
        exact[candidates == rows[:, None]] = -torch.inf  # itself
        chosen, best = rank(candidates, exact, k)
        if candidates.shape[1] < nodes:  # what was not fetched may tie with the k-th
            unsure = (best[:, -1] > 0) & (scores.min(dim=1).values + rounding >= best[:, -1])
            if bool(unsure.any()):
                chosen[unsure], best[unsure] = _search_above(
                    unit, searched, rows[unsure], best[unsure, -1].float() - rounding, k
                )
        ids[begin : begin + len(candidates)] = chosen.int().cpu()
        similarities[begin : begin + len(candidates)] = best.cpu()
    return ids, similarities


def _rounding(dim: int) -> float:
    """By how much the similarity of a search, a float32 product in any order, may differ from the one of the pair.

    Each of the two sums of ``dim`` products errs by at most dim u Σ|a_i b_i| ≤ dim u, u = 2⁻²⁴, and rounding the
    features to float32 adds 2u. Beyond some hundred terms that is never met: errors of that many roundings add up as
    √dim (Higham and Mary, 2019), here with a factor of 16 for each sum, which independent roundings exceed with
    probability 2 exp(−16²/2) < 1e-55.
    """
    return 2.0**-24 * (2 + 2 * min(dim, 16 * math.sqrt(dim)))


def _search(unit: Tensor, count: int, backend: str) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Chunk by chunk of rows: where it begins, the ``count`` most similar points of each row, and how similar the
    search found them.
    """
    nodes = len(unit)
    search = _faiss_search(unit, count) if backend == "faiss" else _torch_search(unit, count)
    size = rows_at_once(unit)
    for begin in range(0, nodes, size):
        scores, candidates = search(unit[begin : begin + size])
        yield begin, candidates, scores


def faiss(backend: str) -> Any:
    """The module faiss, which ``backend`` takes."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            f"backend is {backend!r}, which needs faiss: pip install faiss-cpu, or take backend='auto'"
        ) from error
    return faiss


def _faiss_search(unit: Tensor, count: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    index = faiss("faiss").IndexFlatIP(unit.shape[1])
    index.add(unit.numpy())

    def search(rows: Tensor) -> tuple[Tensor, Tensor]:
        scores, candidates = index.search(rows.numpy(), count)
        return torch.from_numpy(scores), torch.from_numpy(candidates)

    return search


def rows_at_once(unit: Tensor) -> int:
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
    size = max(1, min(256, rows_at_once(searched)))
    for begin in range(0, len(rows), size):
        part = slice(begin, begin + size)
        row = torch.empty(0, dtype=torch.int64, device=unit.device)
        ids, similarities = row, best.new_empty(0)
        for first, products in _products(searched[rows[part]], searched):
            near, column = (products >= least[part, None]).nonzero(as_tuple=True)
            column = column + first
            other = rows[part][near] != column
            near, column = near[other], column[other]
            exact = pairwise(unit, rows[part][near], column[:, None])[:, 0]
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


def pairwise(unit: Tensor, rows: Tensor, others: Tensor) -> Tensor:
    """[B, M] similarities of row b and its M others, each summed in the same order: the same for (i, j) and (j, i),
    and for duplicates.
    """
    if unit.device.type == "cpu":
        return kernels.pair_products(unit, rows.repeat_interleave(others.shape[1]), others.flatten()).view_as(others)
    out = torch.empty(others.shape, dtype=unit.dtype, device=unit.device)
    size = max(1, CHUNK_BYTES // (others.shape[1] * unit.shape[1] * unit.element_size() + 1))
    for begin in range(0, len(rows), size):
        end = begin + size
        out[begin:end] = (unit[rows[begin:end], None] * unit[others[begin:end]]).sum(dim=2)
    return out


def rank(ids: Tensor, similarities: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row, by similarity and then by index."""
    by_index = ids.argsort(dim=1)
    ids, similarities = ids.gather(1, by_index), similarities.gather(1, by_index)
    best = similarities.argsort(dim=1, descending=True, stable=True)[:, :k]
    return ids.gather(1, best), similarities.gather(1, best)
