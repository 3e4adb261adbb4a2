# SPDX-License-Identifier: BSD-3-Clause
"""``ssmkernels reproduce``: every table, what of it is run, and what is left behind."""

import dataclasses
import json
import re

import numpy as np
import pytest

from ssmkernels.experiments import cli, costs, run, spec
from ssmkernels.experiments.cli import main
from ssmkernels.experiments.jobs import training_job
from ssmkernels.experiments.record import Entry, read_record
from ssmkernels.experiments.run import Request, configure, find_cells
from ssmkernels.experiments.sources import Source
from ssmkernels.experiments.spec import BUDGETS, PAPERS, Figure, load_tables
from ssmkernels.trainers import RunResult
from ssmkernels.trainers.cli import METHODS, parse_config
from ssmkernels.trainers.step_memory import StepMemory

TABLES = load_tables()
FEW = ("--set", "steps=4", "--set", "run.eval_every=4", "--set", "run.log_every=4")


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """No look at the machine."""
    monkeypatch.setattr(run, "machine_in_words", lambda: "2 x processor, no GPU")


def change(name, monkeypatch, **values):
    monkeypatch.setattr(cli, "load_tables", lambda: {**TABLES, name: dataclasses.replace(TABLES[name], **values)})


def test_every_table_and_figure_of_the_papers_is_listed(capsys):
    assert main(["--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == list(TABLES)
    assert {table.paper for table in TABLES.values()} == set(PAPERS)
    papers = (
        *(f"simmatch-{name}" for name in ("figure4", "figure5", "table1", "table2", "table3", "table5")),
        *(f"mixed-lp-{name}" for name in ("figure2", "figure3", "figure4", "figure5", "table1", "table2", "table3")),
        *(f"mlsn-{name}" for name in ("figure2", "figure3", "table1", "table2", "weak-labels")),
        *(f"slade-ablation{number}" for number in (1, 2, 3, 4)),
        *(f"slade-{name}" for name in ("cars196-compcars", "cub200-nabirds", "similarities")),
    )
    assert set(papers) <= set(listed)


@pytest.mark.parametrize("name", TABLES)
def test_tables_agree_with_themselves(name):
    for table in (TABLES[name], *(TABLES[name].variant(kind) for kind in ("embedded", "classes"))):
        assert set(table.budgets) == set(BUDGETS)
        assert all(table.budget(budget).seeds >= 1 for budget in BUDGETS)
        hooks = [table.hook(key) for key in ("cells", "after")]
        if hooks[0] is None or table.rows:
            assert set(table.swav) <= set(table.columns)
        if hooks[0] is None:
            assert {row for claim in table.claims for row in claim} <= set(table.rows)
            for column, rows in TABLES[name].numbers.items():
                assert column in TABLES[name].columns and set(rows) <= set(TABLES[name].rows)
                assert all(len(numbers) == len(TABLES[name].figures) for numbers in rows.values())


def test_a_wrong_key_of_a_table_is_named():
    with pytest.raises(ValueError, match="table 'x' has colums, which is unknown"):
        spec._table({"name": "x", "paper": "y", "title": "z", "colums": {}})


@pytest.mark.parametrize("name", ["simmatch-table1", "mixed-lp-table1", "mlsn-table2", "slade-cub200-nabirds"])
def test_cells_parse(name, tmp_path):
    request = Request("paper", Source(str(tmp_path)), tmp_path, check=False)
    for column in TABLES[name].columns:
        for arguments in [row for row in TABLES[name].rows.values() if "{swav" not in row]:
            config, needs = configure(TABLES[name], request, column, arguments)
            assert config.data.root == str(tmp_path) and needs == ()


def test_the_papers_numbers():
    assert TABLES["simmatch-table1"].numbers["cifar10-40"]["SimMatch"] == ["94.40 ± 1.37"]
    assert TABLES["simmatch-table1"].numbers["cifar100-10000"]["FixMatch"] == ["77.40 ± 0.12"]
    assert TABLES["mixed-lp-table1"].numbers["cub200"]["Ours"] == ["57.780"]
    assert TABLES["mixed-lp-table2"].numbers["cub200"]["Ours"][1] == "49.9 ± 1.3"
    assert TABLES["mlsn-table1"].numbers["svhn-250-tuned"]["MT + Similarity"] == ["15.2 ± 0.82", "-"]
    assert TABLES["mlsn-table2"].numbers["cifar10-1000"]["Π model"] == ["-", "27.36 ± 1.20"]
    cub = TABLES["slade-cub200-nabirds"].numbers["cub200-nabirds"]
    assert cub["SLADE, S2 (SwAV)"] == ["33.59", "44.01", "73.19"] and len(cub) == 8
    assert TABLES["slade-ablation3"].numbers["CUB-200"]["SD"] == cub["SLADE, S2 (SwAV)"]
    assert TABLES["slade-ablation4"].numbers["CUB-200"]["k = 400"] == cub["SLADE, S2 (SwAV)"]
    assert TABLES["slade-ablation2"].numbers["CUB-200"]["+ Basis + Mining"][0] == "33.59"


@pytest.mark.parametrize(
    ("name", "column", "rows"),
    [
        ("simmatch-table1", "cifar10-250", 10),
        ("simmatch-table2", "imagenet-10", 16),
        ("simmatch-table3", "Cars", 5),
        ("simmatch-table3", "mean", 5),
        ("mixed-lp-table1", "cars196", 7),
        ("mixed-lp-table2", "cub200", 2),
        ("mlsn-table1", "svhn-1000", 6),
        ("mlsn-table2", "cifar10-4000-tuned", 6),
        ("slade-cub200-nabirds", "cub200-nabirds", 19),
        ("slade-cars196-compcars", "cars196-compcars", 19),
    ],
)
def test_a_table_beside_the_papers_images_is_the_papers(tmp_path, name, column, rows):
    """It has all rows of the paper, those of other methods quoted; on other images no row is quoted."""
    table = TABLES[name]
    figures = table.read_figures() or (Figure("top-1", "accuracy"),)
    entries = [Entry("row", column, figure.title, figure.unit, "-", ()) for figure in figures]
    quoted = run.quoted_entries(table, Request("paper", Source(str(tmp_path)), tmp_path), entries)
    assert len({entry.row for entry in quoted} | set(table.numbers[column])) == rows
    assert not any(entry.run for entry in quoted)
    assert run.quoted_entries(table, Request("paper", Source(None), tmp_path), entries) == []


def test_a_record_says_what_the_report_says_and_what_is_done_is_kept(tmp_path, capsys):
    command = ["simmatch-table5", "--out", str(tmp_path), *FEW]
    assert main([*command, "--rows", "standard", "--seeds", "2"]) == 0
    (folder,) = tmp_path.glob("simmatch-table5-smoke*")
    first = read_record(folder)
    assert {entry.row: entry.seeds for entry in first.entries} == {"without p̂": (), "without q̂": (), "standard": (2,)}
    assert first.command == (
        "ssmkernels reproduce simmatch-table5 --data embedded --budget smoke --rows standard --seeds 2 "
        "--set steps=4 --set run.eval_every=4 --set run.log_every=4"
    )
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("jobs/*/checkpoint.pt")}
    assert len(written) == 1
    capsys.readouterr()
    assert main([*command, "--seeds", "2", "--shard", "1/2"]) == main([*command, "--seeds", "2", "--shard", "2/2"]) == 0
    printed = capsys.readouterr().out
    record = read_record(folder)
    assert (record.name, record.paper, record.budget, record.seeds) == ("simmatch-table5", "SimMatch", "smoke", (2,))
    assert all(len(entry.values) == 1 and 0 < entry.values[0] < 100 and entry.unit == "%" for entry in record.entries)
    assert all(entry.paper == "-" for entry in record.entries)  # these are not the paper's images
    assert all(f"{entry.values[0]:.2f}" in printed for entry in record.entries)
    assert record.seconds > 0 and record.versions["torch"] and "digits" in record.data
    assert "No folder of images was given" in printed and "61.7" not in printed
    assert (folder / "report.md").read_text() in printed
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert main([*command, "--seeds", "2", "--dry-run"]) == 0
    assert "0 of 3 jobs are to run" in capsys.readouterr().out


def test_cells_are_listed_and_nothing_is_run(tmp_path, capsys):
    command = ["simmatch-table1", "--budget", "paper", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main([*command, "--columns", "cifar10-40", "--rows", "SimMatch", "--list-cells"]) == 0
    listed = capsys.readouterr().out.splitlines()[2:]
    assert len(listed) == 5 and all(
        re.match(r"\| SimMatch +\| cifar10-40 +\| [1-5] +\| simmatch-cifar10-40-seed", line) for line in listed
    )
    assert main([*command, "--columns", "cifar10-40", "--rows", "SimMatch", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "1,048,576" in printed  # steps
    (parts,) = re.findall(r"and 4 more \|(.*)\|\n", printed + "\n")  # five seeds take the same memory
    network, optimizer, average, memory, images, batch, rest, total = map(float, parts.replace(",", "").split("|"))
    assert images == 146.5 and network == average >= optimizer > memory and batch == 11.3  # MiB
    # WRN-28-2 keeps about 5 MiB of each of 960 views
    assert 4500 < rest < 6000 and printed.count(f"| {total:,.1f} ") == 6
    assert total == pytest.approx(network + optimizer + average + memory + images + batch + rest, abs=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_cells_of_imagenet_take_the_papers_pieces_of_a_batch(tmp_path, capsys, monkeypatch, ranks):
    """8 x (8 + 40) images with bfloat16, on however many ranks up to the paper's eight."""
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    trained = []
    method = METHODS["simmatch"]._replace(
        train=lambda config, resume: trained.append(config) or RunResult(True, 1, 1, [])
    )
    monkeypatch.setitem(METHODS, "simmatch", method)
    asked = []
    monkeypatch.setattr(costs, "step_memory", lambda *_, **shares: asked.append(shares) or StepMemory(*[2**30] * 7))
    for budget in ("short", "paper"):
        request = Request(budget, Source(str(tmp_path)), tmp_path, check=False)
        for name in ("simmatch-table2", "simmatch-figure4", "simmatch-figure5", "simmatch-table5"):
            assert main([name, "--budget", budget, "--data", str(tmp_path), "--dry-run"]) == 0
            assert "| 8 x (8 + 40), bf16-mixed |" in capsys.readouterr().out
            find_cells(TABLES[name], request).cells[-1].job(1).run(tmp_path)
    assert {config.accumulate for config in trained} == {8 // ranks} and len(trained) == 8
    assert {config.precision for config in trained} == {"bf16-mixed"}
    assert all(shares == {"pieces": 8 // ranks, "ranks": ranks} for shares in asked) and asked


def test_wrong_arguments(tmp_path, capsys):
    for arguments, words in {
        ("simmatch-tabel1",): "there is no experiment 'simmatch-tabel1'; did you mean simmatch-table1",
        ("simmatch-table1", "--budget", "tiny"): "invalid choice: 'tiny'",
        ("simmatch-table1", "--shard", "3/2"): "it should be I/N",
        ("simmatch-table1", "--seeds", "a"): "it should be numbers",
        ("simmatch-table1", "--set", "steps"): "it should be KEY=VALUE",
    }.items():
        with pytest.raises(SystemExit) as stopped:
            main(list(arguments))
        assert stopped.value.code == 2
        assert words in capsys.readouterr().err
    for arguments, words in {
        ("--budget", "short"): "--data is missing; the short budget needs the folder of the paper's images",
        ("--rows", "standart"): "--rows has 'standart'; did you mean standard?",
        ("--columns", "nothing"): "--columns has 'nothing'; it should be one of imagenet-1",
    }.items():
        assert main(["simmatch-table5", *arguments, "--out", str(tmp_path)]) == 1
        assert words in capsys.readouterr().err


def test_a_stopped_call_says_so(tmp_path, monkeypatch, capsys):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_table", stopped)
    assert main(["simmatch-table5", "--out", str(tmp_path)]) == 130
    assert "The same command goes on" in capsys.readouterr().out


def test_images_of_a_file_serve_the_set_that_it_is_named_after(tmp_path, capsys):
    draw = np.random.default_rng(0)
    content = {
        f"{part}_x": draw.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        for part, count in (("train", 60), ("test", 20))
    }
    place = tmp_path / "cifar10.npz"
    np.savez(place, **content, train_y=np.arange(60) % 10, test_y=np.arange(20) % 10)
    command = ["simmatch-table1", "--budget", "short", "--data", str(place), "--out", str(tmp_path / "out")]
    few = [
        "model=convnet-small",
        "steps=2",
        "batch_size=4",
        "mu=1",
        "run.eval_every=2",
        "run.workers=0",
        "first_epoch_steps=1",
    ]
    settings = [argument for setting in few for argument in ("--set", setting)]
    assert main([*command, *settings, "--rows", "SimMatch", "--columns", "cifar10-40"]) == 0
    assert "Left out: cifar100-400: --data is" in capsys.readouterr().out
    record = read_record(next((tmp_path / "out").glob("simmatch-table1-short*")))
    assert record.data == "cifar10.npz" and {entry.column for entry in record.entries} == {
        "cifar10-40",
        "cifar10-250",
        "cifar10-4000",
    }
    assert "arrays of a file" in record.deviations[0] and all(entry.paper == "-" for entry in record.entries)
    (done,) = (entry for entry in record.entries if entry.values)
    assert (done.row, done.column) == ("SimMatch", "cifar10-40")
    page = next((tmp_path / "out").glob("simmatch-table1-short*/report.md")).read_text()
    assert "Settings not run: cifar10-250; cifar10-4000" in page
    place.rename(tmp_path / "images.npz")
    assert main([*command[:4], str(tmp_path / "images.npz"), *command[5:]]) == 1
    assert "the images of images by its name; this needs cifar10" in capsys.readouterr().err


def test_a_failed_cell_is_reported_and_tried_again(tmp_path, monkeypatch, capsys):
    train = METHODS["simmatch"].train
    broken = True

    def sometimes(config, **rest):
        if broken and config.alpha == 1:
            raise FloatingPointError("loss is nan at step 3")
        return train(config, **rest)

    monkeypatch.setitem(METHODS, "simmatch", METHODS["simmatch"]._replace(train=sometimes))
    command = ["simmatch-table5", "--out", str(tmp_path), *FEW]
    assert main(command) == 1
    captured = capsys.readouterr()
    assert "**Failed: without p̂, imagenet-1.** FloatingPointError: loss is nan at step 3" in captured.out
    assert "some cells failed" in captured.err
    (folder,) = tmp_path.glob("simmatch-table5-smoke*")
    entries = {entry.row: entry for entry in read_record(folder).entries}
    assert (
        entries["without p̂"].failed == ("FloatingPointError: loss is nan at step 3",)
        and entries["without p̂"].values == ()
    )
    assert len(entries["standard"].values) == len(entries["without q̂"].values) == 1
    broken = False
    assert main(command) == 0
    again = {entry.row: entry for entry in read_record(folder).entries}
    assert (
        again["standard"] == entries["standard"]
        and len(again["without p̂"].values) == 1
        and again["without p̂"].failed == ()
    )


def test_images_that_are_not_there_are_one_message(tmp_path, capsys):
    for name, words in {
        "simmatch-table5": ["imagenet: looked for the folder", "image-net.org"],
        "simmatch-table3": ["imagenet: looked for the folder", "image-net.org"],
        "mixed-lp-table2": ["cub200: looked for CUB_200_2011/images.txt", "data.caltech.edu"],
        "mlsn-figure2": ["cifar10: looked for"],
        "slade-similarities": ["cub200: looked for", "folder: "],
        "mixed-lp-table3": ["at least one of cifar10.npz", "cub200"],
    }.items():
        empty = tmp_path / name
        empty.mkdir()
        out = tmp_path / "out"
        assert main([name, "--data", str(empty), "--budget", "short", "--out", str(out)]) == 1
        message = capsys.readouterr().err
        assert all(word in message for word in words) and str(empty) in message, message
        assert message.startswith(f"ssmkernels reproduce {name}: ") and "Traceback" not in message
        assert not out.exists()


def test_all_runs_everything_whatever_fails(tmp_path, monkeypatch, capsys):
    def one(table, request):
        if table.name == "simmatch-table1":
            raise RuntimeError("a bug")
        return run_table(table, request)

    run_table = cli.run_table
    monkeypatch.setattr(cli, "run_table", one)
    monkeypatch.setattr(
        cli, "load_tables", lambda: {name: TABLES[name] for name in ("simmatch-table1", "simmatch-table5")}
    )
    assert main(["all", "--out", str(tmp_path), *FEW]) == 1
    captured = capsys.readouterr()
    assert "1 of 2 experiments are done. Failed: simmatch-table1." in captured.out
    assert "ssmkernels reproduce simmatch-table1: a bug" in captured.err


def test_figures_come_with_their_plot(tmp_path, monkeypatch):
    rows = {row: TABLES["simmatch-figure5"].rows[row] for row in ("t = 0.05", "t = 0.1", "α = 0.9")}
    change("simmatch-figure5", monkeypatch, rows=rows)
    assert main(["simmatch-figure5", "--out", str(tmp_path), *FEW]) == 0
    (folder,) = tmp_path.glob("simmatch-figure5-smoke*")
    (plot,) = read_record(folder).plots
    assert (folder / plot.file).read_bytes().startswith(b"\x89PNG") and f"({plot.file})" in (
        folder / "report.md"
    ).read_text()
    assert len(list(tmp_path.glob("jobs/*/checkpoint.pt"))) == 2  # the usual setting is trained once


def test_tables_share_their_runs(tmp_path):
    request = Request("paper", Source(None), tmp_path, check=False)
    names = {
        name: {cell.job(1).name for cell in find_cells(dataclasses.replace(TABLES[name], offline=""), request).cells}
        for name in ("mixed-lp-figure2", "mixed-lp-figure3", "mixed-lp-table2")
    }
    assert names["mixed-lp-figure2"] == names["mixed-lp-figure3"] > names["mixed-lp-table2"]


def test_figures_of_runs():
    runs = [{"history": [{"step": k, "a": base + k / 100} for k in range(3)]} for base in (0.5, 0.7)]
    assert [Figure("top-1", "a").of(run) for run in runs] == [pytest.approx(51), pytest.approx(71)]
    assert Figure("top-1", "a", last=1).of(runs[0]) == pytest.approx(52) and Figure("top-5", "b").of(runs[0]) is None
    history = [{"step": s, "v": p, "n": n} for s, p, n in ((1, 0.5, 0.7), (2, 0.9, 0.6), (3, 0.8, 0.8))]
    assert Figure("NMI", "n", best="v").of({"history": history}) == pytest.approx(60)
    assert Figure("share", "x", unit="").of({"x": 0.5}) == 0.5 and Figure("MAP@R", "x", unit="").of(12.5) == 12.5


def test_memory_is_not_known_where_values_decide():
    """SLADE's multi-similarity loss is given the pairs that similarities choose; the one on pairs of all is not."""
    small = ["--config", "digits", "--ranking_loss", "multi-similarity"]
    known = {}
    for student in ("none", "mining"):
        config, _ = parse_config("slade", [*small, "--student", student])
        known[student] = costs._memory([training_job("slade", config, "a title")])
    assert [*known["mining"].values()] == [None]
    assert all(of_step.total > 10**6 for of_step in known["none"].values())


def test_costs_are_those_of_jobs_that_are_alike(tmp_path, capsys):
    command = ["simmatch-table5", "--out", str(tmp_path), "--rows", "standard", *FEW]
    assert main(command) == 0
    state = json.loads(next(tmp_path.glob("jobs/*/job.json")).read_text())
    capsys.readouterr()
    assert main([*command, "--seeds", "5", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    # 4 steps of 16 · (1 + 4) images
    assert f"| {state['seconds'] / 4:.3g} " in printed and "| 4 " in printed and "| 320 " in printed
    assert "1 of 1 jobs are to run; 1 of them" in printed
