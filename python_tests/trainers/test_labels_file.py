# SPDX-License-Identifier: BSD-3-Clause
"""Labelled images by a list: every trainer takes one, and every run writes its own."""

import numpy as np
import pytest

from ssmkernels.trainers.cli import main
from ssmkernels.trainers.loop import MAY_DIFFER

CPU = ["--run.accelerator", "cpu", "--run.bar", "false"]
CLASSIFIER = ["--data.name", "digits", "--data.labels", "20", "--batch_size", "4", "--steps", "2", "--model"]
COLLECTION = ["--model", "convnet-small", "--freeze_bn", "false"]
FEW_IMAGES = [
    "--data.images_per_class",
    "8",
    "--data.labels_per_class",
    "2",
    "--k",
    "4",
    "--labeled_epochs",
    "1",
    "--epochs",
    "1",
]
TEACHER = ["--student", "none", "--teacher_steps", "2", "--batch_size", "8"]
RUNS = {
    "simmatch": [*CLASSIFIER, "convnet-small", "--mu", "1", *CPU],
    "mlsn": [*CLASSIFIER, "convnet-small", "--pairs", "8", "--hidden_features", "8", *CPU],
    "mixed-lp": [*COLLECTION, *FEW_IMAGES, *CPU],
    "slade": [*COLLECTION, *TEACHER, *CPU],
}


@pytest.mark.parametrize("method", RUNS)
def test_a_run_writes_the_labelled_images_and_reads_them(tmp_path, method, capsys):
    first, again = tmp_path / "first", tmp_path / "again"
    assert main([method, *RUNS[method], "--run.out", str(first)]) == 0
    lines = (first / "labels.txt").read_text().splitlines()
    assert lines
    assert all(line.split("\t")[0].isdigit() for line in lines)
    if method == "slade":  # its classes have labels, all their images
        return
    given = ["--data.labels_file", str(first / "labels.txt")]
    assert main([method, *RUNS[method], *given, "--run.out", str(again)]) == 0
    assert (again / "labels.txt").read_text() == (first / "labels.txt").read_text()
    means = [(folder / "metrics.jsonl").read_text().splitlines()[-1] for folder in (first, again)]
    assert means[0] == means[1]  # of the last evaluation


def test_a_list_of_usb(tmp_path):
    numbers = np.array([40, 3, 500, 77])
    np.save(tmp_path / "lb_labels4_1.0_seed0_idx.npy", numbers)
    given = ["--data.labels_file", str(tmp_path / "lb_labels4_1.0_seed0_idx.npy"), "--run.out", str(tmp_path / "run")]
    assert main(["simmatch", *RUNS["simmatch"], *given]) == 0
    lines = (tmp_path / "run" / "labels.txt").read_text().splitlines()
    assert [int(line.split("\t")[0]) for line in lines] == sorted(numbers.tolist())


def test_a_bad_list_is_one_line(tmp_path, capsys):
    (tmp_path / "list.txt").write_text("5\n5\n")
    given = ["--data.labels_file", str(tmp_path / "list.txt"), "--run.out", str(tmp_path / "run")]
    assert main(["simmatch", *RUNS["simmatch"], *given]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"ssmkernels train: {tmp_path / 'list.txt'}, line 2: '5' is already in line 1"
    ]
    assert not (tmp_path / "run").exists()


def test_resuming_compares_the_labelled_images_and_not_where_their_list_is(tmp_path, capsys):
    assert "data.labels_file" in MAY_DIFFER
    (tmp_path / "list.txt").write_text("5\n6\n7\n8\n")
    (tmp_path / "other.txt").write_text("5\n6\n7\n9\n")

    def resume(name):
        given = ["--data.labels_file", str(tmp_path / name), "--run.out", str(tmp_path / "run"), "--resume"]
        return main(["simmatch", *RUNS["simmatch"], *given])

    assert resume("list.txt") == 0
    (tmp_path / "list.txt").rename(tmp_path / "moved.txt")
    assert resume("moved.txt") == 0
    assert resume("other.txt") == 1
    assert "has other labelled images" in capsys.readouterr().err
