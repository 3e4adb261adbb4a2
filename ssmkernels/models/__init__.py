# SPDX-License-Identifier: BSD-3-Clause
"""Networks: a backbone with a classifier and a projection to unit embeddings, or with pooled features and a linear
embedding.
"""

from ssmkernels.models.bn_inception import BNInception
from ssmkernels.models.build import build_model, parameter_groups
from ssmkernels.models.convnet import SmallConvNet
from ssmkernels.models.embedding import (
    EMBEDDING_BACKBONES,
    EmbeddingModel,
    backbone_state,
    build_embedding_model,
    preprocessing,
)
from ssmkernels.models.features import extract_features
from ssmkernels.models.projection import ProjectionModel
from ssmkernels.models.timm_models import timm_normalization
from ssmkernels.models.weights import LoadedWeights, load_weights
from ssmkernels.models.wide_resnet import WideResNet

__all__ = [
    "EMBEDDING_BACKBONES",
    "BNInception",
    "EmbeddingModel",
    "LoadedWeights",
    "ProjectionModel",
    "SmallConvNet",
    "WideResNet",
    "backbone_state",
    "build_embedding_model",
    "build_model",
    "extract_features",
    "load_weights",
    "parameter_groups",
    "preprocessing",
    "timm_normalization",
]
