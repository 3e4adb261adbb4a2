# SPDX-License-Identifier: BSD-3-Clause
"""Protocols of the code bases as settings: class lists, no validation classes, held-out images, pairs (i, i), labels of
ImageNet.
"""

import json

import numpy as np
import pytest

from ssmkernels import data
from ssmkernels.trainers import MLSN, DataConfig, MLSNConfig, RunConfig
from ssmkernels.trainers.cli import main, parse_config
from ssmkernels.trainers.loop import make_fabric
from ssmkernels.trainers.swav import SwAVConfig, SwAVDataConfig, load_images

CPU = ["--run.accelerator", "cpu", "--run.bar", "false"]
MIXED_LP = ["--model", "convnet-small", "--freeze_bn", "false", "--data.images_per_class", "6", "--k", "4"]
SHORT = ["--data.labels_per_class", "2", "--labeled_epochs", "1", "--epochs", "2", "--batch_size", "24"]
CLASSIFIER = ["--data.name", "digits", "--data.labels", "20", "--batch_size", "4", "--steps", "2"]


def records(folder, group="test"):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["group"] == group]


def test_half_of_the_classes_to_train_on_and_half_to_test_on(tmp_path, capsys):
    folder = tmp_path / "run"
    halves = ["--data.fractions", "[0.5, 0.0, 0.5]", "--run.out", str(folder)]
    assert main(["mixed-lp", *MIXED_LP, *SHORT, *CPU, *halves]) == 0
    assert "test_MAP@R: " in capsys.readouterr().out
    assert len(records(folder)) == 2
    assert not any(name.startswith("validation") for name in records(folder)[-1])
    assert not (folder / "best.pt").exists()


def test_classes_of_a_list(tmp_path, capsys):
    folder, path = tmp_path / "run", tmp_path / "classes.txt"
    path.write_text("".join(f"{i} {part}\n" for i, part in enumerate(["test", "val", "train"] * 2)))
    assert main(["mixed-lp", *MIXED_LP, *SHORT, *CPU, "--data.classes_file", str(path), "--run.out", str(folder)]) == 0
    labels = {line.split("\t")[1] for line in (folder / "labels.txt").read_text().splitlines()}
    assert labels == {"2", "5"}
    assert {"validation_P@8", "test_P@8"} <= records(folder)[-1].keys()
    path.write_text("0 train\n")
    assert main(["mixed-lp", *MIXED_LP, "--data.classes_file", str(path), "--run.out", str(tmp_path / "other")]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"ssmkernels train: {path} has 1 classes to train on and 0 to test on; it should have both"
    ]


def test_swav_learns_from_the_classes_of_a_list(tmp_path):
    (tmp_path / "classes.txt").write_text("7 test\n1 train\n0 validation\n4 test\n")
    learnt, tested = load_images(SwAVConfig(SwAVDataConfig(classes_file=str(tmp_path / "classes.txt"))))
    assert (learnt.class_names, tested.class_names) == (("0", "1"), ("4", "7"))


@pytest.mark.parametrize(("method", "figure"), [("mlsn", "error"), ("simmatch", "accuracy")])
def test_images_that_are_held_out(tmp_path, method, figure):
    few = {"mlsn": ["--pairs", "8", "--hidden_features", "4"], "simmatch": ["--mu", "1"]}[method]
    folder = tmp_path / "run"
    images = [*CLASSIFIER, "--data.held_out", "3", "--model", "convnet-small"]
    assert main([method, *images, *few, *CPU, "--run.out", str(folder)]) == 0
    assert {f"validation_ema_{figure}", f"ema_{figure}", f"validation_student_{figure}"} <= records(folder)[-1].keys()


def mlsn(**settings):
    chosen = DataConfig(labels=20, held_out=settings.pop("held_out", 0))
    run = RunConfig(accelerator="cpu", bar=False)
    config = MLSNConfig(chosen, model="convnet-small", batch_size=4, pairs=8, hidden_features=4, run=run, **settings)
    return MLSN(config, data.load_dataset("digits"), make_fabric(RunConfig(accelerator="cpu")))


def test_held_out_images_are_of_each_class_and_are_not_learnt_from():
    trainer = mlsn(held_out=4)
    assert np.bincount(trainer.held_out.labels).tolist() == [4] * 10
    assert len(trainer.splits.train) == 1198 - 40
    assert not set(trainer.held_out.index) & set(trainer.splits.train.index)
    numbers = [int(line.split("\t")[0]) for line in trainer.labels_text().splitlines()]
    assert len(numbers) == 20
    assert not set(numbers) & set(trainer.held_out.index)
    assert mlsn().held_out is None


def test_pairs_of_an_image_with_itself(monkeypatch):
    asked = []
    from ssmkernels.trainers import mlsn as module

    sample = module.sample_pairs
    monkeypatch.setattr(module, "sample_pairs", lambda *a, **k: asked.append(k["self_pairs"]) or sample(*a, **k))
    for wanted in (True, False):
        trainer = mlsn(self_pairs=wanted, steps=1)
        trainer.step(next(iter(trainer.batches(0))), 0)
    assert asked == [True, False]


@pytest.mark.parametrize(("name", "count"), [("imagenet-1", 13), ("imagenet-10", 128)])
def test_imagenet_has_equally_many_labels_of_each_class(name, count):
    """Of 1,000 classes of 732 to 1,300 images, as ILSVRC2012 has them."""
    chosen = parse_config("simmatch", ["--config", name])[0].data
    assert (chosen.labels, chosen.proportional, chosen.labels_in_unlabeled) == (1000 * count, False, False)
    labels = np.repeat(np.arange(1000), np.linspace(732, 1300, 1000).astype(int))
    drawn = data.split_labels(labels, chosen.labels, seed=1, proportional=chosen.proportional)
    assert np.bincount(labels[drawn]).tolist() == [count] * 1000
