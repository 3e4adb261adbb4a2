# SPDX-License-Identifier: BSD-3-Clause
from ssmkernels.experiments import demo
from ssmkernels.trainers import RunResult


def test_demo_leaves_a_report_and_plots(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "SEEDS", (1,))
    monkeypatch.setattr(demo, "STEPS", 40)
    monkeypatch.setattr(demo, "SETS", ("digits",))
    monkeypatch.setattr(demo, "OP_SECONDS", 0.1)
    monkeypatch.setattr(demo, "EMBEDDINGS", (*demo.EMBEDDINGS, "--labeled_epochs", "1", "--epochs", "1"))
    few = ("--teacher_steps", "4", "--warm_up_steps", "2", "--student_steps", "4")
    monkeypatch.setattr(demo, "SLADE", (*demo.SLADE, *few))
    assert demo.main(["--out", str(tmp_path), "--budget-minutes", "0.8"]) == 0
    printed = capsys.readouterr().out
    report = (tmp_path / "report.md").read_text()
    assert report in printed
    for words in ("supervised only", "FixMatch", "SimMatch", "accuracy of confident pseudo-labels", "instance_matching", "peak extra MiB"):
        assert words in report
    for words in ("2 draws of five labels per class", "shuffled W_dis", "What does not", "proxies only", "mixed LP"):
        assert words in report
    for words in ("components of the student", "+ Basis + Mining", "4 steps of the teacher, 2 of W_a, 4 of the student"):
        assert words in report
    assert (tmp_path / "figure4.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "report.md") in printed


def test_methods_have_identical_budgets():
    from ssmkernels.trainers.cli import parse_config

    configs = [parse_config("simmatch", ["--config", "digits", *arguments])[0] for arguments in demo.METHODS.values()]
    for name in ("data", "model", "steps", "batch_size", "mu", "learning_rate", "weight_decay", "ema_decay", "threshold"):
        assert len({repr(getattr(config, name)) for config in configs}) == 1


def test_a_stopped_demo_reports_what_is_done(tmp_path, capsys, monkeypatch):
    history = [{"step": 1, "ema_accuracy": 0.9, "pseudo_label_accuracy": 0.8}]
    results = iter([RunResult(True, 1, history), RunResult(False, 0)])
    monkeypatch.setattr(demo, "train_simmatch", lambda config: next(results))
    assert demo.main(["--out", str(tmp_path)]) == 0
    report = (tmp_path / "report.md").read_text()
    assert "Stopped early" in report
    assert "10.0" in report


def test_seeds_that_do_not_fit_are_left_out(tmp_path, monkeypatch):
    seeds = []

    def train(config):
        seeds.append(config.seed)
        return RunResult(True, 1, [{"step": 1, "ema_accuracy": 0.9}])

    monkeypatch.setattr(demo, "train_simmatch", train)
    runs, stopped = demo.train_methods(40, deadline=0.0)
    assert seeds == [1, 1, 1]
    assert not stopped
    assert all(len(results) == 1 for results in runs.values())
