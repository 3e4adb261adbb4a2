# SPDX-License-Identifier: BSD-3-Clause
"""Networks: a backbone, a classifier and a projection to unit embeddings."""

from ssmkernels.models.build import build_model, parameter_groups
from ssmkernels.models.convnet import SmallConvNet
from ssmkernels.models.projection import ProjectionModel
from ssmkernels.models.wide_resnet import WideResNet

__all__ = ["ProjectionModel", "SmallConvNet", "WideResNet", "build_model", "parameter_groups"]
