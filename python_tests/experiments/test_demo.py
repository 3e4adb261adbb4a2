# SPDX-License-Identifier: BSD-3-Clause
import pytest

from ssmkernels.experiments import demo
from ssmkernels.experiments.record import read_record
from ssmkernels.experiments.run import Request, configure
from ssmkernels.experiments.sources import Source
from ssmkernels.experiments.spec import read_tables

TABLES = read_tables("Demo", "demo")


@pytest.mark.long
def test_demo_leaves_records_and_their_report(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "SEEDS", {"demo-simmatch": 1})
    monkeypatch.setattr(demo, "OP_SECONDS", 0.1)
    assert demo.main(["--out", str(tmp_path), "--share", "0.03"]) == 0
    printed, report = capsys.readouterr().out, (tmp_path / "report.md").read_text()
    assert report in printed and (tmp_path / "report.html").exists()
    for words in (
        "supervised only",
        "FixMatch",
        "SimMatch above FixMatch",
        "instance_matching",
        "vs eager",
        "curves.png",
    ):
        assert words in report
    (folder,) = tmp_path.glob("demo-simmatch-short*")
    assert all(len(entry.values) == 1 for entry in read_record(folder).entries)


@pytest.mark.parametrize(("share", "steps", "seeds"), [("0.01", 40, 1), ("0.5", 250, 2), ("1", 500, 3), ("2", 1000, 3)])
def test_share_is_of_steps_and_seeds(tmp_path, monkeypatch, share, steps, seeds):
    requests = {}
    monkeypatch.setattr(demo, "run_table", lambda table, request: requests.update({table.name: request}))
    monkeypatch.setattr(demo, "write_report", lambda *_: (tmp_path / "report.md").write_text(""))
    monkeypatch.setattr(demo, "op_section", lambda: "")
    assert demo.main(["--out", str(tmp_path), "--share", share]) == 0
    settings = requests["demo-simmatch"].settings
    assert f"steps={steps}" in settings
    assert requests["demo-simmatch"].seeds == tuple(range(1, seeds + 1))


@pytest.mark.parametrize("share", ["0", "-1", "nan", "inf"])
def test_a_share_that_is_none_is_refused(tmp_path, capsys, share):
    with pytest.raises(SystemExit):
        demo.main(["--out", str(tmp_path), "--share", share])
    assert "--share is" in capsys.readouterr().err


@pytest.mark.parametrize("name", TABLES)
def test_rows_have_identical_budgets(name, tmp_path):
    assert name in demo.SEEDS
    table = TABLES[name]
    request = Request("short", Source(None), tmp_path)
    rows = {
        row: arguments
        for row, arguments in table.rows.items()
        if "learning_rate" not in arguments and "steps" not in arguments
    }
    configs = [configure(table, request, "digits", arguments)[0] for arguments in rows.values()]
    for setting in (
        "data",
        "model",
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
