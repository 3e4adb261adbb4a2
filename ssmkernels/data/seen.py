# SPDX-License-Identifier: BSD-3-Clause
"""How a trained network sees images, in plain values that a run keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from ssmkernels.data.augment import ResizeCenterCrop
from ssmkernels.data.retrieval import EvaluationView, reordered


@dataclass(frozen=True)
class SeenImages:
    """An image becomes ``transform(image)``, then (pixel / 255 − ``mean``) / ``std`` per channel.

    Args:
        mean, std: per channel, in the order of ``channel_order``.
        image_size: side of the square in pixels.
        resize: to which the shorter side of an image is resized before its centre is cut out; of one that has the
            ``image_size`` already and a ``resize`` equal to it, nothing is changed.
        channel_order: "RGB", "BGR" or, of one channel, "L".
        class_names: of the classes that a classifier tells from each other; none for embeddings.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    resize: int
    channel_order: str
    class_names: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        evaluation: Any,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        size: int,
        class_names: Sequence[str] = (),
    ) -> SeenImages:
        """Of the evaluation transform of :func:`default_transforms` or :func:`retrieval_views`; None for none."""
        order = "native"
        if isinstance(evaluation, EvaluationView):
            evaluation, order = evaluation.crop, evaluation.order
        resize = evaluation.resize if isinstance(evaluation, ResizeCenterCrop) else size
        if order == "native":
            order = "L" if len(mean) == 1 else "RGB"
        return cls(tuple(mean), tuple(std), size, resize, order, tuple(class_names))

    @property
    def channels(self) -> int:
        return len(self.mean)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def is_like(self, other: SeenImages) -> bool:
        """Whether images of the same classes are seen alike. Means are compared to 1e-6: processors round their sums
        differently.
        """
        if self.channels != other.channels or replace(self, mean=other.mean, std=other.std) != other:
            return False
        return np.allclose([self.mean, self.std], [other.mean, other.std], rtol=0, atol=1e-6)

    def transform(self, image: Image.Image) -> Image.Image:
        """An image of any size and mode as the network sees it."""
        image = image.convert("L" if self.channel_order == "L" else "RGB")
        if image.size != (self.image_size, self.image_size) or self.resize != self.image_size:
            image = ResizeCenterCrop(self.resize, self.image_size)(image)
        return reordered(image, "BGR") if self.channel_order == "BGR" else image
