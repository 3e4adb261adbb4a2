# SPDX-License-Identifier: BSD-3-Clause
"""The ops in plain PyTorch, same names and signatures as :mod:`ssmkernels.ops`: the definition of right.

Tests, benchmarks and docs import these. They store every intermediate and run anywhere torch runs.
"""

from ssmkernels.reference.graph import LaplacianSolution, laplacian_solve, leave_one_edge_out
from ssmkernels.reference.memory import (
    InstanceMatching,
    InstanceMatchingPartial,
    aggregate,
    instance_matching,
    instance_matching_partial,
    memory_update_,
    unfold,
)
from ssmkernels.reference.pairs import pair_focal_loss, pair_logits
from ssmkernels.reference.ranking import (
    SimilarityMoments,
    mined_pair_ranking_loss,
    pair_ranking_loss,
    similarity_moments,
)

__all__ = [
    "InstanceMatching",
    "InstanceMatchingPartial",
    "LaplacianSolution",
    "SimilarityMoments",
    "aggregate",
    "instance_matching",
    "instance_matching_partial",
    "laplacian_solve",
    "leave_one_edge_out",
    "memory_update_",
    "mined_pair_ranking_loss",
    "pair_focal_loss",
    "pair_logits",
    "pair_ranking_loss",
    "similarity_moments",
    "unfold",
]
