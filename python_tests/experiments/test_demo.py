# SPDX-License-Identifier: BSD-3-Clause
import pytest

from ssmkernels.experiments import demo
from ssmkernels.experiments.record import read_record
from ssmkernels.experiments.run import Request, configure
from ssmkernels.experiments.sources import Source
from ssmkernels.experiments.spec import read_tables

TABLES = read_tables("Demo", "demo")


def test_demo_leaves_records_and_their_report(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "SEEDS", {"demo-simmatch": 1})
    monkeypatch.setattr(demo, "OP_SECONDS", 0.1)
    assert demo.main(["--out", str(tmp_path), "--budget-minutes", "0.1"]) == 0
    printed, report = capsys.readouterr().out, (tmp_path / "report.md").read_text()
    assert report in printed and (tmp_path / "report.html").exists()
    for words in (
        "supervised only",
        "FixMatch",
        "SimMatch above FixMatch",
        "instance_matching",
        "peak extra MiB",
        "curves.png",
    ):
        assert words in report
    (folder,) = tmp_path.glob("demo-simmatch-short*")
    assert all(len(entry.values) == 1 for entry in read_record(folder).entries)


@pytest.mark.parametrize("name", TABLES)
def test_rows_have_identical_budgets(name, tmp_path):
    assert name in demo.SEEDS
    table = TABLES[name]
    request = Request("short", Source(None), tmp_path)
    rows = {row: each for row, each in table.rows.items() if "learning_rate" not in each and "steps" not in each}
    configs = [configure(table, request, "digits", arguments)[0] for arguments in rows.values()]
    for setting in (
        "data",
        "model",
        "backbone",
        "batch_size",
        "mu",
        "learning_rate",
        "weight_decay",
        "ema_decay",
        "student_steps",
    ):
        assert len({repr(getattr(config, setting, None)) for config in configs}) == 1


def test_a_stopped_demo_says_so(tmp_path, capsys, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_table", stopped)
    assert demo.main(["--out", str(tmp_path)]) == 130
    assert "The same command goes on" in capsys.readouterr().out
