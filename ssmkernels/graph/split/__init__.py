# SPDX-License-Identifier: BSD-3-Clause
"""Graphs whose rows are split over the ranks of a process group."""

from ssmkernels.graph.split.dissimilarity import leave_one_edge_out
from ssmkernels.graph.split.structure import SplitGraph
from ssmkernels.graph.split.system import laplacian_solve

__all__ = ["SplitGraph", "laplacian_solve", "leave_one_edge_out"]
