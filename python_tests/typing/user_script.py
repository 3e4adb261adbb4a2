# SPDX-License-Identifier: BSD-3-Clause
"""What users write, for mypy and pyright; test_typing.py runs them. `# wrong` marks what they must refuse."""

import numpy as np
import torch
from torch import Tensor

from ssmkernels import graph, metrics, nn, ops
from ssmkernels.estimators import MixedLabelPropagation


def step(memory: nn.LabeledMemory, weak: Tensor, strong: Tensor, probs: Tensor) -> Tensor:
    matching = memory.instance_matching(weak, strong, probs)
    pseudo: Tensor = matching.pseudo_probs
    return matching.loss.mean() + pseudo.sum()


def losses(embeddings: Tensor, labels: Tensor) -> Tensor:
    contrastive = nn.ContrastiveLoss(pos_margin=0.0, neg_margin=0.5, reduction="mean")
    ranking: Tensor = ops.pair_ranking_loss(embeddings, labels, reduction="sum")
    total: Tensor = contrastive(embeddings, labels) + ranking
    return total


def propagate(features: Tensor, labels: Tensor) -> Tensor:
    made: graph.Graph = graph.knn_graph(features, 10)
    return graph.mixed_label_propagation(made, labels).probs


network = nn.SimilarityNetwork(32, interaction="absdiff")
teacher = nn.EMATeacher(network, decay=0.99, buffers="average")
memory = nn.LabeledMemory(40, 32, 10, mode="teacher")
model = MixedLabelPropagation(n_neighbors=10, affinity="precomputed")
scores: dict[str, float] = metrics.retrieval(torch.randn(8, 4), torch.arange(8) % 2)
model.fit(np.eye(4), np.array([0, 1, -1, -1]))

nn.SimilarityNetwork(32, interaction="sum")  # wrong
nn.EMATeacher(network, buffers="none")  # wrong
nn.LabeledMemory(40, 32, 10, mode="student")  # wrong
nn.ContrastiveLoss(reduction="median")  # wrong
ops.pair_ranking_loss(torch.randn(4, 2), torch.arange(4), reduction="none")  # wrong
MixedLabelPropagation(affinity="euclidean")  # wrong
ops.aggregate(torch.randn(4, 2))  # wrong
