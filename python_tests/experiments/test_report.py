# SPDX-License-Identifier: BSD-3-Clause
import numpy as np
import pytest

from ssmkernels._text import markdown_table
from ssmkernels.experiments.plots import Point, curve, plot_curves, plot_points, points_of
from ssmkernels.experiments.record import Claim, Entry, Record
from ssmkernels.experiments.statistics import half_width, mean_and_std, paired_difference, verdicts


def test_tables_line_up():
    table = markdown_table(["method", "%"], [["FixMatch", "1.0"], ["x", "22.5 ± 1.0"]])
    lines = table.splitlines()
    assert lines[0].split("|")[1].strip() == "method"
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1


def test_mean_and_std():
    assert mean_and_std([90.0, 92.0, 94.0]) == "92.00 ± 2.00"
    assert mean_and_std([90.126], digits=1) == "90.1"


def test_curves_are_where_there_are_values():
    histories = [[{"step": 1, "a": 0.0}, {"step": 2, "a": 4.0}], [{"step": 1, "a": 1.0}, {"step": 2}]]
    assert curve(histories, "a") == ([1, 2], [[0.0, 1.0], [4.0]])
    assert curve(histories, "b") == ([], [])


@pytest.mark.parametrize("runs", [{"x": [[{"step": 1, "a": 0.5}, {"step": 2, "a": 0.7}]]}, {"x": [[{"step": 1}]]}])
def test_plots_are_png(tmp_path, runs):
    plot_curves(tmp_path / "plot.png", {"A": "a", "B": "b"}, runs, title="t")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_plots_say_what_is_seen(tmp_path):
    """Each method has one colour in all panels, both axes have names, and the words give the figures."""
    runs = {"ours": [[{"step": 1, "a": 0.25}, {"step": 2, "a": 0.75}]], "theirs": [[{"step": 2, "a": 0.5}]]}
    words = plot_curves(tmp_path / "curves.png", {"Accuracy": "a", "None": "b"}, runs)
    assert words == "Accuracy: ours from 0.25 to 0.75 at step 2; theirs from 0.5 to 0.5 at step 2."
    panels = {
        "β": {"ours": {1.0: Point(0.6, 0.1), 0.1: Point(0.2, 0.0)}},
        "γ": {"theirs": {None: Point(0.5, 0.25)}},
    }
    words = plot_points(tmp_path / "points.png", panels, xlabel=None, ylabel="MAP@R", log=True)
    assert words == "β: ours is highest, 0.6, at 1, and 0.2 at 0.1. γ: theirs is 0.5."


def test_points_are_means_with_their_intervals():
    entries = [
        Entry("β = 0.1", "digits", "accuracy", "", "-", (1.0, 2.0, 3.0)),
        Entry("without", "digits", "accuracy", "", "-", (4.0,)),
        Entry("β = 1", "digits", "accuracy", "", "-", ()),
    ]
    lines = points_of(entries, r"(?P<line>β|without)(?: = (?P<x>.*))? \| (?P<panel>.*) \| .*")["digits"]
    assert lines == {"β": {0.1: Point(2.0, half_width([1.0, 2.0, 3.0]))}, "without": {None: Point(4.0, 0.0)}}


def test_intervals():
    """Student's t with 9 degrees of freedom, by hand."""
    values = [float(i) for i in range(10)]
    assert half_width(values) == pytest.approx(2.262157 * np.std(values, ddof=1) / 10**0.5, rel=1e-6)
    assert half_width([0.5]) == half_width([0.5, 0.5]) == 0.0


def test_differences_are_paired():
    """1 ± 2.48 points over three seeds, by hand: Student's t with 2 degrees of freedom is 4.303, the deviation 1."""
    difference = paired_difference([11.0, 20.0, 32.0], [10.0, 20.0, 30.0])
    assert (difference.text(1), difference.wins, difference.sign) == ("+1.0 (-1.5 to +3.5)", 2, 0)
    assert paired_difference([11.0, 20.0, 32.0], [0.0, 10.0, 19.0]).sign == 1
    assert paired_difference([0.0, 10.0, 19.0], [11.0, 20.0, 32.0]).sign == -1
    assert paired_difference([2.0], [1.0]).sign == 0 and paired_difference([], []) is None


def record(*entries, lower=False):
    claims = (Claim("ours", "theirs", "error", lower),)
    return Record("n", "t", "p", "short", "d", (1, 2, 3), "c", entries, (), (), "", 1.0, "m", {}, claims)


def entry(row, values, seeds=(), failed=(), column="set"):
    return Entry(row, column, "error", "%", "-", tuple(values), failed, tuple(seeds))


def test_claims_have_verdicts():
    ours, theirs = entry("ours", (10.0, 20.0, 31.0), (1, 2, 3)), entry("theirs", (20.0, 30.0, 42.0), (1, 2, 3))
    ((claim, column, difference, verdict),) = verdicts(record(ours, theirs, lower=True))
    assert (claim, column, difference) == ("ours below theirs, error, %", "set", "-10.33 (-11.77 to -8.90)")
    assert verdict == "holds (in 3 of 3 seeds)"
    assert verdicts(record(ours, theirs))[0][3] == "the opposite holds (in 0 of 3 seeds)"
    assert verdicts(record(ours)) == []
    assert verdicts(record(entry("ours", ()), entry("theirs", ()))) == []


def test_claims_are_of_the_seeds_that_finished_both():
    both = verdicts(record(entry("ours", (10.0, 30.0), (1, 3), ("failed",)), entry("theirs", (9.0, 8.0), (1, 2))))
    assert both[0][2:] == ("+1.00", "one seed says nothing about the next")
    none = verdicts(record(entry("ours", (10.0,), (1,)), entry("theirs", (9.0,), (2,))))
    assert none[0][2:] == ("-", "no seed has both")
    old = verdicts(record(entry("ours", (10.0, 11.0, 12.0)), entry("theirs", (9.0, 10.0, 11.0))))
    assert old[0][2:] == ("+1.00 (+1.00 to +1.00)", "holds (in 3 of 3 seeds)")
    assert (
        verdicts(record(entry("ours", (10.0,), failed=("x",)), entry("theirs", (9.0, 8.0))))[0][3] == "no seed has both"
    )
