# SPDX-License-Identifier: BSD-3-Clause
"""Benchmark cases of the search behind ``knn_graph``: ours, the libraries that users have for it, and products with
top-k. The products of the floor are those of each pair once, which is what an exact search needs.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.bench.case import Case
from ssmkernels.graph import nearest_neighbours

NEIGHBOURS = 50
SIZES = [(20_000, 64), (20_000, 128), (100_000, 64)]  # N, d
QUICK_SIZES = [(2_000, 64)]
ALL_PEERS_UP_TO = 20_000  # rows; beyond, those that take minutes are left out
FAISS_PROBES = 16  # of about √N cells
HNSW_LINKS = 32
ROWS = 1024  # of a product with all columns
RECALL_ROWS = 1000

Search = Callable[[], Any]
"""[N, k + 1] ids, each row itself among them."""


def cases(*, device: str = "cpu", dtype: torch.dtype = torch.float32, quick: bool = False) -> Iterator[Case]:
    """Random directions: no library finds structure in them, and approximate ones have their lowest recall."""
    for nodes, dim in QUICK_SIZES if quick else SIZES:
        draw = torch.Generator().manual_seed(0)
        features = F.normalize(torch.randn(nodes, dim, generator=draw), dim=1)
        peers = libraries() if device == "cpu" else {}
        if quick:
            peers.pop("pynndescent", None)  # it is compiled at its first call, for a minute
        if nodes > ALL_PEERS_UP_TO:
            peers = {name: peer for name, peer in peers.items() if name.startswith("faiss")}
        yield search_case(features.to(device), NEIGHBOURS, peers)


def search_case(features: Tensor, k: int, peers: dict[str, Callable[[Tensor, int], Search]]) -> Case:
    """``features`` [N, d] of length 1 and the exact search for k others of each, beside ``peers``."""
    nodes, dim = features.shape
    last: dict[str, Any] = {}

    def remembered(name: str, search: Search) -> Search:
        def run() -> Any:
            last[name] = search()
            return last[name]

        return run

    def ours(**options: Any) -> Tensor:
        return nearest_neighbours(features, k, **options)[0]

    def recall(name: str) -> float:
        rows = torch.linspace(0, nodes - 1, min(RECALL_ROWS, nodes), dtype=torch.float64).long()
        exact, others = last["ours"][rows], torch.as_tensor(np.asarray(last[name])).long()[rows]
        return float((exact[:, :, None] == others[:, None]).any(dim=2).double().mean())

    searches: dict[str, Search] = {"torch.mm, topk": functools.partial(top_k, features, k + 1)}
    searches |= {name: peer(features, k + 1) for name, peer in peers.items()}
    if features.device.type == "cpu" and importlib.util.find_spec("faiss") is not None:
        searches['backend="ivf"'] = functools.partial(ours, backend="ivf")
    item = features.element_size()
    return Case(
        op="nearest_neighbours",
        phase="search",
        size={"N": nodes, "d": dim, "k": k},
        dtype=features.dtype,
        ours=remembered("ours", ours),
        peers={name: remembered(name, search) for name, search in searches.items()},
        products={"of each pair": functools.partial(upper_products, features)},
        product_counts={"of each pair": 1},
        flops=nodes * nodes * dim,
        bytes=nodes * (dim * item + k * (4 + item)),
        recall={name: functools.partial(recall, name) for name in searches},
    )


def upper_products(features: Tensor) -> None:
    """The products of each pair of rows once, and of some twice: rows with the columns from the first of them on, in
    tiles that stay in the cache. The whole product would be memory's time, not the processor's.
    """
    tile = features.new_empty(ROWS * ROWS)
    for begin in range(0, len(features), ROWS):
        rows = features[begin : begin + ROWS]
        for columns in features[begin:].split(ROWS):
            torch.mm(rows, columns.t(), out=tile[: len(rows) * len(columns)].view(len(rows), len(columns)))


def top_k(features: Tensor, count: int) -> Tensor:
    parts = [(rows @ features.t()).topk(count, dim=1).indices for rows in features.split(ROWS)]
    return torch.cat(parts)


def libraries() -> dict[str, Callable[[Tensor, int], Search]]:
    """What is installed, by name."""
    peers: dict[str, Callable[[Tensor, int], Search]] = {}
    if importlib.util.find_spec("faiss") is not None:
        peers |= {"faiss IndexFlatIP": faiss_flat, "faiss IVF": faiss_ivf, "faiss HNSW": faiss_hnsw}
    if importlib.util.find_spec("pynndescent") is not None:
        peers["pynndescent"] = pynndescent
    if importlib.util.find_spec("sklearn") is not None:
        peers["scikit-learn"] = scikit_learn
    return peers


def _searched(make_index: Callable[[Any, int], Any], features: Tensor, count: int) -> Search:
    faiss, points = importlib.import_module("faiss"), features.numpy()

    def search() -> Any:
        index = make_index(faiss, points.shape[1])
        index.train(points)
        index.add(points)
        return index.search(points, count)[1]

    return search


def faiss_flat(features: Tensor, count: int) -> Search:
    return _searched(lambda faiss, dim: faiss.IndexFlatIP(dim), features, count)


def faiss_ivf(features: Tensor, count: int) -> Search:
    cells = max(1, round(len(features) ** 0.5))

    def make(faiss: Any, dim: int) -> Any:
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, cells, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = FAISS_PROBES
        return index

    return _searched(make, features, count)


def faiss_hnsw(features: Tensor, count: int) -> Search:
    def make(faiss: Any, dim: int) -> Any:
        index = faiss.IndexHNSWFlat(dim, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efSearch = 2 * count
        return index

    return _searched(make, features, count)


def pynndescent(features: Tensor, count: int) -> Search:
    library, points = importlib.import_module("pynndescent"), features.numpy()
    return lambda: library.NNDescent(points, metric="cosine", n_neighbors=count, random_state=0).neighbor_graph[0]


def scikit_learn(features: Tensor, count: int) -> Search:
    """By Euclidean distances, whose order is that of the cosines of rows of length 1."""
    library, points = importlib.import_module("sklearn.neighbors"), features.numpy()

    def search() -> Any:
        index = library.NearestNeighbors(n_neighbors=count, algorithm="brute").fit(points)
        return index.kneighbors(points, return_distance=False)

    return search
