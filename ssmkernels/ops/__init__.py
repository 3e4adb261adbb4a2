# SPDX-License-Identifier: BSD-3-Clause
"""The ops: C++ and CUDA kernels behind plain functions, each with its reference of the same name in
:mod:`ssmkernels.reference`.
"""

from ssmkernels.ops.graph import LaplacianSolution, laplacian_solve, leave_one_edge_out
from ssmkernels.ops.memory import (
    InstanceMatching,
    InstanceMatchingPartial,
    aggregate,
    finish_instance_matching,
    instance_matching,
    instance_matching_partial,
    memory_update_,
    merge_instance_matching,
    unfold,
)
from ssmkernels.ops.pairs import pair_focal_loss, pair_logits
from ssmkernels.ops.ranking import SimilarityMoments, mined_pair_ranking_loss, pair_ranking_loss, similarity_moments

__all__ = [
    "InstanceMatching",
    "InstanceMatchingPartial",
    "LaplacianSolution",
    "SimilarityMoments",
    "aggregate",
    "finish_instance_matching",
    "instance_matching",
    "instance_matching_partial",
    "laplacian_solve",
    "leave_one_edge_out",
    "memory_update_",
    "merge_instance_matching",
    "mined_pair_ranking_loss",
    "pair_focal_loss",
    "pair_logits",
    "pair_ranking_loss",
    "similarity_moments",
    "unfold",
]
