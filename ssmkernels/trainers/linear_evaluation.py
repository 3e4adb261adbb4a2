# SPDX-License-Identifier: BSD-3-Clause
"""Linear evaluation: what a linear classifier reads off the features of a frozen network.

The protocol is that of SimCLR (Chen et al., ICML 2020, section B.8) and BYOL, after Kornblith et al. (CVPR 2019): a
multinomial logistic regression with an L2 penalty, fitted by L-BFGS on features of central crops, without augmentation;
the penalty is picked on validation images among 45 values, and the classifier fitted again on training and validation
images together.

L-BFGS is PyTorch's, not scikit-learn's LogisticRegression: it minimises the same function, but where the features are,
so that the 45 fits on tens of thousands of images, 2048 features and 100 classes take minutes on a GPU; and each starts
from the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ssmkernels import data, models

PENALTIES = tuple(np.logspace(5, -6, 45).tolist())
"""λ, the strongest first."""


class LinearEvaluation(NamedTuple):
    """What :func:`linear_evaluation` returns."""

    accuracy: float
    """Share of the test images that are classified right."""
    mean_per_class: float
    """The mean over classes of that share."""
    penalty: float
    """The λ that was picked."""


def linear_evaluation(
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    penalties: Sequence[float] = PENALTIES,
) -> LinearEvaluation:
    """Fits a linear classifier to frozen features and tests it.

    Args:
        train, validation, test: features [N, d], floating point and on one device, and their labels [N] int64.
        penalties: values of λ to pick from, by the accuracy on the validation images; the first of several that are
            equal.
    """
    if not penalties or min(penalties) <= 0:
        raise ValueError(f"penalties is {tuple(penalties)}; it should be at least one positive number")
    for name, (features, labels) in {"train": train, "validation": validation, "test": test}.items():
        if features.ndim != 2 or labels.shape != features.shape[:1] or len(labels) == 0:
            shapes = f"{list(features.shape)} and {list(labels.shape)}"
            raise ValueError(f"{name} has features and labels of shape {shapes}; they should be [N, d] and [N], N > 0")
    classes = 1 + int(max(labels.max() for _, labels in (train, validation, test)))
    classifier, best, picked = _zeros(train[0], classes), -1.0, penalties[0]
    kept = {name: value.clone() for name, value in classifier.state_dict().items()}
    for penalty in penalties:
        fit_logistic_regression(classifier, *train, penalty=penalty)
        right = float((_predict(classifier, validation[0]) == validation[1]).float().mean())
        if right > best:
            best, picked = right, penalty
            kept = {name: value.clone() for name, value in classifier.state_dict().items()}
    classifier.load_state_dict(kept)
    everything = [torch.cat(column) for column in zip(train, validation, strict=True)]
    fit_logistic_regression(classifier, everything[0], everything[1], penalty=picked)
    features, labels = test
    right_of = (_predict(classifier, features) == labels).double()
    sums = torch.zeros(2, classes, dtype=torch.double, device=labels.device)
    sums[0].index_add_(0, labels, right_of)
    sums[1].index_add_(0, labels, torch.ones_like(right_of))
    there = sums[1] > 0
    return LinearEvaluation(float(right_of.mean()), float((sums[0, there] / sums[1, there]).mean()), picked)


def fit_logistic_regression(
    classifier: nn.Linear, features: Tensor, labels: Tensor, *, penalty: float, max_iter: int = 500
) -> None:
    """Minimises the mean cross-entropy + λ/2·‖W‖², W without the biases, from where ``classifier`` is, which it
    changes.

    Args:
        features: [N, d].
        labels: [N] int64.
        penalty: λ.
        max_iter: iterations of L-BFGS at most.
    """
    optimizer = torch.optim.LBFGS(
        classifier.parameters(),
        max_iter=max_iter,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(classifier(features), labels) + penalty / 2 * classifier.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


@torch.no_grad()
def frozen_features(
    backbone: nn.Module,
    images: data.ImageDataset,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int | None = 224,
    device: torch.device | str = "cpu",
    workers: int = 0,
) -> tuple[Tensor, Tensor]:
    """Features [N, d] float32 and labels [N] of all images, on ``device``.

    Args:
        backbone: images [B, C, H, W] -> features [B, d]; it is put in eval mode for the time.
        mean, std: per channel, of pixels scaled to [0, 1], as the network was trained with.
        image_size: the shorter side is resized to it by bicubic interpolation, and the central square taken; None takes
            images as they are.
        workers: processes that load images.
    """
    transform = None if image_size is None else CentralSquare(image_size)
    batches = data.evaluation_batches(images, 256, mean=mean, std=std, transform=transform, workers=workers)
    features = models.extract_features(_Pair(backbone), batches, device=device, progress=False)
    return features.to(device), torch.tensor(images.labels, device=device)


def transfer(
    backbone: nn.Module,
    images: data.TransferImages,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int | None = 224,
    device: torch.device | str = "cpu",
    workers: int = 0,
    penalties: Sequence[float] = PENALTIES,
) -> LinearEvaluation:
    """:func:`linear_evaluation` of the features that ``backbone`` has of a data set; arguments as in
    :func:`frozen_features`.
    """
    train, validation, test = (
        frozen_features(backbone, part, mean=mean, std=std, image_size=image_size, device=device, workers=workers)
        for part in (images.train, images.validation, images.test)
    )
    return linear_evaluation(train, validation, test, penalties=penalties)


class CentralSquare:
    """The shorter side resized to ``size`` pixels by bicubic interpolation, then the central square (SimCLR, section
    B.8).
    """

    def __init__(self, size: int = 224) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        ratio = self.size / min(image.size)
        image = image.resize((round(image.width * ratio), round(image.height * ratio)), Image.Resampling.BICUBIC)
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        return image.crop((left, top, left + self.size, top + self.size))


class _Pair(nn.Module):
    """A backbone as :func:`ssmkernels.models.extract_features` takes it."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        return self.backbone(images), None


def _zeros(features: Tensor, classes: int) -> nn.Linear:
    classifier = nn.Linear(features.shape[1], classes, device=features.device, dtype=features.dtype)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    return classifier


@torch.no_grad()
def _predict(classifier: nn.Linear, features: Tensor) -> Tensor:
    return classifier(features).argmax(dim=1)
