# SPDX-License-Identifier: BSD-3-Clause
import pickle

import numpy as np
import pytest
from PIL import Image

from ssmkernels.data import ArrayImages, FileImages


@pytest.mark.parametrize(("shape", "mode"), [((4, 6, 5), "L"), ((4, 6, 5, 3), "RGB")])
def test_arrays(shape, mode):
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    dataset = ArrayImages(images, np.array([0, 1, 2, 1], dtype=np.uint8), 3)
    assert (len(dataset), dataset.num_classes, dataset.labels.dtype) == (4, 3, np.int64)
    assert (dataset.image(2).mode, dataset.image(2).size) == (mode, (5, 6))
    assert np.array_equal(np.asarray(dataset.image(2)), images[2])


def test_files(tmp_path):
    paths = [tmp_path / name for name in ("ü 0.png", "1.png")]
    Image.new("L", (4, 3), 9).save(paths[0])
    Image.new("RGBA", (4, 3), (1, 2, 3, 255)).save(paths[1])
    dataset = pickle.loads(pickle.dumps(FileImages([paths[0], str(paths[1])], np.array([1, 0]), 2)))
    assert (len(dataset), dataset.labels.tolist()) == (2, [1, 0])
    assert [dataset.image(i).mode for i in range(2)] == ["RGB", "RGB"]
    assert [dataset.image(i).getpixel((0, 0)) for i in range(2)] == [(9, 9, 9), (1, 2, 3)]
    paths[0].unlink()
    with pytest.raises(FileNotFoundError, match=r"ü 0\.png"):
        dataset.image(0)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 4, 4)), [0, 1], "images is float64 of shape"),
        (np.zeros((2, 4, 4, 4), np.uint8), [0, 1], r"images is uint8 of shape \(2, 4, 4, 4\)"),
        (np.zeros((2, 4), np.uint8), [0, 1], r"images is uint8 of shape \(2, 4\)"),
        (np.zeros((2, 4, 4), np.uint8), [0], r"labels is int64 of shape \(1,\); it should be integers of shape \[2\]"),
        (np.zeros((2, 4, 4), np.uint8), [0.0, 1.0], "labels is float64"),
        (np.zeros((2, 4, 4), np.uint8), [0, 3], r"labels are in \[0, 3\]; they should be in \[0, 3\)"),
        (np.zeros((2, 4, 4), np.uint8), [-2, 0], r"labels are in \[-2, 0\]"),
    ],
)
def test_bad_arguments(images, labels, message):
    with pytest.raises(ValueError, match=message):
        ArrayImages(images, np.array(labels), 3)
