# SPDX-License-Identifier: BSD-3-Clause
"""BN-Inception (Ioffe and Szegedy, 2015), layer for layer the Caffe network whose weights circulate as
``bn_inception-52deb4733.pth``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Unit(NamedTuple):
    """Output channels of the branches of an inception unit; a unit without a 1x1 branch has stride 2 and hands its
    input on, pooled.
    """

    name: str
    conv1: int
    conv3: tuple[int, int]
    double: tuple[int, int]
    pool: int
    max_pool: bool = False


UNITS = (
    _Unit("3a", 64, (64, 64), (64, 96), 32),
    _Unit("3b", 64, (64, 96), (64, 96), 64),
    _Unit("3c", 0, (128, 160), (64, 96), 0, True),
    _Unit("4a", 224, (64, 96), (96, 128), 128),
    _Unit("4b", 192, (96, 128), (96, 128), 128),
    _Unit("4c", 160, (128, 160), (128, 160), 128),
    _Unit("4d", 96, (128, 192), (160, 192), 128),
    _Unit("4e", 0, (128, 192), (192, 256), 0, True),
    _Unit("5a", 352, (192, 320), (160, 224), 128),
    _Unit("5b", 352, (192, 320), (192, 224), 128, True),
)


class BNInception(nn.Module):
    """The convolutions of BN-Inception: 10.3 million parameters.

    Modules are named as in Caffe, ``inception_3a_double_3x3_1`` and ``inception_3a_double_3x3_1_bn``, all of them
    children of this one, so that the published weights load by name.

    Shape: images [N, 3, H, W], H and W multiples of 32, BGR of 0 … 255 less the mean -> maps [N, 1024, H/32, W/32], not
    negative.
    """

    feature_dim = 1024

    def __init__(self) -> None:
        super().__init__()
        self._add("conv1_7x7_s2", 3, 64, 7, stride=2)
        self._add("conv2_3x3_reduce", 64, 64, 1)
        self._add("conv2_3x3", 64, 192, 3)
        channels = 192
        for unit in UNITS:
            prefix, stride = f"inception_{unit.name}", 1 if unit.conv1 else 2
            if unit.conv1:
                self._add(f"{prefix}_1x1", channels, unit.conv1, 1)
                self._add(f"{prefix}_pool_proj", channels, unit.pool, 1)
            self._add(f"{prefix}_3x3_reduce", channels, unit.conv3[0], 1)
            self._add(f"{prefix}_3x3", *unit.conv3, 3, stride)
            self._add(f"{prefix}_double_3x3_reduce", channels, unit.double[0], 1)
            self._add(f"{prefix}_double_3x3_1", *unit.double, 3)
            self._add(f"{prefix}_double_3x3_2", unit.double[1], unit.double[1], 3, stride)
            channels = unit.conv1 + unit.conv3[1] + unit.double[1] + (unit.pool or channels)

    def forward(self, images: Tensor) -> Tensor:
        # Pooling rounds up and convolution down: their maps would not fit together
        if any(side % 32 for side in images.shape[2:]):
            raise ValueError(
                f"images are of {images.shape[2]}x{images.shape[3]} pixels; bn-inception takes multiples of 32"
            )
        x = _halved(self._conv("conv1_7x7_s2", images))
        x = _halved(self._conv("conv2_3x3", self._conv("conv2_3x3_reduce", x)))
        for unit in UNITS:
            x = self._inception(unit, x)
        return x

    def _inception(self, unit: _Unit, x: Tensor) -> Tensor:
        prefix = f"inception_{unit.name}"
        conv3 = self._conv(f"{prefix}_3x3", self._conv(f"{prefix}_3x3_reduce", x))
        double = self._conv(f"{prefix}_double_3x3_1", self._conv(f"{prefix}_double_3x3_reduce", x))
        double = self._conv(f"{prefix}_double_3x3_2", double)
        if not unit.conv1:
            return torch.cat([conv3, double, _halved(x)], dim=1)
        pooled = F.max_pool2d(x, 3, 1, 1) if unit.max_pool else F.avg_pool2d(x, 3, 1, 1)
        return torch.cat(
            [self._conv(f"{prefix}_1x1", x), conv3, double, self._conv(f"{prefix}_pool_proj", pooled)], dim=1
        )

    def _add(self, name: str, in_channels: int, out_channels: int, size: int, stride: int = 1) -> None:
        self.add_module(name, nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2))
        self.add_module(f"{name}_bn", nn.BatchNorm2d(out_channels))

    def _conv(self, name: str, x: Tensor) -> Tensor:
        return F.relu(self.get_submodule(f"{name}_bn")(self.get_submodule(name)(x)))


def _halved(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2, ceil_mode=True)
