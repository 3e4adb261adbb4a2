# SPDX-License-Identifier: BSD-3-Clause
"""Modules: state around the ops."""

from ssmkernels.nn.distribution_alignment import DistributionAlignment
from ssmkernels.nn.ema_teacher import EMATeacher
from ssmkernels.nn.labeled_memory import LabeledMemory
from ssmkernels.nn.proxy_loss import ProxyLoss
from ssmkernels.nn.similarity_network import ClassCenters, SimilarityNetwork, draw_class_centers, sample_pairs

__all__ = [
    "ClassCenters",
    "DistributionAlignment",
    "EMATeacher",
    "LabeledMemory",
    "ProxyLoss",
    "SimilarityNetwork",
    "draw_class_centers",
    "sample_pairs",
]
