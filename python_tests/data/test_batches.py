# SPDX-License-Identifier: BSD-3-Clause
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ssmkernels.data import ArrayImages, Batch, TrainBatches, evaluation_batches, to_tensor
from ssmkernels.data.augment import ResizeCenterCrop, Strong, Weak

RNG = np.random.default_rng(0)
IMAGES = ArrayImages(RNG.integers(0, 256, (50, 16, 16, 3), dtype=np.uint8), np.arange(50) % 10, 10)
LABELED = np.array([3, 4, 10, 21, 32, 48])
STATISTICS = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}


def batches(**changes):
    options = {
        "weak": Weak(16, 2),
        "strong": Strong(16, 2),
        "batch_size": 8,
        "mu": 3,
        "seed": 7,
        "start_step": 0,
        "num_steps": 10,
    }
    options |= {**STATISTICS, **changes}
    return TrainBatches(
        options.pop("labeled", IMAGES),
        options.pop("labeled_index", LABELED),
        options.pop("unlabeled", IMAGES),
        **options,
    )


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def identity(image, rng):
    return image


def test_shapes_and_types():
    batch = batches()[0]
    assert [(tuple(images.shape), images.dtype) for images in batch] == [
        ((8, 3, 16, 16), torch.float32),
        ((8,), torch.int64),
        ((8,), torch.int64),
        ((24, 3, 16, 16), torch.float32),
        ((24, 3, 16, 16), torch.float32),
        ((24,), torch.int64),
    ]


def test_images_labels_and_slots_belong_together():
    batch = batches(weak=identity, strong=identity)[1]
    for image, label, slot in zip(batch.labeled_weak, batch.labels, batch.slots, strict=True):
        assert label == IMAGES.labels[LABELED[slot]]
        assert torch.equal(image, to_tensor(IMAGES.image(LABELED[slot]), **STATISTICS))
    assert torch.equal(batch.unlabeled_weak, batch.unlabeled_strong), "two views of the same images"
    everything = torch.stack([to_tensor(IMAGES.image(i), **STATISTICS) for i in range(50)])
    index = [int((everything == image).flatten(1).all(dim=1).nonzero()) for image in batch.unlabeled_weak]
    assert batch.unlabeled_labels.tolist() == IMAGES.labels[index].tolist()


def test_views_differ():
    batch = batches()[0]
    assert not torch.equal(batch.unlabeled_weak, batch.unlabeled_strong)
    twice = [(batch.slots == slot).nonzero().flatten() for slot in range(6)]
    pair = next(rows for rows in twice if len(rows) > 1)
    assert not torch.equal(batch.labeled_weak[pair[0]], batch.labeled_weak[pair[1]]), (
        "an image that comes twice is augmented twice"
    )


def test_every_image_comes_once_an_epoch():
    labels = torch.cat(
        [batches(mu=5, batch_size=5, weak=identity, strong=identity)[step].unlabeled_labels for step in range(2)]
    )
    assert torch.bincount(labels).tolist() == [5] * 10
    slots = torch.cat([batches(batch_size=3)[step].slots for step in range(2)])
    assert sorted(slots.tolist()) == list(range(6))


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_processes_and_resuming_change_no_bit(workers):
    expected = [batches()[step] for step in range(10)]
    loaded = list(DataLoader(batches(), batch_size=None, num_workers=workers))
    resumed = list(DataLoader(batches(start_step=6), batch_size=None, num_workers=workers))
    assert (len(loaded), len(resumed)) == (10, 4)
    assert isinstance(loaded[0], Batch)
    assert all(equal(a, b) for a, b in zip(expected, loaded, strict=True))
    assert all(equal(a, b) for a, b in zip(expected[6:], resumed, strict=True))


def test_steps_and_seeds_differ():
    assert not equal(batches()[0], batches()[1])
    assert not equal(batches()[0], batches(seed=8)[0])


@pytest.mark.parametrize("world_size", [2, 4])
def test_slices_of_the_ranks_make_the_batch(world_size):
    for step in (0, 5):
        slices = [batches(rank=rank, world_size=world_size)[step] for rank in range(world_size)]
        assert len(slices[0].labels) == 8 // world_size
        assert equal(batches()[step], [torch.cat(parts) for parts in zip(*slices, strict=True)])


def test_labeled_images_can_be_left_out():
    kept = batches(exclude_labeled=True, weak=identity, strong=identity, mu=11, batch_size=4)
    labeled = torch.stack([to_tensor(IMAGES.image(i), **STATISTICS) for i in LABELED]).flatten(1)
    assert (torch.cdist(kept[0].unlabeled_weak.flatten(1), labeled) > 1).all()
    assert (
        torch.cdist(
            batches(weak=identity, strong=identity, mu=25, batch_size=2)[0].unlabeled_weak.flatten(1), labeled
        ).min()
        == 0
    )


def test_without_unlabeled_images():
    batch, full = batches(mu=0)[3], batches()[3]
    assert equal(batch[:3], full[:3])
    assert batch.unlabeled_weak.shape == batch.unlabeled_strong.shape == (0, 3, 16, 16)
    assert batch.unlabeled_labels.shape == (0,)


def test_ends():
    assert len(list(batches(start_step=8))) == 2
    assert len(list(batches(start_step=10))) == 0
    with pytest.raises(IndexError, match="item 10 of 10 batches"):
        batches()[10]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_batches(workers):
    loaded = list(evaluation_batches(IMAGES, 16, workers=workers, **STATISTICS))
    assert [len(labels) for _, labels in loaded] == [16, 16, 16, 2]
    assert torch.cat([labels for _, labels in loaded]).tolist() == IMAGES.labels.tolist()
    assert torch.equal(torch.cat([images for images, _ in loaded])[37], to_tensor(IMAGES.image(37), **STATISTICS))


def test_evaluation_is_shared_among_ranks():
    shares = [list(evaluation_batches(IMAGES, 7, rank=rank, world_size=3, **STATISTICS)) for rank in range(3)]
    labels = [torch.cat([labels for _, labels in share]) for share in shares]
    assert torch.cat(labels).tolist() == IMAGES.labels.tolist()
    assert [len(of_rank) for of_rank in labels] == [16, 17, 17]


def test_evaluation_transforms_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    images, _ = next(iter(evaluation_batches(IMAGES, 5, transform=ResizeCenterCrop(12, 10), **STATISTICS)))
    assert images.shape == (5, 3, 10, 10)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labeled_index": np.array([50])}, r"labeled_index is in \[50, 50\]; it should be in \[0, 50\)"),
        ({"labeled_index": np.array([], int)}, r"labeled_index is int64 of shape \(0,\)"),
        ({"labeled_index": np.array([0.5])}, "labeled_index is float64"),
        ({"mu": -1}, "mu is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"world_size": 3}, "batch_size is 8; it should be a positive multiple of world_size, 3"),
        ({"rank": 1}, r"rank is 1; it should be in \[0, world_size\)"),
        ({"start_step": 11}, r"start_step is 11; it should be in \[0, num_steps\], num_steps being 10"),
        ({"exclude_labeled": True, "labeled_index": np.arange(50)}, "unlabeled has no image left"),
        (
            {"exclude_labeled": True, "unlabeled": ArrayImages(IMAGES.images, IMAGES.labels, 10)},
            "labeled and unlabeled should then be the same data set",
        ),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        batches(**changes)


def test_bad_evaluation_arguments():
    with pytest.raises(ValueError, match="batch_size is 0"):
        evaluation_batches(IMAGES, 0, **STATISTICS)
    with pytest.raises(ValueError, match="rank is 2"):
        evaluation_batches(IMAGES, 4, rank=2, world_size=2, **STATISTICS)
