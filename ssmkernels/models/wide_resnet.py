# SPDX-License-Identifier: BSD-3-Clause
"""Wide residual networks (Zagoruyko and Komodakis, 2016) as semi-supervised learning uses them."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

LEAKY_SLOPE = 0.1


def conv(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    """Padded convolution without bias, weights of N(0, 2 / (size² · out_channels))."""
    layer = nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)
    nn.init.normal_(layer.weight, std=math.sqrt(2 / (size * size * out_channels)))
    return layer


class WideResNet(nn.Module):
    """WRN-depth-width without its classifier, with the wiring of FixMatch's and MixMatch's original code.

    Leaky ReLU (0.1) everywhere; three stages of (depth − 4) / 6 units. The first unit of stages 2 and 3 normalises its
    input for its first convolution and takes its shortcut from the raw input; that of stage 1 takes the shortcut from
    the normalised one. (PyTorch ports that feed the raw input to the convolution leave a batch norm without effect and
    its parameters without gradient.)

    Args:
        depth: 6n + 4.
        width: factor k on the channels 16, 32, 64 of the stages.
        in_channels: channels C of the images.
        bn_momentum: share of the current batch in the running statistics of batch norm. The published 0.001 suits 2^20
            steps; runs of a few thousand need 0.01 or 0.1.
        bn_eps: ε of batch norm.

    Shape: images [N, C, H, W] -> features [N, ``feature_dim``], ``feature_dim`` = 64 k.
    """

    def __init__(
        self, depth: int = 28, width: int = 2, in_channels: int = 3, *, bn_momentum: float = 0.001, bn_eps: float = 1e-3
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth is {depth}; it should be 6n + 4 with n > 0")
        if width < 1:
            raise ValueError(f"width is {width}; it should be at least 1")
        self.feature_dim = 64 * width
        self.stem = conv(in_channels, 16, 3)
        units, channels = [], 16
        for stage, out_channels in enumerate((16 * width, 32 * width, 64 * width)):
            for unit in range((depth - 4) // 6):
                first = unit == 0
                units.append(
                    _Unit(
                        channels,
                        out_channels,
                        stride=2 if first and stage > 0 else 1,
                        normalised_shortcut=first and stage == 0,
                        bn_momentum=bn_momentum,
                        bn_eps=bn_eps,
                    )
                )
                channels = out_channels
        self.units = nn.Sequential(*units)
        self.bn = nn.BatchNorm2d(channels, eps=bn_eps, momentum=bn_momentum)

    def forward(self, images: Tensor) -> Tensor:
        x = F.leaky_relu(self.bn(self.units(self.stem(images))), LEAKY_SLOPE)
        return x.mean(dim=(2, 3))


class _Unit(nn.Module):
    """Two 3x3 convolutions, each after batch norm and activation, beside a shortcut."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int,
        normalised_shortcut: bool,
        bn_momentum: float,
        bn_eps: float,
    ) -> None:
        super().__init__()
        self.normalised_shortcut = normalised_shortcut
        self.bn1 = nn.BatchNorm2d(in_channels, eps=bn_eps, momentum=bn_momentum)
        self.conv1 = conv(in_channels, out_channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(out_channels, eps=bn_eps, momentum=bn_momentum)
        self.conv2 = conv(out_channels, out_channels, 3)
        self.shortcut = nn.Identity() if in_channels == out_channels else conv(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        normalised = F.leaky_relu(self.bn1(x), LEAKY_SLOPE)
        residual = self.conv2(F.leaky_relu(self.bn2(self.conv1(normalised)), LEAKY_SLOPE))
        return residual + self.shortcut(normalised if self.normalised_shortcut else x)
