# SPDX-License-Identifier: BSD-3-Clause
"""The tables, figures and digits of MLSN, on few steps."""

import dataclasses
import re

import numpy as np
import pytest
import torch

from ssmkernels.experiments import demo, similarity
from ssmkernels.experiments.cli import EXPERIMENTS, main
from ssmkernels.experiments.experiment import Budget
from ssmkernels.experiments.jobs import Outcome
from ssmkernels.trainers import RunResult, train_mlsn
from ssmkernels.trainers.cli import parse_config

FEW = Budget(
    1, ("--steps", "6", "--batch_size", "8", "--pairs", "64", "--run.eval_every", "6", "--run.log_every", "3", "--run.workers", "0")
)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(similarity, "DIGITS_BUDGETS", {"smoke": FEW})
    monkeypatch.setattr(similarity, "POINTS", 60)


def runs(*errors):
    results = [RunResult(True, 1, [{"step": 1, "ema_error": each, "student_error": each + 0.1}]) for each in errors]
    return [Outcome(f"seed {seed}", dataclasses.asdict(result)) for seed, result in enumerate(results)]


def test_every_experiment_is_listed(capsys):
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out
    for name in ("mlsn-table1", "mlsn-table2", "mlsn-weak-labels", "mlsn-figure2", "mlsn-figure3", "mlsn-mnist"):
        assert name in listed


def test_the_papers_numbers():
    tables = [
        {(cell.row, cell.column): cell.paper for cell in EXPERIMENTS[name].cells if not cell.column.endswith("-tuned")}
        for name in ("mlsn-table1", "mlsn-table2")
    ]
    assert len(tables[0]) == len(tables[1]) == 12
    assert tables[0]["MT + Similarity", "svhn-250"] == ("15.2 ± 0.82", "-")
    assert tables[0]["MT", "svhn-250"] == ("40.92 ± 1.13", "-")
    assert tables[1]["Π model", "cifar10-1000"] == ("-", "27.36 ± 1.20")
    assert tables[1]["Supervised only", "cifar10-4000"] == ("-", "20.66 ± 0.57")
    assert EXPERIMENTS["mlsn-table1"].budgets["paper"].seeds == EXPERIMENTS["mlsn-table2"].budgets["paper"].seeds == 10


def test_rows_differ_in_their_losses_only():
    configs = {row: parse_config("mlsn", ["--config", "digits", *arguments])[0] for row, arguments in similarity.DIGITS_ROWS.items()}
    for name in ("data", "model", "steps", "batch_size", "optimizer", "learning_rate", "weight_decay", "schedule", "ema_decay", "pairs"):
        assert len({repr(getattr(config, name)) for config in configs.values()}) == 1
    assert not configs["Supervised only"].uses_unlabeled
    assert configs["Π model"].teacher == "student"
    assert not configs["MT"].uses_similarity
    assert configs["MT + Similarity"].uses_similarity


def test_a_table_smokes_offline(tmp_path, capsys, monkeypatch):
    table = EXPERIMENTS["mlsn-table2"]
    monkeypatch.setitem(EXPERIMENTS, "mlsn-table2", dataclasses.replace(table, cells=table.cells[:8:2]))
    assert main(["mlsn-table2", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for words in ("No folder of images was given", "46.43 ± 1.21", "22.90 ± 0.93", "MixMatch-pytorch", "cifar10-1000-tuned"):
        assert words in printed


def test_digits_and_weak_labels(few, tmp_path, capsys):
    assert main(["mlsn-mnist", "--out", str(tmp_path)]) == 0
    report = (tmp_path / "mlsn-mnist-smoke" / "report.md").read_text()
    assert report in capsys.readouterr().out
    for row in similarity.DIGITS_ROWS:
        assert len(re.findall(rf"^\| {re.escape(row)} +\| [\d.]+ ", report, flags=re.MULTILINE)) == 2
    assert report.count("MT + Similarity − MT: ") == 2

    assert main(["mlsn-weak-labels", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for words in ("all labels, supervised", "an error of 5.3 %", "one seed, which says nothing"):
        assert words in printed


def test_figures_2_and_3(few, tmp_path, capsys):
    for name in ("mlsn-figure2", "mlsn-figure3"):
        assert main([name, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for words in ("| 25 %  ", "self-training", "silhouette", "all labels, supervised"):
        assert words in printed
    for name in ("mlsn-figure2-smoke/figure2.png", "mlsn-figure3-smoke/figure3.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    written = [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("checkpoint.pt"))]
    assert len(written) == 4
    assert main(["mlsn-figure2", "--out", str(tmp_path)]) == 0
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("checkpoint.pt"))] == written


def test_all_labels_are_all(few):
    config = similarity.choose("smoke", None).parse(similarity.choose("smoke", None).all_labels(), 1, None)
    assert (config.data.labels, config.data.proportional, config.uses_unlabeled) == (1198, True, False)


def test_similarity_probs_tell_clusters_apart(few, tmp_path):
    """y_sc of the figures: rows sum to 1, and say the class when the network knows which samples are alike."""
    config = similarity.choose("smoke", None).parse((), 1, tmp_path / "run")
    train_mlsn(config)
    trainer = similarity.trained(config, tmp_path / "run")
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
    clusters = torch.nn.functional.one_hot(labels, dim).float() + 0.01 * torch.randn(30, dim, generator=torch.Generator().manual_seed(0))
    probs = similarity.similarity_probs(trainer, clusters, clusters[:20], labels[:20])
    torch.testing.assert_close(probs.sum(dim=1), torch.ones(30))
    assert probs.argmax(dim=1).equal(labels)


def test_verdicts_are_paired():
    """1 ± 2.48 points over three seeds, by hand: Student's t with 2 degrees of freedom is 4.303, the deviation 1."""
    results = {"a": runs(0.10, 0.20, 0.30), "b": runs(0.11, 0.20, 0.32), "c": runs(0.20, 0.30, 0.41)}
    assert similarity.verdict(results, "b", "a", 3) == "b − a: +1.0 ± 2.5 points (95 % interval over 3 paired seeds): not told apart."
    assert similarity.verdict(results, "a", "c", 3).endswith(": lower.")
    assert similarity.verdict(results, "c", "a", 3).endswith(": higher.")
    assert "with one seed" in similarity.verdict({"a": runs(0.1), "b": runs(0.2)}, "a", "b", 3)
    assert "20.0 ± 10.0" in similarity.error_table(results, 3)


def test_verdicts_are_of_the_seeds_that_finished_both():
    failed = Outcome("seed 1", None, "ValueError: no")
    results = {"a": runs(0.10, 0.20), "b": [*runs(0.15), failed], "c": [failed, failed]}
    assert similarity.verdict(results, "b", "a", 3).startswith("b − a: +5.0 points with one seed")
    assert similarity.verdict(results, "c", "a", 3) == "c − a: no seed finished both."
    assert "| c      | failed " in similarity.error_table(results, 3)
    averaged, student = similarity.entries(results, "set", 3, {"b": "5.3"})[2:4]
    assert (averaged.values, averaged.paper, averaged.failed) == ((15.0,), "5.3", ("ValueError: no",))
    assert student.values == (25.0,) and student.paper == "-"


def test_digits_need_no_folder(tmp_path, capsys):
    assert main(["mlsn-mnist", "--data", "somewhere", "--out", str(tmp_path)]) == 1
    assert "--data is somewhere; these digits come inside packages" in capsys.readouterr().err


def test_a_stopped_run_stops_the_rows(few, monkeypatch):
    monkeypatch.setattr(similarity, "train_mlsn", lambda config, **_: RunResult(False, 3))
    with pytest.raises(KeyboardInterrupt):
        similarity.train_rows(similarity.choose("smoke", None), {"MT": similarity.MEAN_TEACHER}, out=None, seeds=(1,))
    assert demo.mlsn_section(6, (1,)) == ("", True)


def test_demo_section():
    section, stopped = demo.mlsn_section(2, (1,))
    assert not stopped
    for words in (*similarity.DIGITS_ROWS, "20 labels", "2 steps"):
        assert words in section


def test_places_are_the_same_for_the_same_features():
    features = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    first, again = similarity.tsne(features), similarity.tsne(features)
    assert first.shape == (40, 2)
    assert np.array_equal(first, again)
