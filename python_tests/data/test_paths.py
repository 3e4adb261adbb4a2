# SPDX-License-Identifier: BSD-3-Clause
"""Lists of files, in memory and mapped: the same files in the same order, in the bytes that they take."""

import pickle
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from ssmkernels.data import FileImages, TrainBatches, load_dataset, read_labels
from ssmkernels.data.paths import PATHS_OF_A_RUN, PathList


def names(count):
    """Of many lengths, the empty one and bytes of two lengths of UTF-8 among them."""
    return ["" if i == 3 else f"folder {i % 7}/" + "ü" * (i * i % 11) + f"{i}.png" for i in range(count)]


@pytest.mark.parametrize("count", [0, 1, 6, PATHS_OF_A_RUN, PATHS_OF_A_RUN + 1, 3 * PATHS_OF_A_RUN - 1, 1000])
@pytest.mark.parametrize("at_once", [7, 2**20])
def test_list(tmp_path, monkeypatch, count, at_once):
    monkeypatch.setattr("ssmkernels.data.paths.SCANNED_AT_ONCE", at_once)
    expected = [name.encode() for name in names(count)]
    lists = [PathList.of(names(count))]
    for ending in ("\n", "") if count else ():
        (tmp_path / f"{len(lists)}.txt").write_text("\n".join(names(count)) + ending, encoding="utf-8")
        lists.append(PathList.mapped(tmp_path / f"{len(lists)}.txt"))
    for paths in (*lists, *(pickle.loads(pickle.dumps(paths)) for paths in lists)):
        assert len(paths) == count
        assert [*paths] == [paths[place] for place in range(count)] == expected
        if count:
            assert paths[-1] == paths[np.int64(-count) + count - 1] == expected[-1]
        for outside in (count, -count - 1):
            with pytest.raises(IndexError, match=f"path {outside} of {count}"):
                paths[outside]


def written_list(folder, count, dtype=np.int64):
    """``count`` images of 4 classes, half of them by absolute paths; their pixels are their numbers."""
    for part, size in (("train", count), ("test", 4)):
        (folder / "images").mkdir(exist_ok=True)
        lines = []
        for number in range(size):
            path = folder / "images" / f"{part}{number}.png"
            Image.new("RGB", (8, 8), (number, number, number)).save(path)
            lines.append(str(path) if number % 2 else f"images/{path.name}")
        (folder / f"{part}.txt").write_text("\n".join(lines) + "\n")
        np.save(folder / f"{part}.npy", (np.arange(size) % 4).astype(dtype))


def test_listed_files(tmp_path, monkeypatch):
    written_list(tmp_path, 70)
    monkeypatch.chdir(tmp_path.parent)
    splits = load_dataset("list", tmp_path.name)
    monkeypatch.chdir("/")
    assert (len(splits.train), len(splits.test), splits.class_names) == (70, 4, ("0", "1", "2", "3"))
    for train in (splits.train, pickle.loads(pickle.dumps(splits.train))):
        assert not train.labels.flags.writeable
        assert train.labels.tolist() == [number % 4 for number in range(70)]
        assert [train.image(number).getpixel((0, 0))[0] for number in (0, 1, 69)] == [0, 1, 69]
        assert train.path(0) == str(tmp_path / "images/train0.png")
        assert train.names(np.array([2, 3])) == ["train2.png", "train3.png"]
        assert train.by_base_name({"train3.png"}) == {"train3.png": [3]}
    (tmp_path / "classes.txt").write_text("cat\ndog\nfox\nowl\n")
    assert load_dataset("list", tmp_path).class_names == ("cat", "dog", "fox", "owl")


def test_training_from_listed_files(tmp_path):
    written_list(tmp_path, 12)
    train = load_dataset("list", tmp_path).train
    batches = TrainBatches(
        train,
        np.arange(8),
        train,
        weak=lambda image, _: image,
        strong=lambda image, _: image,
        batch_size=4,
        mu=1,
        seed=0,
        start_step=0,
        num_steps=1,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
    )
    batch = batches[0]
    number = (batch.unlabeled_weak[:, 0, 0, 0] * 255).round().long()
    assert batch.unlabeled_labels.tolist() == (number % 4).tolist()


@pytest.mark.parametrize("dtype", [np.int32, np.uint8])
def test_labels_of_other_integers(tmp_path, dtype):
    written_list(tmp_path, 5, dtype)
    labels = load_dataset("list", tmp_path).train.labels
    assert (labels.tolist(), labels.dtype) == ([0, 1, 2, 3, 0], np.int64)


def test_what_is_wrong_with_a_list(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"list: looked for train\.txt, train\.npy, test\.txt, test\.npy in"):
        load_dataset("list", tmp_path)
    written_list(tmp_path, 5)
    np.save(tmp_path / "train.npy", np.arange(4) % 3)
    with pytest.raises(ValueError, match=r"train\.npy, for the lines of .*train\.txt: labels is int64 of shape \(4,\)"):
        load_dataset("list", tmp_path)
    np.save(tmp_path / "train.npy", np.arange(5) % 3)
    with pytest.raises(ValueError, match=r"test\.npy, for the lines of .*test\.txt: labels are in \[0, 3\]"):
        load_dataset("list", tmp_path)
    np.save(tmp_path / "train.npy", np.zeros(5))
    with pytest.raises(ValueError, match=r"train\.npy holds float64 of shape \(5,\)"):
        load_dataset("list", tmp_path)
    np.save(tmp_path / "train.npy", np.arange(5) % 4)
    (tmp_path / "test.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"test\.txt lists no images"):
        load_dataset("list", tmp_path)


COUNT = 20_000


def paths_of_a_large_set():
    """A generator: there is no list of them."""
    return (f"/data/train/n{number % 1000:08d}/n{number % 1000:08d}_{number}.JPEG" for number in range(COUNT))


def test_bytes_of_a_list_in_memory():
    """An object for each path, in a list, is above 3 · text."""
    text = sum(len(path) + 1 for path in paths_of_a_large_set())
    labels = np.arange(COUNT) % 1000
    tracemalloc.start()
    try:
        images = FileImages(paths_of_a_large_set(), labels, 1000)
        kept, peak = tracemalloc.get_traced_memory()
        assert images.labels is labels
    finally:
        tracemalloc.stop()
    # A growing bytearray has an eighth to spare; the scan for separators has 9 bytes a path and a mask of 1 MiB.
    assert kept < text * 9 / 8 + 8 * COUNT / PATHS_OF_A_RUN + 2**14
    assert peak < text * 9 / 8 + 17 * COUNT + 2**20 + 2**14
    assert len(pickle.dumps(images)) < text + 8 * COUNT / PATHS_OF_A_RUN + labels.nbytes + 2**12


def test_bytes_of_a_mapped_list(tmp_path):
    """What a process has of its own, and what a loading process that is not forked is sent: where the runs begin."""
    (tmp_path / "paths.txt").write_text("\n".join(paths_of_a_large_set()))
    np.save(tmp_path / "labels.npy", np.arange(COUNT) % 1000)
    tracemalloc.start()
    try:
        images = FileImages.listed(tmp_path / "paths.txt", tmp_path / "labels.npy", 1000)
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    own = 8 * (COUNT / PATHS_OF_A_RUN + 2) + 2**14
    assert kept < own
    assert len(pickle.dumps(images)) < own
    assert images.path(COUNT - 1).endswith(f"n00000999_{COUNT - 1}.JPEG")


def test_bytes_of_a_list_of_labelled_images(tmp_path):
    """Their numbers are arrays: an entry each, as lists of text have, would be above 100 bytes."""
    images = FileImages(paths_of_a_large_set(), np.arange(COUNT) % 1000, 1000)
    np.save(tmp_path / "labeled.npy", np.arange(COUNT)[::-1])
    tracemalloc.start()
    try:
        index = read_labels(tmp_path / "labeled.npy", images, [str(label) for label in range(1000)])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.array_equal(index, np.arange(COUNT))
    assert peak < 6 * 8 * COUNT + 2**17
