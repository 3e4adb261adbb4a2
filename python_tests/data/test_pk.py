# SPDX-License-Identifier: BSD-3-Clause
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ssmkernels import data
from ssmkernels.data import CollectionBatch, PKBatches

RNG = np.random.default_rng(0)
SIZES = [6, 4, 2, 9, 5]  # of the classes 0, 10, 20, 30, 40
LABELS = RNG.permutation(np.repeat([0, 10, 20, 30, 40, -1], [*SIZES, 14]))
INDEX = RNG.permutation(60)[: len(LABELS)]
IMAGES = data.ArrayImages(RNG.integers(0, 256, (60, 8, 8), dtype=np.uint8), np.zeros(60, int), 1)
LABEL_OF = dict(zip(INDEX.tolist(), LABELS.tolist(), strict=True))


def shifted(image, rng):
    return image.rotate(90 * rng.integers(4))


def batches(index=INDEX, labels=LABELS, **changes):
    options = {
        "batch_size": 12,
        "per_class": 4,
        "seed": 3,
        "start_step": 0,
        "num_steps": 40,
        "mean": (0.5,),
        "std": (0.5,),
    }
    return PKBatches(IMAGES, index, labels, transform=shifted, **(options | changes))


def groups(batch, per_class=4):
    """[P, K] positions, and the class of each row."""
    positions = batch.positions.reshape(-1, per_class).tolist()
    classes = [{LABEL_OF[position] for position in row} for row in positions]
    assert all(len(of_row) == 1 for of_row in classes), "the images of a class stand in a row"
    return positions, [of_row.pop() for of_row in classes]


def test_a_batch_is_classes_times_images():
    seen = set()
    for step in range(40):
        batch = batches()[step]
        assert isinstance(batch, CollectionBatch)
        assert (tuple(batch.images.shape), batch.positions.dtype) == ((12, 1, 8, 8), torch.int64)
        positions, classes = groups(batch)
        assert len(set(classes)) == 3, "without replacement"
        assert -1 not in classes
        for row, label in zip(positions, classes, strict=True):
            assert len(set(row)) == 4 or label == 20, "distinct images, if the class has as many"
        seen.update(batch.positions.tolist())
    assert seen == set(INDEX[LABELS >= 0].tolist())


def test_classes_are_drawn_alike_whatever_their_size():
    counts = dict.fromkeys([0, 10, 20, 30, 40], 0)
    for step in range(400):
        for label in groups(batches(num_steps=400, batch_size=4)[step])[1]:
            counts[label] += 1
    assert min(counts.values()) > 55 and max(counts.values()) < 105  # 80 expected, standard deviation 8


def test_classes_come_again_with_other_images_where_there_are_too_few():
    two = np.where(np.isin(LABELS, [0, 30]), LABELS, -1)
    for step in range(20):
        positions, classes = groups(batches(labels=two, per_class=3)[step], 3)
        assert sorted(classes) == [0, 0, 30, 30]
        assert len(np.unique(positions)) == 12


def test_three_groups_of_two_classes():
    two = np.where(np.isin(LABELS, [0, 30]), LABELS, -1)
    tallies = [sorted(groups(batches(labels=two, batch_size=9, per_class=3)[step], 3)[1]) for step in range(20)]
    assert {tuple(tally) for tally in tallies} == {(0, 0, 30), (0, 30, 30)}


def test_the_images_are_those_named():
    batch = batches()[7]
    for place, position in enumerate(batch.positions.tolist()):
        view = shifted(IMAGES.image(position), data.generator(3, data.Stream.PK_VIEW, 7, place))
        assert torch.equal(batch.images[place], data.to_tensor(view, (0.5,), (0.5,)))


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_processes_and_resuming_change_no_bit(workers):
    whole = [batches()[step] for step in range(6)]
    resumed = list(DataLoader(batches(start_step=2, num_steps=6), batch_size=None, num_workers=workers))
    assert len(resumed) == 4
    for first, second in zip(whole[2:], resumed, strict=True):
        assert torch.equal(first.images, second.images) and torch.equal(first.positions, second.positions)


def test_seeds_steps_and_streams_are_independent():
    first = batches()[0]
    for other in (batches()[1], batches(seed=4)[0], batches(stream=1)[0]):
        assert not torch.equal(first.positions, other.positions)
    one = batches(labels=np.where(LABELS == 20, LABELS, -1), batch_size=2, per_class=2)
    other = batches(labels=np.where(LABELS == 20, LABELS, -1), batch_size=2, per_class=2, stream=1)
    same_order = [step for step in range(40) if torch.equal(one[step].positions, other[step].positions)]
    assert 8 < len(same_order) < 32, "orders agree by chance alone"
    assert any(not torch.equal(one[step].images, other[step].images) for step in same_order), "so do views"


@pytest.mark.parametrize("world_size", [3, 1])
def test_ranks_share_whole_classes(world_size):
    parts = [batches(rank=rank, world_size=world_size)[5] for rank in range(world_size)]
    whole = batches()[5]
    assert all(len(groups(part)[1]) == 3 // world_size for part in parts)
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert torch.equal(torch.cat([part.positions for part in parts]), whole.positions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_class": 0}, "per_class is 0; it should be at least 1"),
        ({"batch_size": 10}, "batch_size is 10; it should be a positive multiple of per_class · world_size, 4 · 1"),
        ({"world_size": 2}, "batch_size is 12; it should be a positive multiple of per_class · world_size, 4 · 2"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"rank": 1}, "rank is 1"),
        ({"stream": -1}, "stream is -1"),
        ({"start_step": 41}, "start_step is 41"),
        (
            {"labels": LABELS[1:]},
            r"labels is int64 of shape \(39,\); it should be integers of shape \[40\], as index has",
        ),
        ({"labels": LABELS / 2}, "labels is float64"),
        ({"labels": LABELS - 1}, "labels has a -2"),
        ({"labels": np.full(40, -1)}, "labels are all -1; at least one image should have a class"),
        ({"index": INDEX + 60}, "index is in"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        batches(**changes)


def test_views_of_musgraves_protocol():
    pixels = RNG.integers(0, 256, (1, 300, 400, 3), dtype=np.uint8)
    collection = data.ImageCollection(data.ArrayImages(pixels, np.zeros(1, int), 1), ("a",))
    views = data.retrieval_views(collection, size=227, resize=256, crop_scale=(0.16, 1.0))
    image = collection.images.image(0)
    assert np.array_equal(
        np.asarray(views.evaluation(image)), np.asarray(data.augment.ResizeCenterCrop(256, 227)(image))
    )
    expected = data.augment.ImageNetWeak(227, (0.16, 1.0))(image, data.generator(0, 0))
    assert np.array_equal(np.asarray(views.training(image, data.generator(0, 0))), np.asarray(expected))
    assert not np.array_equal(
        np.asarray(data.retrieval_views(collection, size=227).training(image, data.generator(0, 0))), expected
    )
    with pytest.raises(ValueError, match="resize being 200"):
        data.retrieval_views(collection, size=227, resize=200)
