# SPDX-License-Identifier: BSD-3-Clause
"""How many edges of a kNN graph join two points of one class: of those between mutual neighbours, and of the others,
which MoM takes for dissimilar.

python bench/mutual_edges.py [--data DIR]    DIR with glyphs.npz, for the sets that are not inside packages
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ssmkernels import graph
from ssmkernels._text import markdown_table
from ssmkernels.experiments.analyses import feature_sets

SETS = ("digits", "mnist5k", "glyphs-10k", "glyphs")


def shares(name: str, folder: str | None) -> list[str]:
    """The name, the share of the edges that are not mutual, and of all, mutual and other edges those of one class."""
    points = feature_sets.load(name, folder, Path("build/features"))
    neighbours = graph.knn_graph(points.features)
    rows = torch.repeat_interleave(torch.arange(len(points.labels)), neighbours.crow.diff())
    of_one_class = points.labels[rows] == points.labels[neighbours.col.long()]
    mutual = neighbours.mutual
    assert mutual is not None
    parts = (of_one_class, of_one_class[mutual], of_one_class[~mutual])
    return [name, *(f"{100 * float(part.double().mean()):.1f} %" for part in (~mutual, *parts))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="the folder of glyphs.npz")
    folder = parser.parse_args().data
    names = feature_sets.available(SETS, folder)
    header = ["set", "not mutual", "of one class: all edges", "mutual ones", "others"]
    print(markdown_table(header, [shares(name, folder) for name in names]))


if __name__ == "__main__":
    main()
