# SPDX-License-Identifier: BSD-3-Clause
"""How often the L1 cache of a multiprocessor holds a neighbour's row in the CUDA solver's product, by the rows' order.

python bench/row_order.py [--nodes 30000] [--neighbours 50] [--latent 6 12 24]

Ten classes, each a smooth surface of so many dimensions in 64, with noise; their kNN graph. A multiprocessor has a run
of 455 rows, as of N = 60,000 rows on 132, and 20 warps that each go through their part of them, four neighbours at a
time; its cache is simulated as the 980 rows of 52 columns of float32 used last. The order of the rows within a line,
the L2 cache and other multiprocessors play no part.
"""

from __future__ import annotations

import argparse
import time
from collections import OrderedDict

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.csgraph import reverse_cuthill_mckee

from ssmkernels.graph import Graph, knn_graph

CLASSES, DIMENSIONS, NOISE = 10, 64, 0.05
ROWS, WARPS, AT_ONCE, CACHED = 455, 20, 4, 980
BLOCKS = 6  # multiprocessors that are simulated

Places = NDArray[np.int64]


def surfaces(nodes: int, latent: int, draw: np.random.Generator) -> tuple[NDArray[np.float32], Places]:
    """Features [N, 64] of unit length and classes [N], in random order."""
    classes = draw.permutation(np.arange(nodes) % CLASSES)
    features = NOISE * draw.normal(size=(nodes, DIMENSIONS))
    for k in range(CLASSES):
        here = classes == k
        at = draw.normal(size=(here.sum(), latent))
        bends = draw.normal(size=(2, latent, DIMENSIONS)) / latent**0.5
        features[here] += draw.normal(size=DIMENSIONS) + np.tanh(at @ bends[0]) + np.sin(at @ bends[1])
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32), classes


def hits_of_block(accesses: list[Places]) -> float:
    """Share of the rows found in the cache; ``accesses``: the rows that each warp reads, in its order."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits, begin, longest = 0, 0, max(len(rows) for rows in accesses)
    while begin < longest:
        for rows in accesses:
            for row in rows[begin : begin + AT_ONCE].tolist():
                hits += row in cache
                cache[row] = None
                cache.move_to_end(row)
                if len(cache) > CACHED:
                    cache.popitem(last=False)
        begin += AT_ONCE
    return hits / sum(len(rows) for rows in accesses)


def hits(graph: Graph, order: Places, draw: np.random.Generator) -> float:
    """The mean over some multiprocessors, where ``order`` [N] names the node of each row."""
    crow, col = graph.crow.numpy(), graph.col.numpy()
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    shares = []
    for block in draw.choice(len(order) // ROWS, BLOCKS, replace=False):
        parts = np.array_split(order[block * ROWS : (block + 1) * ROWS], WARPS)
        accesses = [np.concatenate([np.sort(place[col[crow[i] : crow[i + 1]]]) for i in part]) for part in parts]
        shares.append(hits_of_block(accesses))
    return float(np.mean(shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=30_000)
    parser.add_argument("--neighbours", type=int, default=50)
    parser.add_argument("--latent", type=int, nargs="+", default=[6, 12, 24])
    options = parser.parse_args()

    for latent in options.latent:
        draw = np.random.default_rng(0)
        features, classes = surfaces(options.nodes, latent, draw)
        graph = knn_graph(torch.from_numpy(features), options.neighbours)
        start = time.process_time()
        cuthill_mckee = reverse_cuthill_mckee(graph.to_scipy(), symmetric_mode=True).astype(np.int64)
        seconds = time.process_time() - start
        orders = {
            "random": np.arange(options.nodes),
            "classes": np.argsort(classes, kind="stable"),
            "reverse Cuthill-McKee": cuthill_mckee,
        }
        shares = ", ".join(f"{name} {100 * hits(graph, order, draw):.0f} %" for name, order in orders.items())
        print(f"{latent} dimensions, {graph.num_edges:,} entries: {shares} (ordered in {seconds:.2f} s)", flush=True)


if __name__ == "__main__":
    main()
