# SPDX-License-Identifier: BSD-3-Clause
"""A network small enough to train on a CPU in minutes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from torch import Tensor, nn

from ssmkernels.models.wide_resnet import LEAKY_SLOPE, conv


class SmallConvNet(nn.Module):
    """Four 3x3 convolutions with batch norm and leaky ReLU, the second and the fourth of stride 2, and the mean over
    the image.

    Args:
        in_channels: channels C of the images.
        bn_momentum, bn_eps: of batch norm.

    Shape: images [N, C, H, W], 8x8 or larger -> features [N, 64].
    """

    feature_dim = 64

    def __init__(self, in_channels: int = 1, *, bn_momentum: float = 0.1, bn_eps: float = 1e-5) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, out_channels, stride in ((in_channels, 16, 1), (16, 64, 2), (64, 64, 1), (64, 64, 2)):
            layers += [
                conv(channels, out_channels, 3, stride),
                nn.BatchNorm2d(out_channels, eps=bn_eps, momentum=bn_momentum),
                nn.LeakyReLU(LEAKY_SLOPE),
            ]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).mean(dim=(2, 3))


def convnet_widths(name: str) -> tuple[int, ...] | None:
    """The widths of a :class:`PlainConvNet` in its name, "convnet-32-64-128"; None where it is none."""
    plain = re.fullmatch(r"convnet((-[1-9]\d*)+)", name)
    return None if plain is None else tuple(int(width) for width in plain[1][1:].split("-"))


class PlainConvNet(nn.Module):
    """3x3 convolutions with batch norm and ReLU, of stride 1 in the first and of stride 2 in every other, and the mean
    over the image.

    Args:
        in_channels: channels C of the images.
        widths: channels of the convolutions, such as (32, 64, 128, 256); the last one is ``feature_dim``.

    Shape: images [N, C, H, W] -> features [N, feature_dim].
    """

    def __init__(self, in_channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.feature_dim = widths[-1]
        layers: list[nn.Module] = []
        for channels, out_channels in itertools.pairwise((in_channels, *widths)):
            stride = 2 if layers else 1
            layers += [conv(channels, out_channels, 3, stride), nn.BatchNorm2d(out_channels), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).mean(dim=(2, 3))
