# SPDX-License-Identifier: BSD-3-Clause
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_simmatch_loss_block(monkeypatch, capsys):
    """The example itself asserts that p̂, loss and gradient are those of the block it replaces."""
    arguments = ["--rows", "17", "--slots", "203", "--classes", "7", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["simmatch_loss_block.py", *arguments])
    runpy.run_path(str(EXAMPLES / "simmatch_loss_block.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert all(f"{name:9} equal" in printed for name in ("p̂", "loss", "gradient"))
    assert "peak extra" in printed


def run_on_digits(name, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(sys, "argv", [name, "--data", "digits", "--labels", "3", "--seconds", "0"])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_lp_deepssl_pseudo_labels(monkeypatch, capsys):
    """The example itself asserts that labels and weights are those of LP-DeepSSL's solves, run to their tolerance."""
    printed = run_on_digits("lp_deepssl_pseudo_labels.py", monkeypatch, capsys)
    assert "labels and weights equal" in printed
    rows = [line for line in printed.splitlines() if "labels as when converged" in line]
    assert [float(row.split()[-1]) for row in rows[1:]] == [1.0, 1.0]


def test_label_spreading(monkeypatch, capsys):
    """The example itself asserts that labels and distributions are those of scikit-learn's steps, taken to the end."""
    printed = run_on_digits("label_spreading.py", monkeypatch, capsys)
    assert "labels equal" in printed
    rows = [line for line in printed.splitlines() if "labels as at the end" in line]
    assert [float(row.split()[-1]) for row in rows[1:]] == [1.0, 1.0]


def test_pair_mlp_head(monkeypatch, capsys):
    """The example itself asserts that loss and gradients are those of the head it replaces."""
    pytest.importorskip("torchvision")
    monkeypatch.setattr(
        sys, "argv", ["pair_mlp_head.py", "--rows", "17", "--dim", "8", "--hidden", "24", "--seconds", "0", "--device", "cpu"]
    )
    runpy.run_path(str(EXAMPLES / "pair_mlp_head.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.count(" equal: ") == 6 and "peak extra" in printed


def test_mean_teacher_similarity(monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(sys, "argv", ["mean_teacher_similarity.py", "--steps", "40", "--seeds", "1"])
    runpy.run_path(str(EXAMPLES / "mean_teacher_similarity.py"), run_name="__main__")
    rows = [line.rsplit(" ", 1) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2 and all(float(accuracy) > 30 for _, accuracy in rows)  # of ten classes


def test_metric_learning_loop(monkeypatch, capsys):
    """The example itself asserts that losses and gradients are those of pytorch-metric-learning, in its own loop."""
    pytest.importorskip("pytorch_metric_learning")
    pytest.importorskip("sklearn")
    monkeypatch.setattr(sys, "argv", ["metric_learning_loop.py", "--iterations", "4", "--rows", "64", "--seconds", "0", "--device", "cpu"])
    runpy.run_path(str(EXAMPLES / "metric_learning_loop.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "4 losses equal" in printed and "gradients equal" in printed and printed.count("peak extra") == 2
