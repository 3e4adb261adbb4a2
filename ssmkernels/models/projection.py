# SPDX-License-Identifier: BSD-3-Clause
"""A backbone with SimMatch's two heads."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ProjectionModel(nn.Module):
    """A classifier and a projection head on the features of a backbone (SimMatch, section 3.1).

    The projection is Linear(d, d), ReLU, Linear(d, projection_dim), then L2 normalisation. Dense layers start from
    Glorot's normal distribution, biases from 0.

    Args:
        backbone: images [N, C, H, W] -> features [N, d], with d as its ``feature_dim``.
        num_classes: number of classes L.
        projection_dim: size D of the embeddings.

    Shape: images [N, C, H, W] -> logits [N, L], embeddings [N, D] of norm 1.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, projection_dim: int = 128) -> None:
        super().__init__()
        for name, value in (("num_classes", num_classes), ("projection_dim", projection_dim)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it should be at least 1")
        features = getattr(backbone, "feature_dim", None)
        if not isinstance(features, int):
            raise TypeError(
                f"backbone has no feature_dim; {type(backbone).__name__} should have the size of its features there,"
                " an int"
            )
        self.backbone = backbone
        self.classifier = nn.Linear(features, num_classes)
        self.projection = nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, projection_dim))
        for layer in (self.classifier, *self.projection):
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(images)
        return self.classifier(features), F.normalize(self.projection(features), dim=1)
