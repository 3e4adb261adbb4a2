# SPDX-License-Identifier: BSD-3-Clause
"""Lists of labelled images in exactly the forms in which they are published."""

import json

import numpy as np
import pytest

from ssmkernels.data import ArrayImages, FileImages, ImageSubset, labels_text, read_labels

CLASSES = ("airplane", "automobile", "bird")
LABELS = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
SYNSETS = ("n01532829", "n02108551")


@pytest.fixture
def in_memory():
    return ArrayImages(np.zeros((10, 4, 4, 3), np.uint8), LABELS, 3)


@pytest.fixture
def in_files(tmp_path):
    """n01532829/n01532829_0.JPEG … 3, then those of n02108551; none is opened."""
    paths = [tmp_path / "train" / synset / f"{synset}_{number}.JPEG" for synset in SYNSETS for number in range(4)]
    return FileImages(paths, np.repeat([0, 1], 4), 2)


@pytest.fixture
def make_list(tmp_path):
    def make(content, name="list.txt"):
        (tmp_path / name).write_text(content)
        return tmp_path / name

    return make


def test_file_names_as_simmatch_lists_them(in_files, make_list):
    path = make_list("n02108551_3.JPEG\nn01532829_0.JPEG\nn02108551_1.JPEG")  # its files end without a newline
    assert read_labels(path, in_files, SYNSETS).tolist() == [0, 5, 7]


def test_files_and_classes_as_lp_deepssl_lists_them(in_files, make_list):
    path = make_list("n01532829_2.JPEG n01532829\nn02108551_0.JPEG n02108551\n")
    assert read_labels(path, in_files, SYNSETS).tolist() == [2, 4]


def test_lp_deepssl_numbers_the_images_of_cifar(in_memory, make_list):
    path = make_list("4_automobile.png automobile\n0_airplane.png airplane\n8_bird.png bird\n")
    assert read_labels(path, in_memory, CLASSES).tolist() == [0, 4, 8]


def test_names_of_classes_where_the_data_set_has_numbers(in_memory, make_list):
    numbers = ("0", "1", "2")
    path = make_list("4_automobile.png automobile\n0_airplane.png airplane\n3_airplane.png airplane\n")
    assert read_labels(path, in_memory, numbers).tolist() == [0, 3, 4]
    for lines in ("4_a.png a\n0_a.png a\n", "0_a.png a\n3_b.png b\n"):  # one class, two numbers; two classes, one
        with pytest.raises(ValueError, match="line 2"):
            read_labels(make_list(lines), in_memory, numbers)


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_numbers_as_usb_saves_them(in_memory, tmp_path, dtype):
    path = tmp_path / "lb_labels3_1.0_seed0_idx.npy"
    np.save(path, np.asarray([9, 1, 5], dtype))
    assert read_labels(path, in_memory, CLASSES).tolist() == [1, 5, 9]


def test_numbers_as_fixmatch_writes_them(in_memory, make_list):
    content = json.dumps({"distribution": [1.0, 1.0, 1.0], "label": [2, 3, 7]}, indent=2, sort_keys=True)
    path = make_list(content, "cifar10.1@3-label.json")
    assert read_labels(path, in_memory, CLASSES).tolist() == [2, 3, 7]


def test_files_in_shards_as_fixmatch_lists_them(in_files, make_list):
    path = make_list("n02108551_2.JPEG,0,0\nn01532829_1.JPEG,0,1\n")
    assert read_labels(path, in_files, SYNSETS).tolist() == [1, 6]


def test_a_name_may_have_folders(tmp_path, make_list):
    images = FileImages([tmp_path / "a" / "1 x.png", tmp_path / "b" / "1 x.png"], np.array([0, 1]), 2)
    assert read_labels(make_list("b/1 x.png\n"), images, "ab").tolist() == [1]
    with pytest.raises(ValueError, match=r"line 1: 2 images have the name '1 x.png'"):
        read_labels(make_list("1 x.png\n"), images, "ab")


@pytest.mark.parametrize("kind", ["in_memory", "in_files"])
def test_what_a_run_writes_is_read(request, make_list, kind):
    images = request.getfixturevalue(kind)
    names = ["two words", "b", "c"]
    index = np.array([1, 4, 7])
    text = labels_text(index, images, names)
    assert len(text.splitlines()) == 3
    assert read_labels(make_list(text), images, names).tolist() == index.tolist()


def test_names_and_numbers_of_a_subset_are_those_of_the_whole(in_memory, make_list):
    subset = ImageSubset(in_memory, np.array([1, 4, 7, 2, 5]), np.array([0, 0, 0, 1, 1]), 2)
    inner = ImageSubset(subset, np.array([3, 1]), np.array([1, 0]), 2)
    path = make_list(labels_text(np.array([0, 1]), inner, CLASSES[1:]))
    assert path.read_text() == "2\tbird\n4\tautomobile\n"
    assert read_labels(path, inner, CLASSES[1:]).tolist() == [0, 1]
    assert read_labels(path, in_memory, CLASSES).tolist() == [2, 4]
    with pytest.raises(ValueError, match=r"line 1: '0' is none of the 2 images to train on"):
        read_labels(make_list("0\n"), inner, CLASSES[1:])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("n01532829_0.JPEG\nn01532829_9.JPEG\n", r"list.txt, line 2: 'n01532829_9.JPEG' is the file name of no image"),
        ("n01532829_0.JPEG\n\nn01532829_0.JPEG\n", r"list.txt, line 3: 'n01532829_0.JPEG' is already in line 1"),
        ("n01532829_0.JPEG n02108551\n", r"line 1: .* is of class 'n01532829' and not 'n02108551'"),
        ("n01532829_0.JPEG\tn02108551\n", r"line 1: .* is of class 'n01532829' and not 'n02108551'"),
        ("3\n8\n", r"line 2: image 8 is out of range; it should be in \[0, 8\)"),
        ("-1\n", r"line 1: image -1 is out of range"),
        ("\n", r"list.txt lists no images"),
    ],
)
def test_bad_lines(in_files, make_list, lines, message):
    with pytest.raises(ValueError, match=message):
        read_labels(make_list(lines), in_files, SYNSETS)


def test_bad_lists_of_images_without_files(in_memory, make_list, tmp_path):
    with pytest.raises(ValueError, match=r"line 1: 'cat.png' is no number"):
        read_labels(make_list("cat.png\n"), in_memory, CLASSES)
    with pytest.raises(ValueError, match=r"line 1: '4_bird.png bird' is of class 'automobile' and not 'bird'"):
        read_labels(make_list("4_bird.png bird\n"), in_memory, CLASSES)
    with pytest.raises(FileNotFoundError, match=r"nowhere.txt: there is no such list"):
        read_labels(tmp_path / "nowhere.txt", in_memory, CLASSES)
    for content, message in ((b"\xff\x00", "neither text"), (b"", "not a readable .npy")):
        path = tmp_path / ("list.npy" if not content else "list.bin")
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_labels(path, in_memory, CLASSES)
    for array, message in ((np.ones(3), "float64"), (np.array([[1]]), r"\(1, 1\)"), (np.array([1, 1]), "entry 1")):
        np.save(tmp_path / "list.npy", array)
        with pytest.raises(ValueError, match=message):
            read_labels(tmp_path / "list.npy", in_memory, CLASSES)
    for content in ("{}", '{"label": [1.5]}', "[true]", "{"):
        with pytest.raises(ValueError, match=r"list.json"):
            read_labels(make_list(content, "list.json"), in_memory, CLASSES)
