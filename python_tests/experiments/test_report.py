# SPDX-License-Identifier: BSD-3-Clause
import pytest

from ssmkernels.experiments.report import markdown_table, mean_and_std, mean_curve, plot_curves


def test_tables_line_up():
    table = markdown_table(["method", "%"], [["FixMatch", "1.0"], ["x", "22.5 ± 1.0"]])
    lines = table.splitlines()
    assert lines[0].split("|")[1].strip() == "method"
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1


def test_mean_and_std():
    assert mean_and_std([90.0, 92.0, 94.0]) == "92.00 ± 2.00"
    assert mean_and_std([90.126], digits=1) == "90.1"


def test_curves_are_means_where_there_are_values():
    histories = [[{"step": 1, "a": 0.0}, {"step": 2, "a": 4.0}], [{"step": 1, "a": 1.0}, {"step": 2}]]
    assert mean_curve(histories, "a") == ([1, 2], [0.5, 4.0])
    assert mean_curve(histories, "b") == ([], [])


@pytest.mark.parametrize("runs", [{"x": [[{"step": 1, "a": 0.5}, {"step": 2, "a": 0.7}]]}, {"x": [[{"step": 1}]]}])
def test_plots_are_png(tmp_path, runs):
    plot_curves(tmp_path / "plot.png", {"A": "a", "B": "b"}, runs, title="t")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
