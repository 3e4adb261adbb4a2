# SPDX-License-Identifier: BSD-3-Clause
"""Data sets as their authors publish them: small files of exactly that form, and a set's own folder as root."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from ssmkernels import metrics
from ssmkernels.data import (
    class_subset,
    load_collection,
    load_dataset,
    load_transfer_images,
    read_labels,
    split_labels,
)
from ssmkernels.trainers.cli import main
from ssmkernels.trainers.evaluation import retrieval

RNG = np.random.default_rng(0)


def save(path, value, side=20):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side + 4), (value, 0, 0)).save(path)


def reds(images):
    """The first channel of all pictures, by which they say which they are; JPEG changes it a little."""
    return [round(images.image(i).getpixel((0, 0))[0], -1) for i in range(len(images))]


def structs(**columns):
    """A struct array of MATLAB, [1, N]."""
    rows = np.empty((1, len(next(iter(columns.values())))), dtype=[(name, object) for name in columns])
    for name, values in columns.items():
        rows[name][0] = values
    return rows


def lay_out_cars(root, classes=(2, 1, 2, 3), tests=(0, 0, 1, 1)):
    numbers = range(1, len(classes) + 1)
    for number in numbers:
        save(root / "car_ims" / f"{number:06}.jpg", 10 * number)
    annotations = structs(
        relative_im_path=[f"car_ims/{number:06}.jpg" for number in numbers],
        **{f"bbox_{corner}": [1] * len(classes) for corner in ("x1", "y1", "x2", "y2")},
        **{"class": classes, "test": tests},
    )
    names = np.empty((1, 3), dtype=object)
    names[0] = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Acura TL Sedan 2012"]
    savemat(root / "cars_annos.mat", {"annotations": annotations, "class_names": names})


@pytest.mark.parametrize("folder", [".", "cars196"])
def test_cars_in_one_folder(tmp_path, folder):
    lay_out_cars(tmp_path / folder)
    collection = load_collection("cars196", tmp_path)
    assert reds(collection.images) == [10, 20, 30, 40]
    assert collection.labels.tolist() == [1, 0, 1, 2]
    assert collection.class_names == ("AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Acura TL Sedan 2012")


@pytest.mark.parametrize("folder", [".", "cars196"])
def test_cars_in_one_folder_for_linear_evaluation(tmp_path, folder):
    lay_out_cars(tmp_path / folder, classes=(1, 2, 3, 1, 2, 3, 3, 1), tests=(0, 0, 0, 0, 0, 0, 1, 1))
    parts = load_transfer_images("cars196", tmp_path)
    assert sorted(reds(parts.train) + reds(parts.validation)) == [10, 20, 30, 40, 50, 60]
    assert sorted(parts.validation.labels.tolist()) == [0, 1, 2]
    assert reds(parts.test) == [70, 80]
    assert parts.test.labels.tolist() == [2, 0]


def lay_out_sop(root):
    rows = {
        "train": [("1", "1", "1", "bicycle_final/111085122871_0.JPG"), ("2", "2", "1", "bicycle_final/12_0.JPG")],
        "test": [("3", "11319", "12", "toaster_final/111157129195_0.JPG"), ("4", "11319", "12", "toaster_final/1.JPG")],
    }
    value = 0
    for split, lines in rows.items():
        for *_, path in lines:
            value += 10
            save(root / path, value)
        text = "".join(" ".join(line) + "\n" for line in lines)
        (root / f"Ebay_{split}.txt").write_text("image_id class_id super_class_id path\n" + text)


def lay_out_cub(root):
    for number, path in enumerate(("001.Black_footed_Albatross/a.jpg", "002.Laysan_Albatross/b.jpg"), start=1):
        save(root / "images" / path, 10 * number)
    (root / "images.txt").write_text("1 001.Black_footed_Albatross/a.jpg\n2 002.Laysan_Albatross/b.jpg\n")
    (root / "image_class_labels.txt").write_text("1 1\n2 2\n")


def lay_out_nabirds(root):
    save(root / "images/0817/a.jpg", 10), save(root / "images/0295/b.jpg", 20)
    (root / "images.txt").write_text("x-1 0817/a.jpg\nx-2 0295/b.jpg\n")
    (root / "image_class_labels.txt").write_text("x-1 817\nx-2 295\n")
    (root / "classes.txt").write_text("295 Common Goldeneye\n817 Oak Titmouse\n")


def lay_out_compcars(root):
    save(root / "image/78/1/2014/a.jpg", 10), save(root / "image/78/3/2014/b.jpg", 20)


def lay_out_dogs(root):
    save(root / "n02085620-Chihuahua/a.jpg", 10), save(root / "n02085782-Japanese_spaniel/b.jpg", 20)


FOLDERS = {
    "cub200": ("CUB_200_2011", lay_out_cub, [10, 20], [0, 1]),
    "nabirds": ("nabirds", lay_out_nabirds, [10, 20], [1, 0]),
    "compcars": ("data", lay_out_compcars, [10, 20], [0, 1]),
    "dogs": ("Images", lay_out_dogs, [10, 20], [0, 1]),
    "sop": ("Stanford_Online_Products", lay_out_sop, [10, 20, 30, 40], [0, 1, 2, 2]),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_sets_own_folder_is_a_root(tmp_path, name, inside):
    folder, lay_out, colours, labels = FOLDERS[name]
    lay_out(tmp_path / folder)
    collection = load_collection(name, tmp_path / folder if inside else tmp_path)
    assert reds(collection.images) == colours
    assert collection.labels.tolist() == labels


def test_a_renamed_folder_is_a_root(tmp_path):
    lay_out_cub(tmp_path / "birds")
    assert load_collection("cub200", tmp_path / "birds").num_classes == 2


def test_sop_names_products_by_their_numbers(tmp_path):
    lay_out_sop(tmp_path / "Stanford_Online_Products")
    assert load_collection("sop", tmp_path).class_names == ("1", "2", "11319")
    (tmp_path / "Stanford_Online_Products/Ebay_test.txt").write_text("image_id class_id\n3 4\n")
    with pytest.raises(ValueError, match="a class, a super-class and a path"):
        load_collection("sop", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"sop: looked for Stanford_Online_Products/Ebay_train\.txt"):
        load_collection("sop", tmp_path / "elsewhere")


def lay_out_stl10(root):
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    pixels = {part: RNG.integers(0, 256, (n, 96, 96, 3), dtype=np.uint8) for part, n in (("train", 20), ("test", 5))}
    pixels["unlabeled"] = RNG.integers(0, 256, (7, 96, 96, 3), dtype=np.uint8)
    for part, images in pixels.items():
        images.transpose(0, 3, 2, 1).tofile(folder / f"{part}_X.bin")  # planes, column by column
    (np.arange(20) % 10 + 1).astype(np.uint8).tofile(folder / "train_y.bin")
    np.array([1, 10, 3, 3, 2], dtype=np.uint8).tofile(folder / "test_y.bin")
    (folder / "class_names.txt").write_text("airplane\nbird\n")
    return pixels


@pytest.mark.parametrize("inside", [False, True])
def test_stl10(tmp_path, inside):
    pixels = lay_out_stl10(tmp_path)
    splits = load_dataset("stl10", tmp_path / "stl10_binary" if inside else tmp_path)
    assert (len(splits.train), len(splits.test), splits.num_classes, splits.image_size) == (27, 5, 10, 96)
    assert splits.train.labels.tolist() == [*(np.arange(20) % 10), *[-1] * 7]
    assert splits.test.labels.tolist() == [0, 9, 2, 2, 1]
    assert np.array_equal(np.asarray(splits.train.image(3)), pixels["train"][3])
    assert np.array_equal(np.asarray(splits.train.image(22)), pixels["unlabeled"][2])
    assert np.array_equal(np.asarray(splits.test.image(4)), pixels["test"][4])
    drawn = split_labels(splits.train.labels, 10, seed=3)
    assert sorted(splits.train.labels[drawn]) == list(range(10))


def test_lists_name_no_image_of_unknown_class(tmp_path):
    lay_out_stl10(tmp_path)
    splits = load_dataset("stl10", tmp_path)
    np.save(tmp_path / "labels.npy", np.array([4, 21]))
    with pytest.raises(ValueError, match=r"entry 1: the class of '21' is not known"):
        read_labels(tmp_path / "labels.npy", splits.train, splits.class_names)


@pytest.mark.parametrize("method", ["simmatch", "mlsn"])
def test_training_on_images_without_a_class(tmp_path, method):
    """All 27 images are unlabelled ones; what would need their classes is not reported."""
    lay_out_stl10(tmp_path)
    small = {"simmatch": ["--mu", "1"], "mlsn": ["--pairs", "8", "--hidden_features", "4"]}[method]
    images = ["--data.name", "stl10", "--data.root", str(tmp_path), "--data.labels", "10", "--model", "convnet-small"]
    run = ["--batch_size", "4", "--steps", "2", "--run.out", str(tmp_path / "run"), "--run.accelerator", "cpu"]
    assert main([method, *images, *small, *run]) == 0
    record = (tmp_path / "run/metrics.jsonl").read_text()
    assert "loss" in record
    assert "accuracy" not in record.splitlines()[0]


def test_stl10_is_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"looked for train_X\.bin, train_y\.bin.*cs\.stanford\.edu"):
        load_dataset("stl10", tmp_path)
    lay_out_stl10(tmp_path)
    (tmp_path / "stl10_binary/test_X.bin").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"test_X\.bin has 100 bytes"):
        load_dataset("stl10", tmp_path)


def test_svhn_extra(tmp_path, monkeypatch):
    svhn = pytest.importorskip("torchvision.datasets.svhn")
    monkeypatch.setattr(svhn, "check_integrity", lambda *_: True)  # the files below are not the published ones
    images = RNG.integers(0, 256, (32, 32, 3, 9), dtype=np.uint8)
    for split, rows in (("train", slice(0, 4)), ("extra", slice(4, 7)), ("test", slice(7, 9))):
        savemat(tmp_path / f"{split}_32x32.mat", {"X": images[..., rows], "y": np.arange(1, 10)[rows][:, None]})
    splits = load_dataset("svhn-extra", tmp_path)
    assert splits.train.labels.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert splits.test.labels.tolist() == [8, 9]
    assert np.array_equal(np.asarray(splits.train.image(5)), images[..., 5])
    assert len(load_dataset("svhn", tmp_path).train) == 4


def lay_out_imagenet(root):
    """Three classes; the numbers of ILSVRC2012 are not in the order of the folders."""
    for label, wnid in enumerate(("n01440764", "n01443537", "n02119789")):
        save(root / "train" / wnid / f"{wnid}_10026.JPEG", 10 * label)
    for number in range(1, 5):
        save(root / "val" / f"ILSVRC2012_val_{number:08}.JPEG", 50 + 10 * number)
    return ["n02119789", "n01440764", "n02119789", "n01443537"]


def ground_truth(root, wnids):
    folder = root / "ILSVRC2012_devkit_t12" / "data"
    folder.mkdir(parents=True)
    numbers = {"n02119789": 1, "n01443537": 2, "n01440764": 3}
    nodes = [*numbers, "n00001740"]  # and an inner one of the hierarchy
    synsets = structs(
        ILSVRC2012_ID=[1, 2, 3, 1860],
        WNID=nodes,
        words=["kit fox, Vulpes macrotis", "goldfish", "tench", "entity"],
        num_children=[0, 0, 0, 3],
    )
    savemat(folder / "meta.mat", {"synsets": synsets.T})
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{numbers[wnid]}\n" for wnid in wnids))


def kaggle(root, wnids):
    lines = [f"ILSVRC2012_val_{i:08},{wnid} 85 1 499 272 {wnid} 1 2 3 4\n" for i, wnid in enumerate(wnids, start=1)]
    (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(reversed(lines)))


def numbered_list(root, wnids):
    order = sorted(set(wnids))
    lines = [f"ILSVRC2012_val_{i:08}.JPEG {order.index(wnid)}\n" for i, wnid in enumerate(wnids, start=1)]
    (root / "val" / "val.txt").write_text("".join(lines))


def named_list(root, wnids):
    (root / "val.txt").write_text(
        "".join(f"val/ILSVRC2012_val_{i:08}.JPEG {wnid}\n" for i, wnid in enumerate(wnids, start=1))
    )


@pytest.mark.parametrize("list_form", [ground_truth, kaggle, numbered_list, named_list])
def test_imagenets_flat_validation_folder(tmp_path, list_form):
    wnids = lay_out_imagenet(tmp_path)
    list_form(tmp_path, wnids)
    splits = load_dataset("imagenet", tmp_path)
    assert splits.class_names == ("n01440764", "n01443537", "n02119789")
    assert reds(splits.test) == [60, 70, 80, 90]
    assert splits.test.labels.tolist() == [2, 0, 2, 1]
    assert splits.train.labels.tolist() == [0, 1, 2]


def test_imagenets_list_has_to_fit(tmp_path):
    wnids = lay_out_imagenet(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no list of them: looked for ILSVRC2012_validation"):
        load_dataset("imagenet", tmp_path)
    named_list(tmp_path, ["n09999999", *wnids[1:]])
    with pytest.raises(ValueError, match=r"val\.txt has the class 'n09999999'; it should be a folder of train/"):
        load_dataset("imagenet", tmp_path)
    named_list(tmp_path, wnids[:3])
    with pytest.raises(ValueError, match=r"of the same images; ILSVRC2012_val_00000004 is in one only"):
        load_dataset("imagenet", tmp_path)
    (tmp_path / "val.txt").unlink()
    ground_truth(tmp_path, wnids[:3])
    with pytest.raises(ValueError, match="has 3 lines; val/ has 4 images"):
        load_dataset("imagenet", tmp_path)
    (tmp_path / "ILSVRC2012_devkit_t12/data/meta.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"meta\.mat of the development kit"):
        load_dataset("imagenet", tmp_path)


def test_in_shop_looks_for_queries_in_the_gallery(tmp_path):
    splits = ["train", "train", "query", "gallery", "gallery", "query", "gallery"]
    items = ["id_00000005", "id_00000005", *["id_00000001"] * 3, *["id_00000002"] * 2]
    paths = [f"img/WOMEN/Tees_Tanks/{item}/{i:02}_1_front.jpg" for i, item in enumerate(items)]
    for i, path in enumerate(paths):
        save(tmp_path / "Img" / path, 10 * i)
    lines = "".join(f"{path} {item} {split}\n" for path, item, split in zip(paths, items, splits, strict=True))
    (tmp_path / "Eval").mkdir()
    (tmp_path / "Eval/list_eval_partition.txt").write_text("7\nimage_name item_id evaluation_status\n" + lines)
    test = class_subset(load_collection("inshop", tmp_path), [1, 2])
    assert test.queries.tolist() == [True, False, False, True, False]
    torch.manual_seed(0)
    embeddings, labels = torch.randn(5, 3), torch.from_numpy(test.labels)
    asked = torch.tensor([0, 3])
    gallery = torch.tensor([1, 2, 4])
    expected = metrics.retrieval(
        embeddings[asked], labels[asked], references=embeddings[gallery], reference_labels=labels[gallery]
    )
    assert retrieval(embeddings, labels, test.queries) == expected
    training = class_subset(load_collection("inshop", tmp_path), [0])
    images = torch.randn(2, 3), torch.from_numpy(training.labels)
    assert retrieval(*images, training.queries) == metrics.retrieval(*images)
