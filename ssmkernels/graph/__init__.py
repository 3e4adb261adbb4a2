# SPDX-License-Identifier: BSD-3-Clause
"""Graphs, and label propagation on them (Zhuang and Moulin, CVPR 2023)."""

from ssmkernels.graph import comparisons
from ssmkernels.graph.knn import knn_graph, nearest_neighbours
from ssmkernels.graph.propagation import (
    MixedLabelPropagation,
    confidence_of,
    label_propagation,
    mixed_label_propagation,
)
from ssmkernels.graph.split import SplitGraph, laplacian_solve, leave_one_edge_out
from ssmkernels.graph.structure import Graph

__all__ = [
    "Graph",
    "MixedLabelPropagation",
    "SplitGraph",
    "comparisons",
    "confidence_of",
    "knn_graph",
    "label_propagation",
    "laplacian_solve",
    "leave_one_edge_out",
    "mixed_label_propagation",
    "nearest_neighbours",
]
