# SPDX-License-Identifier: BSD-3-Clause
"""The readers of SLADE's collections, on small trees of exactly the published form."""

import pytest
from PIL import Image

from ssmkernels.data import load_collection


def save(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 30), (value, 0, 0)).save(path)


def values(collection):
    """The colours of all pictures, by which they say which they are."""
    return [round(collection.images.image(i).getpixel((0, 0))[0], -1) for i in range(len(collection))]


def lay_out_nabirds(root):
    folder = root / "nabirds"
    images = (
        ("0000139e-21dc-4d0c-bfe1-4cae3c85c829", "0817", 10),
        ("0000d9fc-4e02-4c06-a0af-a55cfb16b12b", "0295", 20),
        ("00019306-9d83-4334-b255-a447742edce3", "0817", 30),
    )
    for name, number, value in images:
        save(folder / "images" / number / f"{name.replace('-', '')}.jpg", value)
    (folder / "images.txt").write_text(
        "".join(f"{name} {number}/{name.replace('-', '')}.jpg\n" for name, number, _ in images)
    )
    (folder / "image_class_labels.txt").write_text("".join(f"{name} {int(number)}\n" for name, number, _ in images))
    (folder / "classes.txt").write_text("0 Birds\n295 Common Goldeneye (Adult male)\n817 Oak Titmouse\n1010 Owls\n")
    (folder / "hierarchy.txt").write_text("295 0\n817 0\n1010 0\n")
    return [10, 20, 30], [1, 0, 1], ("Common Goldeneye (Adult male)", "Oak Titmouse")


def lay_out_compcars(root):
    folder = root / "data"
    save(folder / "image/78/3/2014/3ac218c0c6c378.jpg", 30), save(folder / "image/78/1/2014/2a5f34c6c33377.jpg", 20)
    save(folder / "image/100/7/2009/ff00ae0e25a0da.jpg", 10), save(folder / "image/78/1/2015/10b8d2c6c33377.jpg", 20)
    (folder / "misc").mkdir()
    (folder / "label/78/1/2014").mkdir(parents=True)
    (folder / "label/78/1/2014/2a5f34c6c33377.txt").write_text("4\n1\n52 116 868 581\n")
    return [10, 20, 20, 30], [0, 1, 1, 2], ("100/7", "78/1", "78/3")


def lay_out_inshop(root):
    lines = [
        ("img/WOMEN/Dresses/id_00000002/02_1_front.jpg", "id_00000002", "train", 10),
        ("img/WOMEN/Blouses_Shirts/id_00000001/02_1_front.jpg", "id_00000001", "query", 20),
        ("img/WOMEN/Blouses_Shirts/id_00000001/02_2_side.jpg", "id_00000001", "gallery", 30),
        ("img/MEN/Denim/id_00000080/01_7_additional.jpg", "id_00000080", "train", 40),
    ]
    for path, _, _, value in lines:
        save(root / "Img" / path, value)
    (root / "Eval").mkdir()
    (root / "Eval/list_eval_partition.txt").write_text(
        "4\nimage_name item_id evaluation_status\n"
        + "".join(f"{path:<70} {item} {split:<10}\n" for path, item, split, _ in lines)
    )
    return [10, 20, 30, 40], [0, 2, 2, 1], ("id_00000002", "id_00000080", "id_00000001")


def lay_out_fashion200k(root):
    labels = {
        "dress_train": [
            ("women/dresses/casual_and_day_dresses/51727804/51727804_0.jpeg", "green a-line dress", 10),
            ("women/dresses/casual_and_day_dresses/51727804/51727804_1.jpeg", "green a-line dress", 20),
        ],
        "top_train": [("women/tops/blouses/69182304/69182304_0.jpeg", "black silk top", 30)],
        "dress_test": [("women/dresses/casual_and_day_dresses/83077301/83077301_2.jpeg", "green a-line dress", 40)],
        "top_test": [("women/tops/blouses/69182304/69182304_0.jpeg", "black silk top", 30)],
    }
    (root / "labels").mkdir()
    for name, lines in labels.items():
        (root / f"labels/{name}_detect_all.txt").write_text(
            "".join(f"{path}\t-1.780000\t{text}\n" for path, text, _ in lines)
        )
        for path, _, value in lines:
            save(root / path, value)
    (root / "image_urls.txt").write_text("")
    return [40, 10, 20, 30], [1, 1, 1, 0], ("black silk top", "green a-line dress")


LAYOUTS = {
    "nabirds": lay_out_nabirds,
    "compcars": lay_out_compcars,
    "inshop": lay_out_inshop,
    "fashion200k": lay_out_fashion200k,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_form(tmp_path, name):
    colours, labels, names = LAYOUTS[name](tmp_path)
    collection = load_collection(name, tmp_path)
    assert values(collection) == colours
    assert collection.labels.tolist() == labels
    assert collection.class_names == names
    assert (collection.num_classes, collection.augmentation, collection.image_size) == (len(names), "imagenet", 224)


@pytest.mark.parametrize(
    ("name", "looked_for", "where_from"),
    [
        ("nabirds", "nabirds/images.txt", "https://dl.allaboutbirds.org/nabirds"),
        ("compcars", "data/image/<make>/<model>/<year>", "http://mmlab.ie.cuhk.edu.hk/datasets/comp_cars"),
        (
            "inshop",
            "Eval/list_eval_partition.txt and Img/img/",
            "https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html",
        ),
        ("fashion200k", "_train_detect_all.txt", "https://github.com/xthan/fashion-200k"),
    ],
)
def test_missing_data_is_explained(tmp_path, name, looked_for, where_from):
    with pytest.raises(FileNotFoundError, match=f"^{name}: looked for") as error:
        load_collection(name, tmp_path)
    assert all(part in str(error.value) for part in (looked_for, where_from, str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("nabirds", "nabirds/image_class_labels.txt", "x 817\n", "should list the same images"),
        ("nabirds", "nabirds/classes.txt", "817 Oak Titmouse\n", "classes.txt of .* should name every class"),
        (
            "inshop",
            "Eval/list_eval_partition.txt",
            "4\nimage_name item_id evaluation_status\n",
            "should have lines of an image, an item",
        ),
        (
            "inshop",
            "Eval/list_eval_partition.txt",
            "1\nheading\na.jpg id_1\n",
            "should have lines of an image, an item",
        ),
        (
            "fashion200k",
            "labels/top_train_detect_all.txt",
            "a.jpeg green dress\n",
            "an image, a score and a description",
        ),
    ],
)
def test_damaged_lists(tmp_path, name, file, content, message):
    LAYOUTS[name](tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_collection(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "folder"), [("nabirds", "nabirds/images"), ("inshop", "Img"), ("fashion200k", "women")]
)
def test_lists_without_their_images(tmp_path, name, folder):
    LAYOUTS[name](tmp_path)
    (tmp_path / folder).rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"{name}: looked for"):
        load_collection(name, tmp_path)
