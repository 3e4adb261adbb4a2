# SPDX-License-Identifier: BSD-3-Clause
"""Which views of a data set are natural, in batches."""

from __future__ import annotations

from typing import NamedTuple

from ssmkernels.data.augment import EvaluationTransform, default_transforms, shift_and_flip
from ssmkernels.data.batched_augment import BatchStrong, BatchTransform, BatchWeak
from ssmkernels.data.batched_crops import BatchImageNetWeak, BatchMoCoV2, CropTransform
from ssmkernels.data.images import ImageSplits


class BatchTransforms(NamedTuple):
    """``evaluation``, of one image, is None where test images are taken as they are."""

    weak: BatchTransform | CropTransform
    strong: BatchTransform | CropTransform
    evaluation: EvaluationTransform | None = None


def batch_transforms(
    splits: ImageSplits, *, variant: str = "fixmatch", flip: bool | None = None, shift: int | None = None
) -> BatchTransforms:
    """The batched counterparts of :func:`ssmkernels.data.default_transforms`."""
    size = splits.image_size
    if splits.augmentation == "imagenet":
        evaluation = default_transforms(splits, flip=flip, shift=shift).evaluation
        flip = flip is not False
        return BatchTransforms(BatchImageNetWeak(size, flip=flip), BatchMoCoV2(size, flip=flip), evaluation)
    padding, flip = shift_and_flip(splits, shift, flip)
    return BatchTransforms(BatchWeak(size, padding, flip), BatchStrong(size, padding, flip, variant=variant))
