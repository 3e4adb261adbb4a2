# SPDX-License-Identifier: BSD-3-Clause
"""Backbones of timm by name, ``timm/resnet18``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ssmkernels.models.packages import require

TIMM = "timm/"


class TimmFeatures(nn.Module):
    """A network of timm without its classifier.

    Args:
        name: "timm/" and a name of timm's, with its tag or without, such as "timm/vit_small_patch16_224.dino".
        in_channels: channels C of the images.
        image_size: their side in pixels, where a network is built for one; it is otherwise not looked at.
        maps: keep the maps of a convolutional network instead of pooling them.

    Shape: images [N, C, H, W] -> features [N, d] as the network pools them, d = ``feature_dim``; with ``maps`` [N, d,
    h, w], where h = w = 1 for a network of tokens.
    """

    def __init__(self, name: str, in_channels: int = 3, *, image_size: int | None = None, maps: bool = False) -> None:
        super().__init__()
        config = _config(name)
        options: dict[str, Any] = {"num_classes": 0, "in_chans": in_channels}
        if maps and config.pool_size is not None:
            options["global_pool"] = ""
        self.name, self.maps = name, maps
        self.network = _create(name, options, image_size if config.fixed_input_size else None)
        self.feature_dim: int = self.network.head_hidden_size
        for module in self.network.modules():  # no draws from the global generator, which would break resuming
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.0

    def forward(self, images: Tensor) -> Tensor:
        try:
            features = self.network(images)
        except AssertionError as error:  # timm's check of the size
            size = "x".join(map(str, images.shape[2:]))
            raise ValueError(f"{self.name} does not take images of {size} pixels: {error}") from error
        if not self.maps:
            return features
        if features.ndim == 2:
            return features[:, :, None, None]
        return features.permute(0, 3, 1, 2) if features.shape[1] != self.feature_dim else features


def timm_normalization(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of pixels in [0, 1], RGB, that the network was trained with."""
    config = _config(name)
    return config.mean, config.std


def timm_weights(name: str) -> Mapping[str, Tensor]:
    """timm's own weights of the network, which it downloads."""
    timm = require("timm", "timm", "timm")
    _config(name)
    return timm.create_model(name.removeprefix(TIMM), pretrained=True, num_classes=0).state_dict()


def _config(name: str) -> Any:
    timm, wanted = require("timm", "timm", "timm"), name.removeprefix(TIMM)
    config = timm.models.get_pretrained_cfg(wanted) if timm.is_model(wanted) else None
    if config is None:
        near = difflib.get_close_matches(wanted, timm.list_models(), n=3)
        raise ValueError(
            f"there is no model {name!r}; "
            + (f"did you mean {' or '.join(TIMM + model for model in near)}?" if near else "timm.list_models() has all")
        )
    return config


def _create(name: str, options: Mapping[str, Any], image_size: int | None) -> Any:
    """The network; one with a fixed number of positions for any size of images if it can, for ``image_size`` if not."""
    timm = require("timm", "timm", "timm")
    if image_size is None:
        return timm.create_model(name.removeprefix(TIMM), **options)
    for size in ({"dynamic_img_size": True}, {"img_size": image_size}):
        try:
            return timm.create_model(name.removeprefix(TIMM), **options, **size)
        except TypeError:  # it has no such option
            continue
    return timm.create_model(name.removeprefix(TIMM), **options)
