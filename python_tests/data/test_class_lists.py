# SPDX-License-Identifier: BSD-3-Clause
import re

import pytest

from ssmkernels.data import read_classes

NAMES = ("001.Black_footed_Albatross", "Oak Titmouse", "Owl", "Common Goldeneye (male)")


def test_classes_by_names_and_numbers(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("\ufeffOak Titmouse\ttest\n\n3 train\n001.Black_footed_Albatross   val\n", encoding="utf-8")
    train, validation, test = read_classes(path, NAMES)
    assert (train.tolist(), validation.tolist(), test.tolist()) == ([3], [0], [1])
    path.write_text("Owl train\nOak Titmouse test\n0 test\n")
    train, validation, test = read_classes(str(path), NAMES)
    assert (train.tolist(), validation.tolist(), test.tolist()) == ([2], [], [0, 1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Owl train\nOwl test\n", "line 2: 'Owl' comes twice"),
        ("Owl train\n2 test\n", "line 2: '2' comes twice"),
        ("Owl training\n", "line 1: 'Owl training' should be a class and one of train, validation and test"),
        ("train\n", "line 1: 'train' should be a class and one of"),
        ("Eagle train\n", "line 1: 'Eagle' is none of the 4 classes"),
        ("4 train\n", "line 1: '4' is none of the 4 classes"),
        ("Owl train\n", "has 1 classes to train on and 0 to test on"),
        ("", "has 0 classes to train on and 0 to test on"),
    ],
)
def test_bad_lists(tmp_path, text, message):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_classes(tmp_path / "classes.txt", NAMES)
    assert "classes.txt" in str(error.value)


def test_a_missing_list(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such list of classes"):
        read_classes(tmp_path / "none.txt", NAMES)
