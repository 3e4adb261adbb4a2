# SPDX-License-Identifier: BSD-3-Clause
"""Records, failures, places of the data, and the experiments together."""

import dataclasses
import re

import numpy as np
import pytest

from ssmkernels.experiments import cli, experiment
from ssmkernels.experiments.cli import EXPERIMENTS, PAPERS, main
from ssmkernels.experiments.experiment import Findings, Study
from ssmkernels.experiments.record import Entry, read_record
from ssmkernels.trainers.cli import METHODS


@pytest.fixture
def machine(monkeypatch):
    """No look at the machine, and few steps in Table 5."""
    monkeypatch.setattr(experiment, "machine", lambda: "2 x processor, no GPU")
    table = EXPERIMENTS["simmatch-table5"]
    few = ("--steps", "8", "--run.eval_every", "4", "--run.log_every", "4")
    monkeypatch.setitem(EXPERIMENTS, "simmatch-table5", dataclasses.replace(table, offline=(*table.offline, *few)))


def small(name, monkeypatch, rows):
    """Only some cells of an experiment."""
    whole = EXPERIMENTS[name]
    monkeypatch.setitem(EXPERIMENTS, name, dataclasses.replace(whole, cells=tuple(cell for cell in whole.cells if cell.row in rows)))


def test_a_record_says_what_the_report_says(tmp_path, machine, capsys):
    assert main(["simmatch-table5", "--data", "embedded", "--out", str(tmp_path)]) == 0
    record = read_record(tmp_path / "simmatch-table5-smoke")
    assert (record.name, record.paper, record.budget, record.seeds) == ("simmatch-table5", "SimMatch", "smoke", (1,))
    assert record.command == "ssmkernels reproduce simmatch-table5 --data embedded --budget smoke"
    assert {entry.row: entry.paper for entry in record.entries} == {"without p̂": "59.9", "without q̂": "52.3", "standard": "61.7"}
    assert all(len(entry.values) == 1 and 0 < entry.values[0] < 100 and entry.unit == "%" for entry in record.entries)
    assert record.seconds > 0 and record.versions["torch"] and "digits" in record.data
    printed = capsys.readouterr().out
    assert all(f"{entry.values[0]:.2f}" in printed for entry in record.entries)


def test_images_of_a_file_stand_in_for_the_set_of_the_cells(tmp_path, machine, monkeypatch):
    draw = np.random.default_rng(0)
    content = {f"{part}_x": draw.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8) for part, count in (("train", 60), ("test", 20))}
    np.savez(tmp_path / "images.npz", **content, train_y=np.arange(60) % 10, test_y=np.arange(20) % 10)
    few = ("--model", "convnet-small", "--steps", "2", "--batch_size", "4", "--mu", "1", "--run.eval_every", "2", "--run.workers", "0")
    whole = EXPERIMENTS["simmatch-cifar10-small"]
    small = dataclasses.replace(whole, cells=whole.cells[2:3], budgets={"short": experiment.Budget(1, few)})
    monkeypatch.setitem(EXPERIMENTS, "simmatch-cifar10-small", small)
    place = str(tmp_path / "images.npz")
    assert main(["simmatch-cifar10-small", "--budget", "short", "--data", place, "--out", str(tmp_path / "out")]) == 0
    record = read_record(tmp_path / "out" / "simmatch-cifar10-small-short")
    assert record.command == "ssmkernels reproduce simmatch-cifar10-small --data images.npz --budget short" and record.data == "images.npz"
    assert "arrays of a file" in record.deviations[0] and all(len(entry.values) == 1 for entry in record.entries)


def test_figures_come_with_their_plot_and_share_their_runs(tmp_path, machine, monkeypatch):
    for name in ("mixed-lp-figure2", "mixed-lp-figure3", "mixed-lp-table1"):
        small(name, monkeypatch, ("Ours", "DSSML"))
    assert main(["mixed-lp-figure2", "--out", str(tmp_path)]) == 0
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("jobs/*/checkpoint.pt")}
    for name in ("mixed-lp-figure3", "mixed-lp-table1"):
        assert main([name, "--out", str(tmp_path)]) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("jobs/*/checkpoint.pt")} == written
    for number, what in ((2, "precision"), (3, "recall")):
        folder = tmp_path / f"mixed-lp-figure{number}-smoke"
        (plot,) = read_record(folder).plots
        assert (folder / plot.file).read_bytes().startswith(b"\x89PNG") and what in plot.title
        assert f"({plot.file})" in (folder / "report.md").read_text()


def test_a_failed_cell_is_reported_and_tried_again(tmp_path, machine, monkeypatch, capsys):
    train = METHODS["simmatch"].train
    broken = True

    def sometimes(config, **rest):
        if broken and config.alpha == 1:
            raise FloatingPointError("loss is nan at step 3")
        return train(config, **rest)

    monkeypatch.setitem(METHODS, "simmatch", METHODS["simmatch"]._replace(train=sometimes))
    assert main(["simmatch-table5", "--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "- without p̂, imagenet-1: FloatingPointError: loss is nan at step 3" in captured.out
    assert "some cells failed" in captured.err
    entries = {entry.row: entry for entry in read_record(tmp_path / "simmatch-table5-smoke").entries}
    assert entries["without p̂"].failed == ("FloatingPointError: loss is nan at step 3",) and entries["without p̂"].values == ()
    assert len(entries["standard"].values) == len(entries["without q̂"].values) == 1
    broken = False
    assert main(["simmatch-table5", "--out", str(tmp_path)]) == 0
    again = {entry.row: entry for entry in read_record(tmp_path / "simmatch-table5-smoke").entries}
    assert again["standard"] == entries["standard"] and len(again["without p̂"].values) == 1 and again["without p̂"].failed == ()


def test_a_failed_row_of_a_study_does_not_lose_the_others(tmp_path, machine, monkeypatch):
    from ssmkernels.experiments import similarity

    train = similarity.train_mlsn

    def sometimes(config, **rest):
        if config.pair_labels == "weak":
            raise RuntimeError("out of memory")
        return train(config, **rest)

    monkeypatch.setattr(similarity, "train_mlsn", sometimes)
    monkeypatch.setattr(similarity, "DIGITS_BUDGETS", {"smoke": experiment.Budget(1, ("--steps", "4", "--run.workers", "0"))})
    monkeypatch.setattr(similarity, "POINTS", 40)
    for name in ("mlsn-weak-labels", "mlsn-figure3"):
        assert main([name, "--out", str(tmp_path)]) == 1
        record = read_record(tmp_path / f"{name}-smoke")
        failed = {entry.row for entry in record.entries if entry.failed}
        assert failed == {similarity.WEAK} and all(entry.values for entry in record.entries if entry.row not in failed)
    assert [plot.file for plot in record.plots] == ["figure3.png"]


def test_images_that_are_not_there_are_one_message(tmp_path, capsys):
    for name, words in {
        "simmatch-table1": ["cifar10: looked for cifar-10-batches-py in", "cifar100: looked for", "download=True"],
        "simmatch-table2": ["imagenet: looked for the folder", "image-net.org"],
        "simmatch-table3": ["imagenet: looked for the folder", "image-net.org"],
        "mixed-lp-table1": ["cub200: looked for CUB_200_2011/images.txt", "data.caltech.edu"],
        "mlsn-table1": ["svhn: looked for train_32x32.mat and test_32x32.mat"],
        "mlsn-figure2": ["cifar10: looked for"],
        "slade-cub200-nabirds": ["cub200: looked for"],
        "slade-ablation2": ["should have a folder of images for each class"],
        "mixed-lp-table3": ["at least one of cifar10.npz", "cub200"],
    }.items():
        empty = tmp_path / name
        empty.mkdir()
        out = tmp_path / "out"
        assert main([name, "--data", str(empty), "--budget", "short", "--out", str(out)]) == 1
        said = capsys.readouterr().err
        assert all(word in said for word in words) and str(empty) in said, said
        assert said.startswith(f"ssmkernels reproduce {name}: ") and "Traceback" not in said
        assert not out.exists()


def test_what_of_the_images_is_there_is_run(tmp_path, machine, monkeypatch):
    """CIFAR-10 is missing and digits are there: the cells of the one fail, those of the other are run."""
    whole = EXPERIMENTS["simmatch-table5"]
    cells = (whole.cells[0], dataclasses.replace(whole.cells[1], column="cifar10", arguments=("--data.name", "cifar10")))
    few = experiment.Budget(
        1, tuple(each for each in whole.offline if each not in ("--data.name", "digits")) + whole.budgets["smoke"].arguments
    )
    budgets = {**whole.budgets, "short": few}
    first = dataclasses.replace(cells[0], arguments=(*cells[0].arguments, "--data.name", "digits"))
    monkeypatch.setitem(EXPERIMENTS, "simmatch-table5", dataclasses.replace(whole, cells=(first, cells[1]), budgets=budgets))
    assert main(["simmatch-table5", "--data", str(tmp_path), "--budget", "short", "--out", str(tmp_path / "out")]) == 1
    digits, cifar = read_record(tmp_path / "out" / "simmatch-table5-short").entries
    assert len(digits.values) == 1 and not digits.failed
    assert not cifar.values and "looked for cifar-10-batches-py" in cifar.failed[0]


def test_unknown_names_and_budgets(capsys):
    for arguments, words in {
        ("simmatch-tabel1",): "there is no experiment 'simmatch-tabel1'; did you mean simmatch-table1",
        ("simmatch-table1", "--budget", "tiny"): "invalid choice: 'tiny'",
    }.items():
        with pytest.raises(SystemExit) as stopped:
            main(list(arguments))
        assert stopped.value.code == 2
        assert words in capsys.readouterr().err
    assert main(["simmatch-table1", "--data", "embedded", "--budget", "short"]) == 1
    assert "the short budget needs the folder of the paper's images" in capsys.readouterr().err


def test_all_runs_everything_whatever_fails(tmp_path, machine, monkeypatch, capsys):
    def findings(*, budget, data, out):
        assert (budget, data) == ("smoke", None)
        return Findings("text", "digits", (1,), (Entry("a", "b", "c", "%", "-", (1.0,)),), 1.0)

    def breaks(*, budget, data, out):
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "EXPERIMENTS", {"x": Study("X", breaks), "y": Study("Y", findings)})
    monkeypatch.setattr(cli, "PAPERS", {"Paper": cli.EXPERIMENTS})
    assert main(["all", "--data", "embedded", "--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "1 of 2 experiments are done. Failed: x." in captured.out and "ssmkernels reproduce x: a bug" in captured.err
    assert read_record(tmp_path / "y-smoke").title == "Y"


def test_every_table_and_figure_of_the_papers_is_listed():
    assert {paper: sorted(experiments) for paper, experiments in PAPERS.items()} == {
        "SimMatch": [f"simmatch-{each}" for each in ("cifar10-small", "figure4", "figure5", "table1", "table2", "table3", "table5")],
        "Mixed label propagation": [
            "mixed-lp-cifar10-small",
            *(f"mixed-lp-figure{number}" for number in (2, 3, 4, 5)),
            "mixed-lp-flowers17",
            *(f"mixed-lp-table{number}" for number in (1, 2, 3)),
        ],
        "MLSN": [f"mlsn-{each}" for each in ("cifar10-small", "figure2", "figure3", "mnist", "table1", "table2", "weak-labels")],
        "SLADE": [
            *(f"slade-ablation{number}" for number in (1, 2, 3, 4)),
            *(f"slade-{each}" for each in ("cars196-compcars", "cub200-nabirds", "shared-classes", "similarities")),
        ],
    }
    assert len(EXPERIMENTS) == sum(map(len, PAPERS.values()))
    assert not [name for name in EXPERIMENTS if not re.fullmatch("[a-z0-9-]+", name)]


def test_figure_5_trains_the_usual_setting_once():
    cells = {cell.row: cell for cell in EXPERIMENTS["simmatch-figure5"].cells}
    from ssmkernels.experiments.jobs import training_name
    from ssmkernels.trainers.cli import parse_config

    names = {row: training_name("simmatch", parse_config("simmatch", cell.arguments)[0]) for row, cell in cells.items()}
    assert names["t = 0.1"] == names["α = 0.9"] and len(set(names.values())) == len(cells) - 1
    without = next(cell for cell in EXPERIMENTS["simmatch-table5"].cells if cell.row == "without p̂")
    assert training_name("simmatch", parse_config("simmatch", without.arguments)[0]) == names["α = 1.0"]
