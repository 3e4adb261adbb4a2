# SPDX-License-Identifier: BSD-3-Clause
"""Trainers on photographs in files: views in batches by default, the same from any number of loading processes."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from ssmkernels import data
from ssmkernels.data.batched_crops import BatchImageNetWeak, BatchMoCoV2
from ssmkernels.trainers import (
    CollectionConfig,
    DataConfig,
    MixedLP,
    MixedLPConfig,
    RunConfig,
    SimMatch,
    SimMatchConfig,
    SladeConfig,
    SladeDataConfig,
    SwAV,
    SwAVConfig,
)
from ssmkernels.trainers.loop import make_fabric
from ssmkernels.trainers.slade_data import SladeImages


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Forty of eight classes, 50 to 69 pixels wide."""
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    paths = [folder / f"{number}.jpg" for number in range(40)]
    for number, path in enumerate(paths):
        pixels = rng.integers(0, 256, (60, 50 + number % 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return data.FileImages(paths, np.arange(40) % 8, 8)


NAMES = tuple("abcdefgh")


def simmatch(photographs, augment, workers):
    config = SimMatchConfig(
        data=DataConfig(labels=16, augment=augment),
        model="convnet-small",
        batch_size=4,
        mu=2,
        steps=3,
        first_epoch_steps=1,
        run=run(workers),
    )
    splits = data.ImageSplits(photographs, photographs, 8, NAMES, (0.5,) * 3, (0.25,) * 3, 24, "imagenet")
    return SimMatch(config, splits, make_fabric(config.run))


def mixed_lp(photographs, augment, workers):
    config = MixedLPConfig(
        data=CollectionConfig(augment=augment, image_size=24, labels_per_class=2),
        model="convnet-small",
        k=4,
        batch_size=4,
        run=run(workers),
    )
    return MixedLP(config, data.ImageCollection(photographs, NAMES), make_fabric(config.run))


def swav(photographs, augment, workers):
    config = SwAVConfig(
        model="convnet-small",
        num_prototypes=8,
        batch_size=4,
        queue_length=0,
        small_crops=2,
        run=run(workers),
    )
    config.data.augment, config.data.image_size = augment, 24
    images = data.ImageCollection(photographs, NAMES)
    return SwAV(config, images, images, make_fabric(config.run))


def run(workers):
    return RunConfig(accelerator="cpu", bar=False, workers=workers)


def first_batches(trainer, start=0):
    return list(itertools.islice(iter(trainer.batches(start)), 2))


@pytest.mark.parametrize("make", [simmatch, mixed_lp, swav])
def test_views_are_the_same_from_any_number_of_loading_processes_and_after_resuming(photographs, make):
    trainer = make(photographs, "batched", 0)
    batches = first_batches(trainer)
    for others in (first_batches(make(photographs, "batched", 2)), [None, *first_batches(trainer, 1)[:1]]):
        for batch, other in zip(batches, others, strict=True):
            for tensor, same in zip(batch, other or batch, strict=True):
                assert torch.equal(tensor, same)
    assert torch.isfinite(trainer.step(batches[0], 0)["loss"])


@pytest.mark.parametrize("make", [simmatch, mixed_lp, swav])
def test_pillow_is_a_setting(photographs, make):
    """Batches of the same images, whose views are others."""
    batched, pil = (first_batches(make(photographs, augment, 0))[0] for augment in ("batched", "pil"))
    for name, tensor in batched._asdict().items():
        other = getattr(pil, name)
        assert (tensor.shape, tensor.dtype) == (other.shape, other.dtype)
        assert torch.equal(tensor, other) == (tensor.dtype == torch.int64)


def test_batched_is_the_default(photographs):
    trainer = simmatch(photographs, "batched", 0)
    assert SimMatchConfig().data.augment == "batched"
    assert isinstance(trainer.transforms.weak, BatchImageNetWeak)
    assert isinstance(trainer.transforms.strong, BatchMoCoV2)
    assert trainer.seen.resize == 27  # 24 · 256 / 224
    for config in (MixedLPConfig(), SladeConfig(), SwAVConfig()):
        assert config.data.augment == "batched"


def test_slade_sees_photographs_by_musgraves_crops(photographs):
    config = SladeConfig(
        data=SladeDataConfig(image_size=227, test_fraction=0.25, folds=2), model="convnet-small", run=run(0)
    )
    images = SladeImages(config, data.ImageCollection(photographs, NAMES))
    view = images.views(images.labeled).training
    assert isinstance(view, BatchImageNetWeak)
    assert (view.size, view.scale, view.settings.flip) == (227, (0.16, 1.0), True)
    assert images.views(images.labeled).evaluation.crop.resize == 256
