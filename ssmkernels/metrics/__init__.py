# SPDX-License-Identifier: BSD-3-Clause
"""How well embeddings retrieve and cluster: recall, precision, R-precision, MAP@R and normalised mutual information.

The recall, precision and NMI of Zhuang and Moulin (CVPR 2023), equations (30)-(35); R-precision and MAP@R of Musgrave
et al. (ECCV 2020), as pytorch-metric-learning's AccuracyCalculator has them.
"""

from ssmkernels.metrics.clustering import nmi, nmi_of_clusters
from ssmkernels.metrics.ranking import retrieval

__all__ = ["nmi", "nmi_of_clusters", "retrieval"]
