# SPDX-License-Identifier: BSD-3-Clause
"""Peak memory, CPU time and traffic of pseudo-labels from a graph that is split over ranks.

torchrun --nproc_per_node 4 bench/split_graph.py [--nodes 40000] [--dim 64] [--classes 50] [--neighbours 20]

Every rank draws its own rows: noisy copies of random centres, a class after the other, so that a rank holds whole
classes, with two labels a class. The peak is what the process needed beyond Python, torch and the library.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
import torch.distributed as dist
from torch import Tensor

from ssmkernels import graph
from ssmkernels.distributed import gather_sizes, is_distributed, rank_of, split_rows, world_size


def peak() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def points(nodes: int, dim: int, classes: int, spread: float) -> tuple[Tensor, Tensor]:
    """This rank's features [n, d] float32 and classes [n]."""
    own = split_rows(nodes, rank_of(), world_size())
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(0))
    which = torch.arange(own.start, own.stop) * classes // nodes
    draw = torch.Generator().manual_seed(1 + rank_of())
    return centres[which] + spread * torch.randn(len(which), dim, generator=draw), which


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=40_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--classes", type=int, default=50)
    parser.add_argument("--neighbours", type=int, default=20)
    parser.add_argument("--spread", type=float, default=1.5, help="of the noise, in units of the centres'")
    options = parser.parse_args()
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    base, begun = peak(), time.process_time()
    features, truth = points(options.nodes, options.dim, options.classes, options.spread)
    split = graph.knn_graph(features, options.neighbours, group=None)
    searched = time.process_time()
    position = torch.arange(split.nodes.start, split.nodes.stop)
    first = truth * options.nodes // options.classes
    labels = torch.where(position - first <= 2, truth, -1)
    mixed = graph.mixed_label_propagation(split, labels, num_classes=options.classes)
    solved = time.process_time()
    right = int((mixed.pseudo_labels == truth).sum())
    figures = [peak() - base, split.num_rows, split.num_ghosts, split.num_edges, right]
    figures += [int(1000 * (searched - begun)), int(1000 * (solved - searched))]
    ranks = gather_sizes(figures, torch.device("cpu")) if is_distributed() else [figures]
    if rank_of() == 0:
        print(f"{options}, {int(mixed.iterations.max())} iterations of the second solve")
        print(f"{100 * sum(of_rank[4] for of_rank in ranks) / options.nodes:.1f} % right")
        print("rank  peak MiB    rows  ghosts  entries  search s  propagation s (CPU)")
        for rank, (memory, rows, ghosts, entries, _, search, propagation) in enumerate(ranks):
            print(
                f"{rank:4} {memory / 2**20:9.0f} {rows:7} {ghosts:7} {entries:8} {search / 1000:9.1f}"
                f" {propagation / 1000:9.1f}"
            )
    if is_distributed():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
