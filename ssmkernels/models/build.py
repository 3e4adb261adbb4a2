# SPDX-License-Identifier: BSD-3-Clause
"""Models by name, and what of them decays."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from ssmkernels.models.convnet import PlainConvNet, SmallConvNet, convnet_widths
from ssmkernels.models.packages import require
from ssmkernels.models.projection import ProjectionModel
from ssmkernels.models.timm_models import TIMM, TimmFeatures
from ssmkernels.models.weights import load_weights
from ssmkernels.models.wide_resnet import WideResNet


def build_model(
    name: str,
    num_classes: int,
    *,
    in_channels: int = 3,
    projection_dim: int = 128,
    bn_momentum: float | None = None,
    weights: str | Path | None = None,
    image_size: int | None = None,
) -> ProjectionModel:
    """A freshly initialised model with a classifier and a projection head.

    Args:
        name: "wrn-28-2", "wrn-28-8" or any other "wrn-depth-width" with depth = 6n + 4; "resnet50" (torchvision's);
            "convnet-small", about 100,000 parameters, for images from 8x8 up; "convnet-32-64-128-256" or other widths
            (:class:`PlainConvNet`); or "timm/NAME", any network of timm (the
            extra ``timm``), such as "timm/resnet18" or "timm/vit_small_patch16_224".
        num_classes: number of classes L.
        in_channels: channels of the images: 1 or 3; "resnet50" takes 3.
        projection_dim: size of the embeddings.
        bn_momentum: share of the current batch in the running statistics of batch norm; by default 0.001 in wide
            ResNets, as published for 2^20 steps (short runs need more), and the network's own elsewhere.
        weights: of the backbone: None starts at random; "imagenet"; or a file, see
            :func:`ssmkernels.models.load_weights`.
        image_size: side of the images in pixels, for the networks of timm that are built for one.
    """
    if bn_momentum is not None and not 0 < bn_momentum <= 1:
        raise ValueError(f"bn_momentum is {bn_momentum}; it should be in (0, 1]")
    if in_channels < 1:
        raise ValueError(f"in_channels is {in_channels}; it should be at least 1")
    backbone = _backbone(name, in_channels, image_size)
    if bn_momentum is not None:
        for module in backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = bn_momentum
    if weights is not None:
        load_weights(backbone, weights, name=name)
    return ProjectionModel(backbone, num_classes, projection_dim)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimiser, in the order of ``named_parameters``: weights, which decay, and biases and
    normalisation, which do not.

    A parameter is exempt if it has at most one dimension or is named bias.
    """
    decay: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (exempt if parameter.ndim <= 1 or name.endswith("bias") else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]


def _backbone(name: str, in_channels: int, image_size: int | None) -> nn.Module:
    if name == "convnet-small":
        return SmallConvNet(in_channels)
    widths = convnet_widths(name)
    if widths is not None:
        return PlainConvNet(in_channels, widths)
    if name == "resnet50":
        return _resnet50(in_channels)
    if name.startswith(TIMM):
        return TimmFeatures(name, in_channels, image_size=image_size)
    wide = re.fullmatch(r"wrn-(\d+)-(\d+)", name)
    if wide is None:
        raise ValueError(
            f"name is {name!r}; it should be wrn-<depth>-<width>, such as wrn-28-2, or resnet50, convnet-small,"
            " convnet-<width>-<width>-... or timm/NAME"
        )
    return WideResNet(int(wide[1]), int(wide[2]), in_channels)


def _resnet50(in_channels: int) -> nn.Module:
    if in_channels != 3:
        raise ValueError(f"in_channels is {in_channels}; resnet50 takes 3")
    network = require("torchvision.models", "torchvision", "train").resnet50(weights=None)
    network.feature_dim, network.fc = network.fc.in_features, nn.Identity()
    return network
