# SPDX-License-Identifier: BSD-3-Clause
"""Images as a trained network sees them are those that it was evaluated on."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image

from ssmkernels import data
from ssmkernels.data.augment import to_tensor


def pictures(mode):
    """Of several sizes, one of them the size that small images have."""
    draw = np.random.default_rng(0)
    channels = (3,) if mode == "RGB" else ()
    return [Image.fromarray(draw.integers(0, 256, (*size, *channels), dtype=np.uint8)) for size in ((32, 32), (50, 41))]


def assert_same(seen, evaluation, mean, std, images):
    for image in images:
        expected = to_tensor(image if evaluation is None else evaluation(image), mean, std)
        assert torch.equal(to_tensor(seen.transform(image), seen.mean, seen.std), expected)


@pytest.mark.parametrize("normalization", [*data.NORMALIZATIONS, "native"])
@pytest.mark.parametrize("augmentation", ["imagenet", "crop"])
def test_views_of_collections(normalization, augmentation):
    collection = data.ImageCollection(
        data.ArrayImages(np.zeros((2, 32, 32, 3), dtype=np.uint8), np.arange(2), 2),
        ("a", "b"),
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.25, 0.3),
        image_size=32,
        augmentation=augmentation,
    )
    views = data.retrieval_views(collection, normalization, resize=40)
    seen = data.SeenImages.of(*views[1:], size=32)
    images = pictures("RGB")
    assert_same(seen, *views[1:], images if augmentation == "imagenet" else images[:1])
    if normalization != "native":
        assert_same(seen, *views[1:], pictures("L")[:1])


@pytest.mark.parametrize(("mode", "mean"), [("L", (0.3,)), ("RGB", (0.3, 0.4, 0.5))])
@pytest.mark.parametrize("augmentation", ["imagenet", "crop-flip"])
def test_views_of_splits(mode, mean, augmentation):
    images = data.ArrayImages(np.zeros((1, 32, 32), dtype=np.uint8), np.zeros(1, dtype=int), 1)
    splits = data.ImageSplits(images, images, 1, ("a",), mean, (0.2,) * len(mean), 32, augmentation)
    evaluation = data.default_transforms(splits).evaluation
    seen = data.SeenImages.of(evaluation, splits.mean, splits.std, size=32, class_names=splits.class_names)
    assert (seen.channels, seen.num_classes) == (splits.channels, splits.num_classes)
    assert_same(seen, evaluation, splits.mean, splits.std, pictures(mode)[: 2 if augmentation == "imagenet" else 1])


def test_any_mode_and_size_is_seen():
    seen = data.SeenImages((0.5,) * 3, (0.5,) * 3, image_size=32, resize=32, channel_order="RGB")
    for mode in ("1", "L", "P", "RGBA", "CMYK", "I;16"):
        view = seen.transform(Image.new(mode, (20, 45)))
        assert (view.mode, view.size) == ("RGB", (32, 32))


def test_means_may_be_rounded_otherwise():
    seen = data.SeenImages((0.5,), (0.25,), 8, 8, "L", ("a",))
    assert seen.is_like(data.SeenImages(**{**asdict(seen), "mean": (0.5000001,)}))
    for change in (
        {"mean": (0.51,)},
        {"mean": (0.5, 0.5), "std": (0.25, 0.25)},
        {"class_names": ("b",)},
        {"resize": 9},
    ):
        assert not seen.is_like(replace(seen, **change))
