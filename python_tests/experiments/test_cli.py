# SPDX-License-Identifier: BSD-3-Clause
import dataclasses

import pytest

from ssmkernels.experiments.cli import EXPERIMENTS, main
from ssmkernels.experiments.experiment import BUDGETS, Experiment
from ssmkernels.trainers.cli import parse_config
from ssmkernels.trainers.loop import RunResult


def test_list_names_every_experiment(capsys):
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out
    for name in (*(f"simmatch-table{n}" for n in (1, 2, 3, 5)), "simmatch-figure4", "simmatch-figure5"):
        assert name in listed


@pytest.mark.parametrize("name", [name for name, each in EXPERIMENTS.items() if isinstance(each, Experiment)])
def test_every_cell_and_every_budget_parses(name):
    experiment = EXPERIMENTS[name]
    assert set(experiment.budgets) == set(BUDGETS)
    for cell in experiment.cells:
        assert len(cell.paper) == len(experiment.figures)
        parse_config(experiment.method, [*cell.arguments, *experiment.offline])
    for budget in experiment.budgets.values():
        parse_config(experiment.method, [*experiment.cells[-1].arguments, *budget.arguments, *experiment.offline])
    assert experiment.budgets["paper"].seeds >= 1


def test_the_papers_numbers_of_table_1():
    paper = {(cell.row, cell.column): cell.paper[0] for cell in EXPERIMENTS["simmatch-table1"].cells}
    assert paper["SimMatch", "cifar10-40"] == "94.40 ± 1.37"
    assert paper["FixMatch", "cifar100-10000"] == "77.40 ± 0.12"
    assert len(paper) == 18


def test_smoke_runs_offline_and_says_so(tmp_path, capsys, monkeypatch):
    table = EXPERIMENTS["simmatch-table5"]
    monkeypatch.setitem(EXPERIMENTS, "simmatch-table5", dataclasses.replace(table, offline=(*table.offline, "--steps", "8")))
    assert main(["simmatch-table5", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "No folder of images was given" in printed
    assert "61.7" in printed
    report = (tmp_path / "simmatch-table5-smoke" / "report.md").read_text()
    assert report in printed
    assert report.count("| imagenet-1 ") == 3


def test_a_second_call_goes_on_from_the_runs_there_are(tmp_path, monkeypatch):
    small = dataclasses.replace(EXPERIMENTS["simmatch-table1"], cells=EXPERIMENTS["simmatch-table1"].cells[1:2])
    monkeypatch.setitem(EXPERIMENTS, "simmatch-table1", small)
    assert main(["simmatch-table1", "--out", str(tmp_path)]) == 0
    first = (tmp_path / "simmatch-table1-smoke" / "report.md").read_text()
    checkpoint = next(tmp_path.rglob("checkpoint.pt"))
    written = checkpoint.stat().st_mtime_ns
    assert main(["simmatch-table1", "--out", str(tmp_path)]) == 0
    assert checkpoint.stat().st_mtime_ns == written
    assert (tmp_path / "simmatch-table1-smoke" / "report.md").read_text() == first


def test_larger_budgets_need_data(tmp_path, capsys):
    assert main(["simmatch-table1", "--budget", "paper", "--out", str(tmp_path)]) == 1
    assert "--data is missing" in capsys.readouterr().err


def test_figures_are_medians_or_last_values_over_seeds():
    figure = EXPERIMENTS["simmatch-table1"].figures[0]
    runs = [RunResult(True, 3, [{"step": k, "ema_accuracy": base + k / 100} for k in range(3)]) for base in (0.5, 0.7)]
    assert figure.of(runs) == "61.00 ± 14.14"
    assert figure.values(runs) == [pytest.approx(51), pytest.approx(71)]
    assert dataclasses.replace(figure, median=False).of(runs) == "62.00 ± 14.14"
    assert dataclasses.replace(figure, name="student_top5").of(runs) == "-"
