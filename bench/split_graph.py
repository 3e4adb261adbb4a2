# SPDX-License-Identifier: BSD-3-Clause
"""Peak memory, CPU time and traffic of pseudo-labels from a graph that is split over ranks.

torchrun --nproc_per_node 4 bench/split_graph.py [--features X.npy Y.npy | --nodes 40000 --dim 64 --classes 50]
    [--neighbours 20] [--labels 3] [--class-ranks 2]

X [N, d] are features and Y [N] their classes, of which every rank takes a run of rows: they should stand in an order in
which neighbours are near. ``--sort FOLDER`` writes them to FOLDER/features.npy and FOLDER/classes.npy in such an order
and ends: halved again and again along the first principal component of each half. Without files every rank draws its
rows: noisy copies of random centres, a class after the other, so that a rank holds whole classes.

Some rows of each class, spread over it, have their label. With ``--class-ranks Q`` the ranks are a mesh, and Q of them
share the classes of the same rows out. The peak is what the process needed beyond Python, torch and the library, whose
own peak is "base". What glibc keeps of freed pieces below 32 MiB counts: MALLOC_MMAP_THRESHOLD_=1048576 in the
environment gives those above 1 MiB back. The checksum is of all pseudo-labels in order, to be compared between numbers
of ranks.
"""

from __future__ import annotations

import argparse
import resource
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from ssmkernels import graph
from ssmkernels._files import atomic_file
from ssmkernels.distributed import (
    Group,
    all_gather_rows,
    all_reduce_sum,
    gather_sizes,
    is_distributed,
    rank_of,
    split_rows,
    world_size,
)

DRAWN_AT_ONCE = 1000  # rows, so that all numbers of ranks have the same


def peak() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def drawn(rows: slice, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Features [n, d] float32 and classes [n] of some rows."""
    centres = torch.randn(options.classes, options.dim, generator=torch.Generator().manual_seed(0))
    which = torch.arange(rows.start, rows.stop) * options.classes // options.nodes
    first, last = rows.start // DRAWN_AT_ONCE, -(-rows.stop // DRAWN_AT_ONCE)
    generators = [torch.Generator().manual_seed(1 + block) for block in range(first, last)]
    noise = torch.cat([torch.randn(DRAWN_AT_ONCE, options.dim, generator=generator) for generator in generators])
    begin = rows.start - first * DRAWN_AT_ONCE
    return centres[which] + options.spread * noise[begin : begin + len(which)], which


def read(paths: tuple[Path, Path], rows: slice) -> tuple[Tensor, Tensor]:
    """Features [n, d] float32 and classes [n] of some rows; nothing else of the files comes into memory."""
    features, classes = (np.load(path, mmap_mode="r")[rows] for path in paths)
    return torch.tensor(features, dtype=torch.float32), torch.tensor(classes, dtype=torch.int64)


def halved(features: Tensor, rows: Tensor, least: int) -> Tensor:
    """``rows`` in an order in which neighbours are near."""
    if len(rows) <= least:
        return rows
    some = features[rows]
    some = some - some.mean(dim=0)
    along = some @ torch.linalg.eigh(some.t() @ some)[1][:, -1]
    order = rows[along.argsort(stable=True)]
    middle = len(order) // 2
    return torch.cat([halved(features, half, least) for half in (order[:middle], order[middle:])])


def sort(paths: tuple[Path, Path], folder: Path) -> None:
    features, classes = read(paths, slice(None))
    order = halved(features, torch.arange(len(features)), 256)
    for name, values in (("features", features), ("classes", classes)):
        with atomic_file(folder / f"{name}.npy") as file:
            np.save(file, values[order].numpy())


def some_labels(classes: Tensor, rows: slice, count: int, group: Group) -> tuple[Tensor, int]:
    """[n] the class of ``count`` rows of each class on all ranks, evenly spaced, −1 elsewhere; and how many classes
    there are.
    """
    everything = all_gather_rows(classes, group=group)
    labels = torch.full_like(everything, -1)
    for value in everything.unique().tolist():
        members = (everything == value).nonzero()[:, 0]
        labels[members[torch.linspace(0, len(members) - 1, min(count, len(members))).long()]] = value
    return labels[rows].clone(), int(everything.max()) + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=Path, nargs=2, metavar=("X.npy", "Y.npy"), help="features and classes")
    parser.add_argument("--sort", type=Path, metavar="FOLDER", help="put those into an order, and end")
    parser.add_argument("--nodes", type=int, default=40_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--classes", type=int, default=50)
    parser.add_argument("--neighbours", type=int, default=20)
    parser.add_argument("--labels", type=int, default=3, help="labelled rows of each class")
    parser.add_argument("--class-block", type=int, help="classes that are solved for at a time")
    parser.add_argument("--class-ranks", type=int, default=1, help="ranks that share the classes out")
    parser.add_argument("--spread", type=float, default=1.5, help="of the noise, in units of the centres'")
    options = parser.parse_args()
    if options.sort:
        sort(options.features, options.sort)
        return
    group = rows_group = None
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
        shape = (options.class_ranks, world_size() // options.class_ranks)
        group = init_device_mesh("cpu", shape, mesh_dim_names=("classes", "rows"))
        rows_group = group.get_group("rows")
    if options.features:
        options.nodes = len(np.load(options.features[1], mmap_mode="r"))
    base, begun = peak(), time.process_time()
    rows = split_rows(options.nodes, rank_of(rows_group), world_size(rows_group))
    features, truth = read(options.features, rows) if options.features else drawn(rows, options)
    labels, options.classes = some_labels(truth, rows, options.labels, rows_group)
    split = graph.knn_graph(features, options.neighbours, group=group)
    searched = time.process_time()
    mixed = graph.mixed_label_propagation(split, labels, num_classes=options.classes, class_block=options.class_block)
    solved = time.process_time()
    memory = peak() - base
    right = all_reduce_sum(((mixed.pseudo_labels == truth) & (labels < 0)).sum(), group=split.group)
    asked = all_reduce_sum((labels < 0).sum(), group=split.group)
    checksum = zlib.crc32(all_gather_rows(mixed.pseudo_labels, group=split.group).numpy().tobytes())
    columns = split.columns(options.classes)
    figures = [base, memory, split.num_rows, split.num_ghosts, split.num_edges, columns.stop - columns.start]
    figures += [int(1000 * (searched - begun)), int(1000 * (solved - searched))]
    ranks = gather_sizes(figures, torch.device("cpu")) if is_distributed() else [figures]
    if rank_of() == 0:
        print(f"{options}, {int(mixed.iterations.max())} iterations of the second solve")
        print(f"{100 * int(right) / int(asked):.2f} % of {int(asked)} right, checksum {checksum:08x}")
        print("rank  base MiB  peak MiB    rows  ghosts  entries  classes  search s  propagation s (CPU)")
        for rank, (before, used, count, ghosts, entries, columns, search, propagation) in enumerate(ranks):
            print(
                f"{rank:4} {before / 2**20:9.0f} {used / 2**20:9.0f} {count:7} {ghosts:7} {entries:8} {columns:8}"
                f" {search / 1000:9.1f} {propagation / 1000:9.1f}"
            )
    if is_distributed():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
