# SPDX-License-Identifier: BSD-3-Clause
"""Peak memory and time of label propagation with many classes, a block of classes at a time.

python bench/class_blocks.py [--nodes 100000] [--classes 1000] [--class-block 64] [--neighbours 10] [--features
FILE.npy]

Points are noisy copies of the rows of FILE.npy, or of random centres in 64 dimensions, with two labels a class. The
peak is that of the process, with Python, torch, the points and the graph.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssmkernels import graph


def points(nodes: int, classes: int, file: Path | None) -> tuple[Tensor, Tensor]:
    """Features [N, D] float32 and classes [N]: row i of the file is of class i modulo their number."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(classes, 64, generator=draw) if file is None else torch.from_numpy(np.load(file)).float()
    which = torch.arange(nodes) % len(rows)
    spread = rows.std() / 10 if file is not None else 0.5
    return rows[which] + spread * torch.randn(nodes, rows.shape[1], generator=draw), which % classes


def measured(what: str, run: Callable[[], Tensor], truth: Tensor) -> None:
    wall, user = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_utime
    assigned = run()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(
        f"{what}: {time.perf_counter() - wall:.1f} s, {usage.ru_utime - user:.1f} s of CPU, peak so far"
        f" {usage.ru_maxrss / 2**20:.2f} GiB, {100 * (assigned == truth).double().mean():.1f} % right",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=100_000)
    parser.add_argument("--classes", type=int, default=1_000)
    parser.add_argument("--class-block", type=int, default=64)
    parser.add_argument("--neighbours", type=int, default=10)
    parser.add_argument("--features", type=Path)
    options = parser.parse_args()

    features, truth = points(options.nodes, options.classes, options.features)
    labels = torch.where(torch.arange(options.nodes) < 2 * options.classes, truth, -1)
    neighbours = graph.knn_graph(features, options.neighbours)
    print(f"{neighbours}, {options.classes} classes, {options.class_block} at a time")
    settings = {"num_classes": options.classes, "class_block": options.class_block}
    measured(
        "label_propagation",
        lambda: graph.label_propagation(neighbours, labels, **settings).argmax(dim=1),
        truth,
    )
    measured(
        "mixed_label_propagation",
        lambda: graph.mixed_label_propagation(neighbours, labels, **settings).pseudo_labels,
        truth,
    )


if __name__ == "__main__":
    main()
