# SPDX-License-Identifier: BSD-3-Clause
"""Training batches of P classes with K images each, which ranking losses need: at random, few images would meet
another of their class.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ssmkernels.data.augment import Transform
from ssmkernels.data.batched_crops import CropTransform
from ssmkernels.data.batches import CollectionBatches
from ssmkernels.data.images import ImageDataset
from ssmkernels.data.streams import Stream, generator


class PKBatches(CollectionBatches):
    """As :class:`CollectionBatches`, but a batch is ``batch_size // per_class`` classes with ``per_class`` images of
    each in a row.

    Every step draws its classes and images anew, as pytorch-metric-learning's MPerClassSampler does. Classes come
    without replacement; only where there are fewer than a batch holds do they come again, with other images. The images
    of a class are distinct in a batch if the class has as many, and drawn with replacement if it has fewer.

    Args:
        images: where the images come from.
        index: [K] which of them are drawn.
        labels: [K] classes of those, any integers; an image of class −1 is never drawn.
        transform: of a training image, see :func:`ssmkernels.data.retrieval_views`.
        batch_size: B, images of a step, all ranks together.
        per_class: images of a class; a rank gets whole classes, so B is a multiple of ``per_class · world_size``.
        seed: seed of draws and augmentation.
        start_step: the first step.
        num_steps: one past the last step.
        stream: batches of other streams are independent of these at the same seed and step.
        rank, world_size: which slice of the batch is wanted, and how many there are.
        mean, std: per channel, see :func:`ssmkernels.data.to_tensor`.
    """

    def __init__(
        self,
        images: ImageDataset,
        index: np.ndarray,
        labels: np.ndarray,
        *,
        transform: Transform | CropTransform,
        batch_size: int,
        per_class: int = 4,
        seed: int,
        start_step: int,
        num_steps: int,
        stream: int = 0,
        rank: int = 0,
        world_size: int = 1,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        if per_class < 1:
            raise ValueError(f"per_class is {per_class}; it should be at least 1")
        if batch_size < 1 or world_size < 1 or batch_size % (per_class * world_size):
            raise ValueError(
                f"batch_size is {batch_size}; it should be a positive multiple of per_class · world_size, {per_class} ·"
                f" {world_size}"
            )
        if not 0 <= stream < 2**32:
            raise ValueError(f"stream is {stream}; it should be in [0, 2^32)")
        super().__init__(
            images,
            index,
            transform=transform,
            batch_size=batch_size,
            seed=seed,
            start_step=start_step,
            num_steps=num_steps,
            rank=rank,
            world_size=world_size,
            mean=mean,
            std=std,
        )
        labels = np.asarray(labels)
        if labels.shape != self.index.shape or labels.dtype.kind not in "iu":
            raise ValueError(
                f"labels is {labels.dtype} of shape {labels.shape}; it should be integers of shape [{len(self.index)}],"
                " as index has"
            )
        classes, counts = np.unique(labels, return_counts=True)
        if classes[0] < -1:
            raise ValueError(
                f"labels has a {classes[0]}; classes should be at least 0, or -1 for images that are never drawn"
            )
        self.per_class, self.stream = per_class, stream
        members = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
        self._members = members[1:] if classes[0] == -1 else members
        if not self._members:
            raise ValueError("labels are all -1; at least one image should have a class")

    def _places(self, step: int) -> np.ndarray:
        draw = generator(self.seed, Stream.PK_ORDER, step, self.stream)
        groups, classes = self.batch_size // self.per_class, len(self._members)
        order = np.concatenate([draw.permutation(classes) for _ in range(-(-groups // classes))])[:groups]
        places = np.empty((groups, self.per_class), dtype=np.int64)
        for label in order[:classes]:  # each class that comes, once
            rows = np.flatnonzero(order == label)
            members, count = self._members[label], len(rows) * self.per_class
            places[rows] = draw.choice(members, count, replace=count > len(members)).reshape(-1, self.per_class)
        return places.ravel()

    def _view_stream(self) -> int:
        if self.stream >= 2**8:
            raise ValueError(f"stream is {self.stream}; of views in batches it should be below 256")
        return (self.stream << 8) + Stream.PK_VIEW

    def _view_generator(self, step: int, place: int) -> np.random.Generator:
        return generator(self.seed, Stream.PK_VIEW, step, (self.stream << 32) + place)
