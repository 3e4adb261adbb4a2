# SPDX-License-Identifier: BSD-3-Clause
"""Batches of images held on a device: those of the loading processes, but for the draws of the views."""

import numpy as np
import pytest
import torch
from PIL import Image

from ssmkernels import data
from ssmkernels.data import ArrayImages, DevicePixels, DeviceTrainBatches, ImageSubset, TrainBatches
from ssmkernels.data.batched_augment import BatchStrong, BatchWeak, augment
from ssmkernels.data.streams import Stream

RNG = np.random.default_rng(0)
STATISTICS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.1)}
IMAGES = ArrayImages(RNG.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8), np.arange(60) % 5, 5)
SETTINGS = {"batch_size": 4, "mu": 3, "seed": 7, "start_step": 0, "num_steps": 6, **STATISTICS}
CPU = torch.device("cpu")


def batches(images=IMAGES, device=CPU, **settings):
    transforms = {"weak": BatchWeak(8, 2), "strong": BatchStrong(8, 2)}
    index = np.arange(0, 20)
    return DeviceTrainBatches(images, index, images, device=device, **transforms, **{**SETTINGS, **settings})


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_images_labels_and_slots_are_those_of_loading_processes():
    """Views that keep their image as it is show which images they are of."""
    still = {"weak": data.augment.Weak(8, 0, flip=False), "strong": data.augment.Weak(8, 0, flip=False)}
    theirs = TrainBatches(IMAGES, np.arange(20), IMAGES, **still, **SETTINGS)
    still = {"weak": BatchWeak(8, 0, flip=False), "strong": BatchWeak(8, 0, flip=False)}
    ours = DeviceTrainBatches(IMAGES, np.arange(20), IMAGES, device=CPU, **still, **SETTINGS)
    assert len(ours) == len(theirs)
    for step in range(len(ours)):
        assert equal(ours[step], theirs[step])


def test_views_are_those_of_the_batched_transforms():
    made = batches()
    batch, step = made[2], 2
    index = np.arange(20)[batch.slots]
    pixels = np.stack([np.asarray(IMAGES.image(i)) for i in index]).transpose(0, 3, 1, 2)
    views = augment(
        torch.from_numpy(np.ascontiguousarray(pixels)),
        BatchWeak(8, 2),
        seed=7,
        stream=Stream.LABELED_WEAK,
        step=step,
        positions=np.arange(4),
    )
    assert torch.equal(batch.labeled_weak, data.batched_augment.normalize(views, **STATISTICS))
    assert not torch.equal(batch.unlabeled_weak, batch.unlabeled_strong)
    assert len({view.numpy().tobytes() for view in batch.unlabeled_strong}) == 12


def test_a_batch_does_not_depend_on_where_the_run_started():
    assert equal(batches(start_step=3)[1], batches()[4])
    assert len(list(batches(start_step=3))) == 3


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_see_together_what_one_sees(ranks):
    shares = [batches(rank=rank, world_size=ranks)[1] for rank in range(ranks)]
    together = [torch.cat(column) for column in zip(*shares, strict=True)]
    assert equal(together, batches()[1])


def test_without_unlabeled_images_there_are_none():
    batch = batches(mu=0)[0]
    assert (len(batch.labeled_weak), len(batch.unlabeled_weak), len(batch.unlabeled_strong)) == (4, 0, 0)


@pytest.mark.parametrize("kind", ["array", "subset", "custom", "grey"])
def test_pixels_are_those_of_the_images(kind):
    images = IMAGES
    if kind == "subset":
        images = ImageSubset(IMAGES, np.arange(30, 60)[::-1], IMAGES.labels[:30], 5)
    elif kind == "grey":
        images = ArrayImages(IMAGES.images[..., 0].copy(), IMAGES.labels, 5)
    elif kind == "custom":
        images = Own([IMAGES.image(i) for i in range(20)])
    index = np.array([3, 0, 11])
    expected = np.stack([np.asarray(images.image(i)) for i in index])
    expected = expected[:, None] if kind == "grey" else expected.transpose(0, 3, 1, 2)
    assert np.array_equal(DevicePixels(images, CPU)[index].numpy(), expected)


class Own:
    """A data set of somebody's own."""

    def __init__(self, images):
        self.images, self.labels, self.num_classes = images, np.zeros(len(images), dtype=np.int64), 1

    def __len__(self):
        return len(self.images)

    def image(self, index):
        return self.images[index]


def test_images_of_several_sizes_are_refused():
    with pytest.raises(ValueError, match=r"images are of 2 shapes; .*data\.augment pil"):
        DevicePixels(Own([Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))]), CPU)


def test_nothing_is_read_from_the_device():
    """A meta tensor has no values to read."""
    batch = batches(device=torch.device("meta"))[0]
    assert batch.unlabeled_strong.device.type == "meta"
    assert batch.unlabeled_strong.shape == (12, 3, 8, 8)


@pytest.mark.parametrize("transforms", [data.default_transforms, data.batch_transforms])
def test_shift_and_flip_can_be_chosen(transforms):
    splits = data.load_dataset("digits")
    weak, strong, _ = transforms(splits, flip=True, shift=3)
    for view in (weak, strong.weak if hasattr(strong, "weak") else strong.parts[0]):
        settings = getattr(view, "settings", view)
        assert (settings.padding, settings.flip) == (3, True)
