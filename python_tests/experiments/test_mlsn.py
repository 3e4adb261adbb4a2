# SPDX-License-Identifier: BSD-3-Clause
"""The figures and digits of MLSN, on few steps."""

import numpy as np
import pytest
import torch

from ssmkernels.experiments import run
from ssmkernels.experiments.analyses import features
from ssmkernels.experiments.cli import main
from ssmkernels.experiments.record import read_record
from ssmkernels.experiments.run import Request, configure
from ssmkernels.experiments.sources import Source
from ssmkernels.experiments.spec import load_tables
from ssmkernels.trainers import train_mlsn
from ssmkernels.trainers.cli import METHODS, parse_config

KEYS = ("steps=6", "batch_size=8", "pairs=64", "run.eval_every=6", "run.log_every=3", "run.workers=0")
FEW = [argument for key in KEYS for argument in ("--set", key)]


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(features, "POINTS", 60)
    monkeypatch.setattr(run, "machine_in_words", lambda: "2 x processor, no GPU")


def request_of(tmp_path):
    return Request("smoke", Source(None), tmp_path)


def test_rows_differ_in_their_losses_only(tmp_path):
    table = load_tables()["mlsn-mnist"]
    column = next(iter(table.columns))
    configs = {
        row: configure(table, request_of(tmp_path), column, arguments)[0] for row, arguments in table.rows.items()
    }
    for name in (
        "data",
        "model",
        "steps",
        "batch_size",
        "optimizer",
        "learning_rate",
        "weight_decay",
        "schedule",
        "ema_decay",
        "pairs",
    ):
        assert len({repr(getattr(config, name)) for config in configs.values()}) == 1
    assert not configs["Supervised only"].uses_unlabeled
    assert configs["Π model"].teacher == "student"
    assert not configs["MT"].uses_similarity
    assert configs["MT + Similarity"].uses_similarity


def test_all_labels_are_all(tmp_path):
    table = load_tables()["mlsn-weak-labels"].variant("embedded")
    config, _ = configure(table, request_of(tmp_path), next(iter(table.columns)), table.rows["all labels, supervised"])
    assert (config.data.labels, config.data.proportional, config.uses_unlabeled) == (1198, True, False)


def test_digits_need_no_folder(tmp_path, capsys):
    assert main(["mlsn-mnist", "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "digits comes inside packages, and it should be left out" in capsys.readouterr().err


def test_a_failed_row_does_not_lose_the_others(few, tmp_path, monkeypatch):
    def sometimes(config, **rest):
        if config.pair_labels == "weak":
            raise RuntimeError("out of memory")
        return train_mlsn(config, **rest)

    monkeypatch.setitem(METHODS, "mlsn", METHODS["mlsn"]._replace(train=sometimes))
    assert main(["mlsn-figure3", "--out", str(tmp_path), *FEW]) == 1
    (folder,) = tmp_path.glob("mlsn-figure3-smoke*")
    record = read_record(folder)
    assert {entry.row for entry in record.entries if entry.failed} == {"MT + Similarity, weak labels"}
    silhouettes = {entry.row: entry.values for entry in record.entries if entry.figure == "silhouette"}
    assert set(silhouettes) == {"MT", "all labels, supervised"} and all(
        -1 <= value[0] <= 1 for value in silhouettes.values()
    )
    assert [plot.file for plot in record.plots] == ["figure3.png"] and (folder / "figure3.png").read_bytes().startswith(
        b"\x89PNG"
    )


def test_figure_2(few, tmp_path):
    assert main(["mlsn-figure2", "--out", str(tmp_path), *FEW]) == 0
    (folder,) = tmp_path.glob("mlsn-figure2-smoke*")
    rows = {entry.row for entry in read_record(folder).entries}
    assert {"self-training, most confident 25 %", "similarity, most confident 100 %"} <= rows
    assert (folder / "figure2.png").read_bytes().startswith(b"\x89PNG")


def test_similarity_probs_tell_clusters_apart(tmp_path):
    """y_sc of the figures: rows sum to 1, and say the class when the network knows which samples are alike."""
    config = parse_config(
        "mlsn", ["--config", "digits", "--run.out", str(tmp_path / "run"), *(f"--{key}" for key in KEYS)]
    )[0]
    train_mlsn(config)
    trainer = features.trained(config, tmp_path / "run")
    network = trainer.teacher.model.similarity
    with torch.no_grad():  # logit = 6 − 4 Σ |x_i − y_j| over the first ten features
        for parameter in network.parameters():
            parameter.zero_()
        dim = network.in_features
        for feature in range(10):
            for sign in (0, 1):
                unit = 2 * feature + sign
                network.w1[unit, feature], network.w1[unit, dim + feature] = (1 - 2 * sign), -(1 - 2 * sign)
                network.w2[unit] = -4
        network.b2.fill_(6)
    labels = torch.arange(10).repeat(3)
    clusters = torch.nn.functional.one_hot(labels, dim).float() + 0.01 * torch.randn(
        30, dim, generator=torch.Generator().manual_seed(0)
    )
    probs = features.similarity_probs(trainer, clusters, clusters[:20], labels[:20])
    torch.testing.assert_close(probs.sum(dim=1), torch.ones(30))
    assert probs.argmax(dim=1).equal(labels)


def test_places_are_the_same_for_the_same_features():
    points = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    first, again = features.tsne(points), features.tsne(points)
    assert first.shape == (40, 2)
    assert np.array_equal(first, again)
