# SPDX-License-Identifier: BSD-3-Clause
"""Modules: state around the ops."""

from ssmkernels.nn.contrastive_loss import ContrastiveLoss
from ssmkernels.nn.distribution_alignment import DistributionAlignment
from ssmkernels.nn.ema_teacher import EMATeacher
from ssmkernels.nn.feature_basis import FeatureBasis
from ssmkernels.nn.labeled_memory import LabeledMemory
from ssmkernels.nn.multi_similarity_loss import MultiSimilarityLoss
from ssmkernels.nn.prototypes import PrototypeHead, sinkhorn_codes
from ssmkernels.nn.proxy_loss import ProxyLoss
from ssmkernels.nn.similarity_cross_entropy import GlobalCrossEntropy, LocalCrossEntropy
from ssmkernels.nn.similarity_distribution import RunningSimilarityMoments, SimilarityDistributionLoss
from ssmkernels.nn.similarity_network import ClassCenters, SimilarityNetwork, draw_class_centers, sample_pairs

__all__ = [
    "ClassCenters",
    "ContrastiveLoss",
    "DistributionAlignment",
    "EMATeacher",
    "FeatureBasis",
    "GlobalCrossEntropy",
    "LabeledMemory",
    "LocalCrossEntropy",
    "MultiSimilarityLoss",
    "PrototypeHead",
    "ProxyLoss",
    "RunningSimilarityMoments",
    "SimilarityDistributionLoss",
    "SimilarityNetwork",
    "draw_class_centers",
    "sample_pairs",
    "sinkhorn_codes",
]
