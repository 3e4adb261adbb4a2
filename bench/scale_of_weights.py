# SPDX-License-Identifier: BSD-3-Clause
"""Mixed label propagation with β W_dis beside W, and with β w̄ W_dis (what it takes), on kNN graphs of several scales:
accuracies.

python bench/scale_of_weights.py [--data DIR] [--sets digits mnist5k flowers17 cifar10-test] [--draws 10] [--out
FILE.md]

Mean and 95 % interval over draws of 5 labels per class. The graphs: the cosines of 50 nearest neighbours to the power
3, the same a hundred times smaller, and exp(−‖v_i − v_j‖²/2σ²) on the same edges with σ such that the median is 0.056.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from ssmkernels import graph
from ssmkernels._files import write_atomically
from ssmkernels._text import markdown_table
from ssmkernels.experiments.analyses import feature_sets
from ssmkernels.experiments.analyses.propagation import draw_labels
from ssmkernels.experiments.statistics import half_width

HEADER = ["set", "graph", "w̄", "label propagation", "mixed, β W_dis beside W", "mixed, β w̄ W_dis beside W"]
MEDIAN = 0.056


def graphs_of(features: Tensor) -> Iterator[tuple[str, graph.Graph]]:
    cosines = graph.knn_graph(features, gamma=1.0)
    assert cosines.mutual is not None
    times = 1 + cosines.mutual.to(cosines.dtype)  # W = A + Aᵀ
    cubes = cosines.with_weight(times * (cosines.weight / times) ** 3)
    yield "cos³", cubes
    yield "cos³/100", cubes.with_weight(cubes.weight / 100)
    squares = 2 - 2 * cosines.weight / times
    yield "RBF", cosines.with_weight(times * torch.exp(squares * (math.log(MEDIAN) / squares.median())))


def accuracies(affinity: graph.Graph, classes: Tensor, seed: int) -> tuple[float, ...]:
    labels = draw_labels(classes, seed, (5,))
    mean = mean_weight(affinity)
    assignments = [
        graph.label_propagation(affinity, labels).argmax(dim=1),
        # β and μ are in units of w̄: so divided, they are those of W itself.
        graph.mixed_label_propagation(affinity, labels, beta=1 / mean, mu=1 / (99 * mean)).pseudo_labels,
        graph.mixed_label_propagation(affinity, labels).pseudo_labels,
    ]
    return tuple(float((assigned == classes).double().mean()) for assigned in assignments)


def mean_weight(affinity: graph.Graph) -> float:
    return float(affinity.weight[affinity.weight > 0].double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the sets that are not inside packages")
    parser.add_argument("--sets", nargs="+", default=["digits", "mnist5k"])
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--cache", type=Path, default=Path("runs/features"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.sets:
        points = feature_sets.load(name, arguments.data, arguments.cache)
        for kind, affinity in graphs_of(points.features):
            drawn = [accuracies(affinity, points.labels, seed) for seed in range(1, arguments.draws + 1)]
            figures = [f"{fmean(values):.3f} ± {half_width(values):.3f}" for values in zip(*drawn, strict=True)]
            rows.append([name, kind, f"{mean_weight(affinity):.2g}", *figures])
            print(*rows[-1], sep=" | ", flush=True)
    table = markdown_table(HEADER, rows)
    print(table)
    if arguments.out is not None:
        write_atomically(arguments.out, f"{table}\n")


if __name__ == "__main__":
    main()
