# SPDX-License-Identifier: BSD-3-Clause
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ssmkernels import data
from ssmkernels.data import MultiCropBatch, MultiCropBatches, crop_views, unite
from ssmkernels.data.augment import MoCoV2

RNG = np.random.default_rng(0)
PHOTOGRAPHS = data.ImageCollection(
    data.ArrayImages(RNG.integers(0, 256, (10, 40, 50, 3), dtype=np.uint8), np.arange(10) % 3, 3),
    tuple("abc"),
    image_size=32,
)
GREY = data.ImageCollection(
    data.ArrayImages(RNG.integers(0, 256, (6, 8, 8), dtype=np.uint8), np.arange(6) % 2, 2),
    ("x", "y"),
    (0.3,),
    (0.2,),
    8,
    "crop",
)


def views(collection=PHOTOGRAPHS, normalization="imagenet", **settings):
    return crop_views(collection, normalization, **{"size": 24, "small_size": 12, **settings})


def batches(collection=PHOTOGRAPHS, **settings):
    options = {"num_small": 3, "batch_size": 4, "seed": 5, "start_step": 0, "num_steps": 9}
    return MultiCropBatches(collection.images, settings.pop("crops", views()), **{**options, **settings})


def test_crops_of_two_sizes():
    batch = batches()[2]
    assert isinstance(batch, MultiCropBatch)
    assert (tuple(batch.large.shape), tuple(batch.small.shape)) == ((8, 3, 24, 24), (12, 3, 12, 12))
    assert (batch.large.dtype, batch.positions.dtype, len(batch.positions)) == (torch.float32, torch.int64, 4)
    assert not torch.equal(batch.large[:4], batch.large[4:]), "two crops of an image differ"
    without = batches(num_small=0)[2]
    assert len(without.small) == 0
    assert torch.equal(without.large, batch.large)


def test_crops_stand_crop_by_crop_and_show_the_images_named():
    crops = views()
    batch = batches(crops=crops)[1]
    for number in range(5):
        rows, transform = (batch.large, crops.large) if number < 2 else (batch.small, crops.small)
        first = 4 * (number if number < 2 else number - 2)
        for place, position in enumerate(batch.positions.tolist()):
            rng = data.generator(5, data.Stream.MULTI_CROP, 1, (number << 32) + place)
            expected = data.to_tensor(transform(PHOTOGRAPHS.images.image(position), rng), crops.mean, crops.std)
            assert torch.equal(rows[first + place], expected)


def test_every_image_comes_once_an_epoch():
    positions = torch.cat([batches(batch_size=5)[step].positions for step in range(4)])
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in positions.split(10))


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_processes_and_resuming_change_no_bit(workers):
    whole, resumed = batches(), list(DataLoader(batches(start_step=6), batch_size=None, num_workers=workers))
    assert len(resumed) == 3
    for step, batch in enumerate(resumed, start=6):
        assert all(torch.equal(a, b) for a, b in zip(whole[step], batch, strict=True))
    assert not torch.equal(whole[0].large, batches(seed=6)[0].large)


def test_ranks_share_a_batch():
    whole, parts = batches()[3], [batches(rank=rank, world_size=2)[3] for rank in range(2)]
    assert torch.equal(torch.cat([part.positions for part in parts]), whole.positions)
    for crop in range(2):
        expected = torch.cat([part.large[2 * crop : 2 * crop + 2] for part in parts])
        assert torch.equal(expected, whole.large[4 * crop : 4 * crop + 4])


def test_small_crops_show_less():
    """On a ramp from left to right the range of values is the share of the width that a crop covers."""
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))
    collection = data.ImageCollection(
        data.ArrayImages(ramp[None], np.zeros(1, int), 1), ("ramp",), (0.0,), (1.0,), 64, "crop"
    )
    crops = crop_views(collection, "native", size=32, small_size=16, jitter=0, blur=0)
    image, spread = collection.images.image(0), {}
    for name, view in (("large", crops.large), ("small", crops.small)):
        pixels = [np.asarray(view(image, data.generator(0, 0, step)), dtype=float) for step in range(50)]
        spread[name] = np.array([np.ptp(crop) / 255 for crop in pixels])
    # Widths √(area · aspect), of areas from .05 to .14 and from .14 to 1 and of aspects from 3/4 to 4/3.
    assert spread["small"].min() > 0.1 and spread["small"].max() < 0.45
    assert spread["large"].min() > 0.28 and spread["large"].max() > 0.8


def test_what_networks_take():
    native = batches(GREY, crops=views(GREY, "native", size=8, small_size=6))[0]
    assert (native.large.shape[1:], native.small.shape[1:]) == ((1, 8, 8), (1, 6, 6))
    bgr, rgb = (views(normalization=name, jitter=0, blur=0) for name in ("bgr-caffe", "half"))
    image = PHOTOGRAPHS.images.image(0)
    first, second = (np.asarray(crops.large(image, data.generator(0, 0, 1))) for crops in (bgr, rgb))
    assert np.array_equal(first, second[..., ::-1])
    assert bgr.mean == data.NORMALIZATIONS["bgr-caffe"].mean


def test_no_blur_and_no_jitter():
    view = MoCoV2(16, (0.5, 1.0), flip=False, jitter=0, blur=0)
    image = PHOTOGRAPHS.images.image(1)
    crop = data.augment.ImageNetWeak(16, (0.5, 1.0), flip=False)
    same = grey = 0
    for step in range(60):
        seen, plain = view(image, data.generator(2, 0, step)), crop(image, data.generator(2, 0, step))
        difference = np.abs(np.asarray(seen, dtype=int) - np.asarray(plain, dtype=int)).max()
        same += difference <= 8  # a hue turned by nothing still goes to HSV and back
        grey += np.ptp(np.asarray(seen), axis=2).max() == 0
    assert same + grey == 60 and 4 < grey < 22


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: batches(num_small=-1), "num_small is -1"),
        (
            lambda: batches(batch_size=3, world_size=2),
            "batch_size is 3; it should be a positive multiple of world_size, 2",
        ),
        (lambda: batches(start_step=10), "start_step is 10"),
        (lambda: views(size=0), "size is 0; it should be at least 1"),
        (lambda: views(small_size=0), "small_size is 0"),
        (lambda: views(scale=(0.5, 0.2)), "scale is"),
        (lambda: views(jitter=2), "jitter is 2"),
        (lambda: views(blur=0.01), r"blur is 0\.01; it should be 0 or at least 0\.1"),
        (lambda: views(normalization="caffe"), "normalization is 'caffe'"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_past_the_last_batch():
    with pytest.raises(IndexError, match="item 9 of 9 batches"):
        batches()[9]


def test_union():
    other = data.ImageCollection(
        data.ArrayImages(RNG.integers(0, 256, (4, 20, 20, 3), dtype=np.uint8), np.array([1, 0, 1, 1]), 2),
        ("d", "e"),
        image_size=64,
    )
    both = unite(PHOTOGRAPHS, other, data.class_subset(PHOTOGRAPHS, [2]))
    assert (len(both), both.num_classes, both.class_names, both.image_size) == (
        17,
        6,
        ("a", "b", "c", "d", "e", "c"),
        32,
    )
    assert both.labels.tolist() == [*PHOTOGRAPHS.labels.tolist(), 4, 3, 4, 4, 5, 5, 5]
    for index, (source, place) in {
        0: (PHOTOGRAPHS, 0),
        9: (PHOTOGRAPHS, 9),
        10: (other, 0),
        13: (other, 3),
        15: (PHOTOGRAPHS, 5),
    }.items():
        assert np.array_equal(np.asarray(both.images.image(index)), np.asarray(source.images.image(place)))
    assert unite(GREY).labels.tolist() == GREY.labels.tolist()


def test_what_cannot_be_united():
    with pytest.raises(ValueError, match="augmentation 'crop'; it should be 'imagenet', as in the first"):
        unite(PHOTOGRAPHS, GREY)
    larger = data.ImageCollection(
        data.ArrayImages(np.zeros((1, 9, 9), np.uint8), np.zeros(1, int), 1), ("z",), (0.3,), (0.2,), 9, "crop"
    )
    with pytest.raises(ValueError, match="image_size 9; it should be 8"):
        unite(GREY, larger)
    with pytest.raises(ValueError, match="datasets is empty"):
        data.ImageUnion()
